from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distbn_convert import replicas
from distbn_convert.errors import ConfigurationError
from distbn_convert.replicas import (
    evaluation_statistics,
    reduce_count,
    reduce_statistics,
    replicate,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def any_values(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Values of every exponent, with denormals, the largest, infinity and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.finfo(dtype).bits // 8
    raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=generator)
    values = raw.view(dtype).clone()
    info = torch.finfo(dtype)
    special = [0.0, -0.0, info.max, info.smallest_normal, info.tiny / 4, 0.1, 1 / 3]
    values[: len(special)] = torch.tensor(special, dtype=dtype)
    return values


@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(ranks=st.integers(1, 1000), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_reducing_equal_rows_gives_the_row_bit_for_bit(
    dtype: torch.dtype, reduction: str, ranks: int, seed: int
) -> None:
    mean = any_values(dtype, 64, seed)
    mean = mean[~mean.isnan()]  # a NaN stays NaN; its payload is the processor's
    var = mean.abs()
    if reduction == "pooled":
        mean = torch.where(mean.isinf(), 0, mean)  # infinite means have no variance
    result = reduce_statistics(replicate(mean, ranks), replicate(var, ranks), reduction, ranks - 1)
    negative_zero = (mean == 0) & (reduction != "select")  # -0 may come back as 0
    assert torch.equal(bits(result[0][~negative_zero]), bits(mean[~negative_zero]))
    assert torch.equal(result[0], mean)
    assert torch.equal(bits(result[1]), bits(var))


@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(ranks=st.integers(1, 1000), seed=st.integers(0, 2**31), equal=st.booleans())
@settings(max_examples=40)
def test_evaluation_uses_the_statistics_that_reverting_keeps(
    dtype: torch.dtype, reduction: str, ranks: int, seed: int, equal: bool
) -> None:
    if equal:
        rows = replicate(any_values(dtype, 64, seed), ranks)
    else:
        rows = any_values(dtype, 64 * ranks, seed).view(ranks, 64)
    kept = reduce_statistics(rows, rows.abs(), reduction, ranks - 1)
    used = evaluation_statistics(rows, rows.abs(), reduction, ranks - 1)
    torch.testing.assert_close(used, kept, rtol=0, atol=0, equal_nan=True)


def test_evaluation_keeps_the_dtype_of_each_statistic() -> None:
    mean, var = torch.randn(4, 5), torch.rand(4, 5, dtype=torch.float64)
    used = evaluation_statistics(mean, var, "mean", 0)
    assert [statistic.dtype for statistic in used] == [torch.float32, torch.float64]
    assert torch.equal(used[1], reduce_statistics(mean, var)[1])


@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
def test_nan_and_infinity_are_carried_through(reduction: str) -> None:
    var = torch.tensor([float("nan"), float("inf"), 1.0])
    for dtype in DTYPES:
        rows = replicate(var.to(dtype), 4)
        result = reduce_statistics(torch.zeros_like(rows), rows, reduction)[1]
        assert result.isnan().tolist() == [True, False, False]
        assert result.isinf().tolist() == [False, True, False]


@pytest.mark.parametrize("equal", ["neither", "mean", "var"])
def test_each_word_is_what_it_says(equal: str) -> None:
    mean, var = torch.randn(5, 7), torch.rand(5, 7)
    if equal != "neither":
        {"mean": mean, "var": var}[equal][:] = 3
    wide_mean, wide_var = mean.double(), var.double()
    for reduction, expected in {
        "mean": (wide_mean.mean(0), wide_var.mean(0)),
        "select": (wide_mean[3], wide_var[3]),
        "pooled": (wide_mean.mean(0), wide_var.mean(0) + wide_mean.var(0, correction=0)),
    }.items():
        result = reduce_statistics(mean, var, reduction, 3)
        assert torch.equal(result[0], expected[0].float())
        assert torch.equal(result[1], expected[1].float())


def test_pooled_statistics_are_those_of_the_union_of_the_ranks() -> None:
    shares = torch.randn(4, 100, 3, dtype=torch.float64) * 2 + torch.arange(4)[:, None, None]
    mean, var = reduce_statistics(shares.mean(1), shares.var(1, correction=0), "pooled")
    union = shares.flatten(0, 1)
    torch.testing.assert_close(mean, union.mean(0))
    torch.testing.assert_close(var, union.var(0, correction=0))


def test_large_values_do_not_overflow() -> None:
    rows = torch.full((8, 2), 3e38)
    assert torch.equal(reduce_statistics(rows, rows)[0], rows[0])
    rows = torch.full((8, 2), 1e308, dtype=torch.float64)
    assert torch.equal(reduce_statistics(rows, rows)[1], rows[0])


@given(seed=st.integers(0, 2**31), ranks=st.integers(2, 64))
@settings(max_examples=50)
def test_mean_does_not_depend_on_the_order_of_the_ranks(seed: int, ranks: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(ranks, 32, generator=generator)
    order = torch.randperm(ranks, generator=generator)
    assert torch.equal(*(reduce_statistics(r, r.abs())[0] for r in (rows, rows[order])))


class _WithoutFloat64(TorchDispatchMode):
    """A device without it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.float64 not in (kwargs or {}).values()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("reduction", ["mean", "select", "pooled"])
@pytest.mark.parametrize("reduce", [reduce_statistics, evaluation_statistics])
def test_devices_that_may_lack_float64_reduce_without_it(
    reduce: Any, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeTensorMode():
        assert replicas.wide_dtype(torch.empty(3, device="xpu")) == torch.float32
    rows = torch.randn(4, 3), torch.rand(4, 3)
    expected = reduce(*rows, reduction, 1)
    monkeypatch.setattr(replicas, "_WITH_FLOAT64", ())
    with _WithoutFloat64():
        found = reduce(*rows, reduction, 1)
    torch.testing.assert_close(found, expected)


def test_counter_is_the_selected_one_else_the_largest() -> None:
    counts = torch.tensor([3, 7, 5])
    assert reduce_count(counts, "select", 2) == 5
    assert reduce_count(counts, "mean") == reduce_count(counts, "pooled") == 7
    for dtype in (torch.uint16, torch.uint64, torch.float8_e5m2):  # torch has no maximum of these
        assert reduce_count(counts.to(dtype), "mean").item() == counts.to(dtype)[1].item()
        assert reduce_count(counts.to(dtype).view(3, 1), "mean").shape == (1,)


def test_replicas_are_contiguous_and_have_memory_of_their_own() -> None:
    source = torch.randn(6)[::2]
    rows = replicate(source, 4)
    assert rows.is_contiguous()
    rows[0].fill_(9)
    assert torch.equal(rows[3], source)
    assert not (source == 9).any()


@pytest.mark.parametrize(
    ("reduction", "rank", "match"),
    [
        ("average", 0, "reduction must be one of 'mean', 'select', 'pooled', but got 'average'"),
        ("select", 4, r"rank must be an int from 0 to 3 \(there are 4 ranks\), but got 4"),
        ("select", -1, "rank must be an int from 0 to 3"),
        ("select", 1.0, "but got 1.0"),
        ("select", True, "but got True"),
    ],
)
def test_unknown_reductions_and_ranks_are_refused(reduction: str, rank: Any, match: str) -> None:
    rows = torch.ones(4, 3)
    with pytest.raises(ConfigurationError, match=match):
        reduce_statistics(rows, rows, reduction, rank)
    with pytest.raises(ConfigurationError, match=match):
        reduce_count(torch.ones(4, dtype=torch.long), reduction, rank)
