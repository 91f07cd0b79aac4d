"""The definition of virtual-rank batch norm, in plain torch: any device, any dtype.

For rank ``v`` with the samples ``B_v`` and ``m = |B_v| * S`` values per channel

.. math::

    y = \\frac{x - \\mu_v}{\\sqrt{\\sigma_v^2 + \\epsilon}} \\gamma + \\beta, \\qquad
    \\mu_v = \\frac1m \\sum_{B_v} x, \\quad
    \\sigma_v^2 = \\frac1m \\sum_{B_v} (x - \\mu_v)^2

then, where asked for, the residual is added and the ReLU taken: ``relu(y + residual)``.
Every other backend has these signatures and is tested against this file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .partition import gather_ranks, scatter_ranks, share_of

__all__ = [
    "accumulate_dtype",
    "as_input",
    "backward",
    "count_batch",
    "forward",
    "gradients",
    "mask",
    "normalize",
    "statistics",
    "supports",
    "update_running",
]


def supports(input: Tensor) -> bool:
    """Say whether this backend takes ``input``: it takes everything."""
    return True


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the batch statistics: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _spread(ranks: Tensor, input: Tensor, interleaved: bool) -> Tensor:
    """Broadcast ``Tensor[V, C]`` against ``input``: ``Tensor[N, C, 1, ...]``."""
    samples = scatter_ranks(ranks, input.shape[0], interleaved)
    return samples.reshape(samples.shape + (1,) * (input.dim() - 2))


def _sum_positions(values: Tensor) -> Tensor:
    """Sum ``Tensor[N, C, *]`` over its spatial positions: ``Tensor[N, C]``."""
    return values.sum(tuple(range(2, values.dim()))) if values.dim() > 2 else values


def _share_counts(input: Tensor, vt_world_size: int, dtype: torch.dtype) -> Tensor:
    """Return the samples of each rank, at least 1 so that it can divide: ``Tensor[V, 1]``."""
    q, r = share_of(input.shape[0], vt_world_size)
    longer = torch.arange(vt_world_size, device=input.device)[:, None] < r
    return (longer.to(dtype) + q).clamp(min=1)


def statistics(input: Tensor, vt_world_size: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Compute each rank's mean and biased variance; differentiable.

    The moments of each sample are merged by the parallel formula of Chan, Golub and
    LeVeque (1979), so no large sum of squares is ever subtracted from another.

    Args:
        input: ``Tensor[N, C, *]`` in the accumulation dtype.
        vt_world_size: number of virtual ranks ``V``.
        interleaved: the partition.

    Returns:
        mean and variance, each ``Tensor[V, C]``; zeros for a rank with no samples.
    """
    if input.numel() == 0:
        moments = input.new_zeros((vt_world_size, input.shape[1]))
        return moments, moments.clone()
    counts = _share_counts(input, vt_world_size, input.dtype)
    if input.dim() > 2:
        spatial = tuple(range(2, input.dim()))
        var_n, mean_n = torch.var_mean(input, spatial, correction=0)  # [N, C]
    else:
        var_n, mean_n = torch.zeros_like(input), input
    mean = gather_ranks(mean_n, vt_world_size, interleaved).sum(1) / counts
    deviation = mean_n - scatter_ranks(mean, input.shape[0], interleaved)
    var = gather_ranks(var_n + deviation * deviation, vt_world_size, interleaved).sum(1) / counts
    return mean, var


def normalize(input: Tensor, mean: Tensor, rstd: Tensor, interleaved: bool) -> Tensor:
    """Return ``(input - mean) * rstd``, each sample with its rank's; differentiable."""
    return (input - _spread(mean, input, interleaved)) * _spread(rstd, input, interleaved)


def _affine(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    interleaved: bool,
) -> Tensor:
    """Normalise ``x``, which has the accumulation dtype, then scale and shift it."""
    scale = rstd if weight is None else rstd * weight.to(x.dtype)
    shift = torch.zeros_like(scale[0]) if bias is None else bias.to(x.dtype)
    return torch.addcmul(
        shift.reshape((-1,) + (1,) * (x.dim() - 2)),
        x - _spread(mean, x, interleaved),
        _spread(scale, x, interleaved),
    )


