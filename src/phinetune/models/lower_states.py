"""The hidden states below the first trained block, computed once for known rows and read from disk after.

When only the top blocks are adapted, everything below them gives the same states in every epoch and every
run. They are kept in one memory-mapped file; the blocks below are then passed over. Rows are found by their
tokens, so whoever lays batches need not know. States are computed in batches that follow from the rows
alone: a run that goes on without its file ends in the same bits. Knows nothing of training or of projects.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from phinetune.base.files import committed_dir, manifest_fault
from phinetune.models.batch import PackedBatch
from phinetune.models.sharding import blocks_of
from phinetune.text.render import Rendered

if TYPE_CHECKING:
    from phinetune.models.loading import Base

FILE = "states.npy"
BATCH_TOKENS = 2048


class _EnoughError(Exception):
    """Ends a forward pass below the first trained block."""


class LowerStates:
    """States of rows before block `first_block`, on disk. Made by `lower_states`."""

    def __init__(self, path: Path, blocks: Sequence[nn.Module], places: dict[bytes, int], dtype: torch.dtype):
        self._states_TH = np.load(path, mmap_mode="r")
        self._blocks, self._places, self._dtype = blocks, places, dtype

    def of(self, batch: PackedBatch) -> Tensor | None:
        """The states of a batch, (T, hidden); None unless all its rows are known."""
        ids_T = batch.ids_T.cpu().numpy().astype(np.int32)
        starts, lengths = batch.segment_starts, batch.segment_lengths
        spans = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        states_TH = np.empty((batch.num_tokens, self._states_TH.shape[1]), self._states_TH.dtype)
        for segment in range(batch.num_examples):
            prefix = batch.prefix_of(segment)
            parts = [spans[segment]] if prefix is None else [spans[prefix], spans[segment]]
            first = self._places.get(_digest(np.concatenate([ids_T[part] for part in parts])))
            if first is None:
                return None
            for part in parts:
                length = part.stop - part.start
                states_TH[part] = self._states_TH[first : first + length]
                first += length
        return torch.from_numpy(states_TH).view(self._dtype).to(batch.ids_T.device)

    @contextlib.contextmanager
    def given(self, batch: PackedBatch, num_tokens: int) -> Iterator[None]:
        """Within it the lower blocks are passed over, and the last of them gives the states of a known batch.

        They are filled up to `num_tokens` with zeros.
        """
        states_TH = self.of(batch)
        if states_TH is None:
            yield
            return
        states_1TH = torch.nn.functional.pad(states_TH, (0, 0, 0, num_tokens - len(states_TH)))[None]
        before = [block.__dict__.get("forward") for block in self._blocks]
        for block in self._blocks[:-1]:
            block.forward = _passed
        self._blocks[-1].forward = lambda *_, **__: states_1TH
        try:
            yield
        finally:
            for block, forward in zip(self._blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward


def _passed(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _digest(ids: npt.NDArray[np.int32]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=16).digest()


def first_trained_block(base: Base) -> int:
    """The number of blocks below the first trained weight; 0 where states cannot be kept.

    They cannot where a model has dropout of its own, which would be drawn anew each time.
    """
    config = base.model.config.get_text_config(decoder=True)
    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in base.model.modules())
    if has_dropout or getattr(config, "attention_dropout", False) or getattr(config, "attn_pdrop", False):
        return 0
    found: list[bool] = []
    blocks = blocks_of(base.model.get_decoder(), int(config.num_hidden_layers))
    handles = [
        block.register_forward_hook(lambda _, __, out: found.append(bool(out.requires_grad)))
        for block in blocks
    ]
    ids_T = torch.arange(8, device=base.device) % base.vocab_size
    try:
        base.hidden_states(
            PackedBatch(
                ids_T=ids_T,
                positions_T=torch.arange(8, device=base.device),
                targets_T=ids_T,
                segment_lengths=(8,),
            )
        )
    finally:
        for handle in handles:
            handle.remove()
    return found.index(True) if True in found else 0


def states_bytes(base: Base, rows: Sequence[Rendered]) -> int:
    """The size of the file for these rows."""
    config = base.model.config.get_text_config(decoder=True)
    num_tokens = sum({_digest(row.ids): row.num_tokens for row in rows}.values())
    return num_tokens * int(config.hidden_size) * int(base.dtype.itemsize)


def states_path(base: Base, first_block: int, rows: Sequence[Rendered], folder: Path) -> Path:
    """Where the states of these rows are: a name for base, types, versions and all tokens in their order."""
    facts = [base.sha256, str(base.dtype), base.device.type, base.quantize, first_block, torch.__version__]
    digests = b"".join(dict.fromkeys(_digest(row.ids) for row in rows))
    return folder / hashlib.sha256(json.dumps(facts).encode() + digests).hexdigest()[:16]


def lower_states(base: Base, first_block: int, rows: Sequence[Rendered], folder: Path) -> LowerStates:
    """The states of these rows below `first_block`, from a file in `folder`, made where it is not whole.

    Raises `SpaceError` when the disk is full.
    """
    distinct = {_digest(row.ids): row for row in rows}
    config = base.model.config.get_text_config(decoder=True)
    blocks = list(blocks_of(base.model.get_decoder(), int(config.num_hidden_layers)))[:first_block]
    ends = list(itertools.accumulate(row.num_tokens for row in distinct.values()))
    places = dict(zip(distinct, [0, *ends], strict=False))
    path = states_path(base, first_block, rows, folder)
    if manifest_fault(path):
        with committed_dir(path) as temporary:
            _write(base, blocks[-1], list(distinct.values()), temporary / FILE, ends[-1])
    return LowerStates(path / FILE, blocks, places, base.dtype)


def _write(base: Base, last: nn.Module, rows: Sequence[Rendered], path: Path, num_tokens: int) -> None:
    # NumPy knows no bfloat16: what it keeps are the bits.
    kept = np.dtype(np.int16 if base.dtype.itemsize == 2 else np.int32)
    size = int(base.model.config.get_text_config(decoder=True).hidden_size)
    states_TH = np.lib.format.open_memmap(path, mode="w+", dtype=kept, shape=(num_tokens, size))
    first = 0
    for batch in _batches(rows, base.longrope_limit):
        computed = _computed(base, last, PackedBatch.lay(batch, base.device))
        view = computed.view(getattr(torch, kept.name)).cpu().numpy()
        states_TH[first : first + len(view)] = view
        first += len(view)
    states_TH.flush()


def _batches(rows: Sequence[Rendered], longrope_limit: int | None) -> Iterator[list[Rendered]]:
    """Neighbours that go through the model in one pass: of LongRoPE's two kinds only one."""
    batch: list[Rendered] = []
    for row in rows:
        is_other = longrope_limit is not None and bool(
            batch and (batch[0].num_tokens > longrope_limit) != (row.num_tokens > longrope_limit)
        )
        if batch and (is_other or sum(r.num_tokens for r in batch) + row.num_tokens > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def _computed(base: Base, last: nn.Module, batch: PackedBatch) -> Tensor:
    """What block `last` gives, (T, hidden); the blocks above are not computed."""
    found: list[Tensor] = []

    def stop(_: nn.Module, __: Any, out: Tensor) -> None:
        found.append(out)
        raise _EnoughError

    handle = last.register_forward_hook(stop)
    try:
        base.hidden_states(batch)
    except _EnoughError:
        pass
    finally:
        handle.remove()
    return found[0][0, : batch.num_tokens]
