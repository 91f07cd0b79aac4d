"""The operators of the operation, and how autograd joins them.

``distbn_convert::batch_norm`` and ``distbn_convert::batch_norm_backward`` hand their tensors to a
backend of :mod:`distbn_convert.kernels`, and are opaque to ``torch.compile``.
``distbn_convert::batch_norm_decomposed`` falls into the reference's plain operations, its gradient
too. Of the autograd functions that join them, one is for eager mode, one for the first operator by
name (as compilers and exported programs call it) and for ``torch.func``, one for the third.

A compiler is given operators, and not these functions, since it takes much longer to look into
them and its caches refuse what holds them. The caches know an operator by name and arguments and
cannot see this code; so that no version of it is given what another left, a digest is an argument.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import __version__, kernels
from .errors import ConfigurationError
from .kernels import has_kernel, keeps_output, layout, partition, reference, select_backend
from .kernels.layout import in_torch_format
from .kernels.partition import is_exporting

__all__ = ["batch_norm"]

_LIBRARY = torch.library.Library("distbn_convert", "DEF")
_ARGUMENTS = (
    "(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked,"
    " float? momentum, float eps, int vt_world_size, bool interleaved, bool relu,"
    ' *, str code="") -> (Tensor, Tensor, Tensor)'
)
for _name in ("batch_norm", "batch_norm_decomposed"):
    _LIBRARY.define(_name + _ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias,"
    " Tensor? output, Tensor mean, Tensor rstd, int vt_world_size, bool interleaved, bool relu,"
    ' *, str code="") -> (Tensor, Tensor, Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag,),
)


_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _batch_norm(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return select_backend(input).forward(input, *args)


def _batch_norm_backward(
    grad_output: Tensor, input: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return select_backend(input).backward(grad_output, input, *args)


def _without_class(value: Any) -> Any:
    """Return a tensor without a class that only adds to torch's, as MONAI's MetaTensor does.

    Its methods may take other arguments than those that the backends call.
    """
    cls = type(value)
    if cls in _PLAIN_TYPES or not isinstance(value, Tensor):
        return value
    alone = cls.__torch_dispatch__ is not Tensor.__torch_dispatch__
    return value if alone else value.as_subclass(Tensor)


def _batch_norm_operator(*args: Any, code: str = "") -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(*map(_without_class, args))


def _batch_norm_backward_operator(
    *args: Any, code: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An operator cannot return None; 0 elements stand for it."""
    grad_output, *saved = map(_without_class, args)
    dx, dw, db, grad_residual = _batch_norm_backward(grad_output, *saved)
    return dx, dw, db, grad_output.new_empty((0,)) if grad_residual is None else grad_residual


_LIBRARY.impl("batch_norm", _batch_norm_operator, "CompositeExplicitAutograd")
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
    *,
    code: str = "",
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
    *,
    code: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked = relu and output is not None
    grad_residual = torch.empty_like(input) if masked else input.new_empty((0,))
    sums = mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1])
    return torch.empty_like(input), *sums, grad_residual


torch.library.register_fake("distbn_convert::batch_norm", _batch_norm_fake, lib=_LIBRARY)
torch.library.register_fake(
    "distbn_convert::batch_norm_backward", _batch_norm_backward_fake, lib=_LIBRARY
)

# With this one, the modules whose code makes the graphs of the operators.
_GRAPH_MODULES = kernels, reference, partition, layout


def _digest_code() -> str:
    """Return what tells the code that makes graphs from another version of it."""
    digest = hashlib.sha256(__version__.encode())  # alone where sources are not installed
    for names in (globals(), *map(vars, _GRAPH_MODULES)):
        lines = linecache.getlines(names.get("__file__") or "", names)
        digest.update("".join(lines).encode())
    return digest.hexdigest()[:16]


_Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]
_CODE = _digest_code()
_FORWARD: _Operator = partial(torch.ops.distbn_convert.batch_norm.default, code=_CODE)
_DECOMPOSED: _Operator = partial(torch.ops.distbn_convert.batch_norm_decomposed.default, code=_CODE)
_BACKWARD = partial(torch.ops.distbn_convert.batch_norm_backward.default, code=_CODE)


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, a mode, a transform or a kind of tensor must see the operators.

    Where none does, the backend is called directly: the dispatcher and the way back into
    Python cost as much as a small layer.
    """
    if torch.compiler.is_compiling():  # a backward, by compiled autograd
        return True
    for tensor in tensors:  # a loop, as any() would take longer than all else here
        if type(tensor) not in _PLAIN_TYPES:
            return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


# input, weight, bias, output, mean, rstd; what the backward does not need is None.
_Saved = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor, mean: Tensor, rstd: Tensor) -> None:
    input, weight, bias, residual = inputs[:4]
    eps, vt_world_size, interleaved, relu = inputs[8:]
    saved: _Saved = input, weight, None, None, mean, rstd
    if relu:
        kept = output if keeps_output(input, residual, relu) else None
        saved = input, weight, bias if kept is None else None, kept, mean, rstd
    ctx.save_for_backward(*saved)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.settings = eps, vt_world_size, interleaved, relu


def _differentiate(
    ctx: Any, grad_output: Tensor, decomposed: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of input, weight, bias and residual."""
    saved: _Saved = ctx.saved_tensors
    weight = saved[1]
    eps, *settings = ctx.settings
    grads: tuple[Any, ...]
    if _is_differentiated():
        grads = _differentiable_gradients(grad_output, saved, eps, *settings)
    elif decomposed:
        grads = reference.backward(grad_output, *saved, *settings)
    elif _is_watched(grad_output, saved[0], weight) or not torch._C._has_storage(grad_output):
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


