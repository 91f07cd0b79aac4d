from __future__ import annotations

import io
import os
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata

from distbn_convert.checkpoint import convert_checkpoint
from distbn_convert.checkpoint.dcp import read_dcp
from distbn_convert.errors import (
    CheckpointError,
    ConfigurationError,
    OutputExistsError,
    ReadError,
    RefusedError,
)

from .dcp_folders import (
    BN_KEYS,
    Payload,
    convert,
    overwrite_records,
    records,
    save,
    training_state,
    virtual,
)


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load into a state of the right structure, whose tensors are made NaN or -1 first."""
    for value in state["model"].values():
        value.fill_(-1)
    state["epoch"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder)
    return state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(training_state(), tmp_path / "plain")
    return tmp_path / "plain"


def test_every_tensor_of_a_real_folder_is_read(folder: Path) -> None:
    state, read = training_state(), read_dcp(folder)
    tensors = {f"model.{name}": tensor for name, tensor in state["model"].items()}
    header = read.header
    assert tensors.keys() <= header.tensors.keys()
    assert any("momentum_buffer" in name for name in header.tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read.read_tensor(name), tensor)
        assert header.tensors[name].shape == tuple(tensor.shape)
        assert header.tensors[name].dtype == ("I64" if tensor.dtype == torch.int64 else "F32")
        assert header.tensors[name].nbytes == tensor.nbytes


def test_a_converted_folder_is_loaded_by_torch_with_everything_else_unchanged(
    folder: Path, tmp_path: Path
) -> None:
    state = training_state()
    (folder / "notes.txt").write_text("kept")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    steps: list[tuple[int, int]] = []
    convert(folder, tmp_path / "virtual", virtual(state), progress=lambda *s: steps.append(s))
    loaded, expected = load(training_state(4), tmp_path / "virtual"), training_state(4)
    for name, tensor in expected["model"].items():
        assert torch.equal(loaded["model"][name], tensor), name
    assert loaded["epoch"] == 3
    assert loaded["args"] == {"lr": 0.1}
    for number, buffers in expected["optimizer"]["state"].items():
        momentum = loaded["optimizer"]["state"][number]["momentum_buffer"]
        assert torch.equal(momentum, buffers["momentum_buffer"])
    assert (tmp_path / "virtual" / "notes.txt").read_text() == "kept"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert steps[-1][0] == steps[-1][1]
    assert sorted(os.listdir(tmp_path)) == ["plain", "virtual"]


def test_the_way_back_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    state = training_state()
    plain = {key: read_dcp(folder).read_tensor(key) for key in BN_KEYS}
    convert(folder, tmp_path / "virtual", virtual(state))
    convert(tmp_path / "virtual", tmp_path / "back", plain)
    assert (tmp_path / "back/__0_0.distcp").read_bytes() == (folder / "__0_0.distcp").read_bytes()
    back, original = records(tmp_path / "back"), records(folder)
    assert back == original
    assert list(back.storage_data) == list(original.storage_data)
    assert list(back.state_dict_metadata) == list(original.state_dict_metadata)
    assert type(back.storage_meta.checkpoint_id) is type(original.storage_meta.checkpoint_id)


def test_pieces_that_are_no_tensors_are_copied_unopened(folder: Path, tmp_path: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    info = records(folder).storage_data[metadata.MetadataIndex("epoch")]
    piece = os.urandom(info.length)
    stop = info.offset + info.length
    (folder / "__0_0.distcp").write_bytes(data[: info.offset] + piece + data[stop:])
    convert(folder, tmp_path / "virtual", virtual(training_state()))
    assert piece in (tmp_path / "virtual" / "__0_0.distcp").read_bytes()


def test_weights_beside_the_pieces_are_told(folder: Path, tmp_path: Path) -> None:
    for name in ("ema.pt", "meta.pt"):  # Lightning's meta.pt holds none
        (folder / name).touch()
    (warning,) = convert_checkpoint(folder, tmp_path / "out", 2).warnings
    assert warning == "ema.pt beside the weights was not looked into."
    with pytest.raises(RefusedError, match=r"ema\.pt.* Refused because of --strict"):
        convert_checkpoint(folder, tmp_path / "strict", 2, strict=True)


def test_a_folder_of_pieces_below_is_told_too(folder: Path, tmp_path: Path) -> None:
    below = folder / "earlier"
    below.mkdir()
    for piece in folder.glob("*.distcp"):
        shutil.copy(piece, below)
    with pytest.raises(RefusedError, match=r"earlier/__0_0\.distcp beside .* because of --strict"):
        convert_checkpoint(folder, tmp_path / "strict", 2, strict=True)


def test_a_folder_may_be_named_as_lightning_names_its_own(folder: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(folder, tmp_path / "last.ckpt", 2)
    assert report.output is not None
    assert report.output.format == "dcp"
    with pytest.raises(ConfigurationError, match=r"would be dcp, but last.pth is named as a file"):
        convert_checkpoint(folder, tmp_path / "last.pth", 2)


def test_a_folder_is_converted_in_place(folder: Path, tmp_path: Path) -> None:
    new = virtual(training_state())
    with pytest.raises(OutputExistsError):
        convert(folder, folder, new)
    convert(folder, folder, new, overwrite=True)
    assert torch.equal(read_dcp(folder).read_tensor(BN_KEYS[0]), new[BN_KEYS[0]])
    assert os.listdir(tmp_path) == ["plain"]


def sharded_folder(folder: Path, whole: Tensor, cuts: list[int]) -> None:
    """Write, by torch's own records, one tensor in pieces over two files, as two ranks do."""
    folder.mkdir()
    pieces = list(zip([0, *cuts], whole.tensor_split(cuts), strict=True))
    chunks, stored = [], {}
    for number, (start, piece) in enumerate(pieces):
        offsets = torch.Size([start, *[0] * (whole.ndim - 1)])
        chunks.append(metadata.ChunkStorageMetadata(offsets, piece.shape))
        path = folder / f"__{number % 2}_0.distcp"
        file = io.BytesIO()
        torch.save(piece.clone(), file)
        start = path.stat().st_size if path.exists() else 0
        with open(path, "ab") as out:
            out.write(file.getvalue())
        index = metadata.MetadataIndex("bn.running_mean", offsets, number)
        info = filesystem._StorageInfo(path.name, start, file.tell())
        stored[index] = info
    properties = metadata.TensorProperties(dtype=whole.dtype)
    entry = metadata.TensorStorageMetadata(properties, whole.shape, chunks)
    overwrite_records(
        folder, metadata.Metadata({"bn.running_mean": entry}, {}, stored, metadata.StorageMeta())
    )


