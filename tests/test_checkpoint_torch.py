"""Files of torch.save: converted, reverted, carried through. Cases of the specification."""

from __future__ import annotations

import collections
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from distbn_convert import convert_model
from distbn_convert.checkpoint import (
    convert_checkpoint,
    gather_checkpoints,
    inspect_checkpoint,
    revert_checkpoint,
    verify_checkpoint,
)
from distbn_convert.errors import (
    NothingToDoError,
    OutputExistsError,
    ReadError,
    RefusedError,
    VerificationError,
)

from .checkpoints import (
    BATCH_NORMS,
    STYLES,
    Net,
    bn_state,
    load,
    repickled,
    resaved,
    round_trip,
    save,
    torchvision_style,
    train,
)

COUNT = "num_batches_tracked"
GROUPS = {"torchvision": 2, "timm": 2, "lightning": 2, "moco": 2}  # sets of BatchNorms


@pytest.mark.parametrize("style", STYLES)
def test_checkpoints_of_training_loops_come_back_byte_for_byte(tmp_path: Path, style: str) -> None:
    """Cases 15, 17, 19, 20, 21."""
    path = STYLES[style](tmp_path / "in.pth.tar")
    back = round_trip(path)
    assert back.read_bytes() == resaved(path)
    report = inspect_checkpoint(tmp_path / "virtual")
    assert len(report.groups) == BATCH_NORMS * GROUPS[style]
    assert report.virtual_ranks == 8


@pytest.mark.parametrize("style", STYLES)
def test_the_converted_statistics_equal_those_of_a_converted_model(
    tmp_path: Path, style: str
) -> None:
    path = STYLES[style](tmp_path / "in.pth")
    convert_checkpoint(path, tmp_path / "out.pth", 4)
    plain, virtual = load(path), load(tmp_path / "out.pth")
    name = next(key for key in ("model", "state_dict") if key in plain)
    prefix = {"lightning": "model.", "moco": "module.encoder_k."}.get(style, "")
    strip = {k.removeprefix(prefix): v for k, v in plain[name].items() if k.startswith(prefix)}
    model = Net()
    model.load_state_dict(strip)
    expected = convert_model(model, 4).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(virtual[name][prefix + key], value, rtol=0, atol=0)


