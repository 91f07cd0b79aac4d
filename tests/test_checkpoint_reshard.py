"""Safetensors in shards of a limited size: as huggingface_hub writes them, to the byte."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distbn_convert.checkpoint import (
    convert_checkpoint,
    gather_checkpoints,
    inspect_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)
from distbn_convert.checkpoint.options import parse_size
from distbn_convert.checkpoint.reshard import split_into_shards
from distbn_convert.errors import (
    ConfigurationError,
    FileAccessError,
    OutputExistsError,
    RefusedError,
    VerificationError,
)

from .checkpoints import (
    BATCH_NORMS,
    Net,
    contents,
    load,
    run_cli,
    torchvision_style,
    write_index,
)

INDEX = "model.safetensors.index.json"
LIMIT = 700


def state(width: int = 40) -> dict[str, Tensor]:
    model = Net(width)
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape) * 9)
    return model.state_dict()


def load_all(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 15))
def test_tensors_are_divided_as_by_huggingface(sizes: list[int], limit: int) -> None:
    tensors = {f"t{n}": torch.zeros(size, dtype=torch.uint8) for n, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    ours = split_into_shards({name: tensor.nbytes for name, tensor in tensors.items()}, limit)
    assert ours == list(theirs.filename_to_tensors.values())


@pytest.mark.parametrize("limit", [100, LIMIT, 4500, 10**9])
@pytest.mark.parametrize("source", ["safetensors", "torch"])
def test_the_folder_is_the_one_that_huggingface_writes(
    tmp_path: Path, source: str, limit: int
) -> None:
    """Of the converted file, in its order; 100 bytes are less than most tensors."""
    options: dict[str, Any] = {"max_shard_size": limit}
    if source == "torch":
        path = tmp_path / "in.pth"
        torch.save(state(), path)
        convert_checkpoint(path, tmp_path / "v", 4)
        converted = load(tmp_path / "v")
        options["format"] = "safetensors"
    else:
        path = tmp_path / "in.safetensors"
        save_file(state(), path, {"format": "pt"})
        convert_checkpoint(path, tmp_path / "v", 4)
        with safe_open(tmp_path / "v", "pt") as file:
            converted = {name: file.get_tensor(name) for name in file.offset_keys()}
    (tmp_path / "theirs").mkdir()
    save_torch_state_dict(converted, tmp_path / "theirs", max_shard_size=limit)
    report = convert_checkpoint(path, tmp_path / "ours", 4, **options)
    assert report.counts == {"converted": BATCH_NORMS}
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in theirs if name != INDEX)
    assert json.loads(ours.get(INDEX, "0")) == json.loads(theirs.get(INDEX, "0"))
    if limit == 4500:  # no tensor is larger, which theirs would list out of its order
        assert ours == theirs
    assert (INDEX in ours) == (limit < sum(tensor.nbytes for tensor in converted.values()))
    assert report.output is not None
    assert report.output.format == ("sharded" if INDEX in ours else "accelerate")
    assert report.output.bytes == sum(map(len, ours.values()))


def test_a_tensor_larger_than_the_limit_has_a_shard_of_its_own(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v", 8, max_shard_size=LIMIT)
    shards = [load_file(path) for path in (tmp_path / "v").glob("*.safetensors")]
    sizes = [[tensor.nbytes for tensor in shard.values()] for shard in shards]
    assert any(max(shard) > LIMIT for shard in sizes)
    assert all(sum(shard) <= LIMIT or len(shard) == 1 for shard in sizes)


@pytest.mark.parametrize("back_limit", [None, LIMIT, 10**6])
def test_the_way_back_is_bit_identical(tmp_path: Path, back_limit: int | None) -> None:
    metadata = {"format": "pt", "epoch": "3"}
    save_file(state(), tmp_path / "in.safetensors", metadata)
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v", 8, max_shard_size=LIMIT)
    assert inspect_checkpoint(tmp_path / "v").virtual_ranks == 8
    for path in (tmp_path / "v").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == metadata
    revert_checkpoint(tmp_path / "v", tmp_path / "back", max_shard_size=back_limit)
    assert verify_checkpoint(tmp_path / "back", tmp_path / "in.safetensors").largest_difference == 0
    back, original = load_all(tmp_path / "back"), load_file(tmp_path / "in.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    if back_limit == 10**6:  # all in one file, which is the one that it was
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
            tmp_path / "in.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("limit", [100, 2000, 10**9])
@pytest.mark.parametrize("given_", ["folder", "index"])
def test_a_folder_of_shards_gets_others_and_keeps_what_is_beside_them(
    tmp_path: Path, given_: str, limit: int
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_torch_state_dict(state(), source, max_shard_size=LIMIT, metadata={"total_parameters": "9"})
    (source / "config.json").write_text("{}")
    (source / "logs").mkdir()
    (source / "logs" / "events").write_text("step 1")
    before = contents(source)
    src = source if given_ == "folder" else source / INDEX
    convert_checkpoint(src, tmp_path / "v", 8, max_shard_size=limit)
    assert contents(source) == before
    convert_checkpoint(src, tmp_path / "same", 8)
    after, expected = load_all(tmp_path / "v"), load_all(tmp_path / "same")
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in expected.items())
    files = set(contents(tmp_path / "v"))
    assert {"config.json", "logs/events"} < files
    if limit == 10**9:
        assert files == {"config.json", "logs/events", "model.safetensors"}
    else:
        index = json.loads((tmp_path / "v" / INDEX).read_text())
        total = sum(tensor.nbytes for tensor in after.values())
        assert index["metadata"] == {"total_size": total, "total_parameters": "9"}
        assert {*index["weight_map"].values(), INDEX, "config.json", "logs/events"} == files
    revert_checkpoint(tmp_path / "v", tmp_path / "back", max_shard_size=LIMIT)
    assert verify_checkpoint(tmp_path / "back", source).largest_difference == 0
    if limit < 10**9:  # in one file nothing is left of the order in the index
        assert contents(tmp_path / "back") == before


def test_a_folder_that_held_nothing_but_old_shards_goes_with_them(tmp_path: Path) -> None:
    source, weight_map = tmp_path / "in", {}
    folders = ("kept", "gone", "gone/deep", "also/gone")
    for folder in (*folders, "also/empty"):
        (source / folder).mkdir(parents=True)
    (source / "kept" / "notes").touch()
    tensors = state()
    for number, folder in enumerate(folders):
        names = list(tensors)[number :: len(folders)]
        weight_map |= dict.fromkeys(names, f"{folder}/1.safetensors")
        save_file({name: tensors[name] for name in names}, source / folder / "1.safetensors")
    write_index(source, weight_map)
    convert_checkpoint(source, tmp_path / "v", 8, max_shard_size=LIMIT)
    new = tmp_path / "v"
    found = {str(path.relative_to(new)) for path in new.rglob("*") if path.is_dir()}
    assert found == {"kept", "also", "also/empty"}


def test_a_repository_with_one_file_gets_shards_and_back(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_torch_state_dict(state(), source)
    (source / "config.json").write_text("{}")
    before = contents(source)
    convert_checkpoint(source, tmp_path / "v", 4, max_shard_size=LIMIT)
    files = contents(tmp_path / "v")
    assert {"config.json", INDEX} < files.keys()
    assert "model.safetensors" not in files
    revert_checkpoint(tmp_path / "v", tmp_path / "back", max_shard_size="1MB")
    assert contents(tmp_path / "back") == before
    save_file(state(), source / "model_1.safetensors")
    with pytest.raises(ConfigurationError, match="the output would be accelerate"):
        convert_checkpoint(source, tmp_path / "o", 4, max_shard_size=LIMIT)


def test_an_order_that_is_not_the_packages_is_kept(tmp_path: Path) -> None:
    tensors, infos, data = state(), {}, b""
    for name in sorted(tensors, reverse=True):
        dtype = {torch.float32: "F32", torch.int64: "I64"}[tensors[name].dtype]
        more = tensors[name].numpy().tobytes()
        shape, offsets = list(tensors[name].shape), [len(data), len(data) + len(more)]
        infos[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += more
    header = json.dumps(infos, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "in.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    convert_checkpoint(path, tmp_path / "v", 8, max_shard_size=LIMIT)
    assert list(json.loads((tmp_path / "v" / INDEX).read_text())["weight_map"]) == list(infos)
    revert_checkpoint(tmp_path / "v", tmp_path / "back", max_shard_size="1GB")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == path.read_bytes()


def test_files_of_ranks_are_gathered_into_shards(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    gather_checkpoints(paths, tmp_path / "all", max_shard_size=LIMIT)
    convert_checkpoint(paths[0], tmp_path / "v", 2, max_shard_size=LIMIT)
    assert contents(tmp_path / "all") == contents(tmp_path / "v")


def test_a_file_of_torch_extracts_a_state_dict_into_shards(tmp_path: Path, capsys: Any) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    done = run_cli(
        capsys,
        *("convert", path, tmp_path / "v", "--vt-world-size", 4, "--format", "safetensors"),
        *("--state", "model", "--max-shard-size", "0.3kB", "--json"),
    )
    assert done.code == 0, done
    assert done.json["output"]["format"] == "sharded"
    assert verify_checkpoint(tmp_path / "v", path, state="model").largest_difference == 0
    shared = {**Net().state_dict(), "also": load(path)["model"]["fc.weight"]}
    shared["fc.weight"] = shared["also"]
    torch.save(shared, tmp_path / "tied.pth")
    with pytest.raises(RefusedError, match="share memory"):
        convert_checkpoint(
            tmp_path / "tied.pth", tmp_path / "t", 2, format="safetensors", max_shard_size="1kB"
        )
    assert sorted(os.listdir(tmp_path)) == ["in.pth", "tied.pth", "v"]


@pytest.mark.parametrize(
    ("size", "count"),
    [
        *(("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kB", 1500), (" 7b ", 7), ("12", 12)),
        *(("2GiB", 2 << 30), ("2.3GB", 2_300_000_000), (1, 1), ("1tb", 10**12)),
    ],
)
def test_sizes_are_read_as_people_write_them(size: int | str, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize(
    "size", ["", "GB", "5 XB", "-1GB", "0", 0, -5, "1e3", "nan", True, 2.5, []]
)
def test_what_is_no_size_is_wrong_usage(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"expected a size such as '5GB'.*kB, MB, GB"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, max_shard_size=size)


def test_shards_of_other_formats_and_under_other_names_are_wrong_usage(
    tmp_path: Path, capsys: Any
) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    torch.save(state(), tmp_path / "in.pth")
    (tmp_path / "bin").mkdir()
    save_torch_state_dict(state(), tmp_path / "bin", max_shard_size=LIMIT, safe_serialization=False)
    before = contents(tmp_path)
    for arguments, message in (
        (("in.pth", "o"), "the output would be torch; use format='safetensors'"),
        (("in.safetensors", "o", "--format", "torch"), "the output would be torch"),
        (("bin", "o"), "the output would be sharded"),
        (("in.safetensors", "o.safetensors"), "o.safetensors is named as a file"),
        (("in.safetensors", "--in-place"), "name an output instead"),
    ):
        paths = [
            tmp_path / arg if i < 2 and arg[0] != "-" else arg for i, arg in enumerate(arguments)
        ]
        done = run_cli(capsys, "convert", *paths, "--vt-world-size", 2, "--max-shard-size", "1MB")
        assert (done.code, message in done.err) == (2, True), done
        assert contents(tmp_path) == before
    options = {"format": "safetensors", "max_shard_size": LIMIT}
    convert_checkpoint(tmp_path / "bin", tmp_path / "o", 2, **options)
    assert load_all(tmp_path / "o").keys() == state().keys()


def test_a_folder_does_not_go_to_the_standard_output(tmp_path: Path, capsys: Any) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    arguments = ("convert", tmp_path / "in.safetensors", "-", "--vt-world-size", 2)
    done = run_cli(capsys, *arguments, "--max-shard-size", "1MB")
    assert (done.code, "a folder cannot go to stdout" in done.err) == (2, True)


def test_the_folder_appears_complete_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "v"
    save_file(state(), source)
    convert = (source, target, 4)
    written = []
    real = os.fsync

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileAccessError, match="no space left"):
        convert_checkpoint(*convert, max_shard_size=LIMIT)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["in.safetensors"]
    assert convert_checkpoint(*convert, max_shard_size=LIMIT, dry_run=True).output is None
    assert os.listdir(tmp_path) == ["in.safetensors"]
    convert_checkpoint(*convert, max_shard_size=LIMIT)
    before = contents(target)
    with pytest.raises(OutputExistsError, match="--force"):
        convert_checkpoint(*convert, max_shard_size=LIMIT)
    with pytest.raises(OutputExistsError, match="holds what the new folder would not"):
        convert_checkpoint(*convert, max_shard_size=10**6, overwrite=True)
    assert contents(target) == before
    convert_checkpoint(*convert, max_shard_size=LIMIT, overwrite=True)
    assert contents(target) == before


def test_a_new_name_that_something_else_has_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_torch_state_dict(state(), source, max_shard_size=LIMIT)
    save_file({"other": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(RefusedError, match=r"holds model\.safetensors, the name of a new file"):
        convert_checkpoint(source, tmp_path / "v", 2, max_shard_size="1GB")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("kind", ["copied", "replaced", "header", "index"])
def test_what_the_disk_changes_is_found_when_it_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from distbn_convert.checkpoint import reshard

    source = tmp_path / "in.safetensors"
    save_file(state(), source)
    if kind == "index":
        real_index = reshard._index

        def index(*arguments: Any) -> bytes:
            text = json.loads(real_index(*arguments))
            text["weight_map"] = {}
            return json.dumps(text).encode()

        monkeypatch.setattr(reshard, "_index", index)
    else:
        real = reshard._Shard.write

        def write(self: Any, file: Any, progress: Any) -> None:
            real(self, file, progress)
            wanted = "fc.weight" if kind == "copied" else "head.running_mean"
            if wanted in self.header.tensors:
                place = self.header.start + self.header.tensors[wanted].start
                file.seek(8 if kind == "header" else place)
                file.write(b"\xff" if kind != "header" else b" ")
                file.seek(0, os.SEEK_END)

        monkeypatch.setattr(reshard._Shard, "write", write)
    with pytest.raises(VerificationError, match="was read back and differs at"):
        convert_checkpoint(source, tmp_path / "v", 4, max_shard_size=LIMIT)
    assert os.listdir(tmp_path) == ["in.safetensors"]
