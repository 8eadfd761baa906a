"""Files that are damaged or made to do harm: a clear error; nothing executed, loaded or written."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_adapters import made_up, same_tensors
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from phinetune.base.errors import AdapterError, UserError
from phinetune.lora.files import load_adapter
from phinetune.lora.forms import FORMS, Told, read_adapter, write_adapter
from phinetune.lora.layers import LoraLinear
from phinetune.lora.torch_archive import write_torch_archive

NUM_CHANGES = 80  # 3,000 per form were tried once
KEY = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"
NAMES = {"peft": "adapter", "single": "x.safetensors", "loralib": "x.pt", "mlx": "mlx"}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_adapter(made_up(), tmp_path / "adapter", "peft")
    return tmp_path / "adapter"


def refused(path, told=None):
    """The error of a reader that left the model bare and wrote nothing."""
    before = sorted(path.parent.rglob("*"))
    model = tiny_model("phi3")
    with pytest.raises(AdapterError) as caught:
        read_adapter(path, told)
    if path.is_dir():
        with pytest.raises(AdapterError):
            load_adapter(model, path)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert sorted(path.parent.rglob("*")) == before
    assert str(path) in caught.value.where
    assert caught.value.do
    return caught.value


VALUES = {
    "rank infinite": {"r": float("inf")},
    "rank beyond any memory": {"r": 10**400},
    "rank a fraction": {"r": 4.7},
    "rank a truth": {"r": True},
    "no rank": {"r": None},
    "alpha too large for a number": {"lora_alpha": 10**400},
    "alpha infinite": {"lora_alpha": float("inf")},
    "alpha a truth": {"lora_alpha": True},
    "dropout of everything": {"lora_dropout": 1},
    "rsLoRA a word": {"use_rslora": "false"},
    "DoRA a word": {"use_dora": "false"},
    "a word for transposed": {"fan_in_fan_out": "no"},
    "a list for the base": {"base_model_name_or_path": ["a"]},
    "a dict of targets": {"target_modules": {"a": 1}},
    "a dict for the start": {"init_lora_weights": {}},
    "rank of a layer a fraction": {"rank_pattern": {"o_proj": 4.0}},
    "alpha of a layer infinite": {"alpha_pattern": {"o_proj": float("inf")}},
    "alpha of a layer a truth": {"alpha_pattern": {"o_proj": True}},
    "unknown type": {"peft_type": "LOHA"},
    "a list for the type": {"peft_type": ["LORA"]},
    "layers repeated": {"layer_replication": [[0, 1]]},
}


@pytest.mark.parametrize("fault", VALUES)
def test_no_value_of_a_config_is_guessed_at(folder, fault):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **VALUES[fault]}))
    assert refused(folder).what.startswith(("the adapter", "lora_A of"))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"r":' + "9" * 6000 + "}", "\0", "null", '"a"']
)
def test_a_config_that_is_no_config_is_refused(folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert refused(folder).what == "the adapter's config cannot be read"


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "[1]", "{}", "3", '{"peft_type": "LORA"}'])
def test_a_single_files_config_that_is_none_is_refused(folder, text):
    save_file(load_file(folder / WEIGHTS), folder / "x.safetensors", metadata={"adapter_config": text})
    assert "config" in refused(folder / "x.safetensors").what


@pytest.mark.parametrize(
    "kind", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
)
def test_numbers_that_no_update_is_made_of_are_refused(folder, kind):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, KEY: tensors[KEY].to(kind)}, folder / WEIGHTS)
    error = refused(folder)
    assert str(kind).removeprefix("torch.") in error.what
    assert "bfloat16" in error.why


@pytest.mark.parametrize("shape", [(4, 0), (0, 32), (1, 4, 32), (4,), ()])
def test_tensors_of_no_use_are_refused(folder, shape):
    save_file({**load_file(folder / WEIGHTS), KEY: torch.ones(shape)}, folder / WEIGHTS)
    assert "qkv_proj" in refused(folder).what


def header(content, body=bytes(16)):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape, offsets, dtype="F32"):
    return {KEY: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "longer than any file": struct.pack("<Q", 1 << 62) + b"{}",
    "a shape beyond any memory": header(entry([1 << 31, 1 << 31], [0, 16])),
    "a shape beyond any number": header(entry([1 << 63, 1 << 63], [0, 16])),
    "an offset beyond the file": header(entry([2, 2], [0, 1 << 40])),
    "two tensors in one place": header({**entry([2, 2], [0, 16]), "b": entry([2, 2], [0, 16])[KEY]}),
    "an unknown type": header(entry([2, 2], [0, 16], "I128")),
    "a type that PyTorch lacks": header(entry([4, 4], [0, 12], "F6_E2M3"), bytes(12)),
    "nested without end": header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
    "metadata that is no text": header({"__metadata__": {"a": 1}}),
    "nothing": b"",
    "half a length": b"\1\0\0",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(folder, name):
    (folder / WEIGHTS).write_bytes(HEADERS[name])
    assert refused(folder).what == "the adapter's weights cannot be read"


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_anywhere_is_refused(tmp_path, form, share):
    path = tmp_path / NAMES[form]
    write_adapter(made_up(), path, form)
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    os.truncate(file, int(share * file.stat().st_size))
    refused(path, Told(alpha=8.0))


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_a_pickle_in_the_place_of_the_weights_is_not_run(folder, name):
    (folder / WEIGHTS).unlink()
    torch.save({"a": Evil(folder)}, folder / name)
    error = refused(folder) if name == WEIGHTS else refused_bin(folder)
    assert not (folder / "executed").exists()
    assert error.what.endswith("read") or "mkdir" in error.why


def refused_bin(folder):
    with pytest.raises(AdapterError, match="cannot be read safely") as caught:
        read_adapter(folder)
    assert "weights_only=True" in caught.value.do
    return caught.value


def test_the_weights_that_older_versions_of_peft_wrote_are_read_without_running_them(folder):
    expected = read_adapter(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    assert same_tensors(read_adapter(folder), expected)


def archive(path, records, **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in records.items():
            file.writestr(name, data)


def test_an_archive_whose_sizes_are_absurd_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    write_torch_archive(path, {"a.lora_A": torch.ones(2, 2)})
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\x01\x02")  # the first entry of the zip's directory
    for claimed in (0xFFFFFFF0, 0x7FFFFFFF, 1):
        data[place + 20 : place + 28] = struct.pack("<II", claimed, claimed)
        path.write_bytes(bytes(data))
        assert "cannot be read safely" in refused(path, Told(alpha=1.0)).what


def test_a_small_archive_does_not_unfold_into_a_large_one(tmp_path):
    path = tmp_path / "bomb.pt"
    archive(path, {"archive/data.pkl": bytes(100_000_000)}, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1_000_000
    assert "compressed" in refused(path, Told(alpha=1.0)).why
    whole = torch.zeros(500, 500)
    torch.save({f"m{i}.lora_A": whole.view(500, 500) for i in range(2000)}, tmp_path / "views.pt")
    assert (tmp_path / "views.pt").stat().st_size < 3_000_000
    assert "many times as large" in refused(tmp_path / "views.pt", Told(alpha=1.0)).why


def test_names_outside_the_archive_are_never_written(tmp_path):
    path = tmp_path / "inner" / "x.pt"
    path.parent.mkdir()
    program = pickle.dumps({}, protocol=2)
    archive(path, {"../../evil/data.pkl": program, "../../evil/x": b"hi", "/tmp/evil/y": b"hi"})
    before = sorted(tmp_path.rglob("*"))
    refused(path, Told(alpha=1.0))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and devices in folders")
@pytest.mark.parametrize("name", ["adapter_config.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to nothing", "link to itself"])
def test_what_is_no_file_is_refused_at_once(folder, name, kind):
    path = folder / name
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "link to nothing":
            path.symlink_to(folder / "nowhere")
        case "link to itself":
            path.symlink_to(path)
    refused(folder)


def test_a_config_larger_than_any_is_not_read(folder):
    os.truncate(folder / "adapter_config.json", 1 << 40)  # takes no room on the disk
    assert "bytes" in refused(folder).why


def test_links_to_whole_files_are_followed_as_in_the_cache_of_the_hub(folder, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert same_tensors(read_adapter(snapshot), read_adapter(folder))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_through_a_link(tmp_path, form):
    path, goal = tmp_path / NAMES[form], tmp_path / "elsewhere"
    path.symlink_to(goal)
    with pytest.raises(UserError, match="is there already"):
        write_adapter(made_up(), path, form)
    assert path.is_symlink()
    assert not goal.exists()


def test_a_base_named_by_a_hostile_config_is_a_name_and_nothing_more(folder):
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text()), "base_model_name_or_path": "../../../etc/passwd"}
    content["auto_mapping"] = {"base_model_class": "x", "parent_library": "os; import shutil"}
    path.write_text(json.dumps(content))
    assert read_adapter(folder).base_name == "../../../etc/passwd"
    assert not Path("etc").exists()


@pytest.mark.parametrize("form", FORMS)
def test_changed_bytes_give_an_adapter_or_an_error_and_nothing_else(tmp_path, form):
    path = tmp_path / NAMES[form]
    write_adapter(made_up(targets=("o_proj",), rank=1), path, form)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    random = np.random.default_rng(0)
    num_refused = 0
    for number in range(NUM_CHANGES):
        file = files[number % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        # Half of them near the beginning, where the structure is.
        places = random.integers(
            0, min(len(whole), 400) if number % 4 < 2 else len(whole), size=1 + number % 3
        )
        for place in places:
            damaged[place] = random.integers(0, 256)
        file.write_bytes(bytes(damaged))
        try:
            read_adapter(path, Told(alpha=8.0))
        except AdapterError:
            num_refused += 1
        file.write_bytes(whole)
    assert num_refused > NUM_CHANGES // 10
