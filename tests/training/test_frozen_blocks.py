"""Of the blocks below the first adapted one nothing waits for the backward pass, and none passes them."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_rows, tiny_base

from phinetune.lora.attach import LoraSettings, attach
from phinetune.models.batch import PackedBatch
from phinetune.models.loss import trained_token_loss
from phinetune.models.memory import saved_bytes
from phinetune.training.loop import start
from phinetune.training.settings import TrainingSettings

NUM_BLOCKS = 8


def kept_bytes(first_block: int) -> int:
    """What one batch keeps when only the blocks from `first_block` on are adapted."""
    base = tiny_base("phi3", num_hidden_layers=NUM_BLOCKS)
    blocks = tuple(range(first_block, NUM_BLOCKS))
    attach(
        base.model,
        LoraSettings(rank=4, alpha=8.0, dropout=0.1, target_modules=None, layers_to_transform=blocks),
        seed=0,
    )
    base.model.train()
    batch = PackedBatch.lay(random_rows([64] * 4))
    return saved_bytes(base, lambda: trained_token_loss(base, batch))


def test_what_is_kept_grows_with_the_adapted_blocks_alone():
    all_, half, one = (kept_bytes(first) for first in (0, 4, 7))
    of_a_block = (all_ - one) / (NUM_BLOCKS - 1)
    assert of_a_block > 256 * 32 * 4 * 0.9  # at the least the input of each block
    assert half - one == pytest.approx(3 * of_a_block, rel=0.02)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_no_gradient_passes_below_the_first_adapted_block(is_checkpointed):
    base = tiny_base("phi3", num_hidden_layers=4)
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.0, target_modules=None, layers_to_transform=(2, 3))
    start(base, attach(base.model, lora, seed=0), TrainingSettings(gradient_checkpointing=is_checkpointed))
    needs_gradient = []
    for block in base.model.get_decoder().layers:
        block.register_forward_hook(lambda *args: needs_gradient.append(args[-1].requires_grad))
    loss, _ = trained_token_loss(base, PackedBatch.lay(random_rows([5, 9])))
    assert needs_gradient == [False, False, True, True]
    assert torch.is_tensor(loss)
    loss.backward()
