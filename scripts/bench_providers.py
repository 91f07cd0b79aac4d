"""What bench.py compares: shapes, and the ways people normalise by virtual ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distbn_convert import DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d

_RESNET50 = [
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7)),
]
_MOBILENET_V2 = [
    *((32, 112), (16, 112), (96, 112), (96, 56), (24, 56), (144, 56), (144, 28), (32, 28)),
    *((192, 28), (192, 14), (64, 14), (384, 14), (96, 14), (576, 14), (576, 7), (160, 7)),
    *((960, 7), (320, 7), (1280, 7)),
]
# The shape of a sample, or with the batch size where that matters.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "resnet50": [(c, s, s) for c, s in _RESNET50],
    "mobilenet_v2": [(c, s, s) for c, s in _MOBILENET_V2],
    "1d": [(128,), (1024,), (8192,), (64, 1000), (256, 128), (512, 16)],
    "3d": [(32, 8, 28, 28), (64, 8, 14, 14), (256, 4, 7, 7)],
    # Below 100,000 values with a batch of 64: what a call costs, not what it moves.
    "small": [(64,), (128,), (512,), (1024,), (24, 7, 7), (96, 4, 4), (256, 2, 2), (3, 16, 16)],
}
_PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
_DIST = {1: DistBatchNorm1d, 2: DistBatchNorm1d, 3: DistBatchNorm2d, 4: DistBatchNorm3d}


@dataclass(frozen=True)
class Case:
    """One row of the comparison: a shape [N, C, *], its memory layout, its dtype, V ranks."""

    set: str
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    ranks: int
    device: str

    def tensor(self) -> Tensor:
        values = torch.randn(self.shape, device=self.device, dtype=self.dtype)
        if self.layout == "channels_last":
            values = values.movedim(1, -1).contiguous().movedim(-1, 1)
        return values

    @property
    def per_rank(self) -> int:
        return self.shape[0] // self.ranks

    def is_possible(self) -> bool:
        """Whether each rank gets the same number of samples, and more than one value."""
        even = self.shape[0] % self.ranks == 0
        return even and self.per_rank * math.prod(self.shape[2:]) > 1


class _Ranks(nn.Module):
    """Parameters and rows of statistics for the ways written by hand."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        channels, settings = case.shape[1], {"device": case.device}
        self.case = case
        self.weight = nn.Parameter(torch.ones(channels, **settings))
        self.bias = nn.Parameter(torch.zeros(channels, **settings))
        self.register_buffer("running_mean", torch.zeros(case.ranks, channels, **settings))
        self.register_buffer("running_var", torch.ones(case.ranks, channels, **settings))


class Loop(_Ranks):
    """A batch norm for each share, then torch.cat."""

    def forward(self, input: Tensor) -> Tensor:
        shares = [
            F.batch_norm(share, mean, var, self.weight, self.bias, training=True)
            for share, mean, var in zip(
                input.chunk(self.case.ranks), self.running_mean, self.running_var, strict=True
            )
        ]
        return torch.cat(shares)


class View(_Ranks):
    """The interleaved trick: V * C channels of N / V samples, in one batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        case = self.case
        output = F.batch_norm(
            input.reshape(case.per_rank, case.ranks * case.shape[1], *case.shape[2:]),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.repeat(case.ranks),
            self.bias.repeat(case.ranks),
            training=True,
        )
        return output.reshape(case.shape)


class Decomposition(_Ranks):
    """Means, variances and arithmetic, for torch.compile to fuse."""

    def forward(self, input: Tensor) -> Tensor:
        case = self.case
        x = input.reshape(case.ranks, case.per_rank, *case.shape[1:]).float()
        dims = (1, *range(3, x.dim()))
        var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        affine = (-1, *(1,) * (x.dim() - 3))
        normalized = (x - mean) * torch.rsqrt(var + 1e-5)
        output = normalized * self.weight.view(affine) + self.bias.view(affine)
        with torch.no_grad():
            values = x.numel() // case.ranks // case.shape[1]
            unbiased = var.flatten(1) * (values / (values - 1))
            self.running_mean.lerp_(mean.flatten(1), 0.1)
            self.running_var.lerp_(unbiased, 0.1)
        return output.to(input.dtype).reshape(case.shape)


class Clone(nn.Module):
    """The floor: allocates and writes what batch norm must, and computes nothing."""

    def forward(self, input: Tensor) -> Tensor:
        return input.clone()


def _compiled(case: Case) -> Any:
    torch.compiler.reset()
    return torch.compile(Decomposition(case), fullgraph=True, dynamic=False)


# Each makes a module for a case.
PROVIDERS: dict[str, Callable[[Case], Any]] = {
    "plain": lambda case: _PLAIN[len(case.shape) - 1](case.shape[1], device=case.device),
    "loop": Loop,
    "view": View,
    "compile": _compiled,
    "ours": lambda case: _DIST[len(case.shape) - 1](
        case.shape[1], vt_world_size=case.ranks, device=case.device
    ),
    "clone": lambda case: Clone(),
}


def check(case: Case) -> str | None:
    """Compare our results with the loop's in float64; say what is wrong."""
    ours, loop = PROVIDERS["ours"](case), Loop(case)
    input, upstream = case.tensor(), case.tensor()

    def run(module: Any, dtype: torch.dtype) -> list[Tensor]:
        module.to(torch.float64 if dtype == torch.float64 else torch.float32)
        leaf = input.to(dtype).requires_grad_()
        output = module(leaf)
        leaves = (leaf, module.weight, module.bias)
        gradients = torch.autograd.grad(output, leaves, upstream.to(dtype))
        return [output.detach(), module.running_mean, module.running_var, *gradients]

    names = ["output", "running_mean", "running_var", "dx", "dweight", "dbias"]
    results = run(ours, case.dtype), run(loop, case.dtype), run(Loop(case), torch.float64)
    for name, mine, peer, truth in zip(names, *results, strict=True):
        error, allowed = ((value.double() - truth).abs().max() for value in (mine, peer))
        # A mean near zero is as exact as the values (of unit variance, times the momentum) allow.
        scale = truth.abs().max().clamp(min=0.1)
        if not error <= 2 * allowed + 4 * torch.finfo(mine.dtype).eps * scale:
            return f"{name} of {case} is off by {error:.2g}, torch's own by {allowed:.2g}"
    return None