def test_a_training_run_resumes_exactly_from_a_reverted_checkpoint(tmp_path: Path) -> None:
    """Case 20."""
    path = torchvision_style(tmp_path / "in.pth")
    back = round_trip(path, 4)

    def resume(checkpoint: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
        content = load(checkpoint)
        model = Net()
        model.load_state_dict(content["model"], strict=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
        optimizer.load_state_dict(content["optimizer"])
        torch.set_rng_state(content["rng"])
        return train(model, optimizer, seed=9), model.state_dict()

    (losses, state), (losses_back, state_back) = resume(path), resume(back)
    assert losses == losses_back
    for key in state:
        assert torch.equal(state[key], state_back[key]), key


def test_a_converted_checkpoint_resumes_as_the_converted_model(tmp_path: Path) -> None:
    """Case 20: the optimizer's momentum fits, and the run equals that of a model converted live."""
    path = torchvision_style(tmp_path / "in.pth")
    convert_checkpoint(path, tmp_path / "virtual.pth", 4)

    def resume(checkpoint: Path, convert_first: bool) -> list[float]:
        content = load(checkpoint)
        model = Net()
        if convert_first:
            model = convert_model(model, 4)
        model.load_state_dict(content["model"], strict=True)
        if not convert_first:
            model = convert_model(model, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer.load_state_dict(content["optimizer"])
        return train(model, optimizer, seed=9)

    assert resume(tmp_path / "virtual.pth", True) == resume(path, False)


def test_case_24_cycles_shared_parts_and_odd_keys_keep_their_structure(tmp_path: Path) -> None:
    state = bn_state()
    tree: dict[Any, Any] = {
        "a": state,
        "b": state,
        3: ({"x": bn_state()}, [bn_state()]),
        (1, 2): None,
    }
    tree["self"] = tree
    path = save(tmp_path, tree)
    back = round_trip(path, 3)
    virtual = load(tmp_path / "virtual")
    assert virtual["self"] is virtual
    assert virtual["a"] is virtual["b"]
    assert list(virtual) == list(tree)
    assert virtual[3][0]["x"]["bn.running_var"].shape == (3, 3)
    assert virtual[3][1][0]["bn.running_var"].shape == (3, 3)
    assert back.read_bytes() == resaved(path)


def test_a_state_dict_under_two_keys_is_found_under_both(tmp_path: Path) -> None:
    state = bn_state()
    path = save(tmp_path, {"a": {"x.y": state}, "b": [{"x.y": state}], "c": bn_state()})
    for number, wanted in enumerate(("a.x.y", "b.0.x.y", "b")):
        report = convert_checkpoint(path, tmp_path / f"out{number}", 2, state=wanted)
        assert report.counts == {"converted": 1, "skipped": 1}
        virtual = load(tmp_path / f"out{number}")
        assert virtual["a"]["x.y"] is virtual["b"][0]["x.y"]
        assert virtual["a"]["x.y"]["bn.running_mean"].shape == (2, 3)
        assert virtual["c"]["bn.running_mean"].shape == (3,)
        verify_checkpoint(tmp_path / f"out{number}", path, state=wanted)
    flat = tmp_path / "flat.safetensors"
    convert_checkpoint(path, flat, 2, state="b.0.x.y", format="safetensors")
    assert load_file(flat).keys() == state.keys()
    with pytest.raises(NothingToDoError, match="outside --state d"):
        convert_checkpoint(path, tmp_path / "none", 2, state="d")


def test_a_file_without_batch_norms_tells_how_many_keys_look_like_one(tmp_path: Path) -> None:
    path = save(tmp_path, {"my_running_mean": torch.rand(3), "bn.running_mean": [0.5], "x": 3})
    with pytest.raises(NothingToDoError, match=r"\(1 tensors\)\. Keys ending in running_mean: 2\."):
        convert_checkpoint(path, tmp_path / "out", 2)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_statistics_too_coarse_to_average_are_refused(
    tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    state = bn_state()
    for key in ("bn.running_mean", "bn.running_var"):
        state[key] = state[key].to(dtype)
    path = save(tmp_path, state)
    if kind == "safetensors":
        save_file(state, path)
    told = r"a statistic of bn is (float8_|F8_)\w+, too coarse to average; save it as float32\."
    with pytest.raises(RefusedError, match=told):
        convert_checkpoint(path, tmp_path / "out", 2)


@pytest.mark.parametrize(
    "statistics",
    [
        {key: torch.ones(3).to_sparse() for key in ("running_mean", "running_var")},
        {"running_mean": torch.ones(8, 3), "running_var": torch.ones(4, 3)},
    ],
    ids=["refused", "contradictory"],
)
def test_what_cannot_be_converted_can_be_excluded(
    tmp_path: Path, statistics: dict[str, torch.Tensor]
) -> None:
    odd = {f"odd.{key}": value for key, value in statistics.items()}
    path = save(tmp_path, {**bn_state(), **odd})
    report = convert_checkpoint(path, tmp_path / "out", 2, exclude=["odd"])
    assert [group.action for group in report.groups] == ["converted", "skipped"]
    assert load(tmp_path / "out")["odd.running_var"].shape == odd["odd.running_var"].shape


def test_case_25_tied_batch_norms_stay_tied_and_are_stored_once(tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(1000)
    untied = save(tmp_path, nn.Sequential(norm).state_dict(), "one.pth")
    path = save(tmp_path, nn.Sequential(norm, nn.ReLU(), norm).state_dict())
    convert_checkpoint(path, tmp_path / "v", 8)
    convert_checkpoint(untied, tmp_path / "v1", 8)
    virtual = load(tmp_path / "v")
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert virtual[f"0.{name}"].data_ptr() == virtual[f"2.{name}"].data_ptr()
    assert (tmp_path / "v").stat().st_size < (tmp_path / "v1").stat().st_size * 1.1
    revert_checkpoint(tmp_path / "v", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == resaved(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("error")
def test_case_24_keys_and_values_that_are_or_hold_storages_are_the_same_after_saving(
    tmp_path: Path, legacy: bool
) -> None:
    """Such a key equals nothing but itself; torch warns of printing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of typed storages
        keys = [torch.arange(3.0).storage(), (torch.ones(2).storage(), 0), torch.zeros(2)]
        content = {"state": Net().state_dict(), **{key: [key] for key in keys}}
        torch.save(content, tmp_path / "in", _use_new_zipfile_serialization=not legacy)
    convert_checkpoint(tmp_path / "in", tmp_path / "virtual", 2)
    revert_checkpoint(tmp_path / "virtual", tmp_path / "back")
    assert verify_checkpoint(tmp_path / "back", tmp_path / "in").largest_difference == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load(tmp_path / "back")
        assert [type(key) for key in again][1:] == [type(key) for key in keys]
        assert list(list(again)[1]) == [0, 1, 2]


def test_case_26_views_keep_their_storage_and_statistics_leave_it(tmp_path: Path) -> None:
    flat = torch.randn(100)
    state = {
        "w1": flat[:40].view(5, 8),
        "w2": flat[40:90],
        "bn.running_mean": flat[90:95],
        "bn.running_var": flat[95:].abs(),
    }
    path = save(tmp_path, state)
    back = round_trip(path, 2)
    virtual = load(tmp_path / "virtual")
    assert virtual["w1"].untyped_storage().data_ptr() == virtual["w2"].untyped_storage().data_ptr()
    assert virtual["w2"].storage_offset() == 40
    assert virtual["bn.running_mean"].untyped_storage().nbytes() == 2 * 5 * 4
    assert torch.equal(load(back)["bn.running_mean"], flat[90:95])
    with zipfile.ZipFile(tmp_path / "virtual") as archive:
        sizes = [info.file_size for info in archive.infolist() if "/data/" in info.filename]
    assert sorted(sizes) == [2 * 5 * 4, 2 * 5 * 4, 100 * 4]


def test_case_27_strides_of_other_tensors_are_kept(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    path = save(tmp_path, bn_state() | {"t": torch.randn(3, 4).t(), "w": weight})
    back = load(round_trip(path))
    assert back["t"].stride() == (1, 4)
    assert back["w"].stride() == weight.stride()


def test_case_33_a_deflated_zip_gives_the_right_numbers(tmp_path: Path) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    deflated = tmp_path / "deflated.pth"
    with (
        zipfile.ZipFile(path) as source,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for info in source.infolist():
            out.writestr(info.filename, source.read(info))
    assert round_trip(deflated).read_bytes() == resaved(path)


def test_case_33_a_zip_bomb_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state() | {"zeros": torch.zeros(5_000_000)})
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for info in source.infolist():
            out.writestr(info.filename, source.read(info))
    with pytest.raises(RefusedError, match=r"unpacks from .* as weights never do"):
        convert_checkpoint(bomb, tmp_path / "out", 2)
    assert convert_checkpoint(bomb, tmp_path / "out", 2, allow_compressed=True).output


def test_an_existing_output_needs_overwrite(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state())
    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(OutputExistsError, match="exists"):
        convert_checkpoint(path, tmp_path / "out", 2)
    assert (tmp_path / "out").read_bytes() == b"precious"
    convert_checkpoint(path, tmp_path / "out", 2, overwrite=True)
    assert load(tmp_path / "out")["bn.running_mean"].shape == (2, 3)


def test_a_dry_run_reports_and_writes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state())
    report = convert_checkpoint(path, tmp_path / "out", 2, dry_run=True)
    assert report.counts == {"converted": 1}
    assert report.output is None
    assert os.listdir(tmp_path) == ["in.pth"]


def test_legacy_files_are_read_and_written_as_zip(tmp_path: Path) -> None:
    content = load(torchvision_style(tmp_path / "zip.pth"))
    path = tmp_path / "in.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert round_trip(path).read_bytes() == resaved(path)
    report = convert_checkpoint(path, tmp_path / "again", 2)
    assert any("becomes one in today's, a zip" in warning for warning in report.warnings)
    assert report.source.format == "torch-legacy"
    options: Any = {"format": "safetensors", "state": "model"}
    report = convert_checkpoint(path, tmp_path / "again.safetensors", 2, **options)
    assert not any("a zip" in warning for warning in report.warnings)


def test_the_same_input_gives_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    for name in ("a.pth", "quite_another.ckpt"):
        convert_checkpoint(path, tmp_path / name, 3)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "quite_another.ckpt").read_bytes()


def test_metadata_and_parameters_survive(tmp_path: Path) -> None:
    state = collections.OrderedDict(bn_state())
    state["bn.weight"] = nn.Parameter(state["bn.weight"])
    state["bn.running_mean"] = nn.Parameter(state["bn.running_mean"], requires_grad=False)
    state._metadata = {"": {"version": 1}, "bn": {"version": 2}}  # type: ignore[attr-defined]
    virtual = load(round_trip(save(tmp_path, state)).with_name("virtual"))
    assert virtual._metadata == state._metadata  # type: ignore[attr-defined]
    assert isinstance(virtual["bn.weight"], nn.Parameter)
    assert isinstance(virtual["bn.running_mean"], nn.Parameter)


def test_what_statistics_are_is_kept_with_their_ties(tmp_path: Path) -> None:
    state = bn_state()
    count = nn.Parameter(state["bn.num_batches_tracked"], requires_grad=False)
    state |= {"bn.running_mean": nn.Parameter(state["bn.running_mean"]), f"bn.{COUNT}": count}
    state["bn.running_var"].requires_grad_()
    state |= {f"tied.{key.removeprefix('bn.')}": value for key, value in state.items()}
    path = save(tmp_path, state)
    back = round_trip(path)
    virtual = load(tmp_path / "virtual")
    assert isinstance(virtual[f"bn.{COUNT}"], nn.Parameter)
    assert virtual["bn.running_var"].requires_grad
    assert virtual["tied.running_mean"] is virtual["bn.running_mean"]
    assert back.read_bytes() == resaved(path)
    gather_checkpoints([path, path], tmp_path / "both")
    assert isinstance(load(tmp_path / "both")[f"bn.{COUNT}"], nn.Parameter)


def test_a_damaged_member_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state(500))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/2"))
    data[info.header_offset + 200] ^= 1
    path.write_bytes(data)
    for check_input in (False, True):
        with pytest.raises(ReadError, match="checksum"):
            convert_checkpoint(path, tmp_path / "out", 2, check_input=check_input)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ReadError, match="checksum"):
        verify_checkpoint(path)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_survive_and_are_compared(tmp_path: Path) -> None:
    parts = [torch.randn(3, 2), torch.randn(4, 2)]
    nested = torch.nested.nested_tensor(parts)
    path = save(tmp_path, {**bn_state(), "nested": nested})
    allowed = ["torch._utils._rebuild_nested_tensor"]  # torch's safe loader knows it before 2.15
    convert_checkpoint(path, tmp_path / "virtual", 2, allow_globals=allowed)
    again = torch.load(tmp_path / "virtual", weights_only=False)["nested"].unbind()
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))
    verify_checkpoint(tmp_path / "virtual", path, allow_globals=allowed)
    parts[1][3, 1] += 1
    other = save(tmp_path, {**bn_state(), "nested": torch.nested.nested_tensor(parts)}, "other")
    with pytest.raises(VerificationError, match="nested"):
        verify_checkpoint(path, other, allow_globals=allowed)


@pytest.mark.parametrize(("levels", "refused"), [(900, False), (1100, True)])
def test_mappings_in_mappings_are_looked_into_up_to_a_depth(
    tmp_path: Path, levels: int, refused: bool
) -> None:
    mappings = b"}X\x01\x00\x00\x00k" * levels + b"}" + b"s" * levels
    flat = save(tmp_path, {**bn_state(), "deep": "here"})
    path = repickled(flat, b"X\x04\x00\x00\x00here", mappings)
    if refused:
        with pytest.raises(RefusedError, match="a mapping 1001 levels deep, and at most 1000 are"):
            inspect_checkpoint(path)
    else:
        assert len(inspect_checkpoint(path).groups) == 1


def test_what_is_nested_too_deeply_to_be_saved_is_told(tmp_path: Path) -> None:
    # More than Python 3.14 can pickle, which is forty times what Python 3.11 can.
    lists = b"]" * 200_000 + b"a" * 199_999
    flat = save(tmp_path, {**bn_state(), "deep": "here"})
    path = repickled(flat, b"X\x04\x00\x00\x00here", lists)
    with pytest.raises(RefusedError, match="nested too deeply"):
        convert_checkpoint(path, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
