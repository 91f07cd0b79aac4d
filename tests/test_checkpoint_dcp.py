from __future__ import annotations

import io
import os
import pickle
import resource
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata

from distbn_convert.checkpoint import dcp_metadata
from distbn_convert.checkpoint.dcp import read_dcp, write_dcp
from distbn_convert.checkpoint.stores import WriteOptions
from distbn_convert.errors import CheckpointError, OutputExistsError, ReadError, RefusedError

BN_KEYS = ("model.1.running_mean", "model.1.running_var", "model.1.num_batches_tracked")


def training_state(ranks: int | None = None) -> dict[str, Any]:
    """What a training loop saves: a model, its optimizer after a step, an epoch, arguments."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    state = model.state_dict()
    if ranks is not None:
        for key in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
            state[key] = state[key].expand(ranks, *state[key].shape).contiguous()
    return {"model": state, "optimizer": optimizer.state_dict(), "epoch": 3, "args": {"lr": 0.1}}


def save(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it takes this for a single process
        dcp.save(state, checkpoint_id=folder)


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Load into a state of the right structure, whose tensors are made NaN or -1 first."""
    for value in state["model"].values():
        value.fill_(-1)
    state["epoch"] = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder)
    return state


def virtual(state: dict[str, Any], ranks: int = 4) -> dict[str, Tensor]:
    model = state["model"]
    plain = {key: model[key.removeprefix("model.")] for key in BN_KEYS}
    return {key: t.expand(ranks, *t.shape).contiguous() for key, t in plain.items()}


def convert(src: Path, dst: Path, new: dict[str, Tensor], **options: Any) -> None:
    with write_dcp(read_dcp(src), dst, new, WriteOptions(**options)):
        pass


def records(folder: Path) -> metadata.Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def overwrite_records(folder: Path, value: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(value))


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


class Payload:
    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def malicious(name: str, command: str) -> bytes:
    """A pickle that calls, changes or takes apart what it must not."""
    build = pickle.PROTO + b"\x04" + b"c%s\n}(\x8c\x01a\x8c\x01bub."
    return {
        "os.system": pickle.dumps(Payload(os.system, command)),
        "eval": pickle.dumps({"a": Payload(eval, f"__import__('os').system({command!r})")}),
        "getattr": b"\x80\x04c__builtin__\ngetattr\n.",
        "a name within a name": b"\x80\x04\x8c\x05torch\x8c\x12serialization.os.x\x93.",
        "torch.load": b"\x80\x04ctorch\nload\n.",
        "a change of a class": build % b"torch.distributed.checkpoint.metadata\nMetadata",
        "a change of a function": build % b"torch.serialization\n_get_layout",
        "a change of torch.Size": build % b"torch\nSize",
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        *("os.system", "eval", "getattr", "a name within a name", "torch.load"),
        *("a change of a class", "a change of a function", "a change of torch.Size"),
    ],
)
def test_case_40_a_malicious_metadata_is_refused_and_not_executed(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / ".metadata").write_bytes(malicious(name, f"touch {tmp_path}/executed"))
    with pytest.raises(RefusedError, match=r"which no checkpoint .* Nothing was executed\.$"):
        read_dcp(folder)
    assert not (tmp_path / "executed").exists()
    assert not hasattr(metadata.Metadata, "a")
    assert not hasattr(torch.serialization._get_layout, "a")


def test_the_payload_of_that_test_does_execute_where_nothing_guards(tmp_path: Path) -> None:
    pickle.loads(malicious("os.system", f"touch {tmp_path}/executed"))
    assert (tmp_path / "executed").exists()
    pickle.loads(malicious("a change of a function", ""))
    assert torch.serialization._get_layout.a == "b"
    del torch.serialization._get_layout.a


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


@pytest.mark.parametrize("name", ["../a.distcp", "/etc/passwd", "C:\\a", "..\\a", "a\n"])
def test_a_file_outside_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "a.distcp").touch()
    found = records(folder)
    index = next(iter(found.storage_data))
    found.storage_data[index] = filesystem._StorageInfo(name, 0, 0)
    overwrite_records(folder, found)
    with pytest.raises(RefusedError, match="points outside the folder"):
        read_dcp(folder)


