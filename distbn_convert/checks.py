"""What the operation refuses, before it changes anything."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigurationError, InputError
from .kernels.partition import PARTITIONS, holds, share_sizes

__all__ = [
    "IMPLEMENTATIONS",
    "check_activation",
    "check_count",
    "check_impl",
    "check_numbers",
    "check_partition",
    "check_residual",
    "check_statistics",
    "check_tensors",
    "check_values",
]

IMPLEMENTATIONS = ("auto", "op", "decomposed")

# Dtype of the input -> those of weight, bias and running statistics, as torch's batch norm has it.
_COMPANION_DTYPES = {
    torch.float16: (torch.float16, torch.float32),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}


# What is counted -> what to give.
_COUNTS = {
    "accumulation_steps": "give the number of micro-steps in one step of the optimizer, else 1",
    "batch_size": "give the samples of one virtual rank, not of the whole batch",
    "num_replicas": "give the number of processes, or leave it out",
    "vt_world_size": "give the number of GPUs to stand for, for example 8",
}


def check_count(count: int, name: str = "vt_world_size") -> None:
    """Raise ConfigurationError unless ``count`` is a positive int."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigurationError(
            f"{name} must be a positive int, but got {count!r}; {_COUNTS[name]}."
        )


def check_partition(partition: str) -> None:
    """Raise ConfigurationError unless ``partition`` is a known word."""
    if partition not in PARTITIONS:
        raise ConfigurationError(
            f"partition must be one of {', '.join(map(repr, PARTITIONS))}, but got {partition!r}; "
            "use 'interleaved' for batches in DistributedSampler's order, else 'contiguous'."
        )


def check_activation(activation: str | None) -> None:
    """Raise ConfigurationError unless ``activation`` is one that can be fused."""
    if activation is not None and activation != "relu":
        raise ConfigurationError(
            f"activation must be 'relu' or None, but got {activation!r}; "
            "leave it None and apply the activation to the result."
        )


def check_impl(impl: str) -> None:
    """Raise ConfigurationError unless ``impl`` is a known word."""
    if impl not in IMPLEMENTATIONS:
        raise ConfigurationError(
            f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, but got {impl!r}; "
            "leave it 'auto'."
        )


def check_numbers(momentum: Any, eps: float) -> float | None:
    """Raise ConfigurationError unless the layer can train with these; return the momentum.

    That may be of any kind of number that torch's batch norm takes: NumPy's, a tensor's.
    """
    if eps <= 0:
        raise ConfigurationError(
            f"batch_norm eps must be positive during training, but got {eps}; "
            "use a small positive number, for example 1e-5."
        )
    if momentum is None or isinstance(momentum, (int, float)):
        return momentum
    if isinstance(momentum, Real) or (isinstance(momentum, Tensor) and momentum.numel() == 1):
        return float(momentum)
    raise ConfigurationError(
        f"momentum must be a number or None, but got {momentum!r}; use for example 0.1."
    )


def check_statistics(
    momentum: float | None, mean: Tensor | None, var: Tensor | None, count: Tensor | None
) -> None:
    """Raise ConfigurationError unless the running statistics are complete."""
    if (mean is None) != (var is None):
        given = "running_mean" if var is None else "running_var"
        raise ConfigurationError(
            f"running_mean and running_var must both be given or both be None, but got {given} "
            "alone; pass the other one too."
        )
    if momentum is None and mean is not None and count is None:
        raise ConfigurationError(
            "momentum=None (cumulative average) needs num_batches_tracked, but got None; "
            "pass the counters or give a momentum such as 0.1."
        )


def check_tensors(input: Tensor, vt_world_size: int, **others: Tensor | None) -> None:
    """Refuse an input or a companion of it with a wrong shape, dtype or device."""
    if input.dim() < 2:
        raise InputError(
            f"expected an input of at least 2 dimensions [N, C, ...], but got {input.dim()}; "
            "add the batch dimension."
        )
    if input.dtype not in _COMPANION_DTYPES:
        raise InputError(
            f"expected an input of float16, bfloat16, float32 or float64, but got {input.dtype}; "
            "convert it, for example with .float()."
        )
    channels, device = input.shape[1], input.device
    dtypes = _COMPANION_DTYPES[input.dtype]
    vector, rows = (channels,), (vt_world_size, channels)
    for name, tensor in others.items():
        if tensor is None:
            continue
        shape, allowed = vector if name in ("weight", "bias") else rows, dtypes
        if name == "num_batches_tracked":
            shape, allowed = (vt_world_size,), (torch.int64,)
        if tensor.dtype not in allowed:
            raise InputError(
                f"expected {name} of {' or '.join(map(str, allowed))} for an input of "
                f"{input.dtype}, but got {tensor.dtype}; convert the input or the layer."
            )
        if tensor.shape != shape:
            raise InputError(
                f"expected {name} of shape {shape} for an input with {channels} channels over "
                f"{vt_world_size} virtual ranks, but got {tuple(tensor.shape)}; check the channels "
                f"(dimension 1) of the input, which has shape {tuple(input.shape)}, and the ranks."
            )
        if tensor.device != device:
            raise InputError(
                f"expected {name} on {device} like the input, but it is on {tensor.device}; "
                "move one of them."
            )


def check_residual(residual: Tensor, input: Tensor) -> None:
    """Refuse a residual that is not like the input in shape, dtype and device."""
    for what in ("shape", "dtype", "device"):
        expected, given = getattr(input, what), getattr(residual, what)
        if given != expected:
            values = [tuple(value) if what == "shape" else value for value in (expected, given)]
            remedy = "expand or reshape it" if what == "shape" else "convert it with residual.to()"
            raise InputError(
                f"expected a residual with the {what} of the input, {values[0]}, but got "
                f"{values[1]}; {remedy}, or add it to the result yourself."
            )


def check_values(input: Tensor, vt_world_size: int) -> None:
    """Refuse a share with one value per channel: it has no variance."""
    samples = input.shape[0]
    # Size.numel() would make a number of a size that an export leaves open.
    if not holds(math.prod(input.shape[2:]) == 1) or not holds(samples < 2 * vt_world_size):
        return
    if samples == 0:
        return
    rank = share_sizes(samples, vt_world_size).index(1)
    raise InputError(
        "expected more than 1 value per channel on every virtual rank when training, but got a "
        f"batch of N={samples} over V={vt_world_size} ranks, so that rank {rank} has one sample "
        f"of one position (input size {tuple(input.shape)}); give at least {2 * vt_world_size} "
        "samples, lower vt_world_size, or drop the last incomplete batch."
    )
