"""The CPU backend: one C++ kernel for each direction and dtype, compiled on first use.

Statistics are two-pass or shifted sums over chunks that depend on the shape alone, so the
result has the same bits with any number of threads. The files: ``batch_norm.cpp`` (the
operators), ``rows.h`` and ``columns.h`` with ``grid.h`` (the two memory layouts), ``statistics.h``,
``schedule.h``, ``simd.h``; :mod:`.build` compiles them.

No shape is left to others: over ResNet-50's shapes and over small ones (V = 8, float32)
``scripts/bench.py`` has this kernel at 0.4 to 1.1 times BatchNorm's time on average, plain torch
operations at 3.8 to 5.9, and :mod:`..native` between them. Within it, constants choose by shape:
``kFewPositions`` the layout's code, ``kSerialSize`` one thread, ``kStreamBytes`` stores past the
caches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .. import reference
from ..layout import arrange
from .build import VALUES, load

__all__ = ["backward", "forward", "supports"]


def supports(input: Tensor) -> bool:
    """Say whether this backend takes ``input``; the first call for a dtype compiles."""
    return (
        input.is_cpu
        and input.dtype in VALUES
        and input.layout is torch.strided
        and input.numel() > 0
        and load(input.dtype) is not None
    )


def forward(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    vt_world_size: int,
    interleaved: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`distbn_convert.kernels.reference.forward`."""
    operators = load(input.dtype)
    assert operators is not None, "supports() has found them"
    x, channels_last = arrange(input)
    output = torch.empty_like(x)
    dtype = reference.accumulate_dtype(input.dtype)
    mean = input.new_empty(vt_world_size, input.shape[1], dtype=dtype)
    rstd = torch.empty_like(mean)
    tracked = running_mean is not None and running_var is not None
    operators.forward(
        output,
        mean,
        rstd,
        x,
        weight,
        bias,
        running_mean if tracked else None,
        running_var if tracked else None,
        num_batches_tracked,
        momentum is None,
        0.0 if momentum is None else momentum,
        eps,
        interleaved,
        channels_last,
    )
    written = (running_mean, running_var, num_batches_tracked)
    increment_version([tensor for tensor in written if tensor is not None])
    output = reference.as_input(output, input)
    if residual is not None:
        output.add_(residual)
    if relu:
        output.relu_()
    return output, mean, rstd


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    vt_world_size: int,
    interleaved: bool,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See :func:`distbn_convert.kernels.reference.backward`."""
    operators = load(input.dtype)
    assert operators is not None, "supports() has found them"
    x, channels_last = arrange(input)
    if relu:
        grad_output = reference.mask(
            grad_output, input, weight, bias, output, mean, rstd, interleaved
        )
    if grad_output.stride() != x.stride() or grad_output.dtype != x.dtype:
        grad_output = torch.empty_like(x).copy_(grad_output)
    grad_input = torch.empty_like(x)
    grad_weight = mean.new_empty(mean.shape[1])
    grad_bias = torch.empty_like(grad_weight)
    operators.backward(
        grad_input,
        grad_weight,
        grad_bias,
        grad_output,
        x,
        weight,
        mean,
        rstd,
        interleaved,
        channels_last,
    )
    grad_residual = None
    if relu and output is not None:
        grad_residual = reference.as_input(grad_output, input)
    return reference.as_input(grad_input, input), grad_weight, grad_bias, grad_residual
