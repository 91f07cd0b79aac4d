"""Torch's own batch norm as a backend: the same numbers, whichever way ranks are given to it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distbn_convert import kernels
from distbn_convert.functional import dist_batch_norm
from distbn_convert.kernels import cpu, native, reference

from .kernel_cases import CASES, Case, check, check_nan, check_tiny, check_underflow, make
from .oracle import rank_indices

WAYS = {"each": 0, "joined": 2**62}
# On a CPU torch's backward of channels_last adds up in float32, one row after the other.
EXACT = [case for case in CASES if not (case.channels_last and case.shift > 100)]
# With one channel, ranks that are not beside it in memory look as if they were.
ONE_CHANNEL = [
    Case(shape, 2, channels_last=channels_last, interleaved=interleaved)
    for shape in ((6, 1, 5, 5), (8, 1), (4, 1, 3), (2, 1, 7))
    for channels_last in (False, True)
    for interleaved in (False, True)
]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How ranks are given to torch, where both can be had."""
    monkeypatch.setitem(native._LARGE, "cpu", WAYS[request.param])
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", [*EXACT, *ONE_CHANNEL], ids=str)
def test_agrees_with_the_definition(case: Case) -> None:
    check(case, make(case), native)


@pytest.mark.usefixtures("way")
def test_relu_treats_nan_and_underflow_as_torch_does() -> None:
    check_nan(backend=native)
    check_underflow(backend=native)
    check_tiny(backend=native)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("partition", ["contiguous", "interleaved"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(8, 24, 5, 7), (12, 40), (8, 16, 2, 5, 4)], ids=str)
def test_is_the_batch_norm_of_torch_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, partition: str
) -> None:
    case = Case(shape, 4, channels_last=channels_last, dtype=dtype, running=None)
    tensors = make(case)
    x, dy = tensors["x"], tensors["dy"]
    if dtype == torch.float64:
        tensors = {n: None if t is None else t.double() for n, t in tensors.items()}
    weight, bias = tensors["weight"], tensors["bias"]
    mean, var = (torch.zeros(4, shape[1], dtype=weight.dtype) for _ in range(2))
    interleaved = partition == "interleaved"
    y, *saved = native.forward(
        x, weight, bias, None, mean, var, None, 1.0, 1e-5, 4, interleaved, False
    )
    dx = native.backward(dy, x, weight, bias, None, *saved, 4, interleaved, False)[0]
    for rank, index in enumerate(rank_indices(len(x), 4, partition)):
        share, upstream = (as_it_lies(t, index, channels_last) for t in (x, dy))
        share.requires_grad_()
        running = torch.zeros(2, shape[1], dtype=weight.dtype)
        expected = F.batch_norm(share, *running, weight, bias, True, 1.0)
        (slope,) = torch.autograd.grad(expected, share, upstream)
        results = y[index], dx[index], mean[rank], var[rank]
        torch.testing.assert_close(results, (expected, slope, *running), rtol=0, atol=0)


def as_it_lies(tensor: Tensor, index: Tensor, channels_last: bool) -> Tensor:
    """Samples of the batch, channels where they were."""
    share = tensor[index]
    if not channels_last or share.dim() == 2:
        return share
    return share.movedim(1, -1).contiguous().movedim(-1, 1)


@pytest.mark.parametrize(
    ("samples", "values", "interleaved", "joins"),
    [
        (8, 100, False, True),
        (8, 100, True, True),
        (8, 5000, False, False),
        (8, 5000, True, True),
        (9, 5000, False, False),
        (3, 50000, False, False),  # a rank without samples
        (9, 100, False, None),
        (9, 5000, True, None),
        (0, 100, False, None),
    ],
)
def test_large_shares_have_a_call_each_and_others_one_where_they_are_even(
    samples: int,
    values: int,
    interleaved: bool,
    joins: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    real = torch.ops.aten.native_batch_norm.out

    def count(*arguments: Any, **results: Any) -> Any:
        calls.append(arguments[0].shape)
        return real(*arguments, **results)

    monkeypatch.setattr(torch.ops.aten.native_batch_norm, "out", count)
    x = torch.randn(samples, 8, values)
    native.forward(x, *(None,) * 6, 0.1, 1e-5, 4, interleaved, False)
    ranks = min(samples, 4)
    shapes = {True: [(samples // 4, 32, values, 1)], None: []}
    shapes[False] = [(len(i), 8, values, 1) for i in rank_indices(samples, 4, "contiguous")[:ranks]]
    assert calls == shapes[joins]


def test_is_taken_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda dtype: None)
    assert kernels.select_backend(torch.ones(4, 3)) is native
    assert not kernels.has_kernel(torch.device("cpu"), torch.float32)  # so that compilers fuse
    assert kernels.select_backend(torch.ones(4, 3, device="meta")) is reference


@pytest.mark.parametrize("relu", [False, True])
def test_output_may_be_changed_in_place(relu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BACKENDS", (native,))
    x = torch.randn(8, 6, 5, 5).requires_grad_()
    settings: Any = {"vt_world_size": 4, "activation": "relu" if relu else None}
    for partition in ("contiguous", "interleaved"):
        output = dist_batch_norm(x, partition=partition, **settings)
        assert output._base is None  # an output that is a view refuses it
        (2 * output).sigmoid_().sum().backward()
        if not relu:
            dist_batch_norm(x, partition=partition, **settings).relu_().sum().backward()


def test_backward_keeps_one_gradient_of_a_share_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[Any] = []
    real = torch.ops.aten.native_batch_norm_backward.default

    def watch(*arguments: Any) -> Any:
        assert [grad() for grad in alive[:-1]] == [None] * len(alive[:-1])
        result = real(*arguments)
        alive.append(weakref.ref(result[0]))
        return result

    monkeypatch.setattr(torch.ops.aten.native_batch_norm_backward, "default", watch)
    monkeypatch.setitem(native._LARGE, "cpu", 0)
    x = torch.randn(8, 6, 5)
    _, *moments = native.forward(x, *(None,) * 6, 0.1, 1e-5, 4, False, False)
    native.backward(x, x, *(None,) * 3, *moments, 4, False, False)
    assert len(alive) == 4
