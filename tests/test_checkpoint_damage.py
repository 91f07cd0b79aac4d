"""Damaged files end in a documented exit status and one line, and leave everything as it was."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from distbn_convert.checkpoint.checksums import check_zip
from distbn_convert.checkpoint.sniff import sniff
from distbn_convert.checkpoint.stores import ReadOptions
from distbn_convert.checkpoint.torchfile import load_torch
from distbn_convert.errors import FileAccessError, ReadError

from .checkpoints import Net, Result, contents, run_cli

# Set it to the seed that a failure tells, to see that failure again.
SEED = os.environ.get("DISTBN_DAMAGE_SEED")
EACH = 10  # random cases of each kind of damage
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _limited_memory() -> Iterator[None]:
    """Fail here, not by the system's killer, if a damaged number is taken for a size."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 6 * 10**9, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, old)


def torch_zip(folder: Path) -> Path:
    torch.save({"model": Net().state_dict(), "epoch": 3, "lr": [0.1, 0.2]}, folder / "in")
    return folder / "in"


def torch_legacy(folder: Path) -> Path:
    state = {"model": Net().state_dict(), "epoch": 3, "lr": [0.1, 0.2]}
    torch.save(state, folder / "in", _use_new_zipfile_serialization=False)
    return folder / "in"


def safetensors(folder: Path) -> Path:
    save_file(Net().state_dict(), folder / "in", {"format": "pt"})
    return folder / "in"


def index(folder: Path) -> Path:
    state = Net().state_dict()
    names = sorted(state)
    shards = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: state[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    content = {"metadata": {"total_size": 1000}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2))
    return folder / INDEX


def shard(folder: Path) -> Path:
    index(folder)
    return folder / "1.safetensors"


def dcp_metadata(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it takes this for a single process
        dcp.save({"model": Net().state_dict(), "epoch": 3}, checkpoint_id=folder)
    return folder / ".metadata"


def dcp_pieces(folder: Path) -> Path:
    dcp_metadata(folder)
    return folder / "__0_0.distcp"


FILES = (torch_zip, torch_legacy, safetensors)
INDEXED = (index, shard)
DCP = (dcp_metadata, dcp_pieces)


def boundaries(data: bytes) -> Iterator[bytes]:
    """Cut where one part of a format ends, or just beside."""
    header = 8 + int.from_bytes(data[:4], "little") % len(data)
    marks = {0, 1, 2, 4, 7, 8, 9, 16, header, len(data) // 2, len(data) - 22, len(data) - 1}
    for mark in sorted(marks):
        yield data[:mark]


def cut(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def flip(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << dice.randrange(8)]) + data[place + 1 :]


def zero(data: bytes, dice: random.Random) -> bytes:
    place, length = dice.randrange(len(data)), dice.randint(1, 64)
    return data[:place] + bytes(length) + data[place + length :]


def insert(data: bytes, dice: random.Random) -> bytes:
    place = dice.randrange(len(data))
    return data[:place] + dice.randbytes(dice.randint(1, 16)) + data[place:]


def repeat(data: bytes, dice: random.Random) -> bytes:
    place, length = dice.randrange(len(data)), dice.randint(1, 200)
    return data[:place] + data[place : place + length] * 2 + data[place + length :]


KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, zero, insert, repeat)


def damages(data: bytes, dice: random.Random) -> Iterator[bytes]:
    yield from boundaries(data)
    for kind in KINDS:
        for _ in range(EACH if kind is not flip else 2 * EACH):
            yield kind(data, dice)


def check(result: Result, folder: Path, before: dict[str, bytes], told: str) -> None:
    """Only status 0 leaves an output, all else is as it was; an error is one line that says why."""
    after = contents(folder)
    out = {name for name in after if name.split("/")[0] == "out"}
    assert {name: after[name] for name in after.keys() - out} == before, told
    assert result.code in (0, 3, 4, 5), told
    assert bool(out) == (result.code == 0), told
    lines = [line for line in result.err.splitlines() if not line.startswith("Warning: ")]
    assert "Traceback" not in result.err, told
    if result.code == 0:
        assert not lines, told
    else:
        assert len(lines) == 1, told
        assert lines[0].startswith("Error: "), told
        assert len(lines[0]) > 30, told


@pytest.mark.parametrize("make", [*FILES, *INDEXED, *DCP])
def test_a_damaged_file_is_told_and_nothing_else_happens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path]
) -> None:
    seed = SEED or str(random.SystemRandom().randrange(10**9))
    dice = random.Random(seed)
    folder = tmp_path / "in"
    folder.mkdir()
    path = make(folder)
    data = path.read_bytes()
    source = path if make in FILES else folder / INDEX if make in INDEXED else folder
    codes = set()
    for number, damaged in enumerate(damages(data, dice)):
        path.write_bytes(damaged)
        before = {f"in/{name}": content for name, content in contents(folder).items()}
        options = ["--vt-world-size", 4, "--no-fsync"]
        result = run_cli(capsys, "convert", source, tmp_path / "out", *options)
        told = f"DISTBN_DAMAGE_SEED={seed}, case {number}: {result}"
        check(result, tmp_path, before, told)
        codes.add(result.code)
        if result.code == 0:
            read_again(tmp_path / "out", told)
            remove(tmp_path / "out")
    assert 5 in codes
    assert len(codes) > 1


