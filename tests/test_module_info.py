"""Torch's own inventory of a module's cases, run on the layers at ``vt_world_size=1``.

``module_db`` says how torch itself constructs and calls each BatchNorm when it tests it; here the
layers get the same constructors and inputs, and the plain module is the oracle.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from distbn_convert import DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """Undo what importing torch's test utilities does to every other test of this process.

    It freezes the flags of ``torch.backends`` and loads a hypothesis profile of few examples.
    """
    profile = hypothesis.settings.get_current_profile_name()
    frozen = torch.backends.flags_frozen()
    yield
    hypothesis.settings.load_profile(profile)
    module = torch.backends.flags_frozen.__globals__  # sys.modules holds a stand-in
    module["__allow_nonbracketed_mutation_flag"] = not frozen


with _without_side_effects():
    from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db
    from torch.testing._internal.common_utils import noncontiguous_like

OURS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.BatchNorm1d: functools.partial(DistBatchNorm1d, vt_world_size=1),
    nn.BatchNorm2d: functools.partial(DistBatchNorm2d, vt_world_size=1),
    nn.BatchNorm3d: functools.partial(DistBatchNorm3d, vt_world_size=1),
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
INFOS = [info for info in module_db if info.module_cls in OURS]


def module_inputs(
    info: ModuleInfo, dtype: torch.dtype, training: bool, kind: str = "module_inputs_func"
) -> list[Any]:
    """What torch would construct and call; nothing where this torch has no such list."""
    function = getattr(info, kind, None)
    if function is None:
        return []
    settings = {"dtype": dtype, "requires_grad": True, "training": training}
    return list(function(info, device="cpu", **settings))


def list_cases(kind: str) -> list[Any]:
    return [
        pytest.param((info, index), id=f"{info.module_cls.__name__}-{case}")
        for info in INFOS
        for index, entry in enumerate(module_inputs(info, torch.float32, True, kind))
        for case in [getattr(entry, "desc", index) or "default"]
    ]


CASES = list_cases("module_inputs_func")
ERROR_CASES = list_cases("module_error_inputs_func")
Case = tuple[ModuleInfo, int]

all_cases = pytest.mark.parametrize("case", CASES)
train_and_eval = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def construct(case: Case, **kwargs: Any) -> tuple[Any, Any]:
    """Build our layer and the plain module of one case, as they come."""
    info, index = case
    arguments = module_inputs(info, torch.float32, True)[index].constructor_input
    kwargs = {**arguments.kwargs, **kwargs}
    ours = OURS[info.module_cls](*arguments.args, **kwargs)
    return ours, info.module_cls(*arguments.args, **kwargs)


def make_pair(case: Case, training: bool, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Build both with the same random parameters and statistics."""
    ours, plain = construct(case, dtype=dtype)
    with torch.no_grad():
        for name, value in [*plain.named_parameters(), *plain.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + (name != "running_mean") * 0.5)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours.train(training), plain.train(training)


def make_input(case: Case, training: bool, dtype: torch.dtype = torch.float64) -> Tensor:
    info, index = case
    (input,) = module_inputs(info, dtype, training)[index].forward_input.args
    assert isinstance(input, Tensor)
    return input


def first_rank(layer: nn.Module) -> dict[str, Tensor]:
    """The buffers of the only rank, shaped as a plain module's."""
    return {name: buffer.squeeze(0) for name, buffer in layer.named_buffers()}


