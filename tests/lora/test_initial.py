"""PiSSA and OLoRA begin and learn as PEFT's do, leave the base alone and are saved as plain LoRA, exactly."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from peft_twins import IDS, assert_close, assert_same_work, logits, peft_twin, trained_of
from safetensors.torch import load_file
from tiny_models import as_base, random_rows, tiny_model
from torch import nn

from phinetune.base.errors import SettingsError
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import load_adapter, save_adapter
from phinetune.lora.initial import GaussianLinear, StartedLinear
from phinetune.models.batch import PackedBatch
from phinetune.models.loss import trained_token_loss
from phinetune.models.memory import saved_bytes

# PEFT asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {"phi3": ["qkv_proj", "down_proj"], "qwen2": ["q_proj", "k_proj"], "gpt2": ["c_attn", "c_fc"]}
# PEFT's OLoRA takes GPT-2's weights for those of a linear layer, and fails.
CASES = [
    (name, start) for name in TARGETS for start in ("pissa", "olora") if (name, start) != ("gpt2", "olora")
]


def settings_for(name, start, **changes):
    return LoraSettings(
        rank=4, alpha=6, init_lora_weights=start, target_modules=tuple(TARGETS[name]), **changes
    )


def twins(name, start, *, stir, **changes):
    theirs = peft_twin(
        name, stir=stir, r=4, lora_alpha=6, target_modules=TARGETS[name], init_lora_weights=start, **changes
    )
    model = tiny_model(name, implementation="eager")
    adapter = attach(model, settings_for(name, start, **changes), seed=0)
    return theirs, model, adapter


@pytest.mark.parametrize(("name", "start"), CASES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_and_b_begin_as_in_peft_and_the_base_answers_unchanged(name, start, use_rslora):
    theirs, model, adapter = twins(name, start, stir=0, use_rslora=use_rslora)
    trained = trained_of(theirs)
    assert {key for key, _ in adapter.named_parameters()} == trained.keys()
    for key, weight in adapter.named_parameters():
        assert_close(weight, trained[key])
    base = tiny_model(name, implementation="eager")
    assert torch.equal(logits(model), logits(base))
    with adapter.disabled():
        assert torch.equal(logits(model), logits(base))
    for key, layer in adapter.layers.items():
        assert torch.equal(layer.base.weight, base.get_submodule(key).weight)


@pytest.mark.parametrize(("name", "start"), CASES)
def test_logits_and_gradients_are_pefts(name, start):
    theirs, model, adapter = twins(name, start, stir=0.05)
    trained = trained_of(theirs)
    plain = logits(model).detach()
    with torch.no_grad():
        for key, weight in adapter.named_parameters():
            weight.copy_(trained[key])
    assert (logits(model) - plain).abs().max() > 1e-2
    assert_same_work(model, adapter, theirs)


def stirred(adapter):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    return adapter


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("name", TARGETS)
def test_saved_it_is_plain_lora_of_twice_the_rank_on_the_untouched_base(name, start, tmp_path):
    model = tiny_model(name, implementation="eager")
    changes = {"use_rslora": True, "rank_pattern": {TARGETS[name][1]: 3}}
    adapter = stirred(attach(model, settings_for(name, start, **changes), seed=0))
    save_adapter(adapter, tmp_path, base_name="base", metadata={})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    ranks = {
        tensor.shape[0]
        for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()
        if "_A" in key
    }
    assert ranks == {8, 6}
    ours = tiny_model(name, implementation="eager")
    load_adapter(ours, tmp_path)
    assert torch.equal(logits(ours), logits(model))
    theirs = PeftModel.from_pretrained(tiny_model(name, implementation="eager"), tmp_path).eval()
    assert_close(logits(theirs), logits(model), 2e-6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_snapshot_brings_everything_back_to_a_layer_that_began_elsewhere(start):
    adapter = stirred(attach(tiny_model("phi3"), settings_for("phi3", start), seed=0))
    other = attach(tiny_model("phi3"), settings_for("phi3", start), seed=0)
    for _, tensor in other.named_tensors():
        tensor.data.normal_()
    other.restore(adapter.snapshot())
    for (_, one), (_, two) in zip(adapter.named_tensors(), other.named_tensors(), strict=True):
        assert torch.equal(one, two)
    updates = adapter.updates()
    for name, update in other.updates().items():
        assert torch.equal(update.a_RI, updates[name].a_RI)
        assert torch.equal(update.b_OR, updates[name].b_OR)


def test_the_fast_pissa_finds_the_largest_directions_and_follows_from_the_seed():
    torch.manual_seed(0)
    base = nn.Linear(60, 40, bias=False)
    u, _, v = torch.linalg.svd(base.weight.detach(), full_matrices=False)
    with torch.no_grad():
        base.weight.copy_(u @ torch.diag(0.5 ** torch.arange(40)) @ v)

    def begun(start, seed):
        layer = StartedLinear(base, start=start, rank=5, scaling=2.0)
        layer.reset(torch.Generator().manual_seed(seed))
        return layer

    state = torch.random.get_rng_state()
    fast, again, exact = begun("pissa_niter_8", 1), begun("pissa_niter_8", 1), begun("pissa", 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(fast.lora_A, again.lora_A)
    products = [2.0 * layer.lora_B @ layer.lora_A for layer in (fast, exact)]
    assert (products[0] - products[1]).abs().max() < 1e-4
    assert not any(tensor.requires_grad for _, tensor in fast.fixed())


def test_dropout_falls_on_what_training_changed_alone():
    model = tiny_model("phi3").train()
    adapter = attach(model, settings_for("phi3", "pissa", dropout=0.5), seed=0)
    ids = IDS[:1]
    assert torch.equal(
        model(input_ids=ids, use_cache=False).logits,
        tiny_model("phi3")(input_ids=ids, use_cache=False).logits,
    )
    stirred(adapter)
    one, two = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
    assert not torch.equal(one, two)


def test_small_changes_reach_a_bfloat16_layer():
    torch.manual_seed(0)
    layer = StartedLinear(nn.Linear(64, 64, bias=False).bfloat16(), start="pissa", rank=4, scaling=1.0)
    layer.reset(torch.Generator().manual_seed(0))
    x = torch.randn(200, 64).bfloat16()
    before = layer(x).float()
    change = 1e-3 * layer.lora_A.detach() * torch.randn_like(layer.lora_A)  # less than bfloat16 can tell
    with torch.no_grad():
        layer.lora_A.add_(change)
        layer.base.weight.zero_()  # what is left is the change alone
    expected = x.float() @ change.t() @ layer.lora_B.t()
    assert (layer(x).float() - expected).abs().max() < 0.02 * expected.abs().max()
    assert before.abs().max() > 100 * expected.abs().max()


def test_gaussian_is_pefts_normal():
    layer = GaussianLinear(nn.Linear(500, 8), rank=16, scaling=1.0)
    layer.reset(torch.Generator().manual_seed(0))
    assert layer.lora_A.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert abs(layer.lora_A.mean().item()) < 2e-3
    assert not layer.lora_B.any()
    adapter = attach(tiny_model("phi3"), LoraSettings(rank=2, init_lora_weights="gaussian"), seed=0)
    assert all(isinstance(layer, GaussianLinear) for layer in adapter.layers.values())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"init_lora_weights": "eva"}, "cannot be 'eva'"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "DoRA cannot begin with pissa"),
        ({"init_lora_weights": "olora", "rank": 33}, "has no 33 directions"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, what):
    with pytest.raises(SettingsError, match=what) as caught:
        attach(tiny_model("phi3"), LoraSettings(**changes), seed=0)
    assert caught.value.where == "init_lora_weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["paper", "pissa"])
def test_copies_of_weights_are_told_apart_from_what_grows_with_the_tokens(start, dtype):
    model = tiny_model("phi3").to(dtype).train()
    settings = LoraSettings(rank=4, init_lora_weights=start, modules_to_save=("lm_head",))
    adapter = attach(model, settings, seed=0)
    base = as_base(model)
    for weight in adapter.parameters():
        weight.requires_grad_(True)

    row = random_rows([16])[0]

    def saved(num_rows):
        batch = PackedBatch.lay([row] * num_rows, torch.device("cpu"))
        return saved_bytes(base, lambda: trained_token_loss(base, batch)[0])

    # Batches on a CPU are filled up to 128 tokens and the loss to 32: numbers of rows that need none of it.
    fixed = saved(32) - (saved(64) - saved(32))
    assert abs(fixed - adapter.copied_bytes(dtype)) < 2000
    assert adapter.copied_bytes(dtype) > 5000 or (start, dtype) == ("paper", torch.float32)
