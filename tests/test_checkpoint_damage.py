"""Damaged files end in a documented exit status and one line, and leave everything as it was."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from .checkpoints import Net, Result, run_cli

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


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


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


def test_a_directory_that_points_before_the_file_is_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeking there is the system's "invalid argument", but the file is at fault."""
    path = torch_zip(tmp_path)
    data = bytearray(path.read_bytes())
    fields = [(b"PK\x05\x06", 16, 4), (b"PK\x06\x06", 48, 8)]  # where the directory begins
    for signature, at, size in fields:
        place = data.rfind(signature)
        if place >= 0:
            field = slice(place + at, place + at + size)
            data[field] = (int.from_bytes(data[field], "little") + 64).to_bytes(size, "little")
    path.write_bytes(data)
    options = ["--vt-world-size", 4, "--check-input"]
    result = run_cli(capsys, "convert", path, tmp_path / "out", *options)
    assert (result.code, "is damaged" in result.err) == (5, True), result
    assert not (tmp_path / "out").exists()
