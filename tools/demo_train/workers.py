"""Data-parallel worker processes of one thread each, joined through a file on this machine.

One process per core waits for the other once a step instead of in every operation, which on a busy machine
is several times faster than one process with two threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """This process among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process measures, prints and saves."""
        return self.rank == 0

    def agree(self, value: float) -> float:
        """The leading process's value."""
        tensor = torch.tensor([value], dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return float(tensor)

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sum each tensor over the processes, in place, in one exchange."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def share(self, tensors: list[Tensor]) -> None:
        """Tensor `i` is taken from process `i % size`."""
        if self.size == 1:
            return
        for owner in range(self.size):
            owned = tensors[owner :: self.size]
            flat = torch.cat([tensor.detach().flatten() for tensor in owned])
            dist.broadcast(flat, owner)
            for tensor, part in zip(owned, flat.split([t.numel() for t in owned]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))


@contextlib.contextmanager
def joined(rank: int, size: int, meeting_point: Path) -> Iterator[Group]:
    """Join the other processes; all must come."""
    if size > 1:
        dist.init_process_group("gloo", init_method=meeting_point.as_uri(), rank=rank, world_size=size)
    try:
        yield Group(rank, size)
    finally:
        if size > 1:
            dist.destroy_process_group()


def start(size: int, meeting_point: Path, work: Callable[[int], None]) -> None:
    """Run `work(rank)` in `size` processes, this one among them."""
    meeting_point.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(1, size)]
    for process in others:
        process.start()
    work(0)
    for process in others:
        process.join()
