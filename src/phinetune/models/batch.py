"""Several examples laid end to end without padding: the one form in which a model sees data.

Each example is a segment: positions restart at 0, attention never leaves it.
Knows nothing of how examples were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phinetune.text.labelled import Labelled
from phinetune.text.render import Rendered

NOT_TRAINED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Token ids with, at each position, the token to be predicted there.

    # T tokens of all segments together
    `targets_T[t]` is `ids_T[t + 1]` where that token is trained, else `NOT_TRAINED`.
    """

    ids_T: Tensor
    positions_T: Tensor
    targets_T: Tensor
    segment_lengths: tuple[int, ...]
    # The class of each segment, for a classification.
    classes_S: Tensor | None = None

    @classmethod
    def lay(cls, examples: Sequence[Rendered], device: torch.device | str = "cpu") -> PackedBatch:
        """Lay examples end to end, in order.

        >>> import numpy as np
        >>> from phinetune.data.conversation import Source
        >>> rendered = Rendered(ids=np.array([5, 6, 7]), trained=np.array([False, False, True]),
        ...                     source=Source(file="x", line=1))
        >>> PackedBatch.lay([rendered]).targets_T.tolist()
        [-100, 7, -100]
        """
        targets = []
        for example in examples:
            target = np.full(len(example.ids), NOT_TRAINED, dtype=np.int64)
            target[:-1][example.trained[1:]] = example.ids[1:][example.trained[1:]]
            targets.append(target)
        numbers = [example.class_number for example in examples if isinstance(example, Labelled)]
        ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
        positions = np.concatenate([np.arange(len(example.ids)) for example in examples])
        return cls(
            ids_T=torch.from_numpy(ids).to(device),
            positions_T=torch.from_numpy(positions).to(device),
            targets_T=torch.from_numpy(np.concatenate(targets)).to(device),
            segment_lengths=tuple(len(example.ids) for example in examples),
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
        )

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def segment_starts(self) -> list[int]:
        """Where each segment begins."""
        starts, position = [], 0
        for length in self.segment_lengths:
            starts.append(position)
            position += length
        return starts
