"""States below the first trained block are read from disk and change neither loss nor gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_models import SHORT_CONTEXT, random_rows, tiny_base, with_beginning

from phinetune.lora.attach import LoraSettings, attach
from phinetune.models import lower_states as module
from phinetune.models.batch import PackedBatch
from phinetune.models.loss import token_scores, trained_token_loss
from phinetune.models.lower_states import first_trained_block, lower_states, states_bytes, states_path

NAMES = ["phi3", "phi3-window", "phi3.5-longrope", "llama", "gemma2", "gemma3", "smollm3", "gpt2"]
LENGTHS = [12, SHORT_CONTEXT + 9, 7, 40, 18, 3]
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0, target_modules=None)


def adapted(name="phi3", *, first=2, num_blocks=4, **changes):
    kinds = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * (num_blocks // 2)}}
    sizes = {"gpt2": {"n_layer": num_blocks}, "smollm3": {"no_rope_layers": [1, 0] * (num_blocks // 2)}}
    depth = {"num_hidden_layers": num_blocks} if name != "gpt2" else {}
    base = tiny_base(name, **{**depth, **kinds.get(name, {}), **sizes.get(name, {}), **changes})
    settings = dataclasses.replace(LORA, layers_to_transform=tuple(range(first, num_blocks)))
    adapter = attach(base.model, settings, seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    base.model.train()
    return base, adapter


def rows_of():
    return with_beginning(random_rows(LENGTHS), 20)


def loss_and_gradients(base, adapter, rows):
    for parameter in adapter.parameters():
        parameter.grad = None
    loss, _ = trained_token_loss(base, PackedBatch.lay(rows, shares_prefixes=True))
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in adapter.parameters()]


def calls_of(base):
    """The blocks whose attention ran, in order."""
    found = []
    for number, block in enumerate(module.blocks_of(base.model.get_decoder(), 4)):
        attention = getattr(block, "self_attn", None) or block.attn
        attention.register_forward_hook(lambda *_, number=number: found.append(number))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_all_blocks(name, is_checkpointed, tmp_path):
    base, adapter = adapted(name)
    if is_checkpointed:
        enable = getattr(base.model, "activation_checkpointing_enable", None)
        (enable or base.model.gradient_checkpointing_enable)({"use_reentrant": False})
        base.model.disable_input_require_grads()
    assert first_trained_block(base) == 2
    rows = rows_of()
    expected, gradients = loss_and_gradients(base, adapter, rows)
    kept = dataclasses.replace(base, lower=lower_states(base, 2, rows, tmp_path))
    calls = calls_of(base)
    loss, found = loss_and_gradients(kept, adapter, rows[::-1])
    assert loss == pytest.approx(expected, rel=1e-6)
    for ours, theirs in zip(found, gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-6
    assert set(calls) == {2, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_same_batches_the_bits_are_the_same(dtype, tmp_path):
    base, _ = adapted()
    base.model.to(dtype)
    base = dataclasses.replace(base, compute=dataclasses.replace(base.compute, dtype=dtype))
    rows = random_rows(LENGTHS)
    plain = token_scores(base, PackedBatch.lay(rows)).nll_N
    kept = dataclasses.replace(base, lower=lower_states(base, 2, rows, tmp_path))
    calls = calls_of(base)
    assert torch.equal(token_scores(kept, PackedBatch.lay(rows)).nll_N, plain)
    assert set(calls) == {2, 3}


def test_a_batch_with_an_unknown_row_is_computed_whole(tmp_path):
    base, _ = adapted()
    rows = rows_of()
    kept = dataclasses.replace(base, lower=lower_states(base, 2, rows[:3], tmp_path))
    expected = base.hidden_states(PackedBatch.lay(rows))
    calls = calls_of(base)
    assert torch.equal(kept.hidden_states(PackedBatch.lay(rows)), expected)
    assert set(calls) == {0, 1, 2, 3}


def test_a_file_is_made_once_and_again_when_it_is_not_whole(tmp_path):
    base, _ = adapted()
    rows = rows_of()
    lower_states(base, 2, [*rows, rows[0]], tmp_path)
    path = states_path(base, 2, rows, tmp_path)
    made = path / module.FILE
    content = made.read_bytes()
    assert 0 <= len(content) - states_bytes(base, [*rows, rows[0]]) < 200  # the head of the file
    calls = calls_of(base)
    lower_states(base, 2, rows, tmp_path)
    assert calls == []
    made.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    lower_states(base, 2, rows, tmp_path)
    assert set(calls) == {0, 1}
    assert made.read_bytes() == content


def test_the_name_depends_on_all_that_the_states_depend_on(tmp_path):
    base, _ = adapted()
    rows = rows_of()
    paths = {
        states_path(base, 2, rows, tmp_path),
        states_path(base, 1, rows, tmp_path),
        states_path(base, 2, rows[1:], tmp_path),
        states_path(base, 2, rows[::-1], tmp_path),
        states_path(dataclasses.replace(base, sha256="other"), 2, rows, tmp_path),
        states_path(dataclasses.replace(base, quantize="int8"), 2, rows, tmp_path),
    }
    assert len(paths) == 6


def test_nothing_is_kept_below_a_trained_embedding_or_a_dropout_of_the_model():
    assert first_trained_block(adapted(first=0)[0]) == 0
    assert first_trained_block(adapted(attention_dropout=0.1)[0]) == 0
    assert first_trained_block(adapted(resid_pdrop=0.1)[0]) == 0
    base = tiny_base("phi3", num_hidden_layers=4)
    rows_too = dataclasses.replace(LORA, layers_to_transform=(2, 3), trainable_token_indices=(5,))
    attach(base.model, rows_too, seed=0)
    assert first_trained_block(base) == 0
