"""A merged folder answers as base and adapter side by side; what does not belong together is not written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up_adapters import logits, logits_with, made_up
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from phinetune.base.errors import AdapterError, IncompatibleLowRankAdapter, ModelError, UserError
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import save_adapter
from phinetune.lora.fusing import fuse, split
from phinetune.lora.peft_format import read_peft
from phinetune.models.catalog import weights_sha256
from phinetune.models.merged import check_fit, merge, model_type_of, part_sizes


def base_folder(tmp_path, name, dtype=torch.float32, **options):
    model = tiny_model(name).to(dtype)
    model.save_pretrained(tmp_path / "base", **options)
    return tmp_path / "base"


def free(weights):
    """Without the hash of a base that was made up."""
    return replace(weights, metadata={})


@pytest.mark.parametrize("name", ["phi3", "phi4-mini", "llama", "gpt2"])
def test_the_merged_model_answers_as_the_adapter(tmp_path, name):
    weights = free(made_up(name))
    base = base_folder(tmp_path, name)
    (base / "tokenizer.json").write_text("{}")
    report = merge(weights, str(base), tmp_path / "merged", where="x")
    assert report.num_layers == len(weights.updates)
    assert set(report.weight_change) == set(weights.target_modules)
    assert report.logit_change > 0
    assert report.logit_error < 1e-4 < report.logit_change
    assert report.rounding == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits_with(weights, name), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    changes = {name: update.delta_OI().abs().max() for name, update in weights.updates.items()}
    assert max(report.weight_change.values()) == pytest.approx(float(max(changes.values())), rel=1e-4)


@pytest.mark.parametrize(("name", "says_transposed"), [("gpt2", False), ("llama", True)])
def test_which_way_a_weight_lies_is_read_from_the_base_not_from_the_adapter(tmp_path, name, says_transposed):
    targets = ("c_attn", "c_proj") if name == "gpt2" else ("q_proj", "k_proj")  # square ones among them
    weights = free(made_up(name, targets=targets))
    wrong = replace(weights, is_transposed=says_transposed)
    report = merge(wrong, str(base_folder(tmp_path, name)), tmp_path / "merged", where="x")
    assert report.logit_error < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits_with(weights, name), rtol=1e-4, atol=1e-4)


def test_a_base_of_an_unknown_architecture_is_refused(tmp_path):
    base = base_folder(tmp_path, "phi3")
    (base / "config.json").write_text('{"model_type": "made-up"}')
    with pytest.raises(ModelError, match="architecture is not known"):
        merge(free(made_up("phi3")), str(base), tmp_path / "merged", where="x")
    assert not (tmp_path / "merged").exists()


def test_shards_are_merged_one_by_one_and_keep_their_index(tmp_path):
    weights = free(made_up("phi3"))
    base = base_folder(tmp_path, "phi3", max_shard_size="20kB")
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 2
    report = merge(weights, str(base), tmp_path / "merged", where="x")
    assert report.logit_error < 1e-4
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors")) == shards
    untouched = "model.embed_tokens.weight"
    for shard in shards:
        before, after = (load_file(folder / shard) for folder in (base, tmp_path / "merged"))
        assert before.keys() == after.keys()
        if untouched in before:
            assert torch.equal(before[untouched], after[untouched])


def test_a_bfloat16_base_is_rounded_once_from_float32(tmp_path):
    weights = free(made_up("phi3", targets=("o_proj",)))
    base = base_folder(tmp_path, "phi3", torch.bfloat16)
    report = merge(weights, str(base), tmp_path / "merged", where="x")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    for name, update in weights.updates.items():
        exact = before[f"{name}.weight"].float() + update.delta_OI()
        assert torch.equal(after[f"{name}.weight"], exact.to(torch.bfloat16))
        assert report.rounding >= float((after[f"{name}.weight"].float() - exact).abs().max())
    assert 0 < report.rounding < 0.02


def test_what_was_merged_can_be_taken_out_again(tmp_path):
    weights = free(made_up("phi3"))
    base = base_folder(tmp_path, "phi3")
    merge(weights, str(base), tmp_path / "merged", where="x")
    report = merge(weights, str(tmp_path / "merged"), tmp_path / "again", where="x", subtract=True)
    assert report.logit_error < 1e-4
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "again"))
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-6)


def greatest(one, two):
    files = [load_file(folder / "model.safetensors") for folder in (one, two)]
    return max(float((files[0][key].float() - files[1][key].float()).abs().max()) for key in files[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_taking_out_says_how_far_the_weights_are_from_the_bases(tmp_path, dtype):
    base, merged = base_folder(tmp_path, "phi3", dtype), tmp_path / "merged"
    weights = free(made_up("phi3"))
    merge(weights, str(base), merged, where="x")
    # Without the base at hand: a bound, which is near the truth.
    report = merge(weights, str(merged), tmp_path / "bounded", where="x", subtract=True)
    truth = greatest(base, tmp_path / "bounded")
    assert not report.is_difference_measured
    assert truth <= report.base_difference <= 8 * truth
    # With the base at hand: measured.
    named = replace(weights, base_name=str(base), metadata={"base_sha256": weights_sha256(base)})
    report = merge(named, str(merged), tmp_path / "measured", where="x", subtract=True)
    assert report.is_difference_measured
    assert report.base_difference == pytest.approx(truth, rel=1e-6)
    # An update that changes nothing goes and comes bit for bit.
    still = {name: replace(u, b_OR=torch.zeros_like(u.b_OR)) for name, u in weights.updates.items()}
    same = replace(named, updates=still)
    merge(same, str(base), tmp_path / "same", where="x")
    other = tmp_path / "moved"
    (tmp_path / "same").rename(other)
    save_file(load_file(other / "model.safetensors"), other / "model.safetensors", {"format": "pt", "a": "b"})
    assert merge(same, str(other), tmp_path / "back", where="x", subtract=True).base_difference == 0.0


def test_an_adapter_is_not_taken_out_of_its_own_base(tmp_path):
    base = base_folder(tmp_path, "phi3")
    weights = replace(made_up("phi3"), metadata={"base_sha256": weights_sha256(base)})
    with pytest.raises(AdapterError, match="is not in this model"):
        merge(weights, str(base), tmp_path / "out", where="x", subtract=True)
    assert not (tmp_path / "out").exists()


def test_another_base_is_taken_only_by_force_and_only_where_it_fits(tmp_path):
    folder = str(base_folder(tmp_path, "phi3"))
    with pytest.raises(IncompatibleLowRankAdapter, match="another base model") as caught:
        check_fit(made_up("phi3"), folder, where="x")
    assert "--force-base" in caught.value.do
    assert "bbbbbbbbbbbb" in check_fit(made_up("phi3"), folder, where="x", force_base=True)
    report = merge(made_up("phi3"), folder, tmp_path / "merged", where="x", force_base=True)
    assert "bbbbbbbbbbbb" in report.forced
    assert weights_sha256(tmp_path / "base")[:12] in report.forced
    assert report.logit_error < 1e-4
    with pytest.raises(IncompatibleLowRankAdapter, match="wrong shape"):
        merge(made_up("phi4-mini"), folder, tmp_path / "other", where="x", force_base=True)
    assert not (tmp_path / "other").exists()


def test_dora_is_merged_by_its_own_arithmetic_but_not_taken_out(tmp_path):
    plain = free(made_up("phi3", targets=("o_proj",)))
    base = base_folder(tmp_path, "phi3")
    lengths = {name: torch.linspace(1, 2, u.out_features) for name, u in plain.updates.items()}
    dora = plain.with_updates({n: replace(u, magnitude_O=lengths[n]) for n, u in plain.updates.items()})
    report = merge(dora, str(base), tmp_path / "merged", where="x")
    assert report.logit_error < 1e-4 < report.logit_change
    after = load_file(tmp_path / "merged" / "model.safetensors")
    for name, length in lengths.items():
        torch.testing.assert_close(torch.linalg.norm(after[f"{name}.weight"], dim=1), length)
    with pytest.raises(AdapterError, match="cannot be taken out"):
        merge(dora, str(tmp_path / "merged"), tmp_path / "again", where="x", subtract=True)


@pytest.mark.parametrize(("adapter", "base"), [("llama", "phi3"), ("phi3", "llama"), ("phi4-mini", "phi3")])
def test_an_adapter_of_another_base_writes_nothing(tmp_path, adapter, base):
    folder = base_folder(tmp_path, base)
    with pytest.raises(IncompatibleLowRankAdapter):
        merge(free(made_up(adapter)), str(folder), tmp_path / "merged", where="x")
    with pytest.raises(IncompatibleLowRankAdapter):
        check_fit(free(made_up(adapter)), str(folder), where="x")
    assert not (tmp_path / "merged").exists()


def test_another_bases_hash_is_refused_and_the_right_one_taken(tmp_path):
    folder = base_folder(tmp_path, "phi3")
    with pytest.raises(IncompatibleLowRankAdapter, match="another base model"):
        merge(made_up("phi3"), str(folder), tmp_path / "merged", where="x")
    right = replace(made_up("phi3"), metadata={"base_sha256": weights_sha256(folder)})
    check_fit(right, str(folder), where="x")
    merge(right, str(folder), tmp_path / "merged", where="x")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="is there already"):
        merge(free(made_up("phi3")), str(base_folder(tmp_path, "phi3")), tmp_path / "merged", where="x")


def test_an_adapter_fused_by_the_bases_config_fits_it(tmp_path):
    folder = str(base_folder(tmp_path, "phi4-mini"))
    sizes = part_sizes(folder)
    assert sizes == {"qkv_proj": (32, 16, 16), "gate_up_proj": (64, 64)}
    assert model_type_of(folder) == "phi3"
    fused = fuse(free(made_up("llama")), sizes, where="x")
    check_fit(fused, folder, where="x")
    torch.testing.assert_close(
        logits_with(split(fused, sizes, where="x"), "llama"),
        logits_with(free(made_up("llama")), "llama"),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"modules_to_save": ("lm_head", "model.norm")}),
        ("phi4-mini", {"trainable_token_indices": (9, 4)}),  # embedding and head are one
        ("gpt2", {"bias": "all"}),
    ],
)
def test_what_was_trained_whole_takes_the_place_of_the_bases_own(tmp_path, name, settings):
    base = base_folder(tmp_path, name)
    model = tiny_model(name, implementation="eager")
    adapter = attach(model, LoraSettings(rank=2, **settings), seed=0)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    (tmp_path / "adapter").mkdir()
    save_adapter(adapter, tmp_path / "adapter", base_name="x", metadata={})
    weights = read_peft(tmp_path / "adapter")
    check_fit(weights, str(base), where="x")
    report = merge(weights, str(base), tmp_path / "merged", where="x")
    assert report.logit_error < 1e-4 < report.logit_change
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(AdapterError, match="trained whole"):
        merge(weights, str(tmp_path / "merged"), tmp_path / "again", where="x", subtract=True)
    with pytest.raises(IncompatibleLowRankAdapter):
        check_fit(
            weights, str(base_folder(tmp_path / "other", "llama" if name == "gpt2" else "gpt2")), where="x"
        )


def test_rows_of_tokens_that_the_base_has_not_are_refused_before_anything_is_written(tmp_path):
    base = base_folder(tmp_path, "llama")
    weights = replace(
        free(made_up("llama")),
        whole={"model.embed_tokens.trainable_tokens_delta": torch.zeros(2, 32)},
    )
    for indices in ((3, 97), (-1, 3)):
        wrong = replace(weights, settings=replace(weights.settings, trainable_token_indices=indices))
        with pytest.raises(IncompatibleLowRankAdapter, match="tokens that the base does not have"):
            merge(wrong, str(base), tmp_path / "merged", where="x")
        assert not (tmp_path / "merged").exists()
