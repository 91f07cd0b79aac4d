from __future__ import annotations

import json
import os
import stat
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import load_torch_model, save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distbn_convert.checkpoint import convert_checkpoint, revert_checkpoint, shard_index
from distbn_convert.checkpoint.beside import other_weights
from distbn_convert.checkpoint.shard_index import ShardIndex, read_index
from distbn_convert.checkpoint.sharded import (
    read_accelerate,
    write_accelerate,
    write_sharded,
)
from distbn_convert.checkpoint.stores import WriteOptions
from distbn_convert.checkpoint.strict_json import parse_object
from distbn_convert.errors import FileAccessError, OutputExistsError, ReadError, RefusedError

from .checkpoints import bn_state, contents, write_index
from .places import restrict

BN_KEYS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3))


def write(index: ShardIndex, dst: Path, new: dict[str, Tensor], **options: Any) -> None:
    with write_sharded(index, dst, new, WriteOptions(**options)):
        pass


def save_shards(folder: Path, state: dict[str, Tensor], kind: str, size: int = 1500) -> Path:
    """Save as huggingface_hub does; return the index."""
    folder.mkdir(exist_ok=True)
    safe = kind == "safetensors"
    save_torch_state_dict(state, folder, max_shard_size=size, safe_serialization=safe)
    (folder / "config.json").write_text('{"model": "tiny"}')
    (folder / "optimizer.bin").write_bytes(b"state of the optimizer" * 100)
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_text("step 1")
    return next(iter(folder.glob("*.index.json")))


def virtual(state: dict[str, Tensor], ranks: int = 4) -> dict[str, Tensor]:
    return {key: state[key].expand(ranks, *state[key].shape).contiguous() for key in BN_KEYS}


