"""Biases, modules and token rows: trained and filed as in PEFT, and refused where they cannot be."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from peft_twins import assert_close, assert_same_work, logits, our_twin, peft_twin
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, as_base, random_rows, tiny_model

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, SettingsError
from phinetune.generation.mixing import MixedLayers
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import load_adapter, save_adapter
from phinetune.lora.forms import read_adapter, write_adapter
from phinetune.lora.peft_format import read_peft
from phinetune.models.attention import IMPLEMENTATION
from phinetune.models.batch import PackedBatch
from phinetune.models.loss import trained_token_loss

# PEFT asks transformers for a property that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Model, target, what is trained whole (the same words for PEFT and here).
CASES = {
    "biases of adapted layers": ("qwen2", "q_proj", {"bias": "lora_only"}),
    "all biases": ("qwen2", "down_proj", {"bias": "all"}),
    "all biases of GPT-2": ("gpt2", "c_attn", {"bias": "all"}),
    "biases under DoRA": ("gpt2", "c_attn", {"bias": "lora_only", "use_dora": True}),
    "the head": ("llama", "q_proj", {"modules_to_save": ["lm_head"]}),
    "last norm and embedding": ("llama", "q_proj", {"modules_to_save": ["model.norm", "embed_tokens"]}),
    "a linear layer": ("llama", "q_proj", {"modules_to_save": ["o_proj"]}),
    "token rows": ("llama", "q_proj", {"trainable_token_indices": [14, 7, 90]}),
    "token rows of a tied model": ("phi4-mini", "qkv_proj", {"trainable_token_indices": [7, 14]}),
    "token rows of GPT-2": ("gpt2", "c_attn", {"trainable_token_indices": {"wte": [7, 14]}}),
    "rows and head": (
        "llama", "q_proj", {"trainable_token_indices": [7], "modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip


def twins(case):
    name, target, extra = CASES[case]
    theirs = peft_twin(name, stir=0.1, r=3, lora_alpha=6, target_modules=[target], **extra)
    tokens = extra.get("trainable_token_indices", [])
    settings = LoraSettings(
        rank=3,
        alpha=6,
        target_modules=(target,),
        bias=extra.get("bias", "none"),
        use_dora=extra.get("use_dora", False),
        modules_to_save=tuple(extra.get("modules_to_save", ())),
        trainable_token_indices=tuple(tokens["wte"] if isinstance(tokens, dict) else tokens),
    )
    return theirs, *our_twin(name, settings, theirs)


def bare(case):
    return tiny_model(CASES[case][0], implementation="eager")


def base_of(model, adapter):
    """A base with its adapter: `as_base` freezes everything."""
    base = as_base(model)
    for weight in adapter.parameters():
        weight.requires_grad_(True)
    return base


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_pefts(case):
    theirs, model, adapter = twins(case)
    assert_same_work(model, adapter, theirs)
    assert (logits(model) - logits(bare(case))).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_our_loss_gives_them_the_gradient_of_the_plain_one(case):
    """The loss forms the head's gradient itself; here autograd does, over the whole logits."""
    _, model, adapter = twins(case)
    row = random_rows([40], seed=3)[0]
    model.set_attn_implementation("eager")
    batch = PackedBatch.lay([row], torch.device("cpu"))
    out = model(input_ids=batch.ids_T[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(out, batch.targets_T, ignore_index=-100, reduction="sum").backward()
    expected = {name: weight.grad for name, weight in adapter.named_parameters()}
    for weight in adapter.parameters():
        weight.grad = None
    model.set_attn_implementation(IMPLEMENTATION)
    loss, _ = trained_token_loss(base_of(model, adapter), batch)
    (0.5 * loss).backward()
    for name, weight in adapter.named_parameters():
        difference = (2 * weight.grad - expected[name]).abs().max()
        assert difference <= 1e-5 * expected[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("case", CASES)
def test_files_go_to_peft_and_back_without_a_changed_byte(case, tmp_path):
    theirs, model, adapter = twins(case)
    ours, through, back = (tmp_path / part for part in ("ours", "peft", "back"))
    for folder in (ours, back):
        folder.mkdir()
    save_adapter(adapter, ours, base_name="", metadata={})
    peft_model = PeftModel.from_pretrained(bare(case), ours).eval()
    assert_close(logits(peft_model), logits(model))
    theirs.save_pretrained(through, save_embedding_layers=False)
    again_model = bare(case)
    again = load_adapter(again_model, through)
    assert torch.equal(logits(again_model), logits(model))
    save_adapter(again, back, base_name="", metadata={})
    files = [load_file(folder / "adapter_model.safetensors") for folder in (ours, through, back)]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    for key, tensor in files[0].items():
        assert torch.equal(tensor, files[1][key])
        assert torch.equal(tensor, files[2][key])


@pytest.mark.parametrize("case", CASES)
def test_off_and_away_the_base_is_as_it_was(case):
    _, model, adapter = twins(case)
    untouched = bare(case)
    expected = logits(untouched)
    with adapter.disabled():
        assert torch.equal(logits(model), expected)
    kept = adapter.snapshot()
    adapter.reset(0)
    assert_close(logits(model), expected, 1e-6)
    adapter.restore(kept)
    assert (logits(model) - expected).abs().max() > 1e-2
    adapter.detach(model)
    assert torch.equal(logits(model), expected)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in untouched.named_modules()
    }
    assert model.state_dict().keys() == untouched.state_dict().keys()


def test_the_coverage_table_names_them():
    settings = LoraSettings(
        rank=2,
        target_modules=("c_attn",),
        bias="all",
        modules_to_save=("ln_f",),
        trainable_token_indices=(3, 5),
    )
    adapter = attach(tiny_model("gpt2"), settings, seed=0)
    rows = {(row.target, row.kind): (row.num_layers, row.num_parameters) for row in adapter.coverage}
    # Two norms and four layers in each of two blocks, and the last norm.
    assert rows[("bias", "bias")] == (13, 2 * (32 + 96 + 32 + 32 + 128 + 32) + 32)
    assert rows[("ln_f", "module")] == (1, 32)
    assert rows[("wte", "rows")] == (2, 64)
    assert sum(row.num_parameters for row in adapter.coverage) == adapter.num_parameters
    assert adapter.settings.modules_to_save == ("transformer.ln_f",)


def test_a_bfloat16_base_is_trained_through_float32_weights():
    row = random_rows([60])[0]
    tokens = tuple(sorted(set(row.ids.tolist())))[:3]
    settings = LoraSettings(rank=2, modules_to_save=("lm_head", "norm"), trainable_token_indices=tokens)

    def gradients(dtype):
        model = tiny_model("llama").bfloat16().to(dtype)
        adapter = attach(model, settings, seed=0)
        batch = PackedBatch.lay([row], torch.device("cpu"))
        loss, _ = trained_token_loss(base_of(model, adapter), batch)
        loss.backward()
        assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == dtype
        return {part.place.name: part.weight.grad for part in adapter.parts}

    ours, exact = gradients(torch.bfloat16), gradients(torch.float32)
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        # Two layers in bfloat16, of 8 bits.
        assert (gradient - exact[name]).norm() < 0.05 * exact[name].norm(), name


REFUSED = {
    "no biases": ("llama", {"bias": "all"}, "no biases"),
    "none in adapted layers": ("qwen2", {"bias": "lora_only", "target_modules": ("o_proj",)}, "no biases"),
    "unknown module": ("llama", {"modules_to_save": ("lm_heads",)}, "no module of the model"),
    "holds an adapted layer": ("llama", {"modules_to_save": ("mlp",)}, "holds an adapted layer"),
    "tied head": ("phi4-mini", {"modules_to_save": ("lm_head",)}, "cannot be trained as a whole"),
    "tied embedding": ("gpt2", {"modules_to_save": ("wte",)}, "cannot be trained as a whole"),
    "no token": ("llama", {"trainable_token_indices": (3, VOCAB)}, "is no token"),
    "twice": ("llama", {"trainable_token_indices": (3, 3)}, "twice"),
    "rows and whole": (
        "llama", {"trainable_token_indices": (3,), "modules_to_save": ("embed_tokens",)}, "trained twice"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_whole_is_refused_before_anything_changes(case):
    name, settings, what = REFUSED[case]
    model = tiny_model(name)
    with pytest.raises(SettingsError, match=what) as caught:
        attach(model, LoraSettings(**settings), seed=0)
    assert caught.value.where in settings
    assert caught.value.do
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def folder(tmp_path):
    settings = LoraSettings(
        rank=2, target_modules=("q_proj",), modules_to_save=("lm_head",), trainable_token_indices=(5, 9)
    )
    save_adapter(attach(tiny_model("llama"), settings, seed=0), tmp_path, base_name="x", metadata={})
    return tmp_path


def test_what_looks_at_updates_alone_refuses_it_with_a_way_out(folder, tmp_path):
    for refused in (
        lambda: read_adapter(folder),
        lambda: MixedLayers(tiny_model("llama")).check(read_peft(folder), "adapter 'x'"),
        lambda: write_adapter(read_peft(folder), tmp_path / "x.pt", "loralib"),
        lambda: write_adapter(read_peft(folder), tmp_path / "mlx", "mlx"),
        lambda: read_peft(folder).folded(),
    ):
        with pytest.raises(AdapterError, match="more than updates") as caught:
            refused()
        assert "adapter merge" in caught.value.do
    assert read_adapter(folder, takes_whole=True).whole.keys() == {
        "lm_head.weight", "model.embed_tokens.trainable_tokens_delta"
    }  # fmt: skip


def edited(folder, change, **config):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


HEAD = "base_model.model.lm_head.weight"
NORM = "base_model.model.norm.weight"
FAULTS = {
    "head missing": (lambda w: w.pop(HEAD), {}, AdapterError, "no weights of 'lm_head'"),
    "other shape": (lambda w: w.update({HEAD: torch.ones(9, 32)}), {}, IncompatibleLowRankAdapter, "lm_head"),
    "NaN": (lambda w: w[HEAD].fill_(float("nan")), {}, AdapterError, "NaN"),
    "not in the config": (lambda w: None, {"modules_to_save": None}, AdapterError, "unknown meaning"),
    "no such bias": (lambda w: None, {"bias": "everything"}, AdapterError, "usable value"),
    "another module": (
        lambda w: w.update({NORM: torch.ones(32)}), {}, AdapterError, "unknown meaning"
    ),
    "rows without indices": (
        lambda w: None, {"trainable_token_indices": None}, AdapterError, "unknown meaning"
    ),
    "fewer rows than indices": (
        lambda w: None, {"trainable_token_indices": [5]}, IncompatibleLowRankAdapter, "not as the base has it"
    ),
    "rows of two layers": (
        lambda w: None, {"trainable_token_indices": {"a": [1], "b": [2]}}, AdapterError, "usable value"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unsound_file_is_refused_and_nothing_attached(folder, fault):
    change, config, error, match = FAULTS[fault]
    edited(folder, change, **config)
    model = tiny_model("llama")
    with pytest.raises(error, match=match):
        load_adapter(model, folder)
    assert {n: type(m) for n, m in model.named_modules()} == {
        n: type(m) for n, m in tiny_model("llama").named_modules()
    }
