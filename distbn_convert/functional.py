"""The operation behind every layer: batch norm with the statistics of virtual ranks.

Two operators, ``distbn_convert::batch_norm`` and ``distbn_convert::batch_norm_backward``,
hand their tensors to a backend of :mod:`distbn_convert.kernels`; an autograd function joins
them. The operators are opaque to ``torch.compile``, which keeps ``fullgraph=True``; it can be
given the reference's plain operations instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import (
    check_activation,
    check_impl,
    check_numbers,
    check_partition,
    check_residual,
    check_statistics,
    check_tensors,
    check_values,
    check_vt_world_size,
)
from .errors import ConfigurationError
from .kernels import has_kernel, keeps_output, reference, select_backend

__all__ = ["dist_batch_norm"]

_LIBRARY = torch.library.Library("distbn_convert", "DEF")
_LIBRARY.define(
    "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var,"
    " Tensor(c!)? num_batches_tracked,"
    " float? momentum, float eps, int vt_world_size, bool interleaved, bool relu)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias,"
    " Tensor? output, Tensor mean, Tensor rstd, int vt_world_size, bool interleaved, bool relu)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _batch_norm(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return select_backend(input).forward(input, *args)


def _batch_norm_backward(
    grad_output: Tensor, input: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return select_backend(input).backward(grad_output, input, *args)


def _batch_norm_backward_operator(
    grad_output: Tensor, input: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator cannot return None; 0 elements stand for it."""
    dx, dw, db, grad_residual = _batch_norm_backward(grad_output, input, *args)
    return dx, dw, db, input.new_empty((0,)) if grad_residual is None else grad_residual


_LIBRARY.impl("batch_norm", _batch_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("batch_norm_backward", _batch_norm_backward_operator, "CompositeExplicitAutograd")


def _batch_norm_fake(
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
    moments = input.new_empty(
        (vt_world_size, input.shape[1]), dtype=reference.accumulate_dtype(input.dtype)
    )
    return torch.empty_like(input), moments, torch.empty_like(moments)


def _batch_norm_backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked = relu and output is not None
    grad_residual = torch.empty_like(input) if masked else input.new_empty((0,))
    sums = mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1])
    return torch.empty_like(input), *sums, grad_residual


torch.library.register_fake("distbn_convert::batch_norm", _batch_norm_fake, lib=_LIBRARY)
torch.library.register_fake(
    "distbn_convert::batch_norm_backward", _batch_norm_backward_fake, lib=_LIBRARY
)

_FORWARD = torch.ops.distbn_convert.batch_norm.default
_BACKWARD = torch.ops.distbn_convert.batch_norm_backward.default


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether a mode, a transform, a tracer or a kind of tensor must see the operators.

    Where none does, the backend is called directly: the dispatcher and the way back into
    Python cost as much as a small layer.
    """
    for tensor in tensors:  # a loop, as any() would take longer than all else here
        if type(tensor) not in _PLAIN_TYPES:
            return True
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


# input, weight, bias, output, mean, rstd; what the backward does not need is None.
_Saved = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    output: Tensor,
    mean: Tensor,
    rstd: Tensor,
    forward_mode: bool = True,
) -> None:
    input, weight, bias, residual = inputs[:4]
    eps, vt_world_size, interleaved, relu = inputs[8:]
    saved: _Saved = input, weight, None, None, mean, rstd
    if relu:
        kept = output if keeps_output(input, residual, relu) else None
        saved = input, weight, bias if kept is None else None, kept, mean, rstd
    ctx.save_for_backward(*saved)
    if forward_mode:
        ctx.save_for_forward(*saved)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.settings = eps, vt_world_size, interleaved, relu


def _differentiate(
    ctx: Any, grad_output: Tensor, compiling: bool, decomposed: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight, bias and residual."""
    saved: _Saved = ctx.saved_tensors
    weight = saved[1]
    eps, *settings = ctx.settings
    grads: tuple[Any, ...]
    if not compiling and torch.is_grad_enabled():
        grads = _differentiable_gradients(grad_output, saved, eps, *settings)
    elif decomposed:
        grads = reference.backward(grad_output, *saved, *settings)
    elif (
        compiling
        or _is_watched(grad_output, saved[0], weight)
        or not torch._C._has_storage(grad_output)
    ):
        # Without memory of its own it is a batch of gradients, which is a Tensor to Python.
        grads = _BACKWARD(grad_output, *saved, *settings)
    else:
        grads = _batch_norm_backward(grad_output, *saved, *settings)
    grad_weight = None if weight is None else _as(grads[1], weight.dtype)
    grad_bias = None if ctx.bias_dtype is None else _as(grads[2], ctx.bias_dtype)
    grad_residual = None
    if ctx.has_residual:
        grad_residual = grads[3] if settings[2] else grad_output
    return grads[0], grad_weight, grad_bias, grad_residual


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # the call costs ten times this


