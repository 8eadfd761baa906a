"""Several processes on one training: who computes what, what they tell each other, and what they agree on.

PyTorch's own engine moves the data (`torch.distributed`: gloo on CPUs, NCCL between GPUs). The promises:

- A step's sequences are those of one process; they are divided, never multiplied. N processes make the
  same update as one, up to the order of float additions.
- Only the adapter's gradients are added up, once a step, with the loss in the same message: the sum over
  all trained tokens, divided by their number in the whole step. That is why it is not DDP: DDP averages
  over ranks, which weighs tokens unequally, and waits forever for a rank that has no sequence.
- Every decision (best so far, early stopping, divergence, smaller pieces, ending) is made on numbers that
  all processes have from the same sum; they end up with the same bits.
- A dropout mask follows from seed, step and the first row of its forward pass.
- A process that dies makes the others raise `LostProcessError`: none waits for ever.

The first process (rank 0) alone reads and writes run folders. Knows nothing of how processes are started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from phinetune.base.errors import LostProcessError, SpaceError, UserError
from phinetune.text.render import Rendered
from phinetune.text.row_files import num_tokens_in
from phinetune.training.checkpoint import counters_of, set_state, state_tensors
from phinetune.training.packing import Rows
from phinetune.training.state import Counters, TrainState

# The first process may wait long for room on a disk, or for an answer to its plan. A lost process is
# noticed by its closed connections, not by this.
LONGEST_WAIT = datetime.timedelta(days=30)


def divided(sequences: Sequence[Rows], num_tokens: Sequence[int], num_ranks: int) -> list[list[Rows]]:
    """The sequences of each rank, in their order: longest first, each to the rank with fewest tokens.

    >>> divided([(0,), (1, 2), (3,)], [5, 9, 4], num_ranks=2)
    [[(1, 2)], [(0,), (3,)]]
    """
    filled = [0] * num_ranks
    owner = [0] * len(sequences)
    for place in sorted(range(len(sequences)), key=lambda place: (-num_tokens[place], place)):
        owner[place] = filled.index(min(filled))
        filled[owner[place]] += num_tokens[place]
    return [
        [sequence for place, sequence in enumerate(sequences) if owner[place] == rank]
        for rank in range(num_ranks)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process's place among those of a run. One alone talks to nobody.

    All of them must call the same methods in the same order. Each raises `LostProcessError` when another
    process is gone.
    """

    rank: int = 0
    size: int = 1
    # The base is divided too: every forward pass needs all processes, so each makes as many.
    is_sharded: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, sequences: Sequence[Rows], rows: Sequence[Rendered]) -> list[Rows]:
        """This rank's part of the sequences."""
        if self.size == 1:
            return list(sequences)
        num_tokens = [num_tokens_in(rows, sequence) for sequence in sequences]
        return divided(sequences, num_tokens, self.size)[self.rank]

    def passes(self, parts: Sequence[list[int]], filler: list[int]) -> Iterator[tuple[list[int], float]]:
        """The rows of each forward pass and their weight: 0 for one that is made only to keep step."""
        num_idle = self.highest(len(parts)) - len(parts) if self.is_sharded else 0
        yield from ((part, 1.0) for part in parts)
        yield from ((filler, 0.0) for _ in range(num_idle))

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter], loss: Tensor) -> None:
        """Put the sum over all ranks in the place of every gradient and of `loss`, in one message."""
        if self.size == 1:
            return
        with self.full_together():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([tensor.reshape(-1) for tensor in (*gradients, loss)])
        self._talk(dist.all_reduce, flat)
        sums = flat.split([*(parameter.numel() for parameter in parameters), 1])
        for parameter, gradient in zip(parameters, sums, strict=False):
            parameter.grad = gradient.view_as(parameter)
        loss.copy_(sums[-1].view_as(loss))

    def add(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over all ranks."""
        if self.size > 1:
            self._talk(dist.all_reduce, values)
        return values

    def highest(self, value: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.int64)
        self._talk(dist.all_reduce, held, op=dist.ReduceOp.MAX)
        return int(held)

    def any(self, is_so: bool) -> bool:
        """Whether it is so on any rank; the same answer on all."""
        return bool(self.highest(int(is_so)))

    def agreed(self, is_so: bool) -> bool:
        """Whether a measurement is to stop here: of a divided base all ranks stop together."""
        return self.any(is_so) if self.is_sharded else is_so

    @contextlib.contextmanager
    def full_together(self) -> Iterator[None]:
        """When one rank's device memory is full within the block, all raise `OutOfMemoryError` at its end.

        Of a divided base the others wait for this rank's part already and cannot be told: `SpaceError`.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if self.is_sharded:
                raise SpaceError(
                    "the device's memory is full",
                    where=f"process {self.rank + 1} of {self.size}",
                    why="with a divided base a step cannot be tried again in smaller pieces",
                    do="write a smaller finetune_train_batch_size, or gradient_checkpointing: true",
                ) from error
            self.any(True)
            raise
        if not self.is_sharded and self.any(False):
            raise torch.OutOfMemoryError("the memory of another process's device is full")

    def from_first(self, content: bytes = b"") -> bytes:
        """What the first rank gives, on all of them."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content), dtype=torch.int64)
        self._talk(dist.broadcast, length, src=0)
        if not int(length):
            return b""
        held = torch.frombuffer(bytearray(content if self.is_first else int(length)), dtype=torch.uint8)
        self._talk(dist.broadcast, held, src=0)
        return held.numpy().tobytes()

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Raise `UserError`, naming them, when facts are not those of the first rank. All wait for all."""
        first: dict[str, str] = json.loads(self.from_first(json.dumps(dict(facts)).encode()))
        others = [f"{name}: {facts.get(name)}, there {first[name]}" for name in first]
        others = [other for other, name in zip(others, first, strict=True) if facts.get(name) != first[name]]
        if others:
            raise UserError(
                f"process {self.rank + 1} of {self.size} has not what the first process has",
                why="; ".join(others),
                do="give every machine the same project, base and versions",
            )
        self.any(False)

    def share_state(self, state: TrainState) -> None:
        """Set every rank's state to that of the first."""
        if self.size == 1:
            return
        from safetensors.torch import load, save

        counters = json.dumps(dataclasses.asdict(counters_of(state))).encode()
        counters = self.from_first(counters)
        content = self.from_first(save(state_tensors(state)) if self.is_first else b"")
        if not self.is_first:
            set_state(state, Counters(**json.loads(counters)), load(content))

    def require_equal_weights(self, parameters: Sequence[Tensor]) -> None:
        """Raise `LostProcessError` when the ranks' weights are not the same bits: a sum of all of them."""
        if self.size == 1:
            return
        bits = sum(int(weight.detach().view(torch.int32).sum(dtype=torch.int64)) for weight in parameters)
        if self.highest(bits) != -self.highest(-bits):
            raise LostProcessError(
                "the processes' adapters are no longer the same",
                where=f"process {self.rank + 1} of {self.size}",
                why="their machines compute differently",
                do="use machines of one kind, with the same versions and threads per process",
            )

    def _talk(self, begin: Callable[..., Any], *args: Any, **options: Any) -> None:
        """Begin and wait, in Python: a signal is heard while others are still at work."""
        pause_s = 1e-5
        try:
            work = begin(*args, **options, async_op=True)
            while not work.is_completed():
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, 0.01)
            work.wait()
        except RuntimeError as error:  # all that torch.distributed raises
            raise LostProcessError(
                "a process of the run is lost",
                where=f"process {self.rank + 1} of {self.size}",
                why=str(error).strip().splitlines()[0],
                do="see what ended it; then go on from the last checkpoint with --resume",
            ) from error


ALONE = Ranks()


@contextlib.contextmanager
def joined(rank: int, size: int, *, store: Any = None, is_sharded: bool = False) -> Iterator[Ranks]:
    """Within the block this process is one of `size`; without a `store` they meet as MASTER_ADDR says."""
    excepthook = sys.excepthook  # which PyTorch replaces by its own
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if has_nccl else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=LONGEST_WAIT,
    )
    try:
        yield Ranks(rank=rank, size=size, is_sharded=is_sharded)
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook
