"""Backends of one operation, with one signature; see :mod:`.reference`, the definition.

A backend is a module with ``supports``, ``forward`` and ``backward``. To add one, write
the module and name it in ``_BACKENDS``; nothing above this folder changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import cpu, gpu, native, reference

__all__ = ["Backend", "has_kernel", "keeps_output", "select_backend"]


class Backend(Protocol):
    """What a backend provides; arguments and results as in :mod:`.reference`."""

    def supports(self, input: Tensor) -> bool:
        """Say whether this backend takes ``input``."""

    def forward(
        self,
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
        """Normalise, add, activate; update the running statistics in place."""

    def backward(
        self,
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
        """Return the gradients of input, weight, bias and residual."""


_BACKENDS: tuple[Backend, ...] = (cpu, gpu, native, reference)


def select_backend(input: Tensor) -> Backend:
    """Return the first backend that takes ``input``; :mod:`.reference` takes everything."""
    for backend in _BACKENDS:
        if backend.supports(input):
            return backend
    raise AssertionError("the reference takes everything")


class _Probe(NamedTuple):
    """What a backend asks of an input, without its memory."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.layout = torch.strided

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def numel(self) -> int:
        return 1


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether tensors like these have a kernel of this package.

    ``torch.compile`` asks while it traces, and keeps the answer.
    """
    probe: Any = _Probe(device, dtype)
    return select_backend(probe) not in (native, reference)


# What torch.compiler.assume_constant_result does, which would import the whole compiler.
has_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def keeps_output(input: Tensor, residual: Tensor | None, relu: bool) -> bool:
    """Say whether the backward is given the output to know where the ReLU was active.

    It costs the GPU kernels a read, and without a residual they can tell from the input, which
    they read anyway. Elsewhere a pass that computes costs more than one that reads.
    """
    if not relu or residual is not None or not input.is_cuda:
        return relu
    return not has_kernel(input.device, input.dtype)