def _in_forward_mode() -> bool:
    """Say whether tensors may have tangents, which an autograd function would have to push.

    Torch cannot push two through one, nor differentiate what one has pushed.
    """
    return forward_ad._current_level >= 0


def _is_transformed() -> bool:
    return _in_forward_mode() or torch._C._are_functorch_transforms_active()


def _is_differentiated() -> bool:
    """Say whether what a backward computes may be differentiated again."""
    # Forward mode and torch.func do not mind that gradients are disabled around them.
    return torch.is_grad_enabled() or _is_transformed()


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
    """Gradients that can be differentiated: to autograd the saved moments are constants."""
    input, weight, *_, mean, _ = saved
    if relu:
        grad_output = reference.mask(grad_output, *saved, interleaved)
    mean, var = reference.statistics(input.to(mean.dtype), vt_world_size, interleaved)
    grads = reference.gradients(
        grad_output, input, weight, mean, torch.rsqrt(var + eps), vt_world_size, interleaved
    )
    return grads[0].to(input.dtype), *grads[1:], grad_output


class _BatchNorm(torch.autograd.Function):
    """The eager path; a third of the overhead of the ``setup_context`` form.

    What takes no gradient comes in one tuple, since each argument costs.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs = (*arguments[:4], *arguments[4])
        function = _FORWARD if _is_watched(*inputs[:7]) else _batch_norm
        output, mean, rstd = function(*inputs)
        _save(ctx, inputs, output, mean, rstd)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, grad_output), None


class _OperatorBatchNorm(torch.autograd.Function):
    """The gradient of the operator itself, and the path of ``torch.func`` with a rule for vmap."""

    @staticmethod
    def forward(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Here no transform is left that would hide how the input lies in memory.
        return _FORWARD(in_torch_format(input), *rest)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _save(ctx, inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, grad_outputs[0]), *(None,) * 8

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
            results.append(_OperatorBatchNorm.apply(*arguments))
        output, mean, rstd = (torch.stack(column) for column in zip(*results, strict=True))
        return (output, mean, rstd), (0, 0, 0)


class _DecomposedBatchNorm(_OperatorBatchNorm):
    """The same in plain operations, for a compiler that fuses them with what comes after."""

    forward = staticmethod(reference.forward)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return *_differentiate(ctx, grad_outputs[0], decomposed=True), *(None,) * 8


def _requires_gradient(inputs: tuple[Any, ...]) -> bool:
    differentiated = [tensor for tensor in inputs[:4] if tensor is not None]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiated)


def _differentiable_operator(*inputs: Any, code: str = "") -> tuple[Tensor, Tensor, Tensor]:
    if _is_transformed():
        return reference.forward(*inputs)
    if _requires_gradient(inputs):
        return _OperatorBatchNorm.apply(*inputs)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD(*inputs)


def _decomposed_operator(*inputs: Any, code: str = "") -> tuple[Tensor, Tensor, Tensor]:
    if _is_transformed() or not _requires_gradient(inputs):
        return reference.forward(*inputs)
    return _DecomposedBatchNorm.apply(*inputs)  # type: ignore[no-any-return]


# torch.library.register_autograd takes no operator that writes to its arguments.
_LIBRARY.impl("batch_norm", _differentiable_operator, "Autograd")
_LIBRARY.impl("batch_norm_decomposed", _decomposed_operator, "CompositeImplicitAutograd")


def _decomposes(impl: str, input: Tensor) -> bool:
    """Say whether a compiler is given plain operations, and not the operator."""
    return impl == "decomposed" or (impl == "auto" and not has_kernel(input.device, input.dtype))


def batch_norm(
    impl: str,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *rest: Any,
) -> Tensor:
    """Normalise in the way that ``impl`` and what looks on ask for; differentiable.

    Args:
        impl: of :func:`~distbn_convert.functional.dist_batch_norm`.
        input: of :func:`.kernels.reference.forward`, as are the others.
        weight: likewise.
        bias: likewise.
        residual: likewise.
        rest: what takes no gradient.

    Returns:
        the output alone.
    """
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    if compiling:
        # An exported program of plain operations runs and trains without this package; and the
        # operators have no rule for vmap.
        plain = transformed or (impl != "op" and is_exporting())
    else:
        # So does a trace, whatever was asked for.
        tracing = torch._C._get_tracing_state() is not None
        plain = impl == "decomposed" or tracing or _in_forward_mode()
    if transformed and not plain:
        return _OperatorBatchNorm.apply(input, weight, bias, residual, *rest)[0]  # type: ignore[no-any-return]
    input = in_torch_format(input)
    if plain:
        return reference.forward(input, weight, bias, residual, *rest)[0]
    if compiling:
        operator = _DECOMPOSED if _decomposes(impl, input) else _FORWARD
        return operator(input, weight, bias, residual, *rest)[0]
    return _BatchNorm.apply(input, weight, bias, residual, rest)  # type: ignore[no-any-return]