@pytest.mark.parametrize("shape", [(10,), (10, 3)])
def test_a_tensor_in_pieces_is_put_together_and_becomes_one(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    whole = torch.randn(shape)
    sharded_folder(tmp_path / "plain", whole, [3, 4, 9])
    assert torch.equal(read_dcp(tmp_path / "plain").read_tensor("bn.running_mean"), whole)
    new = whole.expand(2, *shape).contiguous()
    convert(tmp_path / "plain", tmp_path / "virtual", {"bn.running_mean": new})
    assert torch.equal(read_dcp(tmp_path / "virtual").read_tensor("bn.running_mean"), new)
    (piece,) = read_dcp(tmp_path / "virtual").metadata.storage_data.values()
    files = (tmp_path / "virtual").glob("*.distcp")
    assert sum(file.stat().st_size for file in files) == piece.length  # nothing else is left
    for folder, expected in (("plain", whole), ("virtual", new)):
        target = {"bn.running_mean": torch.zeros_like(expected)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(target, checkpoint_id=tmp_path / folder)
        assert torch.equal(target["bn.running_mean"], expected)


def test_a_malicious_piece_is_not_executed(folder: Path, tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save(Payload(os.system, f"touch {tmp_path}/executed"), file)
    replace_piece(folder, BN_KEYS[0], file.getvalue())
    with pytest.raises(ReadError, match=r"damaged at 'model\.1\.running_mean': it cannot be read"):
        read_dcp(folder).read_tensor(BN_KEYS[0])
    assert not (tmp_path / "executed").exists()


def replace_piece(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes, at the end of the file, in the place of a tensor's first piece."""
    found = records(folder)
    index = next(index for index in found.storage_data if index.fqn == name)
    path = folder / found.storage_data[index].relative_path
    info = filesystem._StorageInfo(path.name, path.stat().st_size, len(data))
    with open(path, "ab") as file:
        file.write(data)
    found.storage_data[index] = info
    overwrite_records(folder, found)


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def bomb() -> bytes:
    """A piece that is small in the file and large in memory."""
    plain, packed = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(10_000_000)))), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in plain.infolist():
            archive.writestr(member.filename, plain.read(member))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("piece", "kind", "message"),
    [
        (b"", ReadError, "it cannot be read"),
        (b"no piece", ReadError, "it cannot be read"),
        (saved(torch.zeros(16))[:-50], ReadError, "it cannot be read"),
        (saved(torch.zeros(15)), ReadError, r"expected torch.float32 of \(16,\)"),
        (saved(torch.zeros(16, dtype=torch.float64)), ReadError, "expected torch.float32"),
        (saved({"a": torch.zeros(16)}), ReadError, "expected torch.float32"),
        (bomb(), RefusedError, r"unpacks to 40,0\d\d,\d{3} bytes\. Refused"),
    ],
)
def test_a_damaged_piece_is_told(
    folder: Path, piece: bytes, kind: type[CheckpointError], message: str
) -> None:
    replace_piece(folder, BN_KEYS[0], piece)
    with pytest.raises(kind, match=message):
        read_dcp(folder).read_tensor(BN_KEYS[0])


@pytest.mark.skipif(
    "transform_descriptors" not in filesystem._StorageInfo.__dataclass_fields__,
    reason="this torch has no transforms",
)
def test_a_compressed_piece_is_refused(folder: Path) -> None:
    found = records(folder)
    for index, info in found.storage_data.items():
        found.storage_data[index] = replace(info, transform_descriptors=["stream.zstd"])
    overwrite_records(folder, found)
    with pytest.raises(
        RefusedError, match=r"is transformed by \['stream\.zstd'\]; save it without"
    ):
        read_dcp(folder).read_tensor(BN_KEYS[0])


def test_pieces_that_overlap_instead_of_covering_are_told(tmp_path: Path) -> None:
    sharded_folder(tmp_path / "plain", torch.randn(4), [2])
    found = records(tmp_path / "plain")
    second = found.state_dict_metadata["bn.running_mean"].chunks[1]
    old = metadata.MetadataIndex("bn.running_mean", second.offsets)
    second.offsets = torch.Size([1])
    found.storage_data[metadata.MetadataIndex("bn.running_mean", [1])] = found.storage_data[old]
    overwrite_records(tmp_path / "plain", found)
    with pytest.raises(ReadError, match="its pieces overlap and leave a hole"):
        read_dcp(tmp_path / "plain").read_tensor("bn.running_mean")


def test_bytes_that_two_tensors_share_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    found = records(folder)
    one, two = (metadata.MetadataIndex(key, [0]) for key in BN_KEYS[:2])
    found.storage_data[one] = found.storage_data[two]
    overwrite_records(folder, found)
    with pytest.raises(ReadError, match="its bytes overlap those of another"):
        convert(folder, tmp_path / "virtual", {BN_KEYS[0]: torch.zeros(4, 16)})
