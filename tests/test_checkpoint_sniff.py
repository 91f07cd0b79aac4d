from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from distbn_convert.checkpoint.sniff import Kind, sniff
from distbn_convert.errors import CheckpointError, FileAccessError, ReadError, RefusedError


def state() -> dict[str, torch.Tensor]:
    return nn.BatchNorm1d(3).state_dict()


def torch_bytes(value: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def zip_bytes(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("tensors"))
    return stream.getvalue()


def numpy_bytes(save_function: object) -> bytes:
    stream = io.BytesIO()
    save_function(stream, np.zeros(3))  # type: ignore[operator]
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.safetensors", "a.index.json.pt", "a"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (torch_bytes(state()), Kind.TORCH_ZIP),
        (torch_bytes({"epoch": 1}), Kind.TORCH_ZIP),
        (save(state()), Kind.SAFETENSORS),
        (save(state(), {"format": "pt"}), Kind.SAFETENSORS),
        (save({}), Kind.SAFETENSORS),
        *(
            (
                torch_bytes(
                    state(), _use_new_zipfile_serialization=False, pickle_protocol=protocol
                ),
                Kind.TORCH_LEGACY,
            )
            for protocol in (2, 3, 4, 5)
        ),
    ],
)
def test_a_file_is_told_by_its_content_not_by_its_name(
    tmp_path: Path, name: str, content: bytes, kind: Kind
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to(name)
    assert sniff(tmp_path / name) is kind
    assert sniff(str(tmp_path / "link")) is kind


@pytest.mark.parametrize("length", [640, 1408, 0x7B20])  # as the start of pickles, and of " {"
def test_the_length_of_a_header_is_not_taken_for_something_else(
    tmp_path: Path, length: int
) -> None:
    unpadded = int.from_bytes(save(state(), {"note": ""})[:8], "little")
    content = save(state(), {"note": "-" * (length - unpadded)})
    assert int.from_bytes(content[:8], "little") == length
    (tmp_path / "a.safetensors").write_bytes(content)
    assert sniff(tmp_path / "a.safetensors") is Kind.SAFETENSORS


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ([".metadata", "__0_0.distcp"], Kind.DCP),
        (["model.safetensors.index.json", "model-00001-of-00001.safetensors"], Kind.SHARDED),
        (["pytorch_model.bin.index.json"], Kind.SHARDED),
        (["model.safetensors.index.json", "model.safetensors"], Kind.SHARDED),
        (["model.safetensors", "optimizer.bin", "random_states_0.pkl"], Kind.ACCELERATE),
    ],
)
def test_a_folder_is_told_by_its_entries(tmp_path: Path, entries: list[str], kind: Kind) -> None:
    for name in entries:
        (tmp_path / name).touch()
    assert sniff(tmp_path) is kind


def test_an_index_stands_for_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": {}}, indent=2))
    assert sniff(path) is Kind.SHARDED


