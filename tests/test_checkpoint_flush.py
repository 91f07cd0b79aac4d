"""Sending parts of a file to the disk while it is written."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import pytest
import torch

from distbn_convert.checkpoint import convert_checkpoint, flush, readback


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to")
def test_the_system_accepts_the_request(tmp_path: Path) -> None:
    function = flush._sync_file_range()
    assert function is not None
    with open(tmp_path / "file", "wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        assert function(file.fileno(), 0, 1 << 20, 2) == 0
        flush.start_flushing(file.fileno(), 0, 1 << 20)


def test_a_system_that_cannot_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    flush._sync_file_range.cache_clear()
    try:
        assert flush._sync_file_range() is None
        flush.start_flushing(-1, 0, 1)
    finally:
        flush._sync_file_range.cache_clear()


@pytest.mark.parametrize("fsync", [True, False])
def test_parts_are_sent_in_order_without_a_gap_if_the_disk_shall_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(readback, "_REQUEST", 1 << 20)
    monkeypatch.setattr(
        readback, "start_flushing", lambda _, start, length: sent.append((start, length))
    )
    norm = torch.nn.BatchNorm1d(4).state_dict(prefix="bn.")
    large = {f"w{number}": torch.randn(500_000) for number in range(5)}
    torch.save({**norm, **large}, tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", 2, fsync=fsync)
    if not fsync:
        assert sent == []
        return
    stops = [start + length for start, length in sent]
    assert [start for start, _ in sent] == [0, *stops[:-1]]
    assert 8_000_000 < stops[-1] <= (tmp_path / "out.pth").stat().st_size


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists them there")
@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
def test_no_file_or_folder_stays_open(tmp_path: Path, name: str) -> None:
    torch.save(torch.nn.BatchNorm1d(4).state_dict(prefix="bn."), tmp_path / "in.pth")
    form = "torch" if name.endswith(".pth") else "safetensors"
    convert_checkpoint(tmp_path / "in.pth", tmp_path / f"first-{name}", 2, format=form)
    before = len(os.listdir("/proc/self/fd"))
    convert_checkpoint(tmp_path / "in.pth", tmp_path / name, 2, format=form)
    assert len(os.listdir("/proc/self/fd")) == before
