"""What cannot be converted or reverted is told why, and left alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from distbn_convert import (
    DistBatchNorm2d,
    convert_model,
    revert_model,
)
from distbn_convert.errors import (
    AlreadyConvertedError,
    ConfigurationError,
    ConversionError,
    NothingToConvertError,
    UnsupportedModuleError,
)

from .converted import Subclass, assert_unchanged, small_net, snapshot, trained_net


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"vt_world_size": 2}, "vt_world_size=4 where 2 was asked for"),
        ({"vt_world_size": 4, "partition": "interleaved"}, "partition='contiguous' where"),
        ({"vt_world_size": 4, "accumulation_steps": 2}, "accumulation_steps=1 where 2"),
    ],
)
def test_converting_again_otherwise_says_to_revert_first(
    settings: dict[str, Any], match: str
) -> None:
    model = convert_model(trained_net(), 4)
    before = snapshot(model)
    with pytest.raises(AlreadyConvertedError, match=f"{match}.*call revert_model first"):
        convert_model(model, **settings)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [0, -8, 8.0, "8", True, None])
def test_vt_world_size_must_be_a_positive_int(value: Any) -> None:
    model = small_net()
    with pytest.raises(ConfigurationError, match="vt_world_size must be a positive int"):
        convert_model(model, value)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"partition": "even"}, "partition must be one of"),
        ({"eval_reduction": "median"}, "reduction must be one of"),
        ({"eval_rank": 4}, "rank must be an int from 0 to 3"),
        ({"accumulation_steps": 0}, "accumulation_steps must be a positive int"),
        ({"unsupported": "ignore"}, "unsupported must be 'raise' or 'skip', but got 'ignore'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    model = small_net()
    before = snapshot(model)
    with pytest.raises(ConfigurationError, match=match):
        convert_model(model, 4, **settings)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("reduction", "rank", "match"),
    [("median", 0, "reduction must be one of"), ("select", 4, "rank must be an int from 0 to 3")],
)
def test_bad_reductions_leave_the_model_alone(reduction: str, rank: int, match: str) -> None:
    for plain in (trained_net(), nn.BatchNorm2d(3, track_running_stats=False)):
        model = convert_model(plain, 4)
        before = snapshot(model)
        with pytest.raises(ConfigurationError, match=match):
            revert_model(model, reduction, rank)
        assert_unchanged(model, before)


def test_reduction_that_overflows_the_dtype_is_refused() -> None:
    layer = convert_model(nn.BatchNorm2d(2).half(), 2)
    layer.running_mean.copy_(torch.tensor([[6e4, 0.0], [-6e4, 0.0]]))
    with pytest.raises(
        ConversionError, match="the pooled running_var of the ranks is too large for"
    ):
        revert_model(layer, "pooled")
    assert type(revert_model(layer, "mean")) is nn.BatchNorm2d


def take_none(module: nn.Module, fqn: str) -> bool:
    return False


def test_nothing_matched_is_an_error_that_names_the_filter() -> None:
    with pytest.raises(NothingToConvertError, match=r"take_none took none of 2 \('1', '4'"):
        convert_model(small_net(), 2, filter_fn=take_none)
    with pytest.raises(NothingToConvertError, match="take_none took none of 2"):
        revert_model(convert_model(small_net(), 2), filter_fn=take_none)
    for filter_fn in (None, take_none):
        match = "some BatchNorm to convert, but found none"
        with pytest.raises(NothingToConvertError, match=match):
            convert_model(nn.Linear(3, 3), 2, filter_fn=filter_fn)
    with pytest.raises(
        NothingToConvertError, match="some layers with virtual ranks to revert, but found none"
    ):
        revert_model(small_net())


def test_frozen_layers_are_left_alone_and_named_when_there_is_nothing_else() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(3)
    model = nn.Sequential(frozen, nn.BatchNorm2d(3))
    convert_model(model, 2)
    assert model[0] is frozen
    assert type(model[1]) is DistBatchNorm2d
    with pytest.raises(NothingToConvertError, match="found none .module '0': it never uses batch"):
        convert_model(nn.Sequential(frozen), 2)


class ForeignBatchNorm(nn.Module):
    """As packages with layers of their own have it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))


