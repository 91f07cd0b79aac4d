from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distbn_convert.functional import dist_batch_norm

from .oracle import loop_batch_norm

PARTITIONS = ("contiguous", "interleaved")
SHAPES = [(12, 5), (12, 5, 7), (12, 5, 4, 3), (12, 5, 2, 3, 2), (14, 5, 4, 3), (13, 5), (3, 5, 4)]


def make_case(
    shape: tuple[int, ...], ranks: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """Random input, weight and bias (leaves), running statistics, upstream gradient."""
    channels = shape[1]
    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    input = (torch.randn(shape, dtype=torch.float64) * 3 + 2).to(dtype).requires_grad_()
    weight = torch.rand(channels, dtype=statistics_dtype).requires_grad_()
    bias = torch.randn(channels, dtype=statistics_dtype).requires_grad_()
    mean = torch.randn(ranks, channels, dtype=statistics_dtype)
    var = torch.rand(ranks, channels, dtype=statistics_dtype)
    return input, weight, bias, mean, var, torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("ranks", [1, 4, 6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop_of_batch_norms(shape: tuple[int, ...], ranks: int, partition: str) -> None:
    input, weight, bias, mean, var, upstream = make_case(shape, ranks)
    settings = {"vt_world_size": ranks, "partition": partition, "momentum": 0.3, "eps": 1e-3}
    mean_2, var_2 = mean.clone(), var.clone()
    ours = dist_batch_norm(input, mean, var, weight, bias, **settings)
    loop = loop_batch_norm(input, mean_2, var_2, weight, bias, **settings)
    torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, mean_2, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(var, var_2, rtol=1e-13, atol=1e-14)
    gradients = torch.autograd.grad(ours, (input, weight, bias), upstream)
    expected = torch.autograd.grad(loop, (input, weight, bias), upstream)
    torch.testing.assert_close(gradients, expected, rtol=1e-11, atol=1e-12)


def test_ranks_are_not_synchronised() -> None:
    input, *_ = make_case((8, 5, 4), 1)
    plain = F.batch_norm(input, None, None, training=True)
    assert (dist_batch_norm(input, vt_world_size=4) - plain).abs().max() > 0.1
