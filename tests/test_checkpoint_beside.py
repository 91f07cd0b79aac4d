"""What folders hold beside their weights: other weights, which are told of."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from distbn_convert.checkpoint import convert_checkpoint, verify_checkpoint
from distbn_convert.checkpoint.beside import other_weights
from distbn_convert.errors import RefusedError, VerificationError

from .checkpoints import bn_state


def test_files_that_may_hold_other_weights_are_listed(tmp_path: Path) -> None:
    weights = ["ema.bin", "ema.pt", "model.safetensors", "pytorch_model.bin"]
    accelerates = ["optimizer_1.bin", "scheduler.bin", "dl_state_dict.bin", "scaler.pt"]
    trainers = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"]
    lightnings = ["meta.pt"]
    for name in (*weights, "own.bin", *accelerates, *trainers, *lightnings, "training_args.bin"):
        (tmp_path / name).touch()
    assert other_weights(tmp_path, ["own.bin"]) == weights


def test_weights_in_a_folder_below_are_told_too(tmp_path: Path) -> None:
    """As those of a Trainer's earlier steps, which are carried over as they are."""
    earlier = tmp_path / "in" / "checkpoint-500"
    earlier.mkdir(parents=True)
    for folder in (earlier.parent, earlier):
        save_file(bn_state(), folder / "model.safetensors")
        (folder / "optimizer.pt").touch()
    (warning,) = convert_checkpoint(tmp_path / "in", tmp_path / "out", 2).warnings
    assert warning == "checkpoint-500/model.safetensors beside the weights was not looked into."
    with pytest.raises(RefusedError, match=r"checkpoint-500.* Refused because of --strict"):
        convert_checkpoint(tmp_path / "in", tmp_path / "strict", 2, strict=True)


def test_git_and_outputs_on_their_way_hold_no_weights_beside(tmp_path: Path) -> None:
    """Below .git, git-annex keeps the weights themselves, under names that end as theirs do."""
    key = "SHA256E-s400--0123.safetensors"
    kept = tmp_path / "in" / ".git" / "annex" / "objects" / key
    unfinished = tmp_path / "in" / ".out.1.0123abcd.distbn-tmp"
    for folder in (kept, unfinished):
        folder.mkdir(parents=True)
    (unfinished / "model.safetensors").touch()
    save_file(bn_state(), kept / key)
    (tmp_path / "in" / "model.safetensors").symlink_to(kept / key)
    assert not convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, strict=True).warnings


def test_a_folder_that_goes_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a Trainer removes its earlier steps."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "ema.pt").touch()
    scandir = os.scandir

    def scan(path: str | Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "checkpoint-500":
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert other_weights(tmp_path, []) == ["ema.pt"]


def test_strict_refuses_what_is_not_looked_into(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file(bn_state(), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "optimizer.bin").touch()
    convert_checkpoint(tmp_path / "in", tmp_path / "sound", 2, strict=True)
    (tmp_path / "in" / "ema.pt").touch()
    (warning,) = convert_checkpoint(tmp_path / "in", tmp_path / "told", 2).warnings
    assert warning == "ema.pt beside the weights was not looked into."
    with pytest.raises(RefusedError, match="in: ema.pt beside .* Refused because of --strict"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, strict=True)
    assert not (tmp_path / "out").exists()


def test_weights_that_two_folders_have_beside_theirs_are_compared(tmp_path: Path) -> None:
    state, first, second = bn_state(), tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        (folder / "checkpoint-500").mkdir(parents=True)
        save_file(state, folder / "model.safetensors")
        (folder / "checkpoint-500" / "model.safetensors").write_text("same")
    assert not verify_checkpoint(first, second, strict=True).warnings
    (first / "ema.pt").touch()
    (warning,) = verify_checkpoint(first, second).warnings
    assert warning == f"ema.pt in {first} had no counterpart in {second}."
    (second / "checkpoint-500" / "model.safetensors").write_text("else")
    with pytest.raises(VerificationError, match="checkpoint-500/model.safetensors differs"):
        verify_checkpoint(first, second, strict=True)
    with pytest.raises(RefusedError, match="and 1 more beside the weights were not looked into"):
        verify_checkpoint(first, first / "model.safetensors", strict=True)