def count_batch(num_batches_tracked: Tensor, input: Tensor) -> None:
    """Increment the counter of each rank that has samples; an empty batch counts for all."""
    ranks = min(input.shape[0], len(num_batches_tracked)) or len(num_batches_tracked)
    # Slicing costs as much as adding.
    whole = ranks == len(num_batches_tracked)
    (num_batches_tracked if whole else num_batches_tracked[:ranks]).add_(1)


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
    """Normalise each rank's share and update its row of the running statistics in place.

    Args:
        input: ``Tensor[N, C, *]``.
        weight: ``Tensor[C]`` or None.
        bias: ``Tensor[C]`` or None.
        residual: ``Tensor[N, C, *]`` of the input's dtype, added to the result, or None.
        running_mean: ``Tensor[V, C]`` or None; written.
        running_var: ``Tensor[V, C]`` or None; written, with Bessel's correction.
        num_batches_tracked: ``int64 Tensor[V]`` or None; incremented first, for each rank that
            has samples (an empty batch counts for all); the average's weight if ``momentum`` is
            None.
        momentum: weight of the new batch; None for the cumulative average.
        eps: added to the variance.
        vt_world_size: number of virtual ranks ``V``.
        interleaved: the partition.
        relu: whether a ReLU comes last.

    Returns:
        output (shape, dtype and strides of ``input``), the batch mean and the reciprocal
        of its standard deviation, each ``Tensor[V, C]`` in the accumulation dtype.
    """
    dtype = accumulate_dtype(input.dtype)
    x = input.to(dtype)
    mean, var = statistics(x, vt_world_size, interleaved)
    rstd = torch.rsqrt(var + eps)
    if num_batches_tracked is not None:
        count_batch(num_batches_tracked, input)
    if running_mean is not None and running_var is not None and input.numel():
        values = _share_counts(input, vt_world_size, dtype) * math.prod(input.shape[2:])
        unbiased = var.detach() * (values / (values - 1).clamp(min=1))
        batch = mean.detach(), unbiased, min(input.shape[0], vt_world_size)
        update_running(running_mean, running_var, num_batches_tracked, momentum, *batch)

    output = _affine(x, weight, bias, mean, rstd, interleaved)
    if residual is not None:
        output = output + residual.to(dtype)
    if relu:
        output = torch.relu(output)
    return as_input(output, input), mean, rstd


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
    """Differentiate :func:`forward`.

    Args:
        grad_output: ``Tensor[N, C, *]``, gradient of the output.
        input: ``Tensor[N, C, *]``, as given to :func:`forward`.
        weight: ``Tensor[C]`` or None.
        bias: ``Tensor[C]`` or None; read only by :func:`mask`.
        output: ``Tensor[N, C, *]``, from :func:`forward`, or None; see :func:`mask`. Needed where
            there were both a residual and a ReLU.
        mean: ``Tensor[V, C]``, from :func:`forward`.
        rstd: ``Tensor[V, C]``, from :func:`forward`.
        vt_world_size: number of virtual ranks ``V``.
        interleaved: the partition.
        relu: whether a ReLU came last.

    Returns:
        gradients of input (shape, dtype and strides of ``input``), weight and bias
        (``Tensor[C]`` in the accumulation dtype, summed over the ranks), and residual: the masked
        ``grad_output``, with the strides of ``input``, if there was a ReLU and ``output`` is
        given, else None (without a ReLU it is ``grad_output`` itself).
    """
    grad_residual = None
    if relu:
        grad_output = mask(grad_output, input, weight, bias, output, mean, rstd, interleaved)
        if output is not None:
            grad_residual = as_input(grad_output, input)
    grad_input, grad_weight, grad_bias = gradients(
        grad_output, input, weight, mean, rstd, vt_world_size, interleaved
    )
    return as_input(grad_input, input), grad_weight, grad_bias, grad_residual


def mask(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    interleaved: bool,
) -> Tensor:
    """Take ``grad_output`` back through the ReLU: zero where the output was not above zero.

    Differentiable in ``grad_output``. An ``output`` of None, which is allowed where there was no
    residual, is computed again and rounded to the input's dtype as :func:`forward` rounds it.
    """
    with torch.no_grad():
        if output is None:
            affine = _affine(input.to(mean.dtype), weight, bias, mean, rstd, interleaved)
            output = affine.to(input.dtype)
    return torch.ops.aten.threshold_backward(grad_output, output.detach(), 0)  # type: ignore[no-any-return]


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    vt_world_size: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute :func:`backward` without a ReLU in the accumulation dtype; differentiable."""
    dy, x = grad_output.to(mean.dtype), input.to(mean.dtype)
    values = _share_counts(input, vt_world_size, mean.dtype) * math.prod(input.shape[2:])
    normalized = normalize(x, mean, rstd, interleaved)
    sum_dy = gather_ranks(_sum_positions(dy), vt_world_size, interleaved).sum(1)
    sum_dy_x = gather_ranks(_sum_positions(dy * normalized), vt_world_size, interleaved).sum(1)
    scale = rstd if weight is None else rstd * weight.to(mean.dtype)
    centred = dy - _spread(sum_dy / values, x, interleaved)
    orthogonal = torch.addcmul(centred, normalized, _spread(-sum_dy_x / values, x, interleaved))
    return orthogonal * _spread(scale, x, interleaved), sum_dy_x.sum(0), sum_dy.sum(0)


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    mean: Tensor,
    unbiased: Tensor,
    ranks: int,
) -> None:
    """Move the running statistics of the first ``ranks`` ranks towards those of a batch.

    Args:
        running_mean: ``Tensor[V, C]``; written.
        running_var: ``Tensor[V, C]``; written.
        num_batches_tracked: ``int64 Tensor[V]``, this batch counted; read if ``momentum`` is None.
        momentum: weight of the batch; None for the cumulative average.
        mean: ``Tensor[V, C]``, the batch's.
        unbiased: ``Tensor[V, C]``, the batch's variance with Bessel's correction.
        ranks: how many have samples.
    """
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    else:
        assert num_batches_tracked is not None  # functional.py has checked it
        factor = 1 / num_batches_tracked[:ranks].to(mean.dtype)[:, None]
    for running, batch in ((running_mean, mean), (running_var, unbiased)):
        rows = running[:ranks]
        rows.copy_(rows.to(batch.dtype) * (1 - factor) + batch[:ranks] * factor)


def as_input(values: Tensor, input: Tensor) -> Tensor:
    """Return ``values`` with the dtype of ``input`` and the strides of a tensor like it.

    Differentiable. Where it is compiled it is a copy, which costs nothing fused, with strides as
    the operations before left them: the compiler of torch 2.11 takes the gradient of a result
    that two operations return, as those in place do, to be zero, and that of torch 2.6 lets no
    backward ask for strides.
    """
    if torch.compiler.is_compiling():
        return values.to(input.dtype, copy=True)
    if values.dtype != input.dtype:
        values = values.to(input.dtype)
    if values.stride() == input.stride():
        return values
    like = torch.empty_like(input)
    return values if values.stride() == like.stride() else like.copy_(values)
