"""Models are converted and reverted, and nothing of them is lost."""

from __future__ import annotations

import copy
from typing import Any, TypeVar, get_type_hints

import pytest
import torch
import torchvision
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from distbn_convert import (
    DistBatchNorm1d,
    DistBatchNorm2d,
    DistBatchNorm3d,
    convert_model,
    plan_conversion,
    revert_model,
)
from distbn_convert.errors import (
    ConversionError,
    StateDictError,
)

from .converted import Subclass, assert_unchanged, small_net, snapshot, trained_net


def test_model_is_converted_in_place_and_returned() -> None:
    model = small_net()
    assert convert_model(model, vt_world_size=4) is model
    assert [type(model[i]) for i in (1, 4)] == [DistBatchNorm2d, DistBatchNorm2d]
    assert model[1].running_mean.shape == (4, 6)
    assert model[1].vt_world_size == 4
    assert revert_model(model) is model
    assert [type(model[i]) for i in (1, 4)] == [nn.BatchNorm2d, nn.BatchNorm2d]


@pytest.mark.parametrize("function", [convert_model, revert_model])
def test_a_type_checker_knows_the_class_of_the_model_afterwards(function: Any) -> None:
    """``model = convert_model(model, 8)`` is an error of types where it becomes any Module."""
    hints = get_type_hints(function)
    assert isinstance(hints["model"], TypeVar)
    assert hints["return"] is hints["model"]


@pytest.mark.parametrize(
    ("plain", "converted", "shape"),
    [
        (nn.BatchNorm1d, DistBatchNorm1d, (8, 3)),
        (nn.BatchNorm2d, DistBatchNorm2d, (8, 3, 2, 2)),
        (nn.BatchNorm3d, DistBatchNorm3d, (8, 3, 2, 2, 2)),
    ],
)
def test_root_that_is_a_batch_norm_comes_back_with_its_own_class(
    plain: Any, converted: Any, shape: tuple[int, ...]
) -> None:
    layer = convert_model(plain(3), 4)
    assert type(layer) is converted
    layer(torch.randn(shape))
    layer = revert_model(layer)
    assert type(layer) is plain
    assert vars(layer).keys() == vars(plain(3)).keys()
    assert repr(layer) == repr(plain(3))
    with pytest.raises(ValueError, match="D input"):
        layer(torch.randn(8, 3, 2, 2, 2, 2))


@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
@pytest.mark.parametrize("ranks", [1, 3, 8, 10])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_convert_then_revert_is_bit_exact(dtype: torch.dtype, ranks: int, reduction: str) -> None:
    model = trained_net().to(dtype)
    before = copy.deepcopy(model.state_dict())
    revert_model(convert_model(model, ranks), reduction, rank=ranks - 1)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert all(after[name].is_contiguous() for name in before)


@pytest.mark.parametrize(("reduction", "rank"), [("mean", 0), ("select", 3), ("pooled", 0)])
def test_evaluation_is_the_same_before_and_after_bit_for_bit(reduction: str, rank: int) -> None:
    model, input = trained_net().eval(), torch.randn(5, 3, 8, 8)
    original = model(input)
    convert_model(model, 4, eval_reduction=reduction, eval_rank=rank)
    assert torch.equal(model(input), original)
    model.train()(torch.randn(8, 3, 8, 8))
    converted = model.eval()(input)
    assert not torch.equal(converted, original)
    assert torch.equal(revert_model(model, reduction, rank)(input), converted)


def test_training_goes_on_with_the_same_optimizer() -> None:
    model = trained_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameters = list(model.parameters())
    for stage in (lambda m: convert_model(m, 4), revert_model):
        stage(model)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        before = [parameter.clone() for parameter in parameters]
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8)).sin().sum().backward()
        optimizer.step()
        assert all((a - b).abs().max() > 0 for a, b in zip(parameters, before, strict=True))


def test_two_parents_share_one_new_module() -> None:
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), shared), nn.Sequential(shared))
    convert_model(model, 2)
    assert type(model[0][1]) is DistBatchNorm2d
    assert model[0][1] is model[1][0]
    revert_model(model)
    assert model[0][1] is model[1][0] is shared


def test_two_names_in_one_parent_are_both_converted() -> None:
    model = nn.Module()
    model.a = model.b = nn.BatchNorm2d(3)
    convert_model(model, 2)
    assert type(model.a) is type(model.b) is DistBatchNorm2d
    assert model.a is model.b
    (entry,) = plan_conversion(model, 2)
    assert (entry.fqn, entry.aliases) == ("a", ("b",))


def test_references_from_outside_the_tree_stay_valid() -> None:
    model = small_net()
    watched = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    convert_model(model, 2)
    assert watched == [model[1], model[4]]
    assert all(type(module) is DistBatchNorm2d for module in watched)


