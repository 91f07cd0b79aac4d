"""A conv net, plain and converted, and its training step, for the tests under torch's tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distbn_convert import convert_model

RANKS = 4
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def make_plain(dtype: torch.dtype = torch.float64, momentum: float | None = 0.1) -> nn.Sequential:
    """A conv net whose parameters and statistics are not those of a fresh one."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6, eps=1e-3, momentum=momentum),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    ).to(dtype)
    with torch.no_grad():
        for norm in (net[1], net[4]):
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return net


def make_converted(
    dtype: torch.dtype = torch.float64, momentum: float | None = 0.1, **settings: Any
) -> nn.Module:
    """The same with ranks that differ, as they do after some training."""
    net = convert_model(make_plain(dtype, momentum), RANKS, **settings)
    for _ in range(2):
        net(make_batch(dtype=dtype))
    return net


def make_batch(samples: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(samples, 3, 8, 8, dtype=dtype) * 2 + 1


def norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def statistics(model: nn.Module) -> list[Tensor]:
    return [getattr(norm, name) for norm in norms(model) for name in STATISTICS]


def train_step(
    call: Callable[[Tensor], Tensor], model: nn.Module, input: Tensor, upstream: Tensor
) -> list[Tensor]:
    """Forward and backward of ``call``; output, then the gradients of input and parameters."""
    input = input.detach().requires_grad_()
    output = call(input)
    return [output.detach(), *torch.autograd.grad(output, [input, *model.parameters()], upstream)]


def assert_equal(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