def read_again(output: Path, told: str) -> None:
    """An output that reports success can be loaded by torch and by the safetensors package."""
    try:
        for path in [output] if output.is_file() else output.glob("*.safetensors"):
            if path.read_bytes().startswith(b"PK"):
                torch.load(path, weights_only=True)
            else:
                load_file(path)
        if (output / ".metadata").exists():
            pickle.loads((output / ".metadata").read_bytes())
    except Exception as error:
        raise AssertionError(told) from error


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def test_no_damage_of_a_zip_gets_past_its_checksums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --check-input what is converted is what was saved, to the bit."""
    seed = SEED or str(random.SystemRandom().randrange(10**9))
    dice = random.Random(seed)
    path = torch_zip(tmp_path)
    data = path.read_bytes()
    options = ["--vt-world-size", 4, "--no-fsync"]
    assert run_cli(capsys, "convert", path, tmp_path / "clean", *options).code == 0
    clean = (tmp_path / "clean").read_bytes()
    refused = 0
    for number in range(40):
        path.write_bytes(flip(data, dice))
        out = tmp_path / "out"
        result = run_cli(capsys, "convert", path, out, *options, "--check-input")
        told = f"DISTBN_DAMAGE_SEED={seed}, case {number}: {result}"
        assert result.code in (0, 4, 5), told
        refused += result.code != 0
        if result.code == 0:
            assert out.read_bytes() == clean, told
            out.unlink()
    assert refused > 10


def before_the_file(data: bytes) -> bytes:
    """A zip whose directory says that it began later, so that all members begin before the file."""
    moved = bytearray(data)
    fields = [(b"PK\x05\x06", 16, 4), (b"PK\x06\x06", 48, 8)]  # where the directory begins
    for signature, at, size in fields:
        place = data.rfind(signature)
        if place >= 0:
            field = slice(place + at, place + at + size)
            moved[field] = (int.from_bytes(moved[field], "little") + 65_536).to_bytes(
                size, "little"
            )
    return bytes(moved)


def beyond_any_file(data: bytes) -> bytes:
    """A zip whose second member begins where no file has bytes: its offset takes all 64 bits."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as archive:
        for number, info in enumerate(source.infolist()):
            new = zipfile.ZipInfo(info.filename)
            if number == 1:
                new.extra = struct.pack("<HHQ", 1, 8, (1 << 63) + 5)
                name = info.filename.encode()
            archive.writestr(new, source.read(info))
    whole = bytearray(out.getvalue())
    entry = whole.rfind(b"PK\x01\x02", 0, whole.rfind(name))
    whole[entry + 42 : entry + 46] = b"\xff" * 4  # see the extra field
    return bytes(whole)


@pytest.mark.parametrize("place", ["file", "shard"])
@pytest.mark.parametrize("damage", [before_the_file, beyond_any_file])
def test_a_directory_that_points_outside_the_file_is_damage(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
    place: str,
) -> None:
    """Seeking there is the system's "invalid argument", but the file is at fault."""
    source = tmp_path / "in"
    source.mkdir()
    torch.save(Net().state_dict(), source / "1.bin")
    (source / "1.bin").write_bytes(damage((source / "1.bin").read_bytes()))
    if place == "file":
        source = source / "1.bin"
    else:
        weight_map = dict.fromkeys(Net().state_dict(), "1.bin")
        (source / "m.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert = ["convert", source, tmp_path / "out", "--vt-world-size", 4]
    for command in (["inspect", source], ["verify", source], convert):
        for option in ((), ("--check-input",), ("--opaque",)):
            result = run_cli(capsys, *command, *option)
            assert result.code == 5, (command, option, result)
            assert re.match(r"Error: .*1\.bin is damaged.*\.\n\Z", result.err), result
    assert os.listdir(tmp_path) == ["in"]


READERS = {
    "zipfile:ZipFile": ("sniff", "load_torch", "check_zip"),
    "torch:load": ("load_torch",),
}


@pytest.mark.parametrize("broken", READERS)
@pytest.mark.parametrize("code", [errno.EINVAL, None, errno.EIO])
def test_the_files_fault_and_the_disks_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, code: int | None
) -> None:
    """Python 3.10 opens a zip whose directory begins before the file with "invalid argument"."""
    path = torch_zip(tmp_path)

    def fail(*_: object, **options: object) -> None:
        raise OSError(code, os.strerror(code)) if code else OSError("made by a library")

    load = partial(load_torch, options=ReadOptions())
    functions = {"sniff": sniff, "load_torch": load, "check_zip": check_zip}
    monkeypatch.setattr(broken.replace(":", "."), fail)
    for name in READERS[broken]:
        with pytest.raises(FileAccessError if code == errno.EIO else ReadError) as caught:
            functions[name](path)
        told = "cannot read .*: input/output error" if code == errno.EIO else "is damaged"
        assert re.search(told, str(caught.value))
