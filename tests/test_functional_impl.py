"""The op as kernels and as plain operations, alone and under a compiler."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.overrides import TorchFunctionMode

from distbn_convert import DistBatchNorm2d, convert_model, revert_model
from distbn_convert.errors import ConfigurationError
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels import reference

from .versions import since_torch

pytestmark = [
    pytest.mark.usefixtures("backend", "_compiler"),
    # Torch's own recorder of graphs gives this.
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning:UserWarning"),
]
PARTITIONS = ("contiguous", "interleaved")
EPILOGUES = [(False, None), (True, None), (False, "relu"), (True, "relu")]
EPILOGUE = pytest.mark.parametrize(
    ("added", "activation"), EPILOGUES, ids=["none", "add", "relu", "add_relu"]
)


def make_batch(samples: int, added: bool, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Input, weight, bias and residual (or None) of a batch with 5 channels."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    input, residual = torch.randn(2, samples, 5, 4, 3, dtype=torch.float64).to(dtype)
    leaves = [input, torch.rand(5, dtype=parameters) + 0.5, torch.randn(5, dtype=parameters)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, residual)]
    return leaves if added else [*leaves[:3], None]


class Rows:
    """Running statistics of four ranks that have seen a batch; a copy for each function."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.mean, self.var = torch.zeros(4, 5, dtype=dtype), torch.ones(4, 5, dtype=dtype)
        self.counts = torch.ones(4, dtype=torch.long)

    def all(self) -> list[Tensor]:
        return [self.mean, self.var, self.counts]


def call(batch: list[Any], rows: Rows | None, **settings: Any) -> Tensor:
    input, weight, bias, residual = batch
    statistics = rows.all() if rows else [None] * 3
    return dist_batch_norm(
        input, *statistics[:2], weight, bias, statistics[2], residual=residual, **settings
    )


def step(function: Any, batch: list[Any], rows: Rows, upstream: Tensor, **settings: Any) -> Any:
    """Output, gradients and statistics."""
    output = function(batch, rows, vt_world_size=4, **settings)
    leaves = [leaf for leaf in batch if leaf is not None]
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream), *rows.all()]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"rtol": 16 * eps, "atol": 64 * eps}


def operators_seen(batch: list[Any], **settings: Any) -> set[str]:
    """Names of this package's operators that a compiler is given, forward and backward."""
    recorder = AotEagerAndRecordGraphs()
    compiled = torch.compile(call, backend=recorder, fullgraph=True)
    compiled(batch, None, vt_world_size=4, **settings).sum().backward()
    graphs = [*recorder.fw_graphs, *recorder.bw_graphs]
    assert len(graphs) == 2
    text = " ".join(str(graph.graph) for graph in graphs)  # a mutating operator is an argument
    return set(re.findall(r"distbn_convert\.\w+", text))


