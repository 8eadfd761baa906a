"""`.pt` files: PyTorch and this project read each other's; a file that wants to run something never does."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile

import loralib
import pytest
import torch
from torch import nn

from phinetune.base.errors import AdapterError
from phinetune.lora.torch_archive import read_torch_archive, write_torch_archive

KINDS = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.uint8,
]


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"of {kind}": (torch.randn(3, 4, generator=generator) * 9).to(kind) for kind in KINDS}
    whole = torch.randn(4, 6, generator=generator)
    return tensors | {
        "turned": whole.t(),
        "part": whole[1:3, 2:],
        "empty": torch.empty(0, 3),
        "one": torch.tensor(2.5),
    }


def same(one, two):
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert tensor.dtype == two[key].dtype
        assert torch.equal(tensor, two[key])


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_pytorch_writes_is_read(tmp_path, protocol):
    torch.save(some_tensors(), tmp_path / "x.pt", pickle_protocol=protocol)
    same(read_torch_archive(tmp_path / "x.pt"), some_tensors())


def test_a_state_dict_with_parameters_and_notes_is_read(tmp_path):
    model = nn.Sequential(loralib.Linear(5, 4, r=2), nn.Linear(4, 3))
    for content in (
        model.state_dict(),
        dict(model.named_parameters()),
        {"model_state_dict": model.state_dict()},
    ):
        torch.save(content, tmp_path / "x.pt")
        same(read_torch_archive(tmp_path / "x.pt"), {k: v.detach() for k, v in model.state_dict().items()})


def test_pytorch_reads_what_we_write(tmp_path):
    write_torch_archive(tmp_path / "x.pt", some_tensors())
    same(torch.load(tmp_path / "x.pt", weights_only=True), some_tensors())
    same(read_torch_archive(tmp_path / "x.pt"), some_tensors())


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "executed"),)


def archive_with(path, program, **records):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)


HOSTILE = {
    "a call": lambda d: pickle.dumps({"a": Evil(d)}, protocol=2),
    "a call, newer protocol": lambda d: pickle.dumps({"a": Evil(d)}, protocol=4),
    "builtins": lambda d: b"\x80\x02c__builtin__\neval\n(X\x05\x00\x00\x001 + 1tR.",
    "torch's own door": lambda d: b"\x80\x02ctorch\nload\n(X\x01\x00\x00\x00xtR.",
    "an object": lambda d: b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an instance": lambda d: b"(icollections\nOrderedDict\n.",
    "a state of a list": lambda d: b"\x80\x02]}b.",
    "calling a dict": lambda d: b"\x80\x02})R.",
    "an endless stack": lambda d: b"\x80\x02" + b"}" * 50 + b".",
    "cut off": lambda d: pickle.dumps({"a": 1}, protocol=2)[:-4],
    "no program": lambda d: b"",
    "not a dict": lambda d: pickle.dumps([1, 2], protocol=2),
    "numbers": lambda d: pickle.dumps({"a": 1}, protocol=2),
    "an unknown memo": lambda d: b"\x80\x02h\x07.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_refused_and_nothing_runs(tmp_path, name):
    path = tmp_path / "x.pt"
    archive_with(path, HOSTILE[name](tmp_path))
    with pytest.raises(AdapterError, match="cannot be read safely") as caught:
        read_torch_archive(path)
    assert not (tmp_path / "executed").exists()
    assert str(path) == caught.value.where
    assert "weights_only=True" in caught.value.do


def test_the_refusal_names_what_the_file_wanted_to_run(tmp_path):
    archive_with(tmp_path / "x.pt", HOSTILE["a call"](tmp_path))
    with pytest.raises(AdapterError) as caught:
        read_torch_archive(tmp_path / "x.pt")
    assert "mkdir" in caught.value.why


def tensor_program(size, stride, offset=0, entries=4):
    class Storage:
        pass

    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    pickler.persistent_id = lambda x: (
        ("storage", torch.FloatStorage, "0", "cpu", entries) if isinstance(x, Storage) else None
    )

    class Tensor:
        def __reduce__(self):
            arguments = (Storage(), offset, size, stride, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    pickler.dump({"a": Tensor()})
    return buffer.getvalue()


def test_a_tensor_that_fits_its_storage_is_read(tmp_path):
    archive_with(tmp_path / "x.pt", tensor_program((2, 2), (2, 1)), **{"data/0": bytes(16)})
    assert torch.equal(read_torch_archive(tmp_path / "x.pt")["a"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    "arguments",
    [
        ((2, 3), (3, 1)), ((1 << 40, 1 << 20), (0, 0)), ((2, 2), (2, 1), 1), ((2, 2), (2, 1), -1),
        ((-2, -2), (2, 1)), ((2, 2), (-2, 1)), ((2, 2), (2, 1), 0, 5), ((2, 2), (100, 1)),
        ((1, 1), (1, 1), 1 << 80),
    ],
)  # fmt: skip
def test_a_tensor_beyond_its_storage_is_refused(tmp_path, arguments):
    archive_with(tmp_path / "x.pt", tensor_program(*arguments), **{"data/0": bytes(16)})
    with pytest.raises(AdapterError, match="cannot be read safely"):
        read_torch_archive(tmp_path / "x.pt")


def test_other_files_are_refused_with_the_line_that_converts_them(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match="cannot be read safely") as caught:
        read_torch_archive(path)
    assert "old.pt" in caught.value.do
    assert "old.safetensors" in caught.value.do
    torch.save({"a": torch.ones(2)}, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(AdapterError, match="cannot be read safely"):
        read_torch_archive(path)


def test_compressed_records_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(AdapterError, match="cannot be read safely"):
        read_torch_archive(tmp_path / "x.pt")
