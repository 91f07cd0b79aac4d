"""A dry run ends as the real run would, and writes nothing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distbn_convert.checkpoint import convert_checkpoint

from .checkpoints import Net, contents, run_cli
from .test_checkpoint_intact import distributed, flip, members, shards

KINDS = ("zip", "legacy", "safetensors", "accelerate", "shards", "bin", "dcp")


def make(kind: str, place: Path) -> Path:
    """A checkpoint of each kind, converted already where there is a kind to revert to."""
    if kind in ("zip", "legacy"):
        torch.save(Net().state_dict(), place, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "accelerate":
        place.mkdir()
        save_file(Net().state_dict(), place / "model.safetensors")
    elif kind == "safetensors":
        save_file(Net().state_dict(), place)
    elif kind == "shards":
        save_file(Net(300).state_dict(), place.with_name("whole"))
        convert_checkpoint(place.with_name("whole"), place, 2, max_shard_size=3000, fsync=False)
        (place.with_name("whole")).unlink()
    elif kind == "bin":
        shards(place)
    else:
        distributed(place)
    return place


def no_space(monkeypatch: pytest.MonkeyPatch, but: int = 10) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=but))


def no_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)


def both(capsys: Any, folder: Path, code: int, *command: object) -> str:
    """Run a command dry and for real: the same status and sentence, and all is as it was."""
    before = contents(folder)
    dry = run_cli(capsys, *command, "--no-fsync", "--dry-run")
    assert dry.code == code, dry
    assert contents(folder) == before
    done = run_cli(capsys, *command, "--no-fsync")
    assert (done.code, done.err) == (code, dry.err)
    if code:
        assert contents(folder) == before
    return done.err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("refuse", "told"),
    [
        (None, ""),
        (no_space, "not enough space in .*: needs"),
        (no_permission, "cannot write .*: permission denied."),
    ],
)
def test_a_dry_run_ends_as_the_real_run(
    capsys: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    in_place: bool,
    refuse: Callable[[pytest.MonkeyPatch], None] | None,
    told: str,
) -> None:
    source = make(kind, tmp_path / "in")
    if refuse is not None:
        refuse(monkeypatch)
    place = ["--in-place"] if in_place else [tmp_path / "out"]
    command = ["revert"] if kind == "shards" else ["convert", "--vt-world-size", 2]
    err = both(capsys, tmp_path, 7 if refuse else 0, *command, source, *place)
    assert re.search(told, err)


@pytest.mark.parametrize(("backup", "code"), [("--backup", 7), ("--no-backup", 0)])
def test_what_did_not_change_needs_space_beside_a_backup(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backup: str, code: int
) -> None:
    source = make("accelerate", tmp_path / "in")
    (source / "optimizer.bin").write_bytes(bytes(1_000_000))
    no_space(monkeypatch, but=500_000)
    both(capsys, tmp_path, code, "convert", source, "--vt-world-size", 2, "--in-place", backup)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_in_place_finds_the_backup(capsys: Any, tmp_path: Path, kind: str) -> None:
    source = make(kind, tmp_path / "in")
    (tmp_path / "in.bak").symlink_to("absent")
    command = ["revert"] if kind == "shards" else ["convert", "--vt-world-size", 2]
    err = both(capsys, tmp_path, 6, *command, source, "--in-place")
    assert "in.bak exists; move it away" in err
    both(capsys, tmp_path, 0, *command, source, "--in-place", "--no-backup")


@pytest.mark.parametrize("sharded", [[], ["--max-shard-size", "1kB"]], ids=["one", "shards"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": Net().state_dict(), "epoch": 3}, "safetensors holds tensors by name alone"),
        ({**Net().state_dict(), "tie": (w := torch.ones(4)), "tied": w}, "share memory"),
        ({**Net().state_dict(), "sparse": torch.eye(3).to_sparse()}, "expected dense tensors"),
    ],
    ids=["epoch", "tied", "sparse"],
)
def test_a_dry_run_finds_what_safetensors_cannot_hold(
    capsys: Any, tmp_path: Path, content: Any, told: str, sharded: list[str]
) -> None:
    torch.save(content, tmp_path / "in")
    command = ["convert", tmp_path / "in", tmp_path / "out", "--vt-world-size", 2]
    err = both(capsys, tmp_path, 4, *command, "--format", "safetensors", *sharded)
    assert told in err


@pytest.mark.parametrize("sharded", [[], ["--max-shard-size", "1kB"]], ids=["one", "shards"])
def test_a_dry_run_tells_what_safetensors_changes(
    capsys: Any, tmp_path: Path, sharded: list[str]
) -> None:
    torch.save({**Net().state_dict(), "turned": torch.rand(3, 4).t()}, tmp_path / "in")
    command = ["convert", tmp_path / "in", tmp_path / "out", "--vt-world-size", 2]
    err = both(capsys, tmp_path, 0, *command, "--format", "safetensors", *sharded)
    assert "turned is made contiguous for safetensors." in err


def test_a_dry_run_finds_what_would_be_lost(capsys: Any, tmp_path: Path) -> None:
    make("accelerate", tmp_path / "in")
    make("accelerate", tmp_path / "out")
    (tmp_path / "out" / "precious").write_text("kept")
    command = ["convert", tmp_path / "in", tmp_path / "out", "--vt-world-size", 2, "--force"]
    err = both(capsys, tmp_path, 6, *command)
    assert "it holds what the new folder would not: precious" in err
    (tmp_path / "out" / "precious").unlink()
    both(capsys, tmp_path, 0, *command)


def test_a_dry_run_finds_damage(capsys: Any, tmp_path: Path) -> None:
    path = make("zip", tmp_path / "in")
    place = dict(members(path))["4"]
    flip(path, place)
    both(capsys, tmp_path, 5, "convert", path, tmp_path / "out", "--vt-world-size", 2)
    flip(path, place)
    both(capsys, tmp_path, 0, "convert", path, tmp_path / "out", "--vt-world-size", 2)
