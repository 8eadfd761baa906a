"""The table of engines says what each engine's source says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_up_adapters import made_up

from phinetune.lora.servability import servability


def answers(weights, form="peft", model_type="phi3"):
    return {verdict.engine: verdict for verdict in servability(weights, form, model_type)}


def test_a_plain_adapter_of_phi_runs_in_vllm_as_it_is_and_elsewhere_after_conversion():
    found = answers(made_up("phi3", rank=16))
    assert {engine: verdict.answer for engine, verdict in found.items()} == {
        "vLLM": "as it is",
        "llama.cpp": "after conversion",
        "Ollama": "after conversion",
        "ONNX Runtime GenAI": "no",
        "MLX": "after conversion",
        "PEFT": "as it is",
    }
    assert "fused" in found["ONNX Runtime GenAI"].why


@pytest.mark.parametrize(("rank", "setting"), [(17, 32), (32, 32), (100, 128), (300, 320)])
def test_vllm_is_told_the_smallest_of_its_ranks_that_holds_the_adapter(rank, setting):
    found = answers(made_up("phi3", rank=rank, targets=("o_proj",)))["vLLM"]
    assert found.answer == "with a setting"
    assert found.do.endswith(f"--max-lora-rank {setting}")


def test_a_rank_beyond_vllms_greatest_must_be_cut():
    assert "--rank 512" in answers(made_up("phi3", rank=513, targets=("o_proj",)))["vLLM"].do


def test_separate_projections_on_a_fused_base_must_be_fused_first():
    found = answers(made_up("llama"), model_type="phi3")
    for engine in ("vLLM", "llama.cpp", "Ollama", "MLX", "PEFT"):
        assert found[engine].answer == "after conversion"
        assert found[engine].do == "adapter convert --layout fused"
    assert answers(made_up("llama"), model_type="llama")["vLLM"].answer == "as it is"


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"alpha_pattern": {"o_proj": 3.0}}])
def test_scales_that_llama_cpp_ignores_must_be_folded(options):
    weights = made_up("phi3", **options)
    found = answers(weights)
    assert found["vLLM"].answer == "as it is"
    for engine in ("llama.cpp", "Ollama"):
        assert "--fold" in found[engine].do
    assert "--fold" not in answers(weights.folded())["llama.cpp"].do


def test_dora_must_be_merged_everywhere_but_in_peft():
    plain = made_up("phi3")
    dora = plain.with_updates(
        {name: replace(u, magnitude_O=torch.ones(u.out_features)) for name, u in plain.updates.items()}
    )
    found = answers(dora)
    peft = found.pop("PEFT")
    assert (peft.answer, peft.why) == ("as it is", "DoRA needs PEFT 0.9 or newer")
    for verdict in found.values():
        assert verdict.answer == "no"
        assert "adapter merge" in verdict.do


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({"use_rslora": True}, "0.8"),
        ({"rank_pattern": {"o_proj": 2}}, "0.6"),
        ({"alpha_pattern": {"o_proj": 2.0}}, "0.6"),
    ],
)
def test_peft_must_be_new_enough_for_what_the_adapter_uses(options, version):
    found = answers(made_up("phi3", **options))["PEFT"]
    assert found.answer == "as it is"
    assert f"needs PEFT {version}" in found.why


@pytest.mark.parametrize("form", ["single", "loralib", "mlx"])
def test_peft_takes_folders_of_its_own_alone(form):
    assert answers(made_up("phi3"), form)["PEFT"].do == "adapter convert --to peft"


def test_every_answer_but_a_plain_yes_says_why_and_what_to_do():
    cases = [
        (made_up("phi3", rank=600, targets=("o_proj",)), "peft", "phi3"),
        (made_up("phi3", use_rslora=True), "peft", "phi3"),
        (made_up("llama"), "peft", "phi3"),
        (made_up("llama"), "single", "llama"),
        (made_up("llama"), "mlx", ""),
        (made_up("gpt2"), "peft", "gpt2"),
        (made_up("qwen2"), "loralib", "qwen2"),
    ]
    for weights, form, model_type in cases:
        for verdict in answers(weights, form, model_type).values():
            assert verdict.do
            assert verdict.why or verdict.answer == "as it is"


def test_gpt2s_transposed_layers_run_in_peft_alone():
    found = answers(made_up("gpt2"), model_type="gpt2")
    for engine in ("vLLM", "llama.cpp", "Ollama", "MLX"):
        assert found[engine].answer == "no"
        assert "adapter merge" in found[engine].do
    assert found["PEFT"].answer == "as it is"


def test_ollama_reads_whole_alphas_of_the_architectures_it_converts():
    for model_type in ("llama", "mistral", "gemma2"):
        assert answers(made_up("llama"), model_type=model_type)["Ollama"].answer == "as it is"
    found = answers(made_up("llama", alpha=7.5), model_type="llama")["Ollama"]
    assert found.answer == "after conversion"
    assert "7.5" in found.why


def test_ollama_reads_the_folder_of_llama_and_an_mlx_folder_runs_in_mlx():
    assert answers(made_up("llama"), model_type="llama")["Ollama"].answer == "as it is"
    assert "not known" in answers(made_up("llama"), model_type="")["Ollama"].why
    found = answers(made_up("llama"), "mlx", "llama")
    assert found["MLX"].answer == "as it is"
    assert found["vLLM"].do == found["llama.cpp"].do == "adapter convert --to peft"
    assert answers(made_up("gpt2"), model_type="gpt2")["MLX"].answer == "no"
