"""Safetensors, shards, folders and changes of format, through the library."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from distbn_convert import convert_model
from distbn_convert.checkpoint import (
    convert_checkpoint,
    inspect_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)
from distbn_convert.checkpoint.safetensors import read_header
from distbn_convert.errors import (
    ConfigurationError,
    OutputExistsError,
    ReadError,
    RefusedError,
    VerificationError,
)

from .checkpoints import (
    BATCH_NORMS,
    Net,
    bn_state,
    contents,
    load,
    resaved,
    torchvision_style,
    train,
)

SHARDS = {"format": "safetensors", "max_shard_size": "5GB"}
KEYS = ("running_mean", "running_var", "num_batches_tracked")


def state(width: int = 5) -> dict[str, torch.Tensor]:
    model = Net(width)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand(buffer.shape) * 9 if "num" in name else torch.rand_like(buffer))
    return model.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_case_29_safetensors_come_back_byte_for_byte_with_their_metadata(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state().items()}
    save_file(tensors, tmp_path / "in.safetensors", metadata={"format": "pt", "epoch": "3"})
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v.safetensors", 8)
    with safe_open(tmp_path / "v.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "epoch": "3"}
        assert file.get_tensor("head.running_mean").shape == (8, 4)
    revert_checkpoint(tmp_path / "v.safetensors", tmp_path / "back.safetensors")
    original = (tmp_path / "in.safetensors").read_bytes()
    assert (tmp_path / "back.safetensors").read_bytes() == original
    names = list(read_header(tmp_path / "in.safetensors").tensors)
    assert list(read_header(tmp_path / "v.safetensors").tensors) == names
    save_file(tensors, tmp_path / "bare.safetensors")
    convert_checkpoint(tmp_path / "bare.safetensors", tmp_path / "v2.safetensors", 8)
    with safe_open(tmp_path / "v2.safetensors", "pt") as file:
        assert file.metadata() is None


def test_a_converted_safetensors_file_equals_what_the_package_would_save(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    torch.save(load_file(tmp_path / "in.safetensors"), tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v.safetensors", 3)
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "v.pth", 3)
    ours, theirs = load_file(tmp_path / "v.safetensors"), load(tmp_path / "v.pth")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])
    save_file(theirs, tmp_path / "w.safetensors")
    assert (tmp_path / "w.safetensors").read_bytes() == (tmp_path / "v.safetensors").read_bytes()


def test_the_mode_of_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    (tmp_path / "in.safetensors").chmod(0o600)
    before = os.umask(0o027)
    try:
        convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v.safetensors", 2)
    finally:
        os.umask(before)
    assert (tmp_path / "v.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_case_30_a_batch_norm_across_shards_is_converted(
    tmp_path: Path, safe: bool, given: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_torch_state_dict(state(40), source, max_shard_size=300, safe_serialization=safe)
    (source / "config.json").write_text("{}")
    index = next(source.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    straddling = {weight_map[f"conv1_BN.{name}"] for name in KEYS}
    assert len(straddling) > 1
    before = contents(source)
    src = source if given == "folder" else index
    report = convert_checkpoint(src, tmp_path / "v", 8)
    assert report.counts == {"converted": BATCH_NORMS}
    assert contents(source) == before
    after = json.loads((tmp_path / "v" / index.name).read_text())
    assert after["weight_map"] == weight_map
    files = [tmp_path / "v" / name for name in set(weight_map.values())]
    tensors = {}
    for file in files:
        tensors.update(load_file(file) if safe else torch.load(file))
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert tensors["conv1_BN.running_mean"].shape == (8, 40)
    unchanged = {
        name: data
        for name, data in before.items()
        if name != index.name
        and not any(key.endswith(KEYS) for key, shard in weight_map.items() if shard == name)
    }
    assert len(unchanged) > 1
    assert unchanged.items() <= contents(tmp_path / "v").items()
    revert_checkpoint(tmp_path / "v", tmp_path / "back")
    back = contents(tmp_path / "back")
    if safe:
        assert {name: json.loads(data) for name, data in back.items() if name == index.name} == {
            index.name: json.loads(before[index.name])
        }
        back[index.name] = before[index.name]
        assert back == before
    else:
        for name in set(weight_map.values()):
            assert resaved(tmp_path / "back" / name) == resaved(source / name)


def test_a_folder_of_accelerate_comes_back_file_by_file(tmp_path: Path) -> None:
    """The layout of accelerator.save_state: weights, optimizer, scheduler, random states."""
    source = tmp_path / "in"
    source.mkdir()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    save_file(model.state_dict(), source / "model.safetensors", metadata={"format": "pt"})
    torch.save(optimizer.state_dict(), source / "optimizer.bin")
    torch.save({"last_epoch": 3}, source / "scheduler.bin")
    torch.save({"numpy": numpy.random.RandomState(0).get_state()}, source / "random_states_0.pkl")
    before = contents(source)
    report = convert_checkpoint(source, tmp_path / "v", 4)
    assert report.source.format == "accelerate"
    assert report.counts == {"converted": BATCH_NORMS}
    virtual = contents(tmp_path / "v")
    assert {name for name in before if before[name] != virtual[name]} == {"model.safetensors"}
    revert_checkpoint(tmp_path / "v", tmp_path / "back")
    assert contents(tmp_path / "back") == before
    assert contents(source) == before


def test_a_folder_is_converted_in_place_and_kept_as_backup(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_file(Net().state_dict(), source / "model.safetensors")
    (source / "optimizer.bin").write_bytes(b"momentum")
    before = contents(source)
    convert_checkpoint(source, None, 4, in_place=True)
    assert inspect_checkpoint(source).virtual_ranks == 4
    assert contents(tmp_path / "in.bak") == before
    with pytest.raises(OutputExistsError, match="same file"):
        revert_checkpoint(source, source)
    number = (source / "optimizer.bin").stat().st_ino
    revert_checkpoint(source, None, in_place=True, backup=False)
    assert contents(source) == before
    assert (source / "optimizer.bin").stat().st_ino == number  # the old folder is gone


@pytest.mark.parametrize(
    ("shard", "error", "reason"),
    [
        ("../x.safetensors", RefusedError, "outside the folder"),
        ("/etc/x.safetensors", RefusedError, "outside the folder"),
        ("C:\\x.safetensors", RefusedError, "outside the folder"),
        ("missing.safetensors", ReadError, "missing"),
    ],
)
def test_case_31_an_index_that_points_elsewhere_is_refused(
    tmp_path: Path, shard: str, error: type[Exception], reason: str
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    save_file(state(), source / "a.safetensors")
    content = {"weight_map": dict.fromkeys(state(), "a.safetensors")}
    content["weight_map"]["head.running_mean"] = shard
    (source / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(error, match=reason):
        convert_checkpoint(source, tmp_path / "v", 2)
    assert os.listdir(tmp_path) == ["in"]


def test_case_28_what_safetensors_cannot_hold_is_refused_and_state_extracts(
    tmp_path: Path,
) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    with pytest.raises(RefusedError, match=r"also has model, optimizer, .* --state model or"):
        convert_checkpoint(path, out, 4, format="safetensors")
    assert not out.exists()
    convert_checkpoint(path, out, 4, format="safetensors", state="model")
    expected = load(path)["model"]
    extracted = load_file(out)
    assert extracted.keys() == expected.keys()
    assert extracted["head.running_mean"].shape == (4, 4)
    assert torch.equal(extracted["fc.weight"], expected["fc.weight"])
    listed = [load(path)["model"], 3]
    torch.save(listed, tmp_path / "list.pth")
    with pytest.raises(RefusedError, match=r"no state dict at its top; it has 0\. Name one with"):
        convert_checkpoint(tmp_path / "list.pth", out, 4, format="safetensors", overwrite=True)
    tied = nn.Sequential(nn.BatchNorm2d(3))
    torch.save({**tied.state_dict(), "also": tied[0].weight.detach()}, tmp_path / "tied.pth")
    with pytest.raises(RefusedError, match="share memory"):
        convert_checkpoint(tmp_path / "tied.pth", tmp_path / "t", 2, format="safetensors")


@pytest.mark.parametrize(
    ("others", "named"),
    [
        ({"epoch": 3}, "has epoch"),
        ({7: torch.ones(3)}, "has 7"),
        (dict.fromkeys("abcdef", 1), r"has a, b, c, d, e, \.\.\."),
    ],
)
def test_a_state_dict_with_more_than_named_tensors_in_it_gets_no_name_to_take(
    tmp_path: Path, others: dict[Any, Any], named: str
) -> None:
    torch.save({**nn.BatchNorm2d(3).state_dict(prefix="bn."), **others}, tmp_path / "in.pth")
    with pytest.raises(RefusedError, match=rf"also {named}\. Save its tensors alone\.$"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out", 2, format="safetensors")
    assert os.listdir(tmp_path) == ["in.pth"]


def test_case_27_strided_tensors_become_contiguous_in_safetensors(tmp_path: Path) -> None:
    tensors = {**nn.BatchNorm2d(3).state_dict(prefix="bn."), "t": torch.rand(3, 4).t()}
    torch.save(tensors, tmp_path / "in.pth")
    report = convert_checkpoint(
        tmp_path / "in.pth", tmp_path / "o.safetensors", 2, format="safetensors"
    )
    assert "t is made contiguous for safetensors." in report.warnings
    assert torch.equal(load_file(tmp_path / "o.safetensors")["t"], tensors["t"])
    torch.save({**tensors, "u": torch.rand(3, 4).t()}, tmp_path / "two.pth")
    report = convert_checkpoint(tmp_path / "two.pth", tmp_path / "two", 2, format="safetensors")
    assert "t and 1 more are made contiguous for safetensors." in report.warnings


def test_views_side_by_side_are_no_obstacle_to_safetensors(tmp_path: Path) -> None:
    flat = torch.rand(10)
    tensors = {**nn.BatchNorm2d(3).state_dict(prefix="bn."), "a": flat[:5], "b": flat[5:]}
    torch.save(tensors, tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "o.safetensors", 2, format="safetensors")
    assert torch.equal(load_file(tmp_path / "o.safetensors")["b"], flat[5:])


def test_safetensors_become_a_file_of_torch_and_back(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v.pth", 3, format="torch")
    revert_checkpoint(tmp_path / "v.pth", tmp_path / "o.safetensors", format="safetensors")
    ours, original = load_file(tmp_path / "o.safetensors"), load_file(tmp_path / "in.safetensors")
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in ours)


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_one_state_dict_is_taken_out_of_a_folder_of_dcp(tmp_path: Path, format: str) -> None:
    state = bn_state()
    tree = {"model": state, "optimizer": {"groups": [{"lr": 0.1}]}, "l": [bn_state(), 3]}
    tree["odd"] = {**bn_state(), "version": 3}
    save_dcp(tree, tmp_path / "in")
    options = {"format": format, "fsync": False}
    told = r"tensors by name alone, but \S+/in also has model, optimizer, l, odd\. Take one state "
    with pytest.raises(RefusedError, match=told + r"dict with --state model or --state l\.0 or"):
        convert_checkpoint(tmp_path / "in", tmp_path / "no", 2, **options)
    with pytest.raises(RefusedError, match=r"also has version\. Take one"):
        convert_checkpoint(tmp_path / "in", tmp_path / "no", 2, state="odd", **options)
    for name, source in (("model", state), ("l.0", tree["l"][0])):
        report = convert_checkpoint(tmp_path / "in", tmp_path / name, 2, state=name, **options)
        assert report.counts == {"converted": 1, "skipped": 2}
        assert report.warnings == ()
        out = load(tmp_path / name) if format == "torch" else load_file(tmp_path / name)
        assert out.keys() == source.keys()
        assert torch.equal(out["bn.weight"], source["bn.weight"])
        assert torch.equal(out["bn.running_var"], source["bn.running_var"].expand(2, 3))
    assert sorted(os.listdir(tmp_path)) == ["in", "l.0", "model"]


@pytest.mark.parametrize("options", [{"format": "torch"}, {"format": "safetensors"}, SHARDS])
def test_one_state_dict_is_taken_out_of_a_folder_of_accelerate(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    states = {"model.safetensors": bn_state(), "model_1.safetensors": bn_state()}
    for name, state in states.items():
        save_file(state, source / name, metadata={"format": "pt", "file": name})
    torch.save({"lr": 0.1}, source / "optimizer.bin")
    with pytest.raises(RefusedError, match=r"at its top; it has model\.safetensors, model_1\."):
        convert_checkpoint(source, out, 2, fsync=False, **options)
    report = convert_checkpoint(source, out, 2, fsync=False, state="model_1.safetensors", **options)
    told = f"left out, as one state dict is written: optimizer.bin in {source}."
    assert report.warnings[-1] == told
    file = out / "model.safetensors" if out.is_dir() else out
    new = load(file) if options["format"] == "torch" else load_file(file)
    assert new.keys() == states["model_1.safetensors"].keys()
    assert torch.equal(new["bn.weight"], states["model_1.safetensors"]["bn.weight"])
    if options["format"] == "torch":
        assert report.warnings[-2] == (
            f"the metadata of {source} (file, format) is left out: a file of torch has no place "
            "for it."
        )
    else:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "file": "model_1.safetensors"}


def test_metadata_that_a_file_of_torch_cannot_hold_is_told(tmp_path: Path) -> None:
    for metadata, told in (({"format": "pt"}, 0), ({"format": "pt", "epoch": "3"}, 1)):
        save_file(bn_state(), tmp_path / "in.safetensors", metadata=metadata)
        report = convert_checkpoint(
            tmp_path / "in.safetensors", tmp_path / "out", 2, format="torch", overwrite=True
        )
        assert ["(epoch, format) is left out" in text for text in report.warnings] == [True] * told


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_one_state_dict_is_taken_out_of_a_file_of_torch_as_one(
    tmp_path: Path, zipped: bool
) -> None:
    """With the format said; without, all of the file is kept."""
    model = Net().state_dict()
    model["extra"] = {"version": 3}  # which a file of torch can hold
    path, out = tmp_path / "in.pth", tmp_path / "out.pth"
    content = {"model": model, "ema": bn_state(), "large": torch.rand(10**6)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    convert_checkpoint(path, out, 2, state="model", format="torch")
    assert out.stat().st_size < 50_000
    revert_checkpoint(out, tmp_path / "back.pth")
    torch.save(model, tmp_path / "expected.pth")
    assert (tmp_path / "back.pth").read_bytes() == resaved(tmp_path / "expected.pth")
    convert_checkpoint(path, out, 2, state="model", overwrite=True)
    assert load(out).keys() == content.keys()
    with pytest.raises(ConfigurationError, match="in_place keeps the format and all else"):
        convert_checkpoint(path, None, 2, state="model", format="torch", in_place=True)


def test_a_name_that_promises_another_format_is_refused(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    with pytest.raises(ConfigurationError, match="--format torch"):
        convert_checkpoint(tmp_path / "in.safetensors", tmp_path / "v.pth", 3)


def test_a_file_keeps_such_a_name_in_place(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "odd.safetensors")
    report = convert_checkpoint(tmp_path / "odd.safetensors", None, 2, in_place=True)
    assert report.output is not None
    assert report.output.format == "torch"


def test_verify_compares_across_formats(tmp_path: Path) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    convert_checkpoint(path, tmp_path / "v.safetensors", 4, format="safetensors", state="model")
    report = verify_checkpoint(tmp_path / "v.safetensors", path, state="model")
    assert (report.groups, report.largest_difference) == (BATCH_NORMS, 0.0)
    other = load_file(tmp_path / "v.safetensors")
    other["head.running_mean"][0, 1] += 0.5
    save_file(other, tmp_path / "w.safetensors")
    with pytest.raises(VerificationError, match=r"head\.running_mean differs by 0\.125"):
        verify_checkpoint(tmp_path / "w.safetensors", path, state="model")
    report = verify_checkpoint(tmp_path / "w.safetensors", path, 0.2, state="model")
    assert report.largest_difference == pytest.approx(0.125)
    other["fc.weight"][0, 0] += 1
    save_file(other, tmp_path / "w.safetensors")
    with pytest.raises(VerificationError, match=r"fc\.weight differs"):
        verify_checkpoint(tmp_path / "w.safetensors", path, 0.2, state="model")


def save_dcp(tree: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it takes this for a single process
        dcp.save(tree, checkpoint_id=folder)


def dcp_state() -> dict[str, Any]:
    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}


def test_case_40_a_folder_of_dcp_is_converted_and_comes_back(tmp_path: Path) -> None:
    save_dcp(dcp_state(), tmp_path / "in")
    before = contents(tmp_path / "in")
    report = convert_checkpoint(tmp_path / "in", tmp_path / "v", 4, state="model")
    assert report.counts == {"converted": BATCH_NORMS}
    assert report.groups[0].path == ("model",)
    assert contents(tmp_path / "in") == before
    virtual = convert_model(Net(), 4).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": virtual}, checkpoint_id=tmp_path / "v")
    expected = dcp_state()["model"]
    assert torch.equal(virtual["head.running_var"], expected["head.running_var"].expand(4, 4))
    assert torch.equal(virtual["fc.weight"], expected["fc.weight"])
    revert_checkpoint(tmp_path / "v", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "in").largest_difference == 0
    back = dcp_state()
    for tensor in back["model"].values():
        tensor.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(back, checkpoint_id=tmp_path / "back")
    assert all(torch.equal(back["model"][key], value) for key, value in expected.items())