def test_kinds_print_as_their_names() -> None:
    assert f"{Kind.TORCH_ZIP} {Kind.DCP}" == "torch dcp"
    assert json.dumps({"format": Kind.SHARDED}) == '{"format": "sharded"}'


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 102530333\n"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", ReadError, "is empty (0 bytes); the download or the save was probably cut short"),
        (LFS, ReadError, 'is a Git LFS pointer, not a checkpoint (134 bytes); run "git lfs pull"'),
        (b"\n<!DOCTYPE html><html>", ReadError, "is a web page"),
        (b"<html><body>404</body>", ReadError, "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", ReadError, "is a web page"),
        (b'{"error": "not found"}', ReadError, "is a JSON text, not a checkpoint"),
        (b"\x00" * 5000, ReadError, "starts with 00 00 00 00 00 00 00 00 (5.0 kB)"),
        (b"\x01", ReadError, "starts with 01 (1 bytes)"),
        (b"\xff" * 8 + b"{}", ReadError, "starts with ff ff"),
        (
            gzip.compress(b"x", mtime=0),
            RefusedError,
            "is compressed with gzip; decompress it first",
        ),
        (bz2.compress(b"x"), RefusedError, "is compressed with bzip2"),
        (lzma.compress(b"x"), RefusedError, "is compressed with xz"),
        (tar_bytes(), RefusedError, "is a tar archive; unpack it first"),
        (numpy_bytes(np.save), RefusedError, "is a NumPy array (.npy)"),
        (numpy_bytes(np.savez), RefusedError, "is a NumPy archive (.npz)"),
        (zip_bytes(**{"a/readme": b""}), RefusedError, "expected data.pkl among its 1 members"),
        (zip_bytes(**{"model.pth": b""}), RefusedError, "(model.pth); if the checkpoint is inside"),
        (zip_bytes(**{"data.pkl": b""}), RefusedError, "is a zip archive, but not by torch.save"),
        (pickle.dumps(state()), RefusedError, "is a plain pickle, which can execute anything"),
        (pickle.dumps({}, 2), RefusedError, "save its state dict with torch.save"),
        (torch_bytes(state())[:-100], ReadError, "is damaged: the zip directory is missing"),
        (torch_bytes(state())[:1000], ReadError, "(file is 1,000 bytes); the download or"),
        (b"PK\x03\x04", ReadError, "is damaged: the zip directory is missing"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_sentence(
    tmp_path: Path, content: bytes, kind: type[CheckpointError], message: str
) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(kind) as caught:
        sniff(path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(f"{path} is ")
    assert text.endswith(".")
    assert "\n" not in text


def test_case_35_graphs_are_refused_with_advice(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.trace(model, torch.zeros(1, 1, 4, 4)).save(tmp_path / "script.pt")
    torch.export.save(torch.export.export(model, (torch.zeros(1, 1, 4, 4),)), tmp_path / "e.pt2")
    with pytest.raises(RefusedError, match=r"script\.pt is a TorchScript archive; .* state dict"):
        sniff(tmp_path / "script.pt")
    with pytest.raises(RefusedError, match=r"e\.pt2 is by torch\.export .* state dict"):
        sniff(tmp_path / "e.pt2")


def test_a_zip_with_two_members_of_one_name_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("archive/data.pkl", b"")
    with pytest.raises(ReadError, match=r"lists 'archive/data\.pkl' twice"):
        sniff(path)


def test_a_folder_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "last.pth").touch()
    with pytest.raises(ReadError, match=r"without a checkpoint: .* its 1 entries; give the file"):
        sniff(tmp_path)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("__0.metadata", "use_collectives=False"),
        ("shard-00001-model-00001-of-00001.safetensors", "save_distributed=True"),
    ],
)
def test_a_folder_that_each_rank_wrote_for_itself_is_refused_with_the_reason(
    tmp_path: Path, name: str, option: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RefusedError, match=f"each rank saved its .*{option}.*; .* without that"):
        sniff(tmp_path)


def test_a_folder_with_two_checkpoints_asks_for_one(tmp_path: Path) -> None:
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(RefusedError, match=r"holds 2 sharded checkpoints .* give the index"):
        sniff(tmp_path)
    assert sniff(tmp_path / "pytorch_model.bin.index.json") is Kind.SHARDED


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "fifo", tmp_path / "socket", "/dev/null"):
        with pytest.raises(RefusedError, match="is not a regular file"):
            sniff(path)


def test_what_cannot_be_read_is_told_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("none.pth", "dangling"):
        with pytest.raises(FileAccessError, match="does not exist; check the path") as caught:
            sniff(tmp_path / name)
        assert caught.value.errno == errno.ENOENT

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "secret").write_bytes(b"x")
    monkeypatch.setattr("builtins.open", refuse)  # root may read everything
    monkeypatch.setattr(os, "listdir", refuse)
    for path in (tmp_path / "secret", tmp_path):
        with pytest.raises(FileAccessError, match=r"cannot read .*: permission denied") as caught:
            sniff(path)
        assert caught.value.errno == errno.EACCES


@given(st.binary(max_size=2000), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x08" * 8]))
def test_any_bytes_end_in_a_kind_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, start: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(start + content)
    try:
        outcome = sniff(path).value
    except (ReadError, RefusedError) as error:
        outcome = str(error)
    assert outcome in ("safetensors", "torch-legacy", "torch") or outcome.startswith(f"{path} is ")


def test_sniffing_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(torch_bytes(state()))
    code = (
        "import sys; from distbn_convert.checkpoint.sniff import sniff\n"
        "print(sniff(sys.argv[1]), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.pth"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "torch False\n"
