"""Reading back while writing: what the disk got wrong is found, in every part of a file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distbn_convert.checkpoint import convert_checkpoint
from distbn_convert.checkpoint.atomic import _Raw
from distbn_convert.checkpoint.readback import reading_back
from distbn_convert.errors import VerificationError

LARGE = 6_000_000  # bytes; a part of that size is read back while the next is written


def state() -> dict[str, torch.Tensor]:
    norm = torch.nn.BatchNorm1d(4).state_dict(prefix="bn.")
    first, last = (torch.randn(LARGE // 4) for _ in range(2))
    return {"a": first, **norm, "z": last}


def flipped(data: Any, place: int) -> bytearray:
    copy = bytearray(data)
    copy[place] ^= 4
    return copy


@pytest.mark.parametrize("place", [0, LARGE // 2, LARGE - 1])
@pytest.mark.parametrize("number", [0, 1], ids=["first", "last"])
def test_a_bit_that_the_disk_changes_in_a_torch_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, number: int
) -> None:
    """In one that torch writes from memory, as from a legacy file."""
    torch.save(state(), tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    large = []
    write = _Raw.write

    def wrong(self: _Raw, data: Any) -> int:
        if len(data) == LARGE:
            large.append(len(data))
            if len(large) == number + 1:
                data = flipped(data, place)
        return write(self, data)

    monkeypatch.setattr(_Raw, "write", wrong)
    with pytest.raises(VerificationError, match="read back|checksum"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", 2)
    assert len(large) == 2
    assert os.listdir(tmp_path) == ["in.pth"]


@pytest.mark.parametrize("place", [0, LARGE // 2, LARGE - 1])
@pytest.mark.parametrize("name", ["a", "z"], ids=["first", "last"])
@pytest.mark.parametrize("format", ["pth", "safetensors"])
def test_a_bit_that_the_disk_changes_in_a_copy_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, name: str, format: str
) -> None:
    path = tmp_path / f"in.{format}"
    content = state()
    wanted = marked(content[name], place)
    if format == "pth":
        torch.save(content, path)
    else:
        save_file(content, path)
    write = os.pwrite
    flips = []

    def wrong(descriptor: int, data: Any, position: int) -> int:
        found = bytes(data).find(wanted)
        if found >= 0:
            flips.append(position + found)
            data = flipped(data, found)
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", wrong)
    with pytest.raises(VerificationError, match=f"differs at (a checksum|{name})"):
        convert_checkpoint(path, tmp_path / f"out.{format}", 2)
    assert len(flips) == 1
    assert os.listdir(tmp_path) == [path.name]


def marked(tensor: torch.Tensor, place: int) -> bytes:
    """Put a mark into a large tensor, and return it."""
    mark = torch.frombuffer(bytearray(b"a mark!!"), dtype=torch.uint8)
    start = min(place, LARGE - len(mark))
    tensor.view(torch.uint8)[start : start + len(mark)] = mark
    return b"a mark!!"


def test_a_part_counts_as_a_copy_only_at_its_place_and_whole(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(200)))
    with open(tmp_path / "written", "wb") as file:
        file.write(b"head" + bytes(range(200)))
        file.flush()
        with reading_back(file, True, True, source) as back:
            assert back is not None
            back.compare(4, 60, 0)
            back.compare(64, 40, 60)
            back.compare(150, 10, 146)
            assert back.is_copy(4, 100, 0)  # two parts that follow one another
            assert back.is_copy(50, 30, 46)
            assert not back.is_copy(50, 30, 47)  # of another place
            assert not back.is_copy(100, 10, 96)  # reaches beyond
            assert not back.is_copy(0, 3, 0)
            back.compare(170, 10, 170)  # not what is there
            assert not back.is_copy(170, 10, 170)


def test_a_part_that_is_cut_short_has_no_checksum(tmp_path: Path) -> None:
    with open(tmp_path / "written", "wb") as file:
        file.write(b"1234")
        file.flush()
        with reading_back(file, True, False) as back:
            assert back is not None
            back.take_checksum(0, 4)
            back.take_checksum(2, 4)
            assert back.checksums() == {(0, 4): 0x9BE3E0A3, (2, 4): None}