def _differentiable_gradients(
    grad_output: Tensor,
    saved: _Saved,
    eps: float,
    vt_world_size: int,
    interleaved: bool,
    relu: bool,
) -> tuple[Tensor, ...]:
    """Gradients for ``create_graph=True``: to autograd the saved moments are constants."""
    input, weight, *_, mean, _ = saved
    if relu:
        grad_output = reference.mask(grad_output, *saved, interleaved)
    mean, var = reference.statistics(input.to(mean.dtype), vt_world_size, interleaved)
    grads = reference.gradients(
        grad_output, input, weight, mean, torch.rsqrt(var + eps), vt_world_size, interleaved
    )
    return grads[0].to(input.dtype), *grads[1:], grad_output


def _push_forward(ctx: Any, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """Differentiate in forward mode; the Jacobian for the input is a symmetric matrix."""
    saved: _Saved = ctx.saved_tensors
    input, weight, *_, mean, rstd = saved
    _, *partition, relu = ctx.settings
    channels = (-1,) + (1,) * (input.dim() - 2)
    result = torch.zeros_like(input, dtype=mean.dtype)
    if tangents[0] is not None:
        result = reference.gradients(tangents[0], input, weight, mean, rstd, *partition)[0]
    if tangents[1] is not None:
        normalized = reference.normalize(input.to(mean.dtype), mean, rstd, partition[1])
        result = result + normalized * tangents[1].to(mean.dtype).reshape(channels)
    if tangents[2] is not None:
        result = result + tangents[2].to(mean.dtype).reshape(channels)
    if tangents[3] is not None:
        result = result + tangents[3].to(mean.dtype)
    result = result.to(input.dtype)
    return reference.mask(result, *saved, partition[1]) if relu else result


class _BatchNorm(torch.autograd.Function):
    """The eager path; a third of the overhead of the ``setup_context`` form.

    What takes no gradient comes in one tuple, since each argument costs.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = (*arguments[:4], *arguments[4])
        function = _FORWARD if _is_watched(*inputs[:7]) else _batch_norm
        output, mean, rstd = function(*inputs)
        # Outside of dual_level() no tensor has a tangent, and saving for one costs.
        _save(ctx, inputs, output, mean, rstd, forward_ad._current_level >= 0)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, grad_output, False), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _push_forward(ctx, tangents)


class _TracedBatchNorm(torch.autograd.Function):
    """The same with ``setup_context``, for ``torch.compile``, which takes no ``jvp``."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _FORWARD(*inputs)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        return *_differentiate(ctx, grad_outputs[0], compiling), *(None,) * 8


class _DecomposedBatchNorm(_TracedBatchNorm):
    """The same in plain operations, for a compiler that fuses them with what comes after."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return reference.forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        return *_differentiate(ctx, grad_outputs[0], compiling, True), *(None,) * 8


class _FunctorchBatchNorm(_TracedBatchNorm):
    """The same under ``torch.func``, with rules for forward mode and vmap."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, None]:
        return _push_forward(ctx, tangents), None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int, int]]:
        shared_rows = inputs[4] is not None and in_dims[4] is None
        if shared_rows and in_dims[0] is not None:
            raise ConfigurationError(
                "vmap was given a batched input but running statistics that are not batched and "
                "would be written in place; map over the buffers too, or pass "
                "running_mean=None and running_var=None."
            )
        results = []
        for index in range(info.batch_size):
            arguments = [
                value if dim is None else value.select(dim, index)
                for value, dim in zip(inputs, in_dims, strict=True)
            ]
            if shared_rows and index:  # one batch updates the rows once
                arguments[4:7] = None, None, None
            results.append(_FunctorchBatchNorm.apply(*arguments))
        output, mean, rstd = (torch.stack(column) for column in zip(*results, strict=True))
        return (output, mean, rstd), (0, 0, 0)


