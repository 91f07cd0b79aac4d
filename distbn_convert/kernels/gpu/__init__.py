"""The GPU backend: Triton kernels that read a rank's share from memory once where it fits.

A share is V times smaller than the batch, so that it fits in registers, or at least in L2,
where the whole batch's does not. See :mod:`.rule` for which kernel runs and :mod:`.tiles` for
what they share. Triton is imported at the first CUDA tensor.

``DISTBN_GPU_KERNEL=off`` in the environment switches them off: then CUDA tensors are
:mod:`..native`'s. So is ``float64``, and everything on a GPU that Triton's kernels were not
compiled for (compute capability below 8.0, or not NVIDIA's; ``DISTBN_GPU_KERNEL=on`` tries 7.5) or
where Triton cannot compile or launch them, see :mod:`.available`; an empty batch is
:mod:`..reference`'s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .available import SWITCH, runs_on, switch

__all__ = ["SWITCH", "backward", "forward", "supports"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(input: Tensor) -> bool:
    """Say whether this backend takes ``input``."""
    if not input.is_cuda or switch() == "off":
        return False
    return input.dtype in _DTYPES and runs_on(input.device)


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
    """Normalise, add, activate; update the statistics; see :func:`..reference.forward`."""
    if input.numel() == 0:
        return reference.forward(
            input,
            weight,
            bias,
            residual,
            running_mean,
            running_var,
            num_batches_tracked,
            momentum,
            eps,
            vt_world_size,
            interleaved,
            relu,
        )
    from . import launch

    running = None
    if running_mean is not None and running_var is not None:
        running = running_mean.contiguous(), running_var.contiguous()
    counts = num_batches_tracked
    counted = running is not None and momentum is not None  # by the kernel
    if counts is not None:
        if not counted:
            reference.count_batch(counts, input)
        counts = counts.contiguous()
    y, mean, rstd = launch.forward(
        input,
        _dense(weight),
        _dense(bias),
        residual,
        running,
        counts,
        momentum,
        eps,
        vt_world_size,
        interleaved,
        relu,
    )
    if running is not None:
        _written(running_mean, running[0])
        _written(running_var, running[1])
        if counted and counts is not None:
            _written(num_batches_tracked, counts)
    return reference.as_input(y, input), mean, rstd


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
    """Differentiate :func:`forward`; see :func:`..reference.backward`."""
    partition = vt_world_size, interleaved
    if input.numel() == 0:
        saved = weight, bias, output, mean, rstd
        return reference.backward(grad_output, input, *saved, *partition, relu)
    from . import launch

    affine, moments = (_dense(weight), _dense(bias)), (mean.contiguous(), rstd.contiguous())
    kept = output if relu else None
    dx, grad_bias, grad_weight, masked = launch.backward(
        grad_output, input, *affine, kept, *moments, *partition, relu
    )
    grad_residual = None if masked is None else reference.as_input(masked, input)
    return reference.as_input(dx, input), grad_weight, grad_bias, grad_residual


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _written(statistic: Tensor | None, rows: Tensor) -> None:
    """Bring what a kernel wrote into the buffer, and tell autograd that it has changed."""
    assert statistic is not None
    if rows.data_ptr() != statistic.data_ptr():
        statistic.copy_(rows)
    else:
        torch.autograd.graph.increment_version(statistic)
