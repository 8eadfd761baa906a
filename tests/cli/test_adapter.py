"""`phinetune adapter`: show, convert, merge, add and check, on a real run's adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from phinetune.cli import main
from phinetune.lora.forms import read_adapter


def run(*arguments: object) -> int:
    return main.run(["adapter", *map(str, arguments)])


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run(*arguments, "--json") == 0
    return dict(json.loads(capsys.readouterr().out))


def test_show_tells_layers_ranks_and_base(
    run_folder: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = as_json(capsys, "show", run_folder)
    assert (record["form"], record["rank"], record["alpha"]) == ("peft", 4, 8.0)
    assert record["base"] == str(tiny_model)
    assert {row["target"]: row["layers"] for row in record["targets"]} == dict.fromkeys(
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), 2
    )
    assert sum(row["parameters"] for row in record["targets"]) == record["num_parameters"]
    assert run("show", run_folder / "adapter") == 0
    out = capsys.readouterr().out
    for part in ("qkv_proj", "rank", "trained", "phinetune adapter check"):
        assert part in out


def test_check_compares_with_the_base_and_lists_the_engines(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = as_json(capsys, "check", run_folder)
    assert record["is_sound"]
    assert record["fits_base"]
    assert [row["engine"] for row in record["engines"]] == [
        "vLLM", "llama.cpp", "Ollama", "ONNX Runtime GenAI", "MLX", "PEFT"
    ]  # fmt: skip
    assert run("check", run_folder) == 0
    assert "every layer fits" in capsys.readouterr().out


def test_an_adapter_goes_through_every_form_and_back(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place: Path = run_folder
    for form, name in (("single", "a.safetensors"), ("mlx", "mlx"), ("loralib", "a.pt"), ("peft", "peft")):
        options = ["--alpha", "8"] if place.suffix == ".pt" else []
        record = as_json(capsys, "convert", place, tmp_path / name, "--to", form, *options)
        assert record["told"] == ("lora_alpha=8" if form == "loralib" else "")
        place = tmp_path / name
    first, again = read_adapter(run_folder / "adapter"), read_adapter(place)
    assert all((again.updates[name].b_OR == update.b_OR).all() for name, update in first.updates.items())


def test_what_a_reader_must_be_told_is_told_and_can_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from made_up_adapters import made_up

    from phinetune.lora.forms import write_adapter

    write_adapter(made_up("gpt2", alpha=8.0), tmp_path / "gpt2", "peft")
    told = as_json(capsys, "convert", tmp_path / "gpt2", tmp_path / "a.pt", "--to", "loralib")["told"]
    assert told == "lora_alpha=8, fan_in_fan_out=True"
    assert run("convert", tmp_path / "gpt2", tmp_path / "b.pt", "--to", "loralib") == 0
    assert f"check {tmp_path / 'b.pt'} --alpha 8 --fan-in-fan-out" in " ".join(
        capsys.readouterr().out.split()
    )
    as_json(capsys, "convert", tmp_path / "a.pt", tmp_path / "back", "--alpha", "8", "--fan-in-fan-out")
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("gpt2", "back")]
    assert configs[0]["fan_in_fan_out"] is configs[1]["fan_in_fan_out"] is True


def test_layouts_are_converted_by_the_bases_config(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json(capsys, "convert", run_folder, tmp_path / "split", "--layout", "split")
    split = as_json(capsys, "show", tmp_path / "split")
    assert {row["target"] for row in split["targets"]} >= {"q_proj", "k_proj", "v_proj", "gate_proj"}
    assert run("check", tmp_path / "split") == 2
    shown = capsys.readouterr()
    assert "does not have" in shown.err
    assert "--layout fused" in shown.err
    assert "are fused, those of the adapter are not" in " ".join(shown.out.split())
    assert run("check", tmp_path / "split", "--json") == 2
    record = json.loads(capsys.readouterr().out)
    assert record["fits_base"] is None
    do = {row["engine"]: row["do"] for row in record["engines"]}
    assert {name for name, text in do.items() if "--layout fused" in text} == set(do) - {"ONNX Runtime GenAI"}
    as_json(capsys, "convert", tmp_path / "split", tmp_path / "fused", "--layout", "fused")
    assert as_json(capsys, "check", tmp_path / "fused")["fits_base"]


def test_merge_reports_what_changed_and_chat_can_be_had_with_the_result(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = as_json(capsys, "merge", run_folder, tmp_path / "merged")
    assert report["logit_error"] < 1e-4
    assert report["logit_change"] > 0
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert run("merge", run_folder, tmp_path / "merged") == 2
    assert "is there already" in capsys.readouterr().err
    assert run("merge", run_folder, tmp_path / "other") == 0
    assert "greatest change of a logit" in capsys.readouterr().out


def test_what_is_taken_out_again_is_compared_with_the_base(
    run_folder: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_json(capsys, "merge", run_folder, tmp_path / "merged")
    options = ("--subtract", "--base", tmp_path / "merged")
    record = as_json(capsys, "merge", run_folder, tmp_path / "again", *options)
    assert record["is_difference_measured"]
    assert 0 <= record["base_difference"] < 1e-6
    assert run("merge", run_folder, tmp_path / "third", *options) == 0
    assert "difference of a weight from the base's" in " ".join(capsys.readouterr().out.split())
    assert run("merge", run_folder, tmp_path / "fourth", "--subtract", "--base", tiny_model) == 2
    assert "is not in this model" in capsys.readouterr().err


def test_adapters_are_added_and_cut(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run("add", run_folder, run_folder, "--out", tmp_path / "sum", "--factor", "2", "--factor", "-1") == 0
    )
    assert as_json(capsys, "show", tmp_path / "sum")["rank"] == 8
    assert run("add", run_folder, run_folder, "--out", tmp_path / "cut", "--rank", "4") == 0
    assert as_json(capsys, "show", tmp_path / "cut")["rank"] == 4
    assert run("add", run_folder, run_folder, "--out", tmp_path / "svd", "--method", "svd") == 0
    assert as_json(capsys, "show", tmp_path / "svd")["rank"] == 4
    assert run("add", run_folder, run_folder, "--out", tmp_path / "linear", "--method", "linear") == 0
    assert as_json(capsys, "show", tmp_path / "linear")["rank"] == 4
    cut, first = read_adapter(tmp_path / "cut"), read_adapter(run_folder / "adapter")
    for name, update in cut.updates.items():
        assert (update.delta_OI() - 2 * first.updates[name].delta_OI()).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "nowhere"), "there is no adapter here"),
        (("convert", "RUN", "OUT", "--to", "peff"), "write peft"),
        (("convert", "RUN", "OUT", "--layout", "fuse"), "write fused"),
        (("convert", "RUN", "OUT", "--merged", "qkv=a"), "does not say the parts"),
        (("add", "RUN", "--out", "OUT", "--method", "tie"), "--method cannot be 'tie'"),
        (("add", "RUN", "--out", "OUT", "--factor", "1", "--factor", "2"), "one factor"),
        (("merge", "RUN", "OUT", "--base", "nowhere/at/all"), "no model folder"),
        (("merge", "RUN", "OUT", "--subtract"), "name the merged model"),
    ],
)
def test_wrong_words_are_refused_without_a_trace(
    run_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    places = {"RUN": run_folder, "OUT": tmp_path / "out"}
    assert run(*(places.get(word, word) for word in arguments)) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused_with_the_line_that_converts_it(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(run_folder / "adapter", folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n.")
    assert run("check", folder) == 2
    assert run("check", folder / "adapter_model.bin", "--alpha", "8") == 2
    assert "weights_only=True" in " ".join(capsys.readouterr().err.split())