def _is_exporting() -> bool:
    """Say whether :func:`torch.export.export` traces; torch 2.6 cannot tell."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _decomposes(impl: str, input: Tensor) -> bool:
    """Say whether a compiler is given plain operations, and not the operator."""
    return impl == "decomposed" or (impl == "auto" and not has_kernel(input.device, input.dtype))


def dist_batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    vt_world_size: int,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    partition: str = "contiguous",
    activation: str | None = None,
    residual: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Normalise each virtual rank's share of a batch with that share's own statistics.

    .. math::

        y = \mathrm{activation}\left(
            \frac{x - \mu_v}{\sqrt{\sigma_v^2 + \epsilon}} \gamma + \beta + \mathrm{residual}\right)

    where :math:`\mu_v` and the biased :math:`\sigma_v^2` are those of the samples of rank
    :math:`v` alone: nothing is synchronised between the ranks. This is the training
    computation; in evaluation a layer is a plain :func:`torch.nn.functional.batch_norm`.
    See :class:`~distbn_convert.DistBatchNorm2d`.

    Args:
        input: ``Tensor[N, C, *]``, float16, bfloat16, float32 or float64.
        running_mean: ``Tensor[V, C]``, updated in place. Default: None
        running_var: ``Tensor[V, C]``, updated in place with the unbiased variances. Default: None
        weight: ``Tensor[C]``, :math:`\gamma`. Default: None, ones
        bias: ``Tensor[C]``, :math:`\beta`. Default: None, zeros
        num_batches_tracked: ``int64 Tensor[V]``, incremented in place for each rank that has
            samples. Default: None
        vt_world_size: number of virtual ranks ``V``.
        momentum: weight of the new batch in the running statistics; None for the cumulative
            average, which needs ``num_batches_tracked``. Default: 0.1
        eps: added to the variance. Default: 1e-5
        partition: ``"contiguous"`` (rank v takes block v of the batch) or ``"interleaved"``
            (sample p belongs to rank p mod V). Shares differ by at most one sample.
            Default: ``"contiguous"``
        activation: ``"relu"``, taken last, or None. One pass over memory with the normalisation
            where the backend can, forward and backward. Default: None
        residual: ``Tensor[N, C, *]``, added before the activation; shape, dtype and device of
            ``input`` (autocast casts neither, as with torch's batch norm). Default: None
        impl: ``"op"`` computes with the kernels, which ``torch.compile`` cannot look into;
            ``"decomposed"`` with plain torch operations, which it can fuse with what comes after;
            ``"auto"`` with the kernels where there are some for the input's device and dtype, and
            under ``torch.compile`` with plain operations elsewhere, under ``torch.export`` (which
            keeps no gradient of the kernels) with them always. Default: ``"auto"``

    Returns:
        ``Tensor[N, C, *]`` with the dtype and memory format of ``input``. Statistics are
        computed in float32, for float64 input in float64.

    Raises:
        ConfigurationError: ``vt_world_size``, ``momentum``, ``eps``, ``partition``,
            ``activation`` or ``impl`` is not allowed.
        InputError: a shape, dtype or device is wrong (weight, bias and statistics have the dtype
            of the input, or float32 for a float16 or bfloat16 input; residual is like the input),
            or a rank has a single value per channel.

    Note:
        A rank with no samples (N < V) keeps its statistics and its counter. An empty batch
        changes no statistics and is counted, as torch's batch norm does.

    Example::

        >>> x = torch.randn(16, 3, 8, 8)
        >>> mean, var = torch.zeros(8, 3), torch.ones(8, 3)
        >>> dist_batch_norm(x, mean, var, vt_world_size=8).shape
        torch.Size([16, 3, 8, 8])

    References:
        Ioffe and Szegedy, "Batch Normalization", 2015; Hoffer, Hubara and Soudry, "Train
        longer, generalize better", 2017 (ghost batch norm).
    """
    check_vt_world_size(vt_world_size)
    check_partition(partition)
    check_activation(activation)
    check_impl(impl)
    check_numbers(momentum, eps)
    check_statistics(momentum, running_mean, running_var, num_batches_tracked)
    check_tensors(
        input,
        vt_world_size,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
        weight=weight,
        bias=bias,
    )
    if residual is not None:
        check_residual(residual, input)
    check_values(input, vt_world_size)
    rest = (
        running_mean,
        running_var,
        num_batches_tracked,
        momentum,
        eps,
        vt_world_size,
        partition == "interleaved",
        activation is not None,
    )
    if impl != "op" and _is_exporting():
        # An exported program keeps no autograd function, and is differentiated as it stands.
        return reference.forward(input, weight, bias, residual, *rest)[0]
    if torch.compiler.is_compiling():
        function = _DecomposedBatchNorm if _decomposes(impl, input) else _TracedBatchNorm
        return function.apply(input, weight, bias, residual, *rest)[0]  # type: ignore[no-any-return]
    if impl == "decomposed":
        return reference.forward(input, weight, bias, residual, *rest)[0]
    if torch._C._are_functorch_transforms_active():
        return _FunctorchBatchNorm.apply(input, weight, bias, residual, *rest)[0]  # type: ignore[no-any-return]
    return _BatchNorm.apply(input, weight, bias, residual, rest)  # type: ignore[no-any-return]
