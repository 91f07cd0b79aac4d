"""What the ``.metadata`` of a folder may hold: damage, malice, and what other torches write."""

from __future__ import annotations

import os
import pickle
import resource
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata

from distbn_convert.checkpoint import dcp_metadata
from distbn_convert.checkpoint.dcp import read_dcp
from distbn_convert.errors import ReadError, RefusedError

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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(training_state(), tmp_path / "plain")
    return tmp_path / "plain"


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