def test_shared_parameters_and_buffers_stay_shared() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].weight = model[0].weight
    model[1].running_mean = model[0].running_mean
    convert_model(model, 2)
    assert model[1].weight is model[0].weight
    assert model[1].running_mean is model[0].running_mean
    assert model[1].running_var is not model[0].running_var


def test_hooks_and_their_handles_survive_both_ways() -> None:
    model, calls = small_net(), []
    layer = model[1]
    handles = [
        layer.register_forward_hook(lambda *_: calls.append("forward")),
        layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
        layer.register_state_dict_post_hook(lambda *_: calls.append("state_dict")),
    ]
    for stage in (lambda m: convert_model(m, 2), revert_model):
        stage(model)
        calls.clear()
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        model.state_dict()
        assert sorted(calls) == ["backward", "forward", "pre", "state_dict"]
    convert_model(model, 2)
    for handle in handles:
        handle.remove()
    calls.clear()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    assert calls == []


def test_flags_attributes_and_extra_buffers_survive_both_ways() -> None:
    model = small_net()
    layer = model[1].eval()
    layer.weight.requires_grad_(False)
    layer.qconfig = "mine"
    layer.eps, layer.momentum = 0.5, None
    layer.register_buffer("extra", torch.arange(3), persistent=False)
    for stage in (lambda m: convert_model(m, 2), revert_model):
        stage(model)
        layer = model[1]
        assert (layer.training, model[4].training) == (False, True)
        assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
        assert (layer.qconfig, layer.eps, layer.momentum) == ("mine", 0.5, None)
        assert layer.extra.tolist() == [0, 1, 2]
        assert "1.extra" not in model.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"momentum": None},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_every_option_of_batch_norm_converts_and_reverts(options: dict[str, Any]) -> None:
    layer = nn.BatchNorm2d(3, **options)
    before, text = copy.deepcopy(layer.state_dict()), repr(layer)
    input = torch.randn(8, 3, 2, 2, dtype=options.get("dtype"))
    evaluated = layer.eval()(input)
    convert_model(layer, 4)
    assert torch.equal(layer(input), evaluated)
    layer.train()(input)
    revert_model(layer)
    assert repr(layer) == text
    assert {n: v.shape for n, v in layer.state_dict().items()} == {
        n: v.shape for n, v in before.items()
    }


def test_layer_without_bias_converts_and_reverts() -> None:
    layer = nn.BatchNorm2d(3)
    layer.bias = None
    convert_model(layer, 2)(torch.randn(4, 3, 2, 2))
    assert revert_model(layer).bias is None


def test_model_on_the_meta_device_converts_and_reverts() -> None:
    with torch.device("meta"):
        model = small_net()
    convert_model(model, 4)
    assert model[1].running_mean.is_meta
    assert model[1].running_mean.shape == (4, 6)
    assert revert_model(model)[1].running_mean.shape == (6,)


def test_counter_reverts_to_the_selected_or_the_largest() -> None:
    for reduction, rank, expected in (("mean", 0, 2), ("select", 3, 1), ("select", 0, 2)):
        layer = convert_model(nn.BatchNorm2d(3), 4)
        layer(torch.randn(4, 3, 2, 2))
        layer(torch.randn(2, 3, 2, 2))
        assert revert_model(layer, reduction, rank).num_batches_tracked == expected


def test_settings_reach_the_layers() -> None:
    model = convert_model(
        small_net(),
        2,
        partition="interleaved",
        eval_reduction="select",
        eval_rank=3,
        accumulation_steps=2,
    )
    layer = model[4]
    assert (layer.partition, layer.eval_reduction, layer.eval_rank) == ("interleaved", "select", 3)
    assert (layer.accumulation_steps, layer.running_var.shape) == (2, (4, 4))


def test_filter_takes_layers_by_name_and_module() -> None:
    model = small_net()
    asked = []
    convert_model(model, 2, filter_fn=lambda module, fqn: asked.append(fqn) or fqn == "4")
    assert asked == ["1", "4"]
    assert [type(model[i]) for i in (1, 4)] == [nn.BatchNorm2d, DistBatchNorm2d]
    convert_model(model, 2, filter_fn=lambda module, fqn: module.num_features == 6)
    assert type(model[1]) is DistBatchNorm2d
    revert_model(model, filter_fn=lambda module, fqn: fqn == "1")
    assert [type(model[i]) for i in (1, 4)] == [nn.BatchNorm2d, DistBatchNorm2d]


def test_filter_must_agree_about_a_shared_module() -> None:
    model = nn.Module()
    model.a = model.b = nn.BatchNorm2d(3)
    with pytest.raises(ConversionError, match="takes 'a' and leaves out 'b'"):
        convert_model(model, 2, filter_fn=lambda module, fqn: fqn == "a")
    assert type(model.a) is nn.BatchNorm2d
    convert_model(model, 2)
    with pytest.raises(ConversionError, match="takes 'a' and leaves out 'b'"):
        revert_model(model, filter_fn=lambda module, fqn: fqn == "a")
    assert type(model.a) is DistBatchNorm2d


