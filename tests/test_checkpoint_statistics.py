"""Which keys are a BatchNorm's, and what becomes of their values. Cases 1 to 18."""

from __future__ import annotations

import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torchvision
from hypothesis import HealthCheck, given, settings
from safetensors.torch import save_file
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
    ConfigurationError,
    NothingToDoError,
    ReadError,
    RefusedError,
)

from .checkpoints import (
    BATCH_NORMS,
    Net,
    bn_state,
    load,
    resaved,
    round_trip,
    save,
    torchvision_style,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    ranks=st.integers(1, 20),
    bits=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=12),
    reduction=st.sampled_from(["mean", "pooled", "select"]),
)
def test_case_01_every_statistic_comes_back_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, ranks: int, bits: list[int], reduction: str
) -> None:
    """Cases 1, 2, 3, 5: any bits, denormals, NaN and infinities among them, and every V."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[
        torch.empty((), dtype=dtype).element_size()
    ]
    values = torch.tensor([b - 2**63 for b in bits]).to(integers).view(dtype)
    half = len(values) // 2
    state = {"running_mean": values[:half].clone(), "running_var": values[half : 2 * half].clone()}
    folder = tmp_path / os.urandom(4).hex()
    folder.mkdir()
    path = save(folder, state)
    convert_checkpoint(path, folder / "v", ranks, fsync=False)
    virtual = load(folder / "v")
    for name, value in state.items():
        assert virtual[name].shape == (ranks, half)
        assert virtual[name].is_contiguous()
        assert torch.equal(virtual[name].view(integers), value.view(integers).expand(ranks, half))
    revert_checkpoint(folder / "v", folder / "back", reduction, ranks - 1, fsync=False)
    back = load(folder / "back")
    for name, value in state.items():
        assert torch.equal(back[name].view(integers), value.view(integers))


def test_case_02_denormals_are_never_flushed(tmp_path: Path) -> None:
    tiny = torch.tensor([5.6e-45, 1.4e-45, 0.0, 1e-40])
    path = save(tmp_path, bn_state(4, **{"bn.running_var": tiny}))
    assert torch.equal(load(round_trip(path, 7))["bn.running_var"], tiny)


def test_case_03_nan_and_inf_are_carried_through_counted_and_strict_refuses(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), 1.0])
    path = save(tmp_path, bn_state(3, **{"bn.running_mean": odd}))
    report = convert_checkpoint(path, tmp_path / "virtual", 2)
    assert "2 statistics are NaN or infinite" in " ".join(report.warnings)
    assert inspect_checkpoint(tmp_path / "virtual").groups[0].nonfinite == 4
    with pytest.raises(RefusedError, match="NaN or infinite"):
        convert_checkpoint(path, tmp_path / "strict", 2, strict=True)
    back = round_trip(
        save(tmp_path, bn_state(3, **{"bn.running_mean": odd}), "again.pth"), 2, overwrite=True
    )
    assert torch.equal(load(back)["bn.running_mean"].view(torch.int32), odd.view(torch.int32))
    with pytest.raises(RefusedError, match="NaN or infinite"):
        inspect_checkpoint(path, strict=True)


@pytest.mark.parametrize("strict", [False, True])
def test_case_03_what_is_not_finite_in_any_input_is_told_and_strict_refuses(
    tmp_path: Path, strict: bool
) -> None:
    sound = save(tmp_path, nn.BatchNorm1d(3).state_dict())
    odd = save(
        tmp_path,
        nn.BatchNorm1d(3).state_dict() | {"running_var": torch.full((3,), math.nan)},
        "odd.pth",
    )
    told = "3 statistics are NaN or infinite, first in (top level)."
    runs = [
        (told, partial(verify_checkpoint, odd)),
        (told, partial(verify_checkpoint, odd, odd)),
        (f"{odd}: {told}", partial(gather_checkpoints, [sound, odd, sound], tmp_path / "all")),
    ]
    for warning, run in runs:
        if strict:
            with pytest.raises(RefusedError, match=re.escape(told)):
                run(strict=True)
        else:
            assert warning in run().warnings


def test_case_03_what_is_not_finite_in_the_file_compared_with_is_told_with_its_name(
    tmp_path: Path,
) -> None:
    odd = nn.BatchNorm1d(3).state_dict() | {"running_var": torch.full((3,), math.inf)}
    path, virtual = save(tmp_path, odd), tmp_path / "virtual.pth"
    convert_checkpoint(path, virtual, 2)
    end = "statistics are NaN or infinite, first in (top level)."
    assert verify_checkpoint(virtual, path).warnings == (f"6 {end}", f"{path}: 3 {end}")
    assert verify_checkpoint(path, path).warnings == (f"3 {end}",)


def test_case_04_large_values_do_not_overflow_and_a_float16_overflow_is_an_error(
    tmp_path: Path,
) -> None:
    state = bn_state(2, **{"bn.running_var": torch.tensor([3e38, 1.0])})
    assert torch.equal(
        load(round_trip(save(tmp_path, state)))["bn.running_var"], state["bn.running_var"]
    )
    rows = torch.tensor([[3.4e38], [2.4e38], [3.2e38]])  # their sum is infinite in float32
    path = save(tmp_path, {"bn.running_mean": rows, "bn.running_var": rows}, "large.pth")
    revert_checkpoint(path, tmp_path / "mean.pth")
    for value in load(tmp_path / "mean.pth").values():
        assert value.item() == rows.double().mean().float().item()
    means = torch.tensor([[-60000.0], [60000.0]], dtype=torch.float16)
    half = {"bn.running_mean": means, "bn.running_var": torch.ones(2, 1, dtype=torch.float16)}
    path = save(tmp_path, half, "half.pth")
    with pytest.raises(RefusedError, match="running_var is too large for float16"):
        revert_checkpoint(path, tmp_path / "out.pth", "pooled")
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("ranks", [0, -1, 65537, 2.0, True, "8"])
def test_case_05_a_number_of_ranks_out_of_range_is_refused(tmp_path: Path, ranks: Any) -> None:
    with pytest.raises(ConfigurationError, match="from 1 to 65536"):
        convert_checkpoint(save(tmp_path, bn_state()), tmp_path / "out", ranks)


def test_case_05_one_rank_is_allowed(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state())
    assert round_trip(path, 1).read_bytes() == resaved(path)
    assert load(tmp_path / "virtual")["bn.running_mean"].shape == (1, 3)


@pytest.mark.parametrize("rank", [8, -1])
def test_case_06_a_rank_that_is_not_there_is_refused(tmp_path: Path, rank: int) -> None:
    convert_checkpoint(save(tmp_path, bn_state()), tmp_path / "v", 8)
    with pytest.raises(ConfigurationError, match="from 0 to 7"):
        revert_checkpoint(tmp_path / "v", tmp_path / "out", "select", rank)


def test_case_07_groups_of_several_numbers_of_ranks_revert_if_the_rank_fits_all(
    tmp_path: Path,
) -> None:
    state = {
        f"{name}.{key}": torch.rand(ranks, 3)
        for name, ranks in (("a", 4), ("b", 2))
        for key in ("running_mean", "running_var")
    }
    path = save(tmp_path, state)
    report = revert_checkpoint(path, tmp_path / "out", "select", 1)
    assert [group.ranks for group in report.groups] == [4, 2]
    assert report.virtual_ranks is None
    assert torch.equal(load(tmp_path / "out")["a.running_mean"], state["a.running_mean"][1])
    with pytest.raises(ConfigurationError, match="from 0 to 1"):
        revert_checkpoint(path, tmp_path / "out2", "select", 2)


def test_case_07_ranks_that_differ_within_a_group_are_unreadable(tmp_path: Path) -> None:
    path = save(tmp_path, {"bn.running_mean": torch.rand(8, 3), "bn.running_var": torch.rand(4, 3)})
    with pytest.raises(ReadError, match="running_mean has 8 ranks but running_var has 4 ranks"):
        revert_checkpoint(path, tmp_path / "out")


def test_case_08_no_batch_norm_is_nothing_to_do(tmp_path: Path) -> None:
    path = save(tmp_path, nn.Sequential(nn.Linear(2, 3), nn.GroupNorm(1, 3)).state_dict())
    with pytest.raises(
        NothingToDoError, match=r"no BatchNorm statistics found in .* \(4 tensors\)"
    ):
        convert_checkpoint(path, tmp_path / "out", 2)
    assert os.listdir(tmp_path) == ["in.pth"]


def test_case_09_what_is_virtual_already_is_left_with_a_warning(tmp_path: Path) -> None:
    path = save(tmp_path, bn_state())
    convert_checkpoint(path, tmp_path / "v", 8)
    with pytest.raises(
        NothingToDoError, match=r"bn is already virtual \(8 ranks\). Revert it first"
    ):
        convert_checkpoint(tmp_path / "v", tmp_path / "v2", 8)
    with pytest.raises(NothingToDoError, match="has no virtual ranks"):
        revert_checkpoint(path, tmp_path / "p2")
    mixed = save(tmp_path, {"a": bn_state(), "b": load(tmp_path / "v")}, "mixed.pth")
    report = convert_checkpoint(mixed, tmp_path / "out", 4)
    assert report.counts == {"converted": 1, "skipped": 1}
    assert "b.bn are already virtual" in " ".join(report.warnings)
    assert load(tmp_path / "out")["b"]["bn.running_mean"].shape == (8, 3)
    with pytest.raises(RefusedError, match="already virtual"):
        convert_checkpoint(mixed, tmp_path / "out2", 4, strict=True)


COUNTERS = [
    (torch.tensor(450_000).half(), None),  # infinite
    (torch.tensor(math.nan), None),
    (torch.tensor(7 + 1j), None),
    *((torch.tensor(7).to(dtype), 7) for dtype in (torch.int8, torch.uint16, torch.uint32)),
    (torch.tensor(2**63, dtype=torch.uint64), 2**63),
    (torch.tensor(True), 1),
    (torch.tensor([7]), 7),  # of some exporters
    (torch.tensor(4.0).to(torch.float8_e4m3fn), 4),
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")
@pytest.mark.parametrize("kind", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize(("counter", "tracked"), COUNTERS, ids=lambda value: str(value))
def test_counters_of_any_kind_are_carried_and_told_if_they_are_numbers(
    tmp_path: Path, counter: torch.Tensor, tracked: int | None, kind: str
) -> None:
    path, state = tmp_path / "in", bn_state(**{"bn.num_batches_tracked": counter})
    if kind == "dcp":
        dcp.save(state, checkpoint_id=path, no_dist=True)
    else:
        (torch.save if kind == "torch" else save_file)(state, path)
    assert inspect_checkpoint(path).groups[0].tracked == tracked
    round_trip(path, 4)
    assert inspect_checkpoint(tmp_path / "virtual").groups[0].tracked == tracked
    verify_checkpoint(tmp_path / "back", path)
    verify_checkpoint(tmp_path / "virtual", path)


def test_case_10_and_11_missing_affine_and_counter_are_not_made_up(tmp_path: Path) -> None:
    state = {"bn.running_mean": torch.rand(3), "bn.running_var": torch.rand(3)}
    report = convert_checkpoint(save(tmp_path, state), tmp_path / "out", 2)
    assert list(load(tmp_path / "out")) == list(state)
    assert report.groups[0].tracked is None
    assert "no num_batches_tracked" in " ".join(report.warnings)
    plain = nn.BatchNorm2d(3, affine=False).state_dict()
    assert set(plain) == {"running_mean", "running_var", "num_batches_tracked"}
    frozen = bn_state()  # as torchvision's FrozenBatchNorm2d and InplaceABN save
    del frozen["bn.num_batches_tracked"]
    for name, content in (("affine.pth", plain), ("frozen.pth", frozen)):
        back = round_trip(save(tmp_path, content, name), overwrite=True)
        assert back.read_bytes() == resaved(tmp_path / name)
        assert list(load(tmp_path / "virtual")) == list(content)


def test_case_12_instance_norm_looks_the_same_and_can_be_excluded(tmp_path: Path) -> None:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    path = save(tmp_path, nn.Sequential(norm, nn.BatchNorm2d(3)).state_dict())
    assert convert_checkpoint(path, tmp_path / "both", 2).counts == {"converted": 2}
    report = convert_checkpoint(path, tmp_path / "one", 2, exclude=["0"])
    assert report.counts == {"converted": 1, "skipped": 1}
    assert load(tmp_path / "one")["0.running_mean"].shape == (3,)
    only = convert_checkpoint(path, tmp_path / "two", 2, include=["0*"])
    assert [group.prefix for group in only.groups if group.action == "converted"] == ["0."]
    with pytest.raises(NothingToDoError, match="not matched by --include"):
        convert_checkpoint(path, tmp_path / "none", 2, include=["layer*"])


def test_case_13_running_mean_std_is_skipped_with_a_warning(tmp_path: Path) -> None:
    obs = {
        "obs_norm.running_mean": torch.zeros(3, dtype=torch.float64),
        "obs_norm.running_var": torch.ones(3, dtype=torch.float64),
        "obs_norm.count": torch.ones((), dtype=torch.float64),
    }
    path = save(tmp_path, bn_state() | obs)
    report = convert_checkpoint(path, tmp_path / "out", 2)
    assert report.counts == {"converted": 1}
    assert (
        'obs_norm left alone: has running_mean but also "count": not BatchNorm.' in report.warnings
    )
    assert load(tmp_path / "out")["obs_norm.running_mean"].shape == (3,)
    with pytest.raises(RefusedError, match="count"):
        convert_checkpoint(path, tmp_path / "strict", 2, strict=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"exclude": ["obs*"]}, False),
        ({"exclude": ["model.obs_norm"]}, False),
        ({"include": ["bn"]}, False),
        ({"state": "ema"}, False),
        ({"include": ["*"]}, True),
        ({"state": "model"}, True),
        ({"exclude": ["ema.*"]}, True),
    ],
    ids=str,
)
def test_what_was_left_out_by_name_is_no_concern(
    options: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    obs = {f"obs_norm.{name}": torch.ones(3) for name in ("running_mean", "running_var", "count")}
    path = save(tmp_path, {"model": bn_state() | obs, "ema": bn_state()})
    report = convert_checkpoint(path, tmp_path / "out", 2, **options)
    assert any("obs_norm left alone" in warning for warning in report.warnings) == told
    if told:
        with pytest.raises(RefusedError, match="count"):
            convert_checkpoint(path, tmp_path / "strict", 2, strict=True, **options)
    else:
        convert_checkpoint(path, tmp_path / "strict", 2, strict=True, **options)


def test_case_14_a_batch_norm_without_prefix_is_converted(tmp_path: Path) -> None:
    path = save(tmp_path, nn.BatchNorm1d(4).state_dict())
    assert round_trip(path).read_bytes() == resaved(path)
    assert load(tmp_path / "virtual")["running_mean"].shape == (8, 4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_case_15_prefixes_of_wrappers_are_kept(tmp_path: Path, prefix: str) -> None:
    path = save(tmp_path, Net().state_dict(prefix=prefix))
    report = convert_checkpoint(path, tmp_path / "out", 2)
    assert report.counts == {"converted": BATCH_NORMS}
    assert list(load(tmp_path / "out")) == list(load(path))


def test_case_16_nested_split_batch_norms_are_judged_on_their_own(tmp_path: Path) -> None:
    from timm.layers import SplitBatchNorm2d

    path = save(tmp_path, nn.Sequential(SplitBatchNorm2d(4, num_splits=3)).state_dict())
    report = convert_checkpoint(path, tmp_path / "out", 2)
    prefixes = [group.prefix for group in report.groups]
    assert prefixes == ["0.", "0.aux_bn.0.", "0.aux_bn.1."]
    assert report.counts == {"converted": 3}
    for name in prefixes:
        assert load(tmp_path / "out")[f"{name}running_var"].shape == (2, 4)
    assert round_trip(path).read_bytes() == resaved(path)
    report = convert_checkpoint(path, tmp_path / "main", 2, exclude=["0.aux_bn.*"])
    assert report.counts == {"converted": 1, "skipped": 2}
    assert load(tmp_path / "main")["0.aux_bn.1.running_mean"].shape == (4,)


def test_case_17_the_state_option_narrows_to_one_sub_tree(tmp_path: Path) -> None:
    path = torchvision_style(tmp_path / "in.pth")
    report = convert_checkpoint(path, tmp_path / "out", 2, state="model_ema")
    assert {group.path for group in report.groups if group.action == "converted"} == {
        ("model_ema",)
    }
    out = load(tmp_path / "out")
    assert out["model"]["head.running_mean"].shape == (4,)
    assert out["model_ema"]["module.head.running_mean"].shape == (2, 4)


@pytest.mark.parametrize(
    ("options", "converted", "told"),
    [
        ({"exclude": ["model_ema.*"]}, ["model.bn", "model.norm1"], []),
        ({"exclude": ["model.norm*"]}, ["model.bn", "model_ema.bn"], []),
        ({"include": ["model.bn"]}, ["model.bn"], []),
        ({"include": ["bn"]}, ["model.bn", "model_ema.bn"], []),
        (
            {"include": ["model*.bn", "*n", "x"], "exclude": ["y*"]},
            ["model.bn", "model_ema.bn"],
            [
                "--include model*.bn matches no BatchNorm; inspect lists their names.",
                "--include x matches no BatchNorm; inspect lists their names.",
                "--exclude y* matches no BatchNorm; inspect lists their names.",
            ],
        ),
    ],
)
def test_patterns_match_the_names_that_are_printed_or_are_told(
    tmp_path: Path, options: dict[str, Any], converted: list[str], told: list[str]
) -> None:
    model = {**bn_state(), **nn.BatchNorm1d(3).state_dict(prefix="norm1.")}
    path = save(tmp_path, {"model": model, "model_ema": bn_state()})
    report = convert_checkpoint(path, tmp_path / "out", 2, fsync=False, **options)
    taken = [group.name for group in report.groups if group.action == "converted"]
    assert taken == converted
    assert list(report.warnings) == told
    if told:
        with pytest.raises(RefusedError, match="matches no BatchNorm"):
            convert_checkpoint(path, tmp_path / "strict", 2, strict=True, **options)


def test_patterns_take_the_same_layers_of_a_state_dict_wherever_it_is(tmp_path: Path) -> None:
    layers = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    model = {**layers[0].state_dict(prefix="bn1."), **layers[1].state_dict(prefix="layer1.0.bn1.")}
    nested, flat = save(tmp_path, {"model": model}), tmp_path / "flat.pth"
    torch.save(model, flat)
    for include in (["*.bn1"], ["model.layer1.*"]):
        verify_checkpoint(nested, flat, state="model", include=include)
    report = convert_checkpoint(nested, tmp_path / "v.pth", 2, include=["*.bn1"])
    taken = [group.name for group in report.groups if group.action == "converted"]
    assert taken == ["model.layer1.0.bn1"]


def test_case_18_mmcv_copies_are_reported_and_converted_on_request(tmp_path: Path) -> None:
    state = Net().state_dict()
    for key in list(state):
        state["ema_" + key.replace(".", "_")] = state[key].clone()
    path = save(tmp_path, {"state_dict": state})
    report = convert_checkpoint(path, tmp_path / "base", 2)
    assert report.counts == {"converted": BATCH_NORMS, "skipped": BATCH_NORMS}
    assert any("--ema-underscore takes them" in warning for warning in report.warnings)
    assert load(tmp_path / "base")["state_dict"]["ema_head_running_mean"].shape == (4,)
    report = convert_checkpoint(path, tmp_path / "both", 2, ema_underscore=True)
    assert report.counts == {"converted": 2 * BATCH_NORMS}
    both = load(tmp_path / "both")["state_dict"]
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert both[f"ema_downsample_1_{name}"].shape == both[f"downsample.1.{name}"].shape
    with pytest.raises(RefusedError, match="MMCV EMA copies"):
        convert_checkpoint(path, tmp_path / "strict", 2, strict=True)
    del state["head.running_mean"]  # its copy is no longer known for one, and not converted
    report = convert_checkpoint(save(tmp_path, state), tmp_path / "alone", 2, ema_underscore=True)
    assert any("ema_head" in warning for warning in report.warnings)
    assert load(tmp_path / "alone")["ema_head_running_mean"].shape == (4,)


def test_frozen_layers_are_left_out_as_convert_model_leaves_them(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(torchvision.ops.FrozenBatchNorm2d(8), nn.BatchNorm2d(8))

    path = save(tmp_path, net().state_dict())
    report = convert_checkpoint(path, tmp_path / "all", 4)
    assert any("FrozenBatchNorm" in warning for warning in report.warnings)
    convert_checkpoint(path, tmp_path / "some", 4, exclude=("0",))
    convert_model(net(), 4).load_state_dict(load(tmp_path / "some"))
