"""The steps of loralib's README, run twice: once as they stand, once with nothing changed but the import."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "shared" / "loralib_script.py"
THEIRS, OURS = "import loralib as lora", "import phinetune.lora as lora"


def results_of(
    import_line: str, folder: Path, *, bias: str, seed: int = 0, found: Path | None = None
) -> dict[str, torch.Tensor]:
    """Everything the script found, run with this import."""
    script = SCRIPT.read_text(encoding="utf-8")
    assert script.count(THEIRS) == script.count("import loralib") == 1
    folder.mkdir()
    path = folder / "script.py"
    path.write_text(script.replace(THEIRS, import_line), encoding="utf-8")
    names = {"FOLDER": folder, "FOUND": found or folder, "BIAS": bias, "SEED": seed}
    return dict(runpy.run_path(str(path), init_globals=names)["results"])


def close(one, two, name):
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_documented_use_gives_the_same_after_one_changed_import(tmp_path, bias):
    theirs = results_of(THEIRS, tmp_path / "theirs", bias=bias)
    ours = results_of(OURS, tmp_path / "ours", bias=bias)
    assert sorted(ours) == sorted(theirs)
    assert len(theirs) > 60
    for name, value in theirs.items():
        close(ours[name], value, name)
    assert (ours["trained, merged"] - ours["trained, training"]).abs().max() > 1e-4, (
        "dropout is on in training"
    )
    assert torch.equal(ours["trained, merged"], ours["loaded, merged"])


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize(("writer", "reader"), [(THEIRS, OURS), (OURS, THEIRS)], ids=["theirs", "ours"])
def test_the_checkpoints_of_one_library_are_those_of_the_other(tmp_path, writer, reader, bias):
    written = results_of(writer, tmp_path / "written", bias=bias, seed=5)
    read = results_of(reader, tmp_path / "read", bias=bias, found=tmp_path / "written")
    close(read["loaded, merged"], written["trained, merged"], "the output")
    assert (read["trained, merged"] - written["trained, merged"]).abs().max() > 1e-2
