"""Doctor names what is missing and how to get it, and says when training is impossible."""

from __future__ import annotations

import json

import pytest

from phinetune.cli import machine, main


def test_doctor_reports_this_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["is_ready"] is True
    assert report["num_cores"] >= 1
    assert report["dtype"] in ("float32", "bfloat16")
    assert report["dtype"] in report["dtype_reason"]
    assert report["network"] == "not used: HF_HUB_OFFLINE is set"


def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "PACKAGES", (*machine.PACKAGES, ("no-such-package", "", "a test")))
    assert main.run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "missing: no-such-package" in out
    assert "-m pip install no-such-package" in out
    assert "Ready" not in out


def test_an_optional_package_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "PACKAGES", (*machine.PACKAGES, ("no-such-package", "bench", "a test")))
    assert main.run(["doctor"]) == 0
    assert "Ready" in capsys.readouterr().out