def damage(found: metadata.Metadata, what: str) -> object:
    """Change one thing in true records, or return something else."""
    mean = found.state_dict_metadata[BN_KEYS[0]]
    index = metadata.MetadataIndex(BN_KEYS[0], [0])
    info = found.storage_data[index]
    if what == "not Metadata":
        return {"state_dict_metadata": {}}
    if what == "no pieces":
        found.storage_data = None
    elif what == "beyond the end":
        info.length = 10**9
    elif what == "negative":
        info.offset = -1
    elif what == "true":
        info.offset = True
    elif what == "missing file":
        info.relative_path = "__7_0.distcp"
    elif what == "stored nowhere":
        del found.storage_data[index]
    elif what == "hole":
        mean.chunks[0].sizes = torch.Size([15])
    elif what == "outside":
        mean.chunks[0].sizes = torch.Size([17])
    elif what == "other rank":
        mean.chunks[0].sizes = torch.Size([4, 4])
    elif what == "no chunks":
        mean.chunks = None
    elif what == "no dtype":
        mean.properties.dtype = "float32"
    elif what == "no attributes":
        mean.__dict__.clear()
    elif what == "unknown entry":
        found.state_dict_metadata[BN_KEYS[0]] = 3
    elif what == "pieces of strings":
        found.storage_data = {"a": "b"}
    return found


@pytest.mark.parametrize(
    "what",
    [
        *("not Metadata", "no pieces", "beyond the end", "negative", "true", "missing file"),
        *("stored nowhere", "hole", "outside", "other rank", "no chunks", "no dtype"),
        *("no attributes", "unknown entry", "pieces of strings"),
    ],
)
def test_records_that_do_not_fit_are_told(folder: Path, what: str) -> None:
    read_dcp(folder)
    overwrite_records(folder, damage(records(folder), what))
    with pytest.raises(ReadError, match=r"\.metadata is damaged: .*; copy or save the whole"):
        read_dcp(folder)


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


HUGE = {
    "bytearray": pickle.BYTEARRAY8 + (10**10).to_bytes(8, "little"),
    "memo": pickle.EMPTY_DICT + pickle.LONG_BINPUT + (4 * 10**9).to_bytes(4, "little"),
}


@pytest.mark.parametrize("claim", HUGE)
def test_a_metadata_that_claims_a_huge_size_takes_no_memory(folder: Path, claim: str) -> None:
    (folder / ".metadata").write_bytes(pickle.PROTO + b"\x05" + HUGE[claim] + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ReadError, match="is damaged"):
        read_dcp(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("cut", [0, 1, 2, 100, -1])
def test_a_metadata_that_is_cut_short_is_told(folder: Path, cut: int) -> None:
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data[:cut])
    with pytest.raises(ReadError, match=r"\.metadata is damaged: it cannot be read \(\w+\)"):
        read_dcp(folder)


def test_flipped_bytes_of_the_metadata_end_in_a_sentence(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    random = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(300):
        place = int(torch.randint(len(data), (), generator=random))
        bit = 1 << int(torch.randint(8, (), generator=random))
        flipped = bytes([data[place] ^ bit])
        (folder / ".metadata").write_bytes(data[:place] + flipped + data[place + 1 :])
        try:
            read_dcp(folder)
            outcomes.add("read")
        except (ReadError, RefusedError) as error:
            outcomes.add(type(error).__name__)
    assert outcomes == {"read", "ReadError", "RefusedError"}


def test_records_of_other_versions_are_read(folder: Path) -> None:
    """Before 2.4 two of them were in another module; Python 3.13 moved its paths."""
    old, new = dcp_metadata._OLD, metadata.__name__
    known = dcp_metadata._known_names()
    assert known[old, "TensorProperties"] is known[new, "TensorProperties"]
    assert known[old, "MEM_FORMAT_ENCODING"] is known[new, "_MEM_FORMAT_ENCODING"]
    for name in ("PosixPath", "WindowsPath"):
        made = known["pathlib._local", name]("a", "b")
        assert made.parts == ("a", "b")
        assert known["pathlib", name] is known["pathlib._local", name]


def test_a_converted_folder_has_the_records_that_torch_writes(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "virtual", virtual(training_state()))
    save(training_state(4), tmp_path / "expected")
    found, expected = (records(tmp_path / name) for name in ("virtual", "expected"))
    assert found.state_dict_metadata == expected.state_dict_metadata


def test_a_folder_from_before_torch_wrote_strides_is_one_for_that_torch_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties, states = metadata.TensorProperties, []
    get = properties.__getstate__
    with monkeypatch.context() as old:  # torch 2.14
        old.setattr(properties, "__getstate__", lambda self: get(self)[:5])
        save(training_state(), tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "virtual", virtual(training_state()))
    monkeypatch.setattr(properties, "__setstate__", lambda _, state: states.append(state))
    records(tmp_path / "virtual")
    assert {len(state) for state in states} == {5}


def test_records_of_a_newer_torch_are_not_called_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, get = records(folder), metadata.TensorProperties.__getstate__
    with monkeypatch.context() as newer:
        newer.setattr(metadata.TensorProperties, "__getstate__", lambda self: (*get(self), None))
        overwrite_records(folder, saved)
    with pytest.raises(ReadError, match=r"was saved by a newer torch than .*; use that one"):
        read_dcp(folder)
