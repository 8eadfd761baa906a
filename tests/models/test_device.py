"""Device and type are chosen by looking, and the reason is said."""

from __future__ import annotations

import pytest
import torch

from phinetune.base.errors import SettingsError
from phinetune.models import device
from phinetune.models.device import choose


def test_what_was_asked_for_is_taken():
    chosen = choose("cpu", "bfloat16")
    assert (chosen.device.type, chosen.dtype, chosen.dtype_name) == ("cpu", torch.bfloat16, "bfloat16")
    assert choose("cpu", "float32").dtype == torch.float32


@pytest.mark.parametrize(
    ("speedup", "dtype"), [(3.0, torch.bfloat16), (1.1, torch.float32), (0.2, torch.float32)]
)
def test_auto_takes_bfloat16_only_where_it_is_faster(monkeypatch, speedup, dtype):
    monkeypatch.setattr(device, "cpu_bfloat16_speedup", lambda: speedup)
    chosen = choose("cpu", "auto")
    assert chosen.dtype == dtype
    assert f"{speedup:.1f} times" in chosen.reason


@pytest.mark.parametrize(
    ("has_cuda", "has_mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_takes_the_fastest_device_there_is(monkeypatch, has_cuda, has_mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert choose("auto", "float32").device.type == expected


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=f"'{name}' is not available"):
        choose(name)


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_without_bfloat16_computes_in_float32(monkeypatch, has_bfloat16, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert choose("cuda", "auto").dtype == dtype


def test_the_probe_measures_and_is_made_once():
    device.cpu_bfloat16_speedup.cache_clear()
    assert device.cpu_bfloat16_speedup() > 0
    assert device.cpu_bfloat16_speedup() == device.cpu_bfloat16_speedup()
    assert device.cpu_bfloat16_speedup.cache_info().misses == 1