def step(layer: nn.Module, input: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Call forward and backward; return all that came of it but the buffers."""
    input = input.detach().requires_grad_()
    output = layer(input)
    names = [name for name, _ in layer.named_parameters()]
    gradients = torch.autograd.grad(output, [input, *layer.parameters()], upstream)
    return dict(zip(["output", "input", *names], [output.detach(), *gradients], strict=True))


def assert_as_accurate(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Allow twice torch's own error against float64, plus two roundings of the largest value."""
    assert ours.dtype == plain.dtype
    assert ours.shape == plain.shape
    if not ours.numel():
        return
    rounding = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item() + 2 * rounding
    assert (ours.double() - exact).abs().max().item() <= allowed


def test_the_inventory_has_the_three_batch_norms() -> None:
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert len(CASES) >= 18


@train_and_eval
@all_cases
def test_forward_backward_and_statistics_equal_the_plain_module(case: Case, training: bool) -> None:
    ours, plain = make_pair(case, training)
    for _ in range(3):
        input = make_input(case, training)
        upstream = torch.randn_like(input)
        expected = step(plain, input, upstream)
        torch.testing.assert_close(step(ours, input, upstream), expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(first_rank(ours), dict(plain.named_buffers()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@train_and_eval
@all_cases
def test_narrow_dtypes_are_as_accurate_as_the_plain_module(
    case: Case, training: bool, dtype: torch.dtype
) -> None:
    ours, plain = make_pair(case, training, dtype)
    exact = copy.deepcopy(plain).double()
    input = make_input(case, training, dtype)
    upstream = torch.randn_like(input)
    results = [step(layer, input, upstream) for layer in (ours, plain)]
    truth = step(exact, input.double(), upstream.double())
    for name, value in truth.items():
        assert_as_accurate(results[0][name], results[1][name], value)
    for name, value in first_rank(ours).items():
        if value.is_floating_point():
            assert_as_accurate(value, plain.get_buffer(name), exact.get_buffer(name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@train_and_eval
@all_cases
def test_narrow_input_keeps_float32_parameters_and_statistics(
    case: Case, training: bool, dtype: torch.dtype
) -> None:
    ours, plain = make_pair(case, training, torch.float32)
    exact = copy.deepcopy(plain).double()
    input = make_input(case, training, dtype)
    upstream = torch.randn_like(input)
    results = [step(layer, input, upstream) for layer in (ours, plain)]
    truth = step(exact, input.double(), upstream.double())
    for name, value in truth.items():
        assert_as_accurate(results[0][name], results[1][name], value)
    assert {b.dtype for b in ours.buffers()} <= {torch.float32, torch.int64}


@train_and_eval
@all_cases
def test_forward_does_not_write_to_its_input(case: Case, training: bool) -> None:
    input = make_input(case, training).detach()
    before, version = input.clone(), input._version
    output = make_pair(case, training)[0](input)
    assert input._version == version
    assert torch.equal(input, before)
    assert not input.numel() or output.data_ptr() != input.data_ptr()


@all_cases
def test_training_and_evaluation_differ_where_statistics_are_kept(case: Case) -> None:
    layer, _ = make_pair(case, True)
    input = make_input(case, True)
    buffers = copy.deepcopy(dict(layer.named_buffers()))
    evaluated = layer.eval()(input)
    torch.testing.assert_close(dict(layer.named_buffers()), buffers, rtol=0, atol=0)
    trained = layer.train()(input)
    if not input.numel():
        assert layer.num_batches_tracked.tolist() == [1]
    elif layer.track_running_stats:
        assert (trained - evaluated).abs().max() > 1e-2
        assert all(not torch.equal(layer.get_buffer(name), buffers[name]) for name in STATISTICS)
    else:
        torch.testing.assert_close(trained, evaluated)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@all_cases
def test_factory_arguments_reach_every_tensor(case: Case, dtype: torch.dtype, device: str) -> None:
    ours, plain = construct(case, device=device, dtype=dtype)
    tensors = dict([*ours.named_parameters(), *ours.named_buffers()])
    assert list(tensors) == [
        name for name, _ in [*plain.named_parameters(), *plain.named_buffers()]
    ]
    for name, tensor in tensors.items():
        assert tensor.device.type == device
        assert tensor.dtype == (torch.int64 if name == "num_batches_tracked" else dtype)


@all_cases
def test_device_context_and_default_dtype_are_obeyed(case: Case) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            ours, _ = construct(case)
    finally:
        torch.set_default_dtype(torch.float32)
    for tensor in [*ours.parameters(), *ours.buffers()]:
        assert tensor.is_meta
        assert tensor.dtype in (torch.float64, torch.int64)


@all_cases
def test_meta_layer_is_emptied_onto_a_device_and_reset(case: Case) -> None:
    layer, _ = construct(case, device="meta")
    fresh, _ = construct(case)
    for tensor in [*layer.to_empty(device="cpu").parameters(), *layer.buffers()]:
        tensor.data.fill_(7)  # uninitialised memory may hold the right answer by chance
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), fresh.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@all_cases
def test_to_a_dtype_converts_values_gradients_and_statistics(
    case: Case, dtype: torch.dtype, swap: bool
) -> None:
    ours, _ = make_pair(case, True, torch.float32)
    ours(make_input(case, True, torch.float32)).square().sum().backward()
    before, parameters = copy.deepcopy(ours), list(ours.parameters())
    gradients = [parameter.grad.to(dtype) for parameter in parameters]
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        assert ours.to(dtype) is ours
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(new is old for new, old in zip(ours.parameters(), parameters, strict=True))
    for name, value in before.state_dict().items():
        expected = value.to(dtype) if value.is_floating_point() else value
        torch.testing.assert_close(ours.state_dict()[name], expected, rtol=0, atol=0)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


@all_cases
def test_repr_is_the_plain_one_and_the_virtual_ranks(case: Case) -> None:
    ours, plain = construct(case)
    words = repr(plain).removesuffix(")")
    assert repr(ours).startswith(f"Dist{words}, vt_world_size=1")
    assert str(nn.Sequential(ours)).count("vt_world_size=1") == 1


def through_torch_save(layer: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_pickle(layer: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
@train_and_eval
@all_cases
def test_copies_go_on_alike_and_apart(
    case: Case, training: bool, duplicate: Callable[[nn.Module], Any]
) -> None:
    layer, _ = make_pair(case, training)
    input = make_input(case, training)
    layer(input)
    twin, before = duplicate(layer), copy.deepcopy(layer.state_dict())
    output = twin(input)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)  # apart
    torch.testing.assert_close(layer(input), output, rtol=0, atol=0)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict(), rtol=0, atol=0)
    assert (type(twin), repr(twin), twin.training) == (type(layer), repr(layer), training)


@train_and_eval
@all_cases
def test_strides_of_input_and_gradient_do_not_matter(case: Case, training: bool) -> None:
    input = make_input(case, training).detach()
    upstream = torch.randn_like(input)
    contiguous, strided = make_pair(case, training)[0], None
    start = copy.deepcopy(contiguous)
    expected = step(contiguous, input, upstream)
    for x, dy in [
        (noncontiguous_like(input), upstream),
        (input, noncontiguous_like(upstream)),
        (noncontiguous_like(input), noncontiguous_like(upstream)),
    ]:
        strided = copy.deepcopy(start)
        torch.testing.assert_close(step(strided, x, dy), expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(strided.state_dict(), contiguous.state_dict())
    if input.numel():
        expanded = step(copy.deepcopy(start), input, torch.ones(()).double().expand_as(input))
        ones = step(copy.deepcopy(start), input, torch.ones_like(input))
        torch.testing.assert_close(expanded, ones, rtol=1e-12, atol=1e-13)


@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")  # gradcheck of 2.6
@train_and_eval
@all_cases
def test_gradients_are_the_derivative_to_second_order(case: Case, training: bool) -> None:
    layer, _ = make_pair(case, training)
    inputs = (make_input(case, training), *layer.parameters())

    def forward(input: Tensor, *_: Tensor) -> Tensor:
        output = layer(input)
        assert isinstance(output, Tensor)
        return output

    # The settings are those that torch gives its own modules.
    assert gradcheck(forward, inputs, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(forward, inputs, fast_mode=True, check_batched_grad=True)


@all_cases
def test_state_dict_has_the_plain_keys_and_loads_strictly(case: Case) -> None:
    layer, plain = make_pair(case, True)
    layer(make_input(case, True))
    state = copy.deepcopy(layer.state_dict())
    assert list(state) == list(plain.state_dict())
    assert state._metadata == plain.state_dict()._metadata
    for options in ({}, {"assign": True}):
        fresh, _ = construct(case, dtype=torch.float64, device="meta" if options else "cpu")
        assert not any(fresh.load_state_dict(state, strict=True, **options))
        torch.testing.assert_close(fresh.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_checkpoint_from_before_the_counter_loads_strictly(info: ModuleInfo, device: str) -> None:
    """Version 1 of BatchNorm's state had no ``num_batches_tracked``; torch fills it in."""
    case = (info, 0)
    _, plain = make_pair(case, True)
    layer, _ = construct(case, dtype=torch.float64, device=device)
    old = {k: v for k, v in plain.state_dict().items() if k != "num_batches_tracked"}
    layer.load_state_dict(old, strict=True, assign=device == "meta")
    torch.testing.assert_close(first_rank(layer), dict(plain.named_buffers()), rtol=0, atol=0)
    assert layer.num_batches_tracked.shape == (1,)


@train_and_eval
@pytest.mark.parametrize("case", [case for case in CASES if "Norm1d" not in str(case.id)])
def test_memory_format_propagates_as_in_the_plain_module(case: Case, training: bool) -> None:
    last = [torch.channels_last, torch.channels_last_3d][make_input(case, True).dim() - 4]
    for module_format in (torch.contiguous_format, last):
        ours, plain = (layer.to(memory_format=module_format) for layer in make_pair(case, training))
        for formats in (
            (last, last),
            (last, torch.contiguous_format),
            (torch.contiguous_format,) * 2,
        ):
            input, upstream = make_input(case, training).detach(), None
            upstream = torch.randn_like(input).contiguous(memory_format=formats[1])
            results = [
                step(layer, input.contiguous(memory_format=formats[0]), upstream)
                for layer in (ours, plain)
            ]
            assert results[0]["output"].stride() == results[1]["output"].stride()
            assert results[0]["output"].is_contiguous(memory_format=formats[0])
            torch.testing.assert_close(*results, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", ["auto", "op", "decomposed"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if str(case.id).split("-")[0] in ("BatchNorm1d", "BatchNorm2d")]
)
def test_what_can_be_viewed_after_batch_norm_can_be_after_ours(case: Case, impl: str) -> None:
    """Whatever the order of the input's axes in memory, and where it has gaps."""
    ours, plain = make_pair(case, True)
    ours.impl = impl
    shape = make_input(case, True).shape
    for order in itertools.permutations(range(len(shape))):
        memory = torch.randn([shape[axis] for axis in order], dtype=torch.float64)
        dense = memory.permute([order.index(axis) for axis in range(len(shape))])
        for input in (dense, torch.stack((dense, dense), -1)[..., 0], dense[:1].expand(shape)):
            outputs = [layer(input) for layer in (ours, plain)]
            torch.testing.assert_close(*outputs, rtol=1e-11, atol=1e-11)
            wanted = [size != 1 for size in shape]
            strides = [list(itertools.compress(out.stride(), wanted)) for out in outputs]
            assert strides[0] == strides[1], (order, input.stride())


@pytest.mark.skipif(not ERROR_CASES, reason="this torch lists no error inputs for BatchNorm")
@pytest.mark.parametrize("case", ERROR_CASES)
def test_error_inputs_raise_what_torch_says(case: Case) -> None:
    info, index = case
    error = module_inputs(info, torch.float64, True, "module_error_inputs_func")[index]
    arguments = error.module_error_input.constructor_input
    inputs = error.module_error_input.forward_input
    assert error.error_on == ModuleErrorEnum.FORWARD_ERROR
    ours = OURS[info.module_cls](*arguments.args, **arguments.kwargs, dtype=torch.float64)
    with pytest.raises(error.error_type, match=error.error_regex):
        ours(*inputs.args, **inputs.kwargs)
    plain = info.module_cls(*arguments.args, **arguments.kwargs, dtype=torch.float64).eval()
    try:
        expected = plain(*inputs.args, **inputs.kwargs)
    except error.error_type as refusal:  # in evaluation too: negative, before torch 2.12 also zero
        with pytest.raises(error.error_type, match=re.escape(str(refusal))):
            ours.eval()(*inputs.args, **inputs.kwargs)
    else:
        assert plain.eps == 0
        torch.testing.assert_close(ours.eval()(*inputs.args, **inputs.kwargs), expected)


@train_and_eval
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.module_cls.__name__)
def test_wrong_dimensions_are_refused_as_by_the_plain_module(
    info: ModuleInfo, training: bool
) -> None:
    for dims in range(1, 7):
        input = torch.randn((4, 3, 2, 2, 2, 2)[:dims])
        refusals = []
        for layer in (OURS[info.module_cls](3), info.module_cls(3)):
            try:
                layer.train(training)(input)
            except ValueError as error:
                refusals.append(re.findall(r"expected \d.*?input \(got \dD input", str(error)))
        assert len(refusals) in (0, 2)
        assert len({str(words) for words in refusals}) <= 1