class ComplexBatchNorm2d(nn.Module):
    """A batch norm of complex numbers, whose statistics have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving_mean", torch.zeros(3, dtype=torch.cfloat))
        self.register_buffer("moving_covariance", torch.eye(2).expand(3, 2, 2))


@pytest.mark.parametrize("kind", [ForeignBatchNorm, ComplexBatchNorm2d])
def test_batch_norms_of_other_packages_are_left_alone_with_a_warning(kind: type) -> None:
    foreign = kind()
    model = nn.Sequential(
        foreign, nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True)
    )
    with pytest.warns(UserWarning, match="left alone: module '0': it keeps running") as caught:
        convert_model(model, 2, filter_fn=lambda module, fqn: module.num_features == 3)
    assert [warning.filename for warning in caught] == [__file__]
    assert type(model[0]) is kind
    assert type(model[1]) is DistBatchNorm2d
    with pytest.raises(NothingToConvertError, match="found none .module '0': it keeps running"):
        convert_model(nn.Sequential(foreign), 2)


def lazy() -> nn.Module:
    return nn.LazyBatchNorm2d()


def parametrized() -> nn.Module:
    return weight_norm(nn.BatchNorm2d(3), "weight", dim=None)


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = layer.forward
    return layer


def wrong_shape() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.running_mean = torch.zeros(6)
    return layer


def qat() -> nn.Module:
    qconfig = torch.ao.quantization.default_qat_qconfig
    return torch.ao.nn.intrinsic.qat.ConvBn2d(3, 3, 1, qconfig=qconfig)


UNSUPPORTED = [
    (lambda: Subclass(3), "Subclass is a subclass whose behaviour would be lost; register_pair"),
    (lazy, "it is lazy and has no channels yet; run one batch"),
    (lambda: nn.SyncBatchNorm(3), "synchronises its statistics, the opposite of virtual ranks"),
    (parametrized, "its parameters are parametrized; convert before parametrizing"),
    (patched, "its forward was replaced on the instance; convert before patching"),
    (wrong_shape, r"its running_mean has shape \(6,\), expected \(3,\)"),
    (lambda: torch.jit.script(nn.BatchNorm2d(3)), "it is TorchScript; convert the model before"),
    (lambda: torch.ao.nn.quantized.BatchNorm2d(3), "it is quantised or fused; convert the float"),
    (
        lambda: torch.ao.nn.intrinsic.qat.ConvBn2d(
            3, 3, 1, qconfig=torch.ao.quantization.default_qat_qconfig
        ),
        "it is quantised or fused; convert the float model",
    ),
]


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Lazy modules:UserWarning"
)
@pytest.mark.parametrize(("make", "match"), UNSUPPORTED)
def test_layers_that_would_lose_behaviour_are_refused_or_left_alone(make: Any, match: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(make()))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UnsupportedModuleError, match=f"was not changed: module '1.0': .*{match}"):
        convert_model(model, 2)
    assert [type(module) for module in model.modules()] == kinds
    left = model[1][0]
    with pytest.warns(UserWarning, match=f"left alone: module '1.0': .*{match}") as told:
        convert_model(model, 2, unsupported="skip")
    assert "unsupported=" not in str(told[0].message)  # which is what was done
    assert type(model[0]) is DistBatchNorm2d
    assert model[1][0] is left
    assert type(left) is kinds[3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("partition", "mine"),
        ("accumulation_steps", 2),
        ("impl", "mine"),
        ("normalize", True),
        ("normalize", nn.Tanh()),
        ("num_ranks", nn.Parameter(torch.ones(1))),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_attribute_of_yours_that_a_layer_needs_is_not_overwritten(name: str, value: Any) -> None:
    model = small_net()
    setattr(model[1], name, value)
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match=f"an attribute {name} of its own.*rename it"):
        convert_model(model, 4)
    assert_unchanged(model, before)


def test_how_a_layer_computes_outlives_its_ranks() -> None:
    model = convert_model(small_net(), 4)
    model[1].impl = "decomposed"
    assert convert_model(revert_model(model), 4)[1].impl == "decomposed"


def test_every_unknown_subclass_is_named_and_a_filter_can_leave_it_out() -> None:
    model = nn.Sequential(Subclass(3), nn.BatchNorm2d(3), Subclass(3))
    with pytest.raises(UnsupportedModuleError, match="module '0', module '2': .*converted.Sub"):
        convert_model(model, 2)
    convert_model(model, 2, filter_fn=lambda module, fqn: type(module) is nn.BatchNorm2d)
    assert type(model[1]) is DistBatchNorm2d


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrap_in_fsdp2(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (1,))
    return fully_shard(model, mesh=mesh)


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (
            nn.parallel.DistributedDataParallel,
            "wrapped by DistributedDataParallel; convert its",
        ),
        (nn.DataParallel, "wrapped by DataParallel; convert its .module, and wrap that"),
        (wrap_in_fsdp2, "wrapped by FSDPModule; convert the model before fully_shard"),
        (torch.compile, "wrapped by OptimizedModule; convert the model before torch"),
        (compile_in_place, "wrapped by Module.compile.*before compiling it"),
    ],
)
def test_wrapped_models_are_refused_with_the_right_order(wrap: Any, match: str) -> None:
    inner = trained_net()
    wrapped = nn.Sequential(wrap(inner))
    before = snapshot(inner)
    for unsupported in ("raise", "skip"):
        with pytest.raises(UnsupportedModuleError, match=f"module '0': {match}"):
            convert_model(wrapped, 2, unsupported=unsupported)
    assert_unchanged(inner, before)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("wrap", "match"),
    [
        (nn.parallel.DistributedDataParallel, "Parallel; call revert_model on its .module and lea"),
        (nn.DataParallel, "DataParallel; call revert_model on its .module, and wrap that"),
        (wrap_in_fsdp2, "FSDPModule; load its full state dict into a converted model and revert"),
    ],
)
def test_wrapped_models_are_not_reverted(wrap: Any, match: str) -> None:
    inner = convert_model(trained_net(), 2)
    wrapped = nn.Sequential(wrap(inner))
    before = snapshot(inner)
    with pytest.raises(UnsupportedModuleError, match=f"cannot be reverted: wrapped.*{match}"):
        revert_model(wrapped)
    assert_unchanged(inner, before)


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models_are_reverted_and_compile_anew(in_place: bool) -> None:
    model = convert_model(trained_net(), 2)
    if in_place:
        model.compile(backend="eager")
    wrapped = model if in_place else torch.compile(model, backend="eager")
    wrapped(torch.randn(8, 3, 8, 8))
    revert_model(wrapped)
    input = torch.randn(5, 3, 8, 8)
    expected = copy.deepcopy(model).eval()(input)
    torch.testing.assert_close(wrapped.eval()(input), expected)


def test_wrappers_and_scripts_without_batch_norm_are_none_of_our_business() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), torch.compile(nn.Conv2d(3, 3, 1)))
    convert_model(model, 2)
    assert type(model[0]) is DistBatchNorm2d


def test_fully_sharded_data_parallel_is_refused_by_name() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # it needs a GPU to build
    nn.Module.__init__(wrapper)
    wrapper.inner = small_net()
    with pytest.raises(UnsupportedModuleError, match="FullyShardedDataParallel; convert"):
        convert_model(wrapper, 2)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: setattr(m, "forward", m.forward), "its forward was replaced on the instance"),
        (lambda m: weight_norm(m, "weight", dim=None), "its parameters are parametrized; remove"),
        (
            lambda m: setattr(m, "__class__", type("Mine", (DistBatchNorm2d,), {})),
            "Mine has no plain class to return to; register_pair it",
        ),
    ],
)
def test_layers_that_cannot_return_are_refused_before_any_other_does(
    spoil: Any, match: str
) -> None:
    model = convert_model(small_net(), 2)
    spoil(model[4])
    with pytest.raises(UnsupportedModuleError, match=f"module '4' cannot be reverted: {match}"):
        revert_model(model)
    assert type(model[1]) is DistBatchNorm2d


def test_filter_that_takes_nothing_is_an_error_also_when_others_are_converted() -> None:
    model = convert_model(small_net(), 2, filter_fn=lambda module, fqn: fqn == "1")
    with pytest.raises(NothingToConvertError, match=r"took none of 2 \('1', '4'\); check"):
        convert_model(model, 2, filter_fn=lambda module, fqn: fqn == "typo")
    with pytest.raises(ConfigurationError, match="filter_fn must be a function of"):
        revert_model(convert_model(nn.BatchNorm1d(2), 2), filter_fn="bn")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="filter_fn must be a function of"):
        convert_model(model, 2, filter_fn="4")


@pytest.mark.parametrize("value", [{"running_mean": torch.zeros(3)}, None, nn.BatchNorm2d])
def test_what_is_no_module_is_refused(value: Any) -> None:
    with pytest.raises(UnsupportedModuleError, match=r"expected an nn\.Module, but got"):
        convert_model(value, 2)
    with pytest.raises(UnsupportedModuleError, match=r"expected an nn\.Module, but got"):
        revert_model(value)