@EPILOGUE
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("samples", [8, 11, 3])
def test_decomposed_equals_the_op_out_of_a_compiler(
    samples: int, partition: str, momentum: float | None, added: bool, activation: str | None
) -> None:
    settings = {"partition": partition, "momentum": momentum, "activation": activation}
    batch, rows = make_batch(samples, added), (Rows(), Rows())
    upstream = torch.randn_like(batch[0])
    ours = step(call, batch, rows[0], upstream, impl="decomposed", **settings)
    expected = step(call, batch, rows[1], upstream, impl="op", **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@EPILOGUE
def test_decomposed_has_all_derivatives(added: bool, activation: str | None) -> None:
    small = [
        leaf if leaf is None or leaf.dim() == 1 else leaf[:, :2, :2, :2]
        for leaf in make_batch(7, added)
    ]
    small[1:3] = small[1][:2], small[2][:2]
    leaves = [leaf.detach().requires_grad_() for leaf in small if leaf is not None]

    def function(*leaves: Tensor) -> Tensor:
        given = [*leaves, *(() if added else (None,))]
        return call(given, None, vt_world_size=3, activation=activation, impl="decomposed")

    output = function(*leaves).detach()
    assert output[output != 0].abs().min() > 1e-5
    assert gradcheck(function, leaves, eps=1e-7, atol=1e-4, check_forward_ad=True)
    assert gradgradcheck(function, leaves, eps=1e-7, atol=1e-4)


def test_decomposed_models_are_mapped_over_with_their_own_statistics() -> None:
    models: Any = [nn.Sequential(DistBatchNorm2d(5, vt_world_size=2)).double() for _ in range(3)]
    for model in models:
        model[0].impl = "decomposed"
    parameters, buffers = stack_module_state(models)
    batches = torch.randn(3, 7, 5, 4, 3, dtype=torch.float64)

    def loss(params: Any, buffers: Any, input: Tensor) -> Tensor:
        return functional_call(models[0], (params, buffers), (input,)).sin().sum()

    found = vmap(grad(loss))(parameters, buffers, batches)
    for index, model in enumerate(models):
        expected = torch.autograd.grad(model(batches[index]).sin().sum(), [*model.parameters()])
        torch.testing.assert_close([value[index] for value in found.values()], list(expected))
        for name, value in model.named_buffers():
            torch.testing.assert_close(buffers[name][index], value)


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, "frozen"])
@pytest.mark.parametrize("impl", ["auto", "op", "decomposed"])
def test_compiled_layers_train_their_statistics_without_gradients(
    impl: str, without: Any, fullgraph: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), DistBatchNorm2d(5, vt_world_size=4)).double()
    model[1].impl = impl
    twin = copy.deepcopy(model)
    if without == "frozen":
        model.requires_grad_(requires_grad=False)
        without = torch.enable_grad
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    batch = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    with without():
        output = compiled(batch)
    torch.testing.assert_close(output, twin(batch).detach())
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@EPILOGUE
@pytest.mark.parametrize(("partition", "momentum"), [*zip(PARTITIONS, (None, 0.3), strict=True)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_compiled_decomposition_is_one_graph_and_equals_eager(
    dtype: torch.dtype,
    partition: str,
    momentum: float | None,
    added: bool,
    activation: str | None,
) -> None:
    settings = {"partition": partition, "momentum": momentum, "activation": activation}
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    rows = Rows(statistics), Rows(statistics)
    for samples in (8, 11, 3):
        batch = make_batch(samples, added, dtype)
        upstream = torch.randn_like(batch[0])
        with torch.no_grad():  # no gradient where a rounding could switch the ReLU
            output = call(batch, None, vt_world_size=4, **{**settings, "momentum": 0.1})
            upstream *= output.abs() > 0.1
        ours = step(compiled, batch, rows[0], upstream, impl="decomposed", **settings)
        expected = step(call, batch, rows[1], upstream, impl="op", **settings)
        torch.testing.assert_close(ours, expected, **tolerance(dtype))


@since_torch(2, 8, "the compiler makes a graph for each size")
@pytest.mark.parametrize("impl", ["op", "decomposed"])
def test_changing_batch_sizes_do_not_compile_anew(impl: str) -> None:
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    rows = Rows(), Rows()
    for samples in (10, 15, 23, 42):  # more than one rank has one more: one kind
        batch = make_batch(samples, False)
        upstream = torch.randn_like(batch[0])
        ours = step(compiled, batch, rows[0], upstream, impl=impl, activation="relu")
        expected = step(call, batch, rows[1], upstream, impl="op", activation="relu")
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@EPILOGUE
def test_a_compiler_sees_the_op_or_plain_operations(added: bool, activation: str | None) -> None:
    settings: Any = {"activation": activation}
    batch = make_batch(8, added, torch.float32)
    operators = {"distbn_convert.batch_norm", "distbn_convert.batch_norm_backward"}
    assert operators_seen(batch, impl="op", **settings) == operators
    torch._dynamo.reset()
    assert operators_seen(batch, impl="decomposed", **settings) == set()


def test_auto_is_the_op_only_where_it_has_a_kernel(backend: str) -> None:
    batch = make_batch(8, False, torch.float32)
    assert bool(operators_seen(batch, impl="auto")) is (backend == "cpu")


@since_torch(2, 8, "it cannot be told that a program is exported")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["auto", "decomposed"])
def test_exported_layer_holds_plain_operations_and_trains(
    impl: str, dtype: torch.dtype, strict: bool
) -> None:
    layer = DistBatchNorm2d(5, vt_world_size=2)
    layer.impl = impl
    input = torch.randn(8, 5, 4, 3, dtype=dtype)
    program = torch.export.export(copy.deepcopy(layer), (input,), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("distbn_convert" in name for name in names)
    upstream, results = torch.randn_like(input), []
    for model in (layer, program.module()):
        leaves = [input.clone().requires_grad_(), *model.parameters()]
        output = model(leaves[0])
        results.append([output, *torch.autograd.grad(output, leaves, upstream), *model.buffers()])
    eps = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=eps, atol=eps)


@since_torch(2, 8, "it cannot be told that a program is exported")
@pytest.mark.parametrize(
    ("size", "strict"),
    [
        (torch.export.Dim("batch", min=4), False),
        (torch.export.Dim("batch", min=4), True),
        (torch.export.Dim.AUTO, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("example", [8, 9])
def test_exported_layer_trains_on_every_batch_with_samples_for_all_ranks(
    example: int, partition: str, size: Any, strict: bool
) -> None:
    layer = DistBatchNorm2d(3, vt_world_size=4, partition=partition).double()
    inputs = torch.randn(16, 3, 2, 2, dtype=torch.float64)
    sizes = ({0: size},)
    program = torch.export.export(
        copy.deepcopy(layer), (inputs[:example],), dynamic_shapes=sizes, strict=strict
    ).module()
    for samples in (8, 9, 4, 16, 11):
        results = []
        for model in (layer, program):
            input = inputs[:samples].clone().requires_grad_()
            output = model(input)
            output.sin().sum().backward()
            results.append([output, input.grad, *model.buffers()])
        torch.testing.assert_close(*results)


@since_torch(2, 8, "it cannot be told that a program is exported")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_layer_trains_on_maps_of_every_size(strict: bool) -> None:
    layer = DistBatchNorm2d(3, vt_world_size=4).double()
    height, width = (torch.export.Dim(name) for name in ("height", "width"))
    program = torch.export.export(
        copy.deepcopy(layer),
        (torch.randn(8, 3, 6, 5, dtype=torch.float64),),
        dynamic_shapes=({2: height, 3: width},),
        strict=strict,
    ).module()
    for positions in ((6, 5), (2, 9), (7, 3)):
        input, results = torch.randn(8, 3, *positions, dtype=torch.float64), []
        for model in (layer, program):
            leaf = input.clone().requires_grad_()
            output = model(leaf)
            output.sin().sum().backward()
            results.append([output, leaf.grad, *model.buffers()])
        torch.testing.assert_close(*results)


def test_layers_have_it_as_an_attribute_that_conversion_keeps() -> None:
    layer = DistBatchNorm2d(5, vt_world_size=4)
    assert layer.impl == "auto"
    layer.impl = "decomposed"
    twin = copy.deepcopy(layer)
    batch = make_batch(8, False, torch.float32)
    output = twin(batch[0])
    assert "_BatchNorm" not in type(output.grad_fn).__name__
    plain = revert_model(layer)
    assert convert_model(plain, 2).impl == "decomposed"


@pytest.mark.parametrize("impl", ["opaque", None, "AUTO"])
def test_unknown_implementation_is_refused(impl: Any) -> None:
    with pytest.raises(ConfigurationError, match="impl must be one of 'auto', 'op', 'decomposed'"):
        dist_batch_norm(torch.randn(8, 3), vt_world_size=2, impl=impl)


class _Results(TorchFunctionMode):
    """Keeps what every call of torch returned, as a compiler sees it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), settings: Any = None
    ) -> Any:
        result = function(*arguments, **(settings or {}))
        self.seen += result if isinstance(result, tuple) else [result]
        return result


@EPILOGUE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_two_operations_of_the_decomposition_return_its_output(
    dtype: torch.dtype,
    layout: str,
    added: bool,
    activation: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The compiler of torch 2.11 takes its gradient to be zero if they do.
    input, weight, bias, residual = (
        None if leaf is None else leaf.detach() for leaf in make_batch(8, added, dtype)
    )
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":
        input = torch.stack([input, input], -1)[..., 0]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    settings: Any = (*(None,) * 4, 1e-5, 4, False, activation is not None)
    with _Results() as results:
        output, *_ = reference.forward(input, weight, bias, residual, *settings)
    assert output.stride() == torch.empty_like(input).stride()
    memory = output.untyped_storage().data_ptr()
    tensors = [result for result in results.seen if isinstance(result, Tensor)]
    assert [t.untyped_storage().data_ptr() for t in tensors].count(memory) == 1


def test_decomposition_is_differentiable_where_a_residual_lies_otherwise() -> None:
    input = torch.randn(4, 2, 1, 3).requires_grad_()
    residual = torch.randn(4, 2, 1, 3).to(memory_format=torch.channels_last).requires_grad_()
    outputs = [
        dist_batch_norm(input, vt_world_size=2, residual=residual, impl=impl)
        for impl in ("op", "decomposed")
    ]
    assert outputs[0].stride() == outputs[1].stride()
    upstream = torch.randn(4, 2, 1, 3)
    gradients = [torch.autograd.grad(o, (input, residual), upstream) for o in outputs]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
