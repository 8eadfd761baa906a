"""One optimizer step: forward and backward over pieces of a batch, a finite check, the update.

The loss is a sum over trained tokens divided once by the step's total, so 1 x 16 and 16 x 1 give the
same update. Knows nothing of epochs, evaluation or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from phinetune.base.errors import DivergedError
from phinetune.base.seeds import derive
from phinetune.lora.attach import Adapter
from phinetune.models.batch import PackedBatch
from phinetune.models.loading import Base
from phinetune.models.loss import trained_token_loss
from phinetune.models.memory import keep_freed
from phinetune.models.shared_prefixes import num_added
from phinetune.text.render import Rendered
from phinetune.text.row_files import num_tokens_in, num_trained_in
from phinetune.training.distributed import ALONE, Ranks
from phinetune.training.packing import Rows
from phinetune.training.settings import TrainingSettings

# A CPU gains nothing from pieces of more tokens, and activations grow with them.
CPU_PIECE_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one update did."""

    loss: float
    grad_norm: float
    num_tokens: int
    num_trained_tokens: int


def pieces(
    sequences: Sequence[Rows],
    rows: Sequence[Rendered],
    batch_size: int,
    is_cpu: bool,
    *,
    counts_all: bool = False,
) -> Iterator[list[int]]:
    """Split a step's sequences into the rows of each forward pass.

    On a GPU a piece is a batch of `batch_size` sequences. On a CPU it is at most about
    `CPU_PIECE_TOKENS` tokens, shared ones counted once unless `counts_all`: the same update in less memory.
    """
    count = _num_whole if counts_all else _num_added
    piece: list[int] = []
    num_tokens = num_sequences = 0
    for sequence in sequences:
        length = count(rows, sequence, piece[0] if piece else None) if is_cpu else 0
        if piece and (num_sequences == batch_size or num_tokens + length > CPU_PIECE_TOKENS):
            yield piece
            piece, num_tokens, num_sequences = [], 0, 0
            length = count(rows, sequence, None) if is_cpu else 0
        piece += sequence
        num_tokens += length
        num_sequences += 1
    if piece:
        yield piece


def _num_added(rows: Sequence[Rendered], added: Rows, first: int | None) -> int:
    """The tokens that rows add to a piece which begins with row `first`, or make by themselves."""
    if first is None:
        first, added = added[0], added[1:]
        return rows[first].num_tokens + _num_added(rows, added, first)
    return sum(num_added(rows[first], rows[row]) for row in added)


def _num_whole(rows: Sequence[Rendered], added: Rows, first: int | None) -> int:
    return num_tokens_in(rows, added)


def halved(pieces: Iterable[list[int]], num_halvings: int) -> Iterator[list[int]]:
    """Each piece in up to 2 ** num_halvings parts, down to one row; rows of a piece never meet.

    >>> list(halved([[0, 1, 2, 3, 4]], 1))
    [[0, 1, 2], [3, 4]]
    """
    for piece in pieces:
        size = -(-len(piece) // 2**num_halvings)
        for first in range(0, len(piece), size):
            yield piece[first : first + size]


def _parts(
    base: Base,
    settings: TrainingSettings,
    rows: Sequence[Rendered],
    sequences: Sequence[Rows],
    num_halvings: int,
) -> Iterator[list[int]]:
    is_cpu = base.device.type == "cpu"
    return halved(pieces(sequences, rows, settings.train_batch_size, is_cpu), num_halvings)


def most_rows(
    base: Base,
    settings: TrainingSettings,
    rows: Sequence[Rendered],
    sequences: Sequence[Rows],
    num_halvings: int,
) -> int:
    """The rows of the largest forward pass over the sequences; 0 without any."""
    return max((len(part) for part in _parts(base, settings, rows, sequences, num_halvings)), default=0)


def train_step(
    base: Base,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Rendered],
    sequences: Sequence[Rows],
    settings: TrainingSettings,
    *,
    dropout_seed: int,
    step: int,
    num_halvings: int = 0,
    ranks: Ranks = ALONE,
) -> StepResult:
    """Update the adapter once; each `num_halvings` halves what goes through the model at once.

    `sequences` are the whole step's; with several `ranks` each computes its share of them.

    Raises `DivergedError`, leaving weights and optimizer untouched, when loss or gradient is not
    finite; it names the step, the rows and the first weight at fault.
    """
    if base.device.type == "cpu":
        keep_freed()
    used = [row for sequence in sequences for row in sequence]
    num_trained = num_trained_in(rows, used)
    parameters = adapter.parameters()
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=base.device)
    parts = list(_parts(base, settings, rows, ranks.share(sequences, rows), num_halvings))
    with ranks.full_together(), torch.random.fork_rng(devices=_cuda_devices(base.device)):
        for piece, weight in ranks.passes(parts, filler=used[:1]):
            torch.manual_seed(derive(dropout_seed, piece[0]))
            batch = PackedBatch.lay([rows[row] for row in piece], base.device, shares_prefixes=True)
            loss, _ = trained_token_loss(base, batch, settings.label_smoothing)
            (weight * loss / num_trained).backward()
            total += weight * loss.detach()
    ranks.add_gradients(parameters, total)
    gradients = {name: weight.grad for name, weight in adapter.named_parameters() if weight.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    # One wait for the device in a step: both figures come back together.
    loss_value, norm_value = torch.stack([total / num_trained, norm.to(total)]).tolist()
    if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
        whole = "the norm of the gradient" if math.isfinite(loss_value) else "the loss"
        at_fault = next((name for name, g in gradients.items() if not torch.isfinite(g).all()), whole)
        optimizer.zero_grad(set_to_none=True)
        raise _diverged(step, loss_value, at_fault, [rows[row] for row in used])
    torch.nn.utils.clip_grads_with_norm_(parameters, settings.max_grad_norm, norm)
    optimizer.step()
    return StepResult(
        loss=loss_value,
        grad_norm=norm_value,
        num_tokens=num_tokens_in(rows, used),
        num_trained_tokens=num_trained,
    )


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _diverged(step: int, loss: float, at_fault: str, rows: Sequence[Rendered]) -> DivergedError:
    places = ", ".join(str(row.source) for row in rows[:5]) + (" …" if len(rows) > 5 else "")
    return DivergedError(
        "the run diverged: loss or gradient is not finite",
        where=f"step {step}, rows {places}",
        why=f"the loss is {loss}, first not finite: {at_fault}; the weights of the step before are kept",
        do="lower learning_rate (a third is a good try), or raise num_warmup_steps",
    )
