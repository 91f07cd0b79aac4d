"""Damage never gets a new checksum: it is told, or carried over with the checksum that tells it."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from distbn_convert.checkpoint import verify_checkpoint
from distbn_convert.checkpoint.checksums import data_start
from distbn_convert.checkpoint.dcp import read_dcp
from distbn_convert.errors import ReadError

from .checkpoints import Net, run_cli

RANKS = ["--vt-world-size", 2, "--no-fsync"]
FORMATS = ([], ["--format", "safetensors", "--state", "model"])


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Net(50).state_dict()


def members(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, int]]:
    """Yield the name of each member of a zip, or of one in a file, and where to flip a bit of it.

    The pickle stays one that loads: a name in it changes.
    """
    data = path.read_bytes()[start:stop]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            place = data_start(io.BytesIO(data), info)
            assert place is not None
            content = data[place : place + info.compress_size]
            in_name = content.find(b"conv1.weight" if b"conv1.weight" in content else b"torch")
            middle = (
                in_name if info.filename.endswith(".pkl") and in_name > 0 else len(content) // 2
            )
            if content:
                yield info.filename.rpartition("/")[2], start + place + middle


def flip(path: Path, place: int) -> None:
    """Flip a bit, or flip it back."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def pack(path: Path) -> None:
    """Compress a zip."""
    with zipfile.ZipFile(path) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def shards(folder: Path) -> list[Path]:
    """A sharded checkpoint of torch whose second shard holds no statistic."""
    folder.mkdir()
    whole = state()
    first = {key for key in whole if "running" in key or "num_batches" in key or "conv1" in key}
    weight_map = {key: "a.bin" if key in first else "b.bin" for key in whole}
    for shard in ("a.bin", "b.bin"):
        torch.save({key: whole[key] for key in whole if weight_map[key] == shard}, folder / shard)
    (folder / "m.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / "a.bin", folder / "b.bin"]


def accelerate(folder: Path) -> Path:
    folder.mkdir()
    save_file(state(), folder / "model.safetensors")
    (folder / "deeper").mkdir()
    torch.save({"state": torch.randn(30)}, folder / "deeper" / "optimizer.bin")
    return folder / "deeper" / "optimizer.bin"


def distributed(folder: Path) -> dict[str, Any]:
    """A folder of torch.distributed.checkpoint; returns the places of its pieces."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it takes this for a single process
        dcp.save({"model": state(), "args": {"epoch": 3}}, checkpoint_id=folder)
    stored = read_dcp(folder).metadata.storage_data
    return {index.fqn: info for index, info in stored.items()}


@pytest.mark.parametrize("options", FORMATS, ids=["torch", "safetensors"])
@pytest.mark.parametrize("kind", ["mapped", "packed", "misnamed"])
def test_a_flipped_bit_in_any_member_of_a_file_is_told(
    capsys: Any, tmp_path: Path, kind: str, options: list[str]
) -> None:
    path = tmp_path / ("in.safetensors" if kind == "misnamed" else "in.pth")
    torch.save({"model": state(), "epoch": 3}, path)
    if kind == "packed":
        pack(path)
    for name, place in list(members(path)):
        flip(path, place)
        done = run_cli(capsys, "convert", path, tmp_path / "out", *RANKS, *options)
        # A damaged pickle that is compressed can be anything.
        assert done.code == 5 or (kind == "packed" and done.code == 4), (name, done)
        assert run_cli(capsys, "verify", path).code in (4, 5)
        flip(path, place)
    assert os.listdir(tmp_path) == [path.name]


def test_a_damaged_statistic_is_carried_over_unverified_alone(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "in"
    torch.save(state(), path)
    found = dict(members(path))
    flip(path, found["4"])
    convert = ["convert", path, tmp_path / "out", *RANKS]
    done = run_cli(capsys, *convert)
    assert done.code == 5
    assert "the checksum of in/data/4 does not match; download or copy" in done.err
    assert run_cli(capsys, *convert, "--no-verify").code == 0


def test_a_flipped_bit_in_a_torch_shard_is_told_or_stays_to_be_found(
    capsys: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for number, shard in enumerate(shards(folder)):
        for name, place in list(members(shard)):
            flip(shard, place)
            out = tmp_path / f"out{number}{name}"
            done = run_cli(capsys, "convert", folder, out, *RANKS)
            if done.code == 0:
                assert shard.name == "b.bin"
                assert run_cli(capsys, "verify", out).code == 5
            else:
                assert (done.code, out.exists()) == (5, False)
            for command in (["verify", folder], ["inspect", folder, "--check-input"]):
                assert run_cli(capsys, *command).code == 5
            index = folder / "m.bin.index.json"
            other = ["convert", index, tmp_path / "flat", *RANKS, "--format", "safetensors"]
            assert run_cli(capsys, *other).code == 5
            flip(shard, place)
    assert any(name.startswith("out1") for name in os.listdir(tmp_path))


def test_a_flipped_bit_in_a_distributed_piece_is_told_or_stays_to_be_found(
    capsys: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for piece, info in distributed(folder).items():
        file = folder / info.relative_path
        for name, place in list(members(file, info.offset, info.offset + info.length)):
            flip(file, place)
            out = tmp_path / f"{piece}-{name}"
            done = run_cli(capsys, "convert", folder, out, *RANKS)
            statistic = "running" in piece or "num_batches" in piece
            assert done.code == (5 if statistic else 0), (piece, name, done)
            assert out.exists() != statistic
            for command in (["verify", out if out.exists() else folder], ["verify", folder]):
                assert run_cli(capsys, *command).code == 5
            flip(file, place)


def test_a_flipped_bit_in_what_accelerate_saved_beside_stays_to_be_found(
    capsys: Any, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    optimizer = accelerate(folder)
    flip(optimizer, dict(members(optimizer))["0"])
    convert = ["convert", folder, out, *RANKS]
    assert run_cli(capsys, *convert, "--check-input").code == 5
    assert not out.exists()
    assert run_cli(capsys, *convert).code == 0
    assert (out / "deeper" / "optimizer.bin").read_bytes() == optimizer.read_bytes()
    for path in (folder, out):
        done = run_cli(capsys, "verify", path)
        assert done.code == 5
        assert "optimizer.bin is damaged: the checksum of optimizer/data/0 does not" in done.err


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_flipped_bit_in_any_gathered_file_is_told(
    capsys: Any, tmp_path: Path, damaged: int
) -> None:
    paths = [tmp_path / f"rank{rank}" for rank in range(3)]
    for path in paths:
        torch.save(state(), path)
    for option in ([], ["--check-input"]):
        for name, place in list(members(paths[damaged])):
            flip(paths[damaged], place)
            done = run_cli(capsys, "gather", *paths, tmp_path / "out", "--no-fsync", *option)
            assert done.code == 5, (name, done)
            assert f"rank{damaged}" in done.err
            flip(paths[damaged], place)
    assert sorted(os.listdir(tmp_path)) == ["rank0", "rank1", "rank2"]


def test_gathered_files_that_are_not_mapped_are_checked_whole(capsys: Any, tmp_path: Path) -> None:
    paths = [tmp_path / "rank0", tmp_path / "rank1"]
    empty = {"n.running_mean": torch.ones(0), "n.running_var": torch.ones(0)}
    for content, code in ((empty, 0), (state(), 5)):
        for path in paths:
            torch.save(content, path)
            pack(path)
        place = dict(members(paths[1])).get("4")
        if place is not None:
            flip(paths[1], place)
        done = run_cli(capsys, "gather", *paths, tmp_path / "out", "--no-fsync", "-f")
        assert done.code == code, done


def test_every_gathered_folder_is_checked_if_that_is_wished(capsys: Any, tmp_path: Path) -> None:
    optimizers = [accelerate(tmp_path / name) for name in ("one", "two")]
    flip(optimizers[1], dict(members(optimizers[1]))["0"])
    gather = ["gather", tmp_path / "one", tmp_path / "two", tmp_path / "out", "--no-fsync"]
    assert run_cli(capsys, *gather, "--check-input").code == 5
    assert run_cli(capsys, *gather).code == 0  # of the second, the model alone is taken
    assert run_cli(capsys, "verify", tmp_path / "out").code == 0


def test_torch_shards_are_checked_when_they_are_gathered(capsys: Any, tmp_path: Path) -> None:
    shards(tmp_path / "one")
    first, _ = shards(tmp_path / "two")
    for name, place in list(members(first)):
        flip(first, place)
        done = run_cli(capsys, "gather", tmp_path / "one", tmp_path / "two", tmp_path / "out")
        assert done.code == 5, (name, done)
        flip(first, place)


def test_verify_counts_the_checksums_of_a_whole_folder(tmp_path: Path) -> None:
    def count(*paths: Path) -> int:
        return sum(len(zipfile.ZipFile(path).namelist()) for path in paths)

    two = shards(tmp_path / "shards")
    report = verify_checkpoint(tmp_path / "shards")
    assert (report.checksums, report.warnings) == (count(*two), ())
    optimizer = accelerate(tmp_path / "accelerate")
    report = verify_checkpoint(tmp_path / "accelerate")
    assert (report.checksums, report.warnings) == (count(optimizer), ())
    optimizer.unlink()
    report = verify_checkpoint(tmp_path / "accelerate")
    assert report.checksums == 0
    assert "has no checksums (accelerate); its structure was checked" in report.warnings[0]
    pieces = distributed(tmp_path / "dcp")
    report = verify_checkpoint(tmp_path / "dcp")
    assert report.checksums > 5 * len(pieces)
    assert report.warnings == ()


def test_a_zip_beside_the_weights_that_has_a_password_is_left_alone(tmp_path: Path) -> None:
    optimizer = accelerate(tmp_path / "in")
    data = bytearray(optimizer.read_bytes())
    count = verify_checkpoint(tmp_path / "in").checksums
    entry = data.index(b"PK\x01\x02")
    data[entry + 8] |= 1  # in the directory, the flag for it
    optimizer.write_bytes(data)
    assert verify_checkpoint(tmp_path / "in").checksums == count - 1


def test_a_cut_file_beside_the_weights_is_damage(tmp_path: Path) -> None:
    optimizer = accelerate(tmp_path / "in")
    optimizer.write_bytes(optimizer.read_bytes()[:-50])
    with pytest.raises(ReadError, match=r"optimizer\.bin is damaged"):
        verify_checkpoint(tmp_path / "in")


def test_pieces_without_checksums_are_read(tmp_path: Path, capsys: Any) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        distributed(tmp_path / "in")
    finally:
        torch.serialization.set_crc32_options(True)
    assert run_cli(capsys, "convert", tmp_path / "in", tmp_path / "out", *RANKS).code == 0
