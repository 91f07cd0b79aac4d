"""The op's epilogues: a residual that is added and a ReLU, with the norm and its gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

from distbn_convert import kernels, operators
from distbn_convert.errors import ConfigurationError, InputError
from distbn_convert.functional import dist_batch_norm

from .oracle import loop_batch_norm

pytestmark = pytest.mark.usefixtures("backend")

PARTITIONS = ("contiguous", "interleaved")
# Whether there is a residual, and the activation.
EPILOGUES = [(True, None), (False, "relu"), (True, "relu")]
EPILOGUE = pytest.mark.parametrize(
    ("added", "activation"), EPILOGUES, ids=["add", "relu", "add_relu"]
)
SHAPES = [(12, 5), (12, 5, 7), (14, 5, 4, 3), (12, 5, 2, 3, 2), (3, 5, 4)]


def make_leaves(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, layout: str = "contiguous"
) -> dict[str, Tensor]:
    """Random input, weight, bias and residual, all leaves that require gradients."""
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    input, residual = torch.randn(2, *shape, dtype=torch.float64).to(dtype) * 2 + 0.5
    if layout == "channels_last":
        input, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (input, residual))
    elif layout == "strided":
        input, residual = (torch.stack([t, t], -1)[..., 0] for t in (input, residual))
    weight = torch.rand(shape[1], dtype=parameters) + 0.5
    bias = torch.randn(shape[1], dtype=parameters)
    leaves = {"input": input, "weight": weight, "bias": bias, "residual": residual}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def make_rows(ranks: int, channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(ranks, channels, dtype=dtype), torch.rand(ranks, channels, dtype=dtype)]


def apart(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, **settings: Any
) -> Tensor:
    """The loop of batch norms, then what follows it, one after the other."""
    activation, rows = settings.pop("activation"), settings.pop("rows", (None, None))
    output = loop_batch_norm(input, *rows, weight, bias, **settings)
    output = output if residual is None else output + residual
    return output.relu() if activation else output


def fused(
    input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, **settings: Any
) -> Tensor:
    rows = settings.pop("rows", (None, None))
    return dist_batch_norm(input, *rows, weight, bias, residual=residual, **settings)


def upstream_for(output: Tensor) -> Tensor:
    """A random gradient that is zero where a rounding could switch the ReLU."""
    gradient = torch.randn(output.shape, dtype=torch.float64)
    return gradient * (output.detach().double().abs() > 0.1)


@EPILOGUE
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop_then_add_then_relu(
    shape: tuple[int, ...], partition: str, added: bool, activation: str | None
) -> None:
    leaves = make_leaves(shape)
    named = leaves if added else {**leaves, "residual": None}
    inputs = [leaf for leaf in named.values() if leaf is not None]
    rows = make_rows(4, shape[1])
    twins = [row.clone() for row in rows]
    settings: Any = {"vt_world_size": 4, "partition": partition, "activation": activation}
    ours = fused(**named, rows=rows, **settings)
    expected = apart(**named, rows=twins, **settings)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows, twins, rtol=1e-13, atol=1e-14)
    upstream = torch.randn(shape, dtype=torch.float64)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    truth = torch.autograd.grad(expected, inputs, upstream)
    torch.testing.assert_close(gradients, truth, rtol=1e-11, atol=1e-12)


@EPILOGUE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_error_is_at_most_twice_that_of_torch(
    dtype: torch.dtype, layout: str, added: bool, activation: str | None, backend: str
) -> None:
    # Torch's own code for channels_last is less exact, and the loop's indexing loses the layout.
    rounding = 32 if backend == "native" and layout == "channels_last" else 1
    leaves = make_leaves((32, 6, 8, 16), dtype, layout)
    settings: Any = {"vt_world_size": 8, "partition": "interleaved", "activation": activation}
    chosen = {name: leaf for name, leaf in leaves.items() if added or name != "residual"}

    def run(function: Any, wide: bool, upstream: Tensor | None) -> list[Tensor]:
        cast = {n: t.detach().double() if wide else t.detach() for n, t in chosen.items()}
        cast = {name: leaf.requires_grad_() for name, leaf in cast.items()}
        output = function(**{"residual": None, **cast}, **settings)
        if upstream is None:
            return [output.detach()]
        gradients = torch.autograd.grad(output, list(cast.values()), upstream.to(output.dtype))
        return [output.detach(), *gradients]

    upstream = upstream_for(apart(**{"residual": None, **chosen}, **settings)).to(dtype)
    exact, torchs = run(apart, True, upstream), run(apart, False, upstream)
    ours = run(fused, False, upstream)
    for result, peer, truth in zip(ours, torchs, exact, strict=True):
        assert result.dtype == peer.dtype
        error, allowed = ((value.double() - truth).abs().max() for value in (result, peer))
        eps = (64 if dtype == torch.float64 else rounding) * torch.finfo(dtype).eps
        assert error <= 2 * allowed + eps * truth.abs().max()


@EPILOGUE
@pytest.mark.parametrize(
    ("dims", "memory_format"), [(4, torch.channels_last), (5, torch.channels_last_3d)]
)
def test_memory_format_is_kept_forward_and_backward(
    dims: int, memory_format: torch.memory_format, added: bool, activation: str | None
) -> None:
    input = torch.randn(4, 6, *(3,) * (dims - 2)).contiguous(memory_format=memory_format)
    residual = torch.randn(input.shape) if added else None  # of the other format
    input.requires_grad_()
    output = dist_batch_norm(input, vt_world_size=2, activation=activation, residual=residual)
    assert output.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(output.sin().sum(), input)
    assert gradient.is_contiguous(memory_format=memory_format)


@EPILOGUE
@pytest.mark.parametrize("samples", [6, 7, 2])
def test_gradcheck_and_gradgradcheck_away_from_the_kink(
    samples: int, added: bool, activation: str | None
) -> None:
    leaves = [*make_leaves((samples, 2, 3)).values()][: 3 + added]

    def function(*leaves: Tensor) -> Tensor:
        residual = leaves[3] if added else None
        settings: Any = {"vt_world_size": 3, "activation": activation, "residual": residual}
        return dist_batch_norm(leaves[0], None, None, *leaves[1:3], **settings)

    output = function(*leaves).detach()
    assert output[output != 0].abs().min() > 1e-3, "the kink is too near for finite differences"
    assert gradcheck(function, leaves, check_forward_ad=True)
    assert gradgradcheck(function, leaves)


def test_relu_gradient_is_the_same_bits_from_the_input_as_from_the_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        leaves = [*make_leaves((9, 5, 4, 3), dtype).values()][:3]
        results = []
        for kept in (True, False):
            monkeypatch.setattr(operators, "keeps_output", lambda *_, kept=kept: kept)
            output = fused(*leaves, None, vt_world_size=4, activation="relu")
            saved = output.grad_fn.saved_tensors
            assert (saved[3] is None) is not kept
            gradients = torch.autograd.grad(output, leaves, torch.ones_like(output), True)
            second = torch.autograd.grad(output, leaves, torch.ones_like(output), create_graph=True)
            results.append([*gradients, *second])
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_output_is_kept_where_the_input_cannot_tell_what_the_relu_let_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnGPU:
        is_cuda, device, dtype = True, torch.device("cuda"), torch.float32

    cpu, residual = torch.ones(1), torch.ones(1)
    gpu: Any = OnGPU()
    for has_kernel in (True, False):
        monkeypatch.setattr(kernels, "has_kernel", lambda *_, answer=has_kernel: answer)
        assert kernels.keeps_output(gpu, None, True) is not has_kernel
        assert kernels.keeps_output(gpu, residual, True)
        assert not kernels.keeps_output(gpu, None, False)
    assert kernels.keeps_output(cpu, None, True)
    assert not kernels.keeps_output(cpu, residual, False)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_input_may_be_its_own_residual(activation: str | None) -> None:
    leaves = make_leaves((8, 5, 4))
    input, weight, bias = leaves["input"], leaves["weight"], leaves["bias"]
    before = input.detach().clone()
    settings: Any = {"vt_world_size": 4, "activation": activation}
    ours = fused(input, weight, bias, input, **settings)
    expected = apart(input, weight, bias, input, **settings)
    torch.testing.assert_close(ours, expected)
    assert torch.equal(input, before)
    upstream = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (input, weight), upstream),
        torch.autograd.grad(expected, (input, weight), upstream),
    )


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("kind", ["expanded", "strided", "transposed"])
def test_residual_of_any_memory_layout(kind: str, activation: str | None) -> None:
    leaves = make_leaves((8, 5, 4, 4))
    base = {
        "expanded": torch.randn(5, 1, 1).double(),
        "strided": torch.randn(8, 5, 4, 8).double(),
        "transposed": torch.randn(4, 4, 5, 8).double(),
    }[kind].requires_grad_()

    def residual() -> Tensor:
        if kind == "expanded":
            return base.expand(8, 5, 4, 4)
        return base[..., ::2] if kind == "strided" else base.transpose(0, 3).transpose(1, 2)

    settings: Any = {"vt_world_size": 4, "activation": activation}
    upstream, results = torch.randn(8, 5, 4, 4).double(), []
    for function in (fused, apart):
        output = function(**{**leaves, "residual": residual()}, **settings)
        gradients = torch.autograd.grad(output, (leaves["input"], base), upstream)
        results.append([output, *gradients])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("activation", [None, "relu"])
def test_residual_or_input_may_need_no_gradient(activation: str | None) -> None:
    upstream = torch.randn(8, 5, 4).double()
    for frozen in ("input", "residual"):
        leaves = make_leaves((8, 5, 4))
        leaves[frozen].requires_grad_(False)
        others = [leaf for name, leaf in leaves.items() if name != frozen]
        results = [
            torch.autograd.grad(
                f(**leaves, vt_world_size=4, activation=activation), others, upstream
            )
            for f in (fused, apart)
        ]
        torch.testing.assert_close(results[0], results[1])
        assert not fused(
            **{n: t.detach() for n, t in leaves.items()}, vt_world_size=4, activation=activation
        ).requires_grad


@EPILOGUE
@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 3, 0)], ids=str)
def test_empty_batch(shape: tuple[int, ...], added: bool, activation: str | None) -> None:
    input, residual = (torch.empty(shape, requires_grad=True) for _ in range(2))
    output = dist_batch_norm(
        input, vt_world_size=2, activation=activation, residual=residual if added else None
    )
    leaves = (input, residual) if added else (input,)
    gradients = torch.autograd.grad(output.sum(), leaves)
    assert {t.shape for t in (output, *gradients)} == {torch.Size(shape)}


def test_func_transforms_equal_those_of_plain_operations() -> None:
    point = tuple(leaf.detach() for leaf in make_leaves((6, 2, 3)).values())

    def ours(*leaves: Tensor) -> Tensor:
        return fused(*leaves, vt_world_size=3, activation="relu").sin().sum()

    def plain(input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        shares = input.reshape(3, 2, 2, 3)
        var, mean = torch.var_mean(shares, (1, 3), correction=0, keepdim=True)
        output = (shares - mean) / (var + 1e-5).sqrt() * weight[:, None] + bias[:, None]
        return (output.reshape(6, 2, 3) + residual).relu().sin().sum()

    which = (0, 1, 2, 3)
    tangents = tuple(torch.randn_like(value) for value in point)
    torch.testing.assert_close(grad(ours, which)(*point), grad(plain, which)(*point))
    torch.testing.assert_close(jvp(ours, point, tangents), jvp(plain, point, tangents))
    torch.testing.assert_close(hessian(ours, which)(*point), hessian(plain, which)(*point))


@EPILOGUE
def test_vmap_equals_a_loop(added: bool, activation: str | None) -> None:
    inputs, residuals = torch.randn(2, 3, 6, 4, 5)

    def function(input: Tensor, residual: Tensor) -> Tensor:
        return dist_batch_norm(
            input, vt_world_size=2, activation=activation, residual=residual if added else None
        )

    expected = [function(*pair) for pair in zip(inputs, residuals, strict=True)]
    torch.testing.assert_close(vmap(function)(inputs, residuals), torch.stack(expected))
    shared = vmap(function, in_dims=(None, 0))(inputs[0], residuals)
    expected = [function(inputs[0], residual) for residual in residuals]
    torch.testing.assert_close(shared, torch.stack(expected))


@EPILOGUE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_as_one_graph_and_equals_eager(
    dtype: torch.dtype, added: bool, activation: str | None, backend: str
) -> None:
    # Without a kernel the graph is the definition's, and eager mode torch's batch norm.
    eps = 8 * torch.finfo(dtype).eps if backend == "native" else 0
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    for samples in (8, 9, 11):
        leaves: Any = make_leaves((samples, 5, 4, 4), dtype)
        leaves |= {} if added else {"residual": None}
        chosen = [leaf for leaf in leaves.values() if leaf is not None]
        settings: Any = {"vt_world_size": 4, "activation": activation}
        upstream, results = torch.randn(samples, 5, 4, 4).to(dtype), []
        for function in (compiled, fused):
            rows = make_rows(4, 5, torch.float32)
            rows = [torch.zeros_like(row) for row in rows]
            output = function(**leaves, rows=rows, **settings)
            results.append([output, *rows, *torch.autograd.grad(output, chosen, upstream)])
        torch.testing.assert_close(*results, rtol=eps, atol=eps)


@EPILOGUE
def test_autocast_keeps_the_dtype_of_the_input(added: bool, activation: str | None) -> None:
    leaves = make_leaves((8, 5, 4), torch.bfloat16)
    leaves |= {} if added else {"residual": None}
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused(**leaves, vt_world_size=4, activation=activation)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, fused(**leaves, vt_world_size=4, activation=activation))


def test_output_of_a_relu_may_not_be_changed_before_the_backward() -> None:
    leaves = make_leaves((8, 5, 4))
    output = fused(**leaves, vt_world_size=4, activation="relu")
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_gradient_passed_to_the_residual_is_not_the_users_tensor_to_spoil() -> None:
    leaves = make_leaves((8, 5, 4))
    output = fused(**leaves, vt_world_size=4, activation=None)
    upstream = torch.randn_like(output)
    before = copy.deepcopy(upstream)
    output.backward(upstream)
    leaves["residual"].grad.mul_(3)
    assert torch.equal(upstream, before)


@pytest.mark.parametrize("activation", ["gelu", "ReLU", F.relu, True, ""])
def test_unknown_activation_is_refused(activation: Any) -> None:
    with pytest.raises(ConfigurationError, match="activation must be 'relu' or None, but got"):
        dist_batch_norm(torch.randn(8, 3), vt_world_size=2, activation=activation)


@pytest.mark.parametrize(
    ("residual", "match"),
    [
        (torch.randn(8, 1), r"with the shape of the input, \(8, 3\), but got \(8, 1\); expand"),
        (torch.randn(3), r"the shape of the input, \(8, 3\), but got \(3,\)"),
        (torch.randn(8, 3).double(), "dtype of the input, torch.float32, but got torch.float64; c"),
        (torch.ones(8, 3, device="meta"), "the device of the input, cpu, but got meta"),
    ],
)
def test_residual_unlike_the_input_is_refused_before_anything_changes(
    residual: Tensor, match: str
) -> None:
    counts = torch.zeros(2, dtype=torch.long)
    with pytest.raises(InputError, match=match), torch.autocast("cpu", torch.bfloat16):
        dist_batch_norm(
            torch.randn(8, 3), num_batches_tracked=counts, vt_world_size=2, residual=residual
        )
    assert counts.sum() == 0