def load_shard(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


@pytest.fixture(params=["safetensors", "torch"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("given", ["folder", "index"])
def test_a_real_folder_of_shards_is_read_tensor_by_tensor(
    tmp_path: Path, kind: str, given: str
) -> None:
    state = model().state_dict()
    path = save_shards(tmp_path, state, kind)
    index = read_index(tmp_path if given == "folder" else path)
    assert index.path == path
    assert len(index.headers) > 1
    assert set(index.weight_map) == set(state)
    for name, tensor in state.items():
        assert torch.equal(index.read_tensor(name), tensor)
        info = index.headers[index.weight_map[name]].tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.dtype == {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype]


def test_a_converted_folder_holds_the_replacements_and_everything_else(
    tmp_path: Path, kind: str
) -> None:
    state = model().state_dict()
    source, target = tmp_path / "plain", tmp_path / "virtual"
    index = read_index(save_shards(source, state, kind))
    before = contents(source)
    shards_of_bn = {index.weight_map[key] for key in BN_KEYS}
    new = virtual(state)
    steps: list[tuple[int, int]] = []
    options = WriteOptions(progress=lambda *step: steps.append(step))
    with write_sharded(index, target, new, options) as folder:
        assert not target.exists()
        assert len(read_index(folder).weight_map) == len(state)
    loaded = {}
    for shard in index.headers:
        loaded.update(load_shard(target / shard))
    expected = {**state, **new}
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    after = contents(target)
    assert contents(source) == before
    assert set(after) == set(before)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {*shards_of_bn, index.path.name}
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    old, grown = (json.loads((place / index.path.name).read_text()) for place in (source, target))
    growth = sum(new[key].nbytes - state[key].nbytes for key in BN_KEYS)
    assert grown["metadata"].pop("total_size") == old["metadata"].pop("total_size") + growth
    assert grown == old
    assert list(grown["weight_map"]) == list(old["weight_map"])
    assert sorted(os.listdir(tmp_path)) == ["plain", "virtual"]


def test_the_way_back_is_bit_identical(tmp_path: Path, kind: str) -> None:
    state = model().state_dict()
    first = read_index(save_shards(tmp_path / "plain", state, kind))
    write(first, tmp_path / "virtual", virtual(state))
    second = read_index(tmp_path / "virtual")
    write(second, tmp_path / "back", {key: state[key] for key in BN_KEYS})
    loaded = model()
    load_torch_model(loaded, tmp_path / "back", strict=True, safe=kind == "safetensors")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])
    if kind == "safetensors":
        plain, back = contents(tmp_path / "plain"), contents(tmp_path / "back")
        for text in (plain, back):
            text[first.path.name] = json.loads(text[first.path.name])  # indented by us
        assert plain == back


def test_one_batch_norm_may_straddle_two_shards(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    state = model().state_dict()
    save_file({key: state[key] for key in state if key != BN_KEYS[1]}, source / "a.safetensors")
    save_file({BN_KEYS[1]: state[BN_KEYS[1]]}, source / "b.safetensors")
    weight_map = {key: "b.safetensors" if key == BN_KEYS[1] else "a.safetensors" for key in state}
    write_index(source, weight_map)
    target = tmp_path / "out"
    write(read_index(source), target, virtual(state))
    assert load_file(target / "a.safetensors")[BN_KEYS[0]].shape == (4, 16)
    assert load_file(target / "b.safetensors")[BN_KEYS[1]].shape == (4, 16)


@pytest.mark.filterwarnings("ignore")  # torch says that it takes this for a single process
@pytest.mark.parametrize("options", [{}, {"max_shard_size": 80}], ids=["as it was", "resharded"])
def test_torchs_own_reader_of_safetensors_loads_what_its_writer_saved(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Its metadata say where each tensor begins, with as many numbers as axes."""
    plain = {"head": torch.ones(4), **bn_state()}
    files = {name: 1 + place % 2 for place, name in enumerate(plain)}
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "in"), fqn_to_index_mapping=files)
    dcp.save(plain, storage_writer=writer)
    convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, **options)
    rows = {name: value.expand(2, *value.shape) for name, value in list(plain.items())[3:]}
    found = {name: torch.zeros_like(value) for name, value in (plain | rows).items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "out")))
    assert all(torch.equal(found[name], value) for name, value in (plain | rows).items())
    if not options:
        revert_checkpoint(tmp_path / "out", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(tmp_path / "in")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_torch_shard_keeps_its_metadata_order_and_other_values(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    state = model().state_dict()
    state["epoch"] = 3
    state["sparse"] = torch.eye(2).to_sparse()
    torch.save(state, source / "pytorch_model-1.bin")
    weight_map = dict.fromkeys((key for key in state if key != "epoch"), "pytorch_model-1.bin")
    write_index(source, weight_map, "pytorch_model.bin.index.json")
    target = tmp_path / "out"
    write(read_index(source), target, virtual(state))
    loaded = torch.load(target / "pytorch_model-1.bin")
    assert isinstance(loaded, OrderedDict)
    assert loaded._metadata == state._metadata
    assert list(loaded) == list(state)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(2))


@pytest.mark.parametrize("total", [None, "many", True, 10.0, 10])
def test_a_total_size_that_is_no_number_is_left_alone(tmp_path: Path, total: object) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_file({"a": torch.zeros(2)}, source / "a.safetensors")
    metadata = {} if total is None else {"total_size": total, "note": "kept"}
    path = write_index(source, {"a": "a.safetensors"}, metadata=metadata, odd=[1])
    target = tmp_path / "out"
    write(read_index(path), target, {"a": torch.zeros(3, 2)})
    content = json.loads((target / path.name).read_text())
    if type(total) in (int, float):
        assert content["metadata"] == {"total_size": total + 16, "note": "kept"}
    else:
        assert (target / path.name).read_bytes() == path.read_bytes()
    assert content["odd"] == [1]


@pytest.mark.parametrize(
    "metadata",
    ['{"total_size" :\t8, "by": "\u00e9"}', '{"old": {"total_size": 5},"total_size": 8}'],
    ids=["alone", "one of two"],
)
def test_the_text_of_an_index_stays_but_for_its_total_size(tmp_path: Path, metadata: str) -> None:
    """Where another number of that name comes first, the text is written anew: it says the same."""
    source, edited = tmp_path / "in", "old" not in metadata
    source.mkdir()
    save_file({"a": torch.zeros(2)}, source / "a.safetensors")
    text = f'\n{{"weight_map": {{ "a":"a.safetensors"}},\n   "metadata": {metadata}}}'
    path = source / "model.safetensors.index.json"
    path.write_bytes(text.encode())
    write(read_index(path), tmp_path / "out", {"a": torch.zeros(3, 2)})
    grown = (tmp_path / "out" / path.name).read_bytes()
    expected = json.loads(text)
    expected["metadata"]["total_size"] = 24
    assert json.loads(grown) == expected
    assert (grown == text.replace("8", "24").encode()) is edited
    write(read_index(tmp_path / "out"), tmp_path / "back", {"a": torch.zeros(2)})
    back = (tmp_path / "back" / path.name).read_bytes()
    assert json.loads(back) == json.loads(text)
    assert (back == path.read_bytes()) is edited


def tiny(folder: Path, **files: str) -> Path:
    """A folder with one shard; returns the index."""
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, folder / "1.safetensors")
    for name, text in files.items():
        (folder / name).write_text(text)
    return write_index(folder, {"a": "1.safetensors"}, metadata={"total_size": 8})


def convert(src: Path, dst: Path, **options: Any) -> None:
    write(read_index(src), dst, {"a": torch.ones(3, 2)}, **options)


def test_files_carried_over_are_copies_with_their_mode(tmp_path: Path) -> None:
    tiny(tmp_path / "in", optimizer="momentum")
    (tmp_path / "in" / "optimizer").chmod(0o640)
    (tmp_path / "in" / "logs").mkdir(mode=0o750)
    os.utime(tmp_path / "in" / "logs", (1e9, 1e9))
    convert(tmp_path / "in", tmp_path / "out")
    logs = (tmp_path / "out" / "logs").stat()
    assert (stat.S_IMODE(logs.st_mode), logs.st_mtime) == (0o750, 1e9)
    copy = tmp_path / "out" / "optimizer"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o640
    copy.write_text("written in place, as torch.save does")
    assert (tmp_path / "in" / "optimizer").read_text() == "momentum"


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_is_converted_in_place(
    tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path / "in", optimizer="momentum")
    (tmp_path / "in" / "1.safetensors").chmod(0o600)
    inode = (tmp_path / "in" / "optimizer").stat().st_ino
    if not links:
        restrict(monkeypatch, "no hard links")
    with pytest.raises(OutputExistsError):
        convert(tmp_path / "in", tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "in", overwrite=True)
    assert load_file(tmp_path / "in" / "1.safetensors")["a"].shape == (3, 2)
    assert stat.S_IMODE((tmp_path / "in" / "1.safetensors").stat().st_mode) == 0o600
    assert (tmp_path / "in" / "optimizer").read_text() == "momentum"
    assert ((tmp_path / "in" / "optimizer").stat().st_ino == inode) == links
    assert os.listdir(tmp_path) == ["in"]


def test_links_into_a_cache_are_followed_in_a_new_folder_and_kept_in_place(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    tiny(folder, config="{}")
    blobs.mkdir()
    (blobs / "logs").mkdir()
    (folder / "logs").symlink_to("../blobs/logs")
    for name in os.listdir(folder):
        if name != "logs":
            (folder / name).rename(blobs / name)
            (folder / name).symlink_to(f"../blobs/{name}")
    before = contents(blobs)
    convert(folder, tmp_path / "out")
    assert not any((tmp_path / "out" / name).is_symlink() for name in ("config", "1.safetensors"))
    assert (tmp_path / "out" / "config").read_text() == "{}"
    assert (tmp_path / "out" / "logs").samefile(blobs / "logs")
    convert(folder, folder, overwrite=True)
    assert (folder / "config").is_symlink()
    assert os.readlink(folder / "logs") == "../blobs/logs"
    assert load_file(folder / "1.safetensors")["a"].shape == (3, 2)
    assert contents(blobs) == before


def test_a_repository_and_leftovers_are_not_copied(tmp_path: Path) -> None:
    tiny(tmp_path / "in", **{".x.1.0123abcd.distbn-tmp": "left over"})
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "HEAD").touch()
    (tmp_path / "in" / ".y.1.0123abcd.distbn-tmp").mkdir()
    (tmp_path / "in" / ".y.1.0123abcd.distbn-tmp" / "1.safetensors").touch()
    (tmp_path / "in" / "empty").mkdir()
    convert(tmp_path / "in", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "1.safetensors",
        "empty",
        "model.safetensors.index.json",
    ]


def test_what_cannot_be_carried_over_is_refused(tmp_path: Path) -> None:
    tiny(tmp_path / "in")
    with pytest.raises(RefusedError, match=r"out is inside .*in, which is copied there"):
        convert(tmp_path / "in", tmp_path / "in" / "out")
    os.mkfifo(tmp_path / "in" / "fifo")
    with pytest.raises(RefusedError, match="fifo is no regular file; move it out"):
        convert(tmp_path / "in", tmp_path / "out")
    os.unlink(tmp_path / "in" / "fifo")
    (tmp_path / "in" / "dangling").symlink_to("nowhere")
    with pytest.raises(FileAccessError, match=r"cannot read .*dangling: no such file"):
        convert(tmp_path / "in", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("dst", ["in", "out"])
def test_shards_below_a_link_to_a_folder_are_not_written_through_it(
    tmp_path: Path, dst: str
) -> None:
    """It said that they exist, and to use overwrite=True, also with that."""
    tiny(tmp_path / "blobs")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights").symlink_to(tmp_path / "blobs")
    write_index(tmp_path / "in", {"a": "weights/1.safetensors"})
    with pytest.raises(RefusedError, match="in/weights is a link to a folder with files to change"):
        convert(tmp_path / "in", tmp_path / dst, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["blobs", "in"]


def test_a_folder_takes_time_in_proportion_to_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes through all names or files does so a few times, not for each shard."""
    (tmp_path / "in").mkdir()
    weight_map = {f"bn{i}.{key}": f"{i}.safetensors" for i in range(20) for key in bn_state()}
    for number in range(20):
        state = {f"bn{number}.{key}": value for key, value in bn_state().items()}
        save_file(state, tmp_path / "in" / f"{number}.safetensors")
    write_index(tmp_path / "in", weight_map)
    passes = Counter[str]()

    class Names(dict[str, str]):
        def items(self) -> Any:
            passes["items"] += len(self)
            return super().items()

        def __getitem__(self, name: str) -> str:
            passes["items"] += 1
            return super().__getitem__(name)

    def parse(text: bytes) -> dict[str, Any]:
        content = parse_object(text)
        return {**content, "weight_map": Names(content["weight_map"])}

    def scan(folder: Any) -> Any:
        passes["folders"] += 1
        return scandir(folder)

    scandir = os.scandir
    monkeypatch.setattr(shard_index, "parse_object", parse)
    monkeypatch.setattr(os, "scandir", scan)
    convert_checkpoint(tmp_path / "in", tmp_path / "out", 2, fsync=False)
    assert passes["items"] < 10 * len(weight_map)
    assert passes["folders"] < 20


def test_weights_under_another_index_are_left_out(tmp_path: Path) -> None:
    path = tiny(tmp_path / "in", config="{}", **{"model.h5": "", "model.safetensors": ""})
    torch.save({"a": torch.zeros(2)}, tmp_path / "in" / "1.bin")
    write_index(tmp_path / "in", {"a": "1.bin"}, "pytorch_model.bin.index.json")
    with pytest.raises(RefusedError, match="holds 2 sharded checkpoints"):
        read_index(tmp_path / "in")
    convert(path, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {
        *("config", "model.h5", "model.safetensors", "1.safetensors", path.name)
    }
    with pytest.raises(OutputExistsError, match=r"holds what the new folder would not: 1\.bin"):
        convert(path, tmp_path / "in", overwrite=True)
    own = read_index(path).headers
    assert other_weights(tmp_path / "in", own) == ["1.bin", "model.h5", "model.safetensors"]


def test_a_failure_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny(tmp_path / "in", config="{}")
    index = read_index(path)
    save_file({"a": torch.zeros(9)}, tmp_path / "in" / "1.safetensors")
    with (
        pytest.raises(ReadError, match="changed while it was read"),
        write_sharded(index, tmp_path / "out", {"a": torch.ones(3, 2)}, WriteOptions()),
    ):
        raise AssertionError
    assert os.listdir(tmp_path) == ["in"]


def test_an_accelerate_folder_is_converted_with_all_that_belongs_to_it(tmp_path: Path) -> None:
    state = model().state_dict()
    folder, target = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file(state, folder / name, {"format": "pt"})
    torch.save({"state": {}}, folder / "optimizer.bin")
    (folder / "random_states_0.pkl").write_bytes(b"\x80\x04 never opened")
    headers = read_accelerate(folder)
    assert list(headers) == ["model.safetensors", "model_1.safetensors"]
    new = virtual(state)
    changed, options = {"model.safetensors": new}, WriteOptions()
    with write_accelerate(folder, headers, target, changed, options) as made:
        assert load_file(made / "model.safetensors")[BN_KEYS[0]].shape == (4, 16)
    before, after = contents(folder), contents(target)
    assert set(before) == set(after)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    loaded = load_file(target / "model.safetensors")
    for name, tensor in {**state, **new}.items():
        assert torch.equal(loaded[name], tensor)