@pytest.mark.parametrize("settings", [{}, {"eval_reduction": "select", "eval_rank": 3}])
def test_converting_twice_changes_nothing(settings: dict[str, Any]) -> None:
    model = convert_model(trained_net(), 4, **settings)
    model(torch.randn(8, 3, 8, 8))
    before = snapshot(model)
    convert_model(model, 4, **settings)
    assert_unchanged(model, before)


def test_checkpoint_with_other_ranks_is_refused_before_anything_is_loaded() -> None:
    source = convert_model(trained_net(), 8).state_dict()
    for model in (convert_model(small_net(), 4), copy.deepcopy(convert_model(small_net(), 4))):
        outer = nn.ModuleDict({"net": model})
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(StateDictError, match=r"^1\.running_mean .* has 8 .* the layer has 4;"):
            model.load_state_dict(source)
        with pytest.raises(StateDictError, match=r"^net\.1\.running_mean in the checkpoint"):
            outer.load_state_dict({f"net.{name}": value for name, value in source.items()})
        after = model.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not any(revert_model(model)._load_state_dict_pre_hooks)


@pytest.mark.parametrize("kind", [nn.Sequential, DistBatchNorm2d])
def test_checkpointed_blocks_are_checked_before_anything_is_loaded(kind: type) -> None:
    model = convert_model(nn.Sequential(small_net()), 4)
    source = convert_model(nn.Sequential(trained_net()), 8).state_dict()
    apply_activation_checkpointing(model, check_fn=lambda module: type(module) is kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateDictError, match=r"^0\.1\.running_mean .* has 8 .* the layer has 4;"):
        model.load_state_dict(source)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_checkpoints_are_checked_once_as_long_as_some_layer_has_virtual_ranks() -> None:
    source = convert_model(small_net(), 8).state_dict()
    model = convert_model(small_net(), 4, filter_fn=lambda module, fqn: fqn == "1")
    convert_model(model, 4)
    assert len(model._load_state_dict_pre_hooks) == 1
    revert_model(model, filter_fn=lambda module, fqn: fqn == "1")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateDictError, match=r"^4\.running_mean .* has 8 .* the layer has 4;"):
        model.load_state_dict(source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not revert_model(model)._load_state_dict_pre_hooks


def test_names_are_those_of_named_modules_in_its_order() -> None:
    model = nn.Module()
    block = nn.Sequential(nn.BatchNorm2d(3))
    model.a, model.b, model.c = block, block, block[0]
    (entry,) = plan_conversion(model, 2)
    assert (entry.fqn, entry.aliases) == ("a.0", ("b.0", "c"))
    convert_model(model, 2, filter_fn=lambda module, fqn: fqn in ("a.0", "b.0", "c"))
    assert type(model.c) is DistBatchNorm2d


def test_statistics_shared_by_two_layers_stay_shared_when_reverted() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(model[1], name, getattr(model[0], name))
    revert_model(convert_model(model, 2))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert getattr(model[1], name) is getattr(model[0], name)


def test_model_converted_in_inference_mode_trains_afterwards() -> None:
    model = small_net()
    for stage in (lambda m: convert_model(m, 2), revert_model):
        with torch.inference_mode():
            stage(model)
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        assert not any(buffer.is_inference() for buffer in model.buffers())


def test_modules_that_contain_themselves_end_the_walk() -> None:
    model = small_net()
    model[0].cycle = model
    convert_model(model, 2)
    assert type(model[4]) is DistBatchNorm2d


def test_instance_and_group_norm_are_none_of_our_business() -> None:
    model = nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)
    )
    assert [entry.fqn for entry in plan_conversion(model, 2)] == ["2"]


def test_plan_says_what_would_happen_and_changes_nothing() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        Subclass(3),
        torchvision.ops.FrozenBatchNorm2d(3),
        convert_model(nn.BatchNorm2d(3), 2),
        nn.BatchNorm2d(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
    )
    before = snapshot(model)
    plan = plan_conversion(model, 2, filter_fn=lambda module, fqn: fqn != "4")
    assert_unchanged(model, before)
    assert [(entry.fqn, entry.action) for entry in plan] == [
        ("0", "convert"),
        ("1", "refuse"),
        ("2", "frozen"),
        ("3", "already"),
        ("4", "filtered"),
    ]
    lines = str(plan).splitlines()
    assert lines[0] == "convert  '0' BatchNorm2d -> DistBatchNorm2d: 2 virtual ranks"
    assert lines[2].startswith("frozen   '2' FrozenBatchNorm2d: it never uses")
    assert lines[4].endswith("filter_fn leaves it out")
    assert len(plan) == 5
    assert plan[0].target is DistBatchNorm2d
    skipped = plan_conversion(model, 2, unsupported="skip")
    assert skipped[1].action == "skip"
