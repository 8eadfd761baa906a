"""The pages on LoRA and on adapter files say what the code does: their commands and their example run."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import phinetune.lora as lora
from phinetune.cli import main
from phinetune.lora.attach import LoraSettings, attach
from phinetune.lora.files import save_adapter
from phinetune.lora.forms import Told, read_adapter
from phinetune.lora.loralib_format import MergedParts
from phinetune.models.loading import load_base

DOCS = Path(__file__).parents[2] / "docs"


def test_every_command_of_the_conversion_table_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = load_base("demo", device_name="cpu", dtype="float32")
    adapter = attach(base.model, LoraSettings(rank=16, alpha=32.0), seed=0)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.01)
    Path("my-adapter").mkdir()
    metadata = {"base_sha256": base.sha256, "base_name": "demo"}
    save_adapter(adapter, Path("my-adapter"), base_name="demo", metadata=metadata)
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    commands = re.findall(r"\| `phinetune ([^`]+)` \|", page)
    assert len(commands) >= 20
    for command in commands:
        assert main.run(shlex.split(command)) == 0, (command, capsys.readouterr().err)
    first = read_adapter(Path("my-adapter"))
    for name in ("from-single", "from-loralib", "from-mlx", "fused"):
        again = read_adapter(Path(name))
        assert again.updates.keys() == first.updates.keys()
        for path, update in first.updates.items():
            assert torch.equal(again.updates[path].a_RI, update.a_RI), (name, path)
            assert torch.equal(again.updates[path].b_OR, update.b_OR), (name, path)
    parts = Told(alpha=32.0, merged={"qkv_proj": MergedParts.from_text("256,256,256")})
    for other in (read_adapter(Path("parts.pt"), parts), read_adapter(Path("from-parts"))):
        for path, update in first.updates.items():
            torch.testing.assert_close(
                other.updates[path].delta_OI(), update.delta_OI(), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("page", ["lora.md", "formats.md"])
def test_the_files_that_a_page_names_are_there(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    root = DOCS.parent
    named = re.findall(r"`((?:lora|tests|models|cli)/[\w/.]+\.py)`", text)
    assert named
    for name in named:
        assert (root / name).is_file() or (root / "src" / "phinetune" / name).is_file(), name


def test_the_example_of_the_page_on_lora_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "lora.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "example.py"))
    assert sorted(names["saved"]) == ["0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B"]
    assert {name for name, p in names["model"].named_parameters() if p.requires_grad} == set(names["saved"])


SHAPES = {
    "`Linear`": (lora.Linear(6, 4, r=2), (4, 6), (2, 6), (4, 2)),
    "`Linear`, `fan_in_fan_out`": (lora.Linear(6, 4, r=2, fan_in_fan_out=True), (6, 4), (2, 6), (4, 2)),
    "`Embedding`": (lora.Embedding(9, 4, r=2), (9, 4), (2, 9), (4, 2)),
    "`MergedLinear`, e parts enabled": (
        lora.MergedLinear(6, 12, r=2, enable_lora=[True, False, True]), (12, 6), (4, 6), (8, 2)
    ),
    "`Conv1d`, `Conv2d`, `Conv3d`, width k, d directions": (
        lora.Conv3d(6, 4, 3, r=2, groups=2), (4, 3, 3, 3, 3), (6, 18), (18, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", SHAPES)
def test_the_shapes_of_the_table_are_those_of_the_layers(row):
    assert f"| {row} |" in (DOCS / "lora.md").read_text(encoding="utf-8")
    layer, weight, a, b = SHAPES[row]
    assert tuple(layer.frozen.shape) == weight
    assert tuple(layer.lora_A.shape) == a
    assert tuple(layer.lora_B.shape) == b
    assert layer.delta().shape == layer.frozen.shape
