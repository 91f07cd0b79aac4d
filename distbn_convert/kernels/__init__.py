"""Backends of one operation, with one signature; see :mod:`.reference`, the definition.

A backend is a module with ``supports``, ``forward`` and ``backward``. To add one, write
the module and name it in ``_BACKENDS``; nothing above this folder changes.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from . import cpu, gpu, reference

__all__ = ["Backend", "keeps_output", "select_backend"]


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


_BACKENDS: tuple[Backend, ...] = (cpu, gpu, reference)


def select_backend(input: Tensor) -> Backend:
    """Return the first backend that takes ``input``; :mod:`.reference` takes everything."""
    for backend in _BACKENDS:
        if backend.supports(input):
            return backend
    raise AssertionError("the reference takes everything")


def keeps_output(input: Tensor, residual: Tensor | None, relu: bool) -> bool:
    """Say whether the backward is given the output to know where the ReLU was active.

    On a GPU it costs a read, and without a residual the kernels can tell from the input, which
    they read anyway. Elsewhere a pass that computes costs more than one that reads.
    """
    return relu and (residual is not None or not input.is_cuda)
