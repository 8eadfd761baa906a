"""Several examples laid end to end without padding: the one form in which a model sees data.

Each example is a segment: positions restart at 0, attention never leaves it. Leading tokens that examples
share may be a segment of their own; the rest of each example continues it. Knows nothing of how examples
were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from phinetune.models.shared_prefixes import SharedPrefix, shared_prefixes
from phinetune.text.labelled import Labelled
from phinetune.text.layout import Ids
from phinetune.text.render import Rendered

NOT_TRAINED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Token ids with, at each position, the token to be predicted there.

    # T tokens of all segments together
    `targets_T[t]` is the token that must be predicted at t where it is trained, else `NOT_TRAINED`.
    `segment_prefixes` names for each segment the segment that stands before it, None where nothing does;
    empty when no segment continues another. Prefixes come after the examples' own segments, which are in
    the order of the examples, and are never trained.
    """

    ids_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    segment_lengths: tuple[int, ...]
    segment_prefixes: tuple[int | None, ...] = ()
    # The class of each example, for a classification.
    classes_S: Tensor | None = None

    @classmethod
    def lay(
        cls,
        examples: Sequence[Rendered],
        device: torch.device | str = "cpu",
        *,
        shares_prefixes: bool = False,
    ) -> PackedBatch:
        """Lay examples end to end, in order; with `shares_prefixes`, common leading tokens only once.

        >>> import numpy as np
        >>> from phinetune.data.conversation import Source
        >>> rendered = Rendered(ids=np.array([5, 6, 7]), trained=np.array([False, False, True]),
        ...                     source=Source(file="x", line=1))
        >>> PackedBatch.lay([rendered]).targets_T.tolist()
        [-100, 7, -100]
        """
        shared = shared_prefixes(examples) if shares_prefixes else []
        first = [0] * len(examples)  # the first token of each example's own segment
        prefixes: list[int | None] = [None] * (len(examples) + len(shared))
        for number, prefix in enumerate(shared, start=len(examples)):
            for member in prefix.members:
                first[member], prefixes[member] = prefix.num_tokens, number
        ids = [example.ids[start:] for example, start in zip(examples, first, strict=True)]
        ids += [_ids(examples, prefix) for prefix in shared]
        starts = [*first, *(0 for _ in shared)]
        targets = [_targets(example)[start:] for example, start in zip(examples, first, strict=True)]
        targets += [np.full(prefix.num_tokens, NOT_TRAINED) for prefix in shared]
        positions = [np.arange(start, start + len(part)) for start, part in zip(starts, ids, strict=True)]
        numbers = [example.class_number for example in examples if isinstance(example, Labelled)]
        return cls(
            ids_T=torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
            positions_T=torch.from_numpy(np.concatenate(positions)).to(device),
            targets_T=torch.from_numpy(np.concatenate(targets)).to(device),
            segment_lengths=tuple(len(part) for part in ids),
            segment_prefixes=tuple(prefixes) if shared else (),
            classes_S=torch.tensor(numbers, device=device) if numbers else None,
        )

    def filled(self, multiple: int) -> PackedBatch:
        """The batch with a last, untrained segment that brings its tokens to a multiple of `multiple`."""
        num_missing = -self.num_tokens % multiple
        if not num_missing:
            return self
        rest = torch.arange(num_missing, device=self.ids_T.device)
        return PackedBatch(
            ids_T=torch.cat([self.ids_T, torch.zeros_like(rest)]),
            positions_T=torch.cat(
                [self.positions_T, torch.zeros_like(rest)]
            ),  # LongRoPE looks at the largest
            targets_T=torch.cat([self.targets_T, torch.full_like(rest, NOT_TRAINED)]),
            segment_lengths=(*self.segment_lengths, num_missing),
            segment_prefixes=(*self.segment_prefixes, None) if self.segment_prefixes else (),
        )

    def part(self, segments: Sequence[int]) -> PackedBatch:
        """Some segments by themselves. Those that they continue must be among them."""
        place = {segment: number for number, segment in enumerate(segments)}
        starts = self.segment_starts
        spans = [slice(starts[i], starts[i] + self.segment_lengths[i]) for i in segments]
        prefixes = [self.prefix_of(i) for i in segments]
        return PackedBatch(
            ids_T=torch.cat([self.ids_T[span] for span in spans]),
            positions_T=torch.cat([self.positions_T[span] for span in spans]),
            targets_T=torch.cat([self.targets_T[span] for span in spans]),
            segment_lengths=tuple(self.segment_lengths[i] for i in segments),
            segment_prefixes=tuple(None if prefix is None else place[prefix] for prefix in prefixes)
            if self.segment_prefixes
            else (),
        )

    def with_prefixes(self, segments: Sequence[int]) -> list[int]:
        """The segments, and those that they continue."""
        prefixes = {self.prefix_of(segment) for segment in segments}
        return [*segments, *sorted(prefix for prefix in prefixes if prefix is not None)]

    def prefix_of(self, segment: int) -> int | None:
        """The segment that stands before this one."""
        return self.segment_prefixes[segment] if self.segment_prefixes else None

    def whole_length(self, segment: int) -> int:
        """The tokens of a segment and of the prefix it continues."""
        prefix = self.prefix_of(segment)
        return self.segment_lengths[segment] + (0 if prefix is None else self.segment_lengths[prefix])

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_examples(self) -> int:
        """The first so many segments end where examples end; the others are prefixes."""
        return len(self.segment_lengths) - len(set(self.segment_prefixes) - {None})

    @property
    def num_example_tokens(self) -> int:
        """The tokens of all examples, shared ones counted for each of them."""
        return sum(self.whole_length(segment) for segment in range(self.num_examples))

    @property
    def segment_starts(self) -> list[int]:
        """Where each segment begins."""
        starts, position = [], 0
        for length in self.segment_lengths:
            starts.append(position)
            position += length
        return starts


def _targets(example: Rendered) -> npt.NDArray[np.int64]:
    targets = np.full(len(example.ids), NOT_TRAINED, dtype=np.int64)
    targets[:-1][example.trained[1:]] = example.ids[1:][example.trained[1:]]
    return targets


def _ids(examples: Sequence[Rendered], prefix: SharedPrefix) -> Ids:
    return examples[prefix.members[0]].ids[: prefix.num_tokens]
