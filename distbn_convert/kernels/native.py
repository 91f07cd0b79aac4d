"""Torch's own batch norm, for devices that have no kernel of this package.

There are two ways to give it virtual ranks: a call for each rank, whose share is a run of memory,
or one call in which the ranks are so many more channels. The second launches no more than one call
of the first, but copies what does not lie that way, which is all but interleaved ranks of channels
that come second. Tensors moved, forward and backward, by count: 3 and 7 in the first way, 7 and 11
in the second; by :mod:`.reference`, whose operations nothing fuses, 5 and 16, and of 16-bit inputs,
which it widens, 16 and 41. It computes what neither way can: a batch that is uneven, and either
interleaved or small.

Native functions are called as autograd calls them, because those of ``torch.nn.functional`` cannot
write into a part of a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .layout import arrange, arrange_like
from .partition import share_sizes

__all__ = ["backward", "forward", "supports"]

# Values of a share from which on a call for each rank pays. On a CPU by measurement; on a GPU an
# estimate: copies move 16 to 32 bytes a value at 1 to 3 TB/s, where a call's launches take 20 us.
_LARGE = {"cpu": 2**15, "cuda": 2**20}


def supports(input: Tensor) -> bool:
    """Say whether this backend takes ``input``."""
    return input.device.type in _LARGE and input.layout is torch.strided


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
    joins = _joins(input, vt_world_size, interleaved)
    if joins is None or _is_differentiated(input, weight, bias, residual):
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
    x, last = arrange(input)
    way = _Way(vt_world_size, interleaved, last, joins)
    output = torch.empty_like(x)
    parts = way.cut(x)
    results = way.cut(output) if way.views(output) else [torch.empty_like(parts[0])]
    dtype = reference.accumulate_dtype(input.dtype)
    mean = input.new_zeros((vt_world_size, input.shape[1]), dtype=dtype)
    rstd = torch.full_like(mean, eps).rsqrt_()  # of a rank without samples
    batch_mean, unbiased = torch.zeros_like(mean), torch.zeros_like(mean)
    affine = _repeated(weight, parts, dtype), _repeated(bias, parts, dtype)
    vectors = (_vectors(t, parts) for t in (batch_mean, unbiased, mean, rstd))
    for part, result, *running, saved_mean, saved_rstd in zip(
        parts, results, *vectors, strict=False
    ):
        # With a momentum of 1 the running statistics become the batch's.
        arguments = part, *affine, *running, True, 1.0, eps
        torch.ops.aten.native_batch_norm.out(
            *arguments, out=result, save_mean=saved_mean, save_invstd=saved_rstd
        )
    if not way.views(output):
        way.put(results[0], output)
    if num_batches_tracked is not None:
        reference.count_batch(num_batches_tracked, input)
    if running_mean is not None and running_var is not None:
        batch = mean, unbiased, min(input.shape[0], vt_world_size)
        counts = num_batches_tracked
        reference.update_running(running_mean, running_var, counts, momentum, *batch)
    if residual is not None:
        output += residual
    if relu:
        output.relu_()
    return reference.as_input(output, input), mean, rstd


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
    saved = input, weight, bias, output, mean, rstd
    joins = _joins(input, vt_world_size, interleaved)
    if joins is None or _is_differentiated(grad_output, input, weight):
        return reference.backward(grad_output, *saved, vt_world_size, interleaved, relu)
    grad_residual = None
    if relu:
        grad_output = reference.mask(grad_output, *saved, interleaved)
        if output is not None:
            grad_residual = reference.as_input(grad_output, input)
    x, last = arrange(input)
    way = _Way(vt_world_size, interleaved, last, joins)
    parts, upstreams = way.cut(x), way.cut(arrange_like(x, grad_output, last))
    scale = _repeated(torch.ones_like(mean[0]) if weight is None else weight, parts, mean.dtype)
    vectors = _vectors(mean, parts), _vectors(rstd, parts)
    grad_input, sums = torch.empty_like(x), []
    results = [None] if joins else way.cut(grad_input)
    for upstream, part, result, *moments in zip(upstreams, parts, results, *vectors, strict=False):
        # In training neither running statistics nor eps are used.
        dx, *both = torch.ops.aten.native_batch_norm_backward.default(
            upstream, part, scale, None, None, *moments, True, 0.0, [True, True, True]
        )
        sums.append(both)
        if result is None:
            way.put(dx, grad_input)
        else:
            result.copy_(dx)
    grad_weight, grad_bias = (
        torch.cat(t).view(-1, x.shape[1]).sum(0) for t in zip(*sums, strict=True)
    )
    return reference.as_input(grad_input, input), grad_weight, grad_bias, grad_residual


def _is_differentiated(*tensors: Tensor | None) -> bool:
    """Say whether autograd looks on, as where the operators are called by name; then it must see
    operations that it knows."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _joins(input: Tensor, vt_world_size: int, interleaved: bool) -> bool | None:
    """Say whether ranks become channels, or have a call each; None if neither is possible."""
    if input.numel() == 0:
        return None
    if not interleaved and input.numel() >= _LARGE[input.device.type] * vt_world_size:
        return False
    return True if input.shape[0] % vt_world_size == 0 else None


class _Way(NamedTuple):
    """How an arranged batch is cut into what torch can normalise in one call each.

    Args:
        vt_world_size: number of virtual ranks V.
        interleaved: the partition.
        last: channels are the fast axis.
        joins: ranks become channels.
    """

    vt_world_size: int
    interleaved: bool
    last: bool
    joins: bool

    def cut(self, x: Tensor) -> list[Tensor]:
        """Cut ``Tensor[N, C, *]``.

        Returns:
            views of the shares of the ranks that have samples, ``Tensor[n, C, S, 1]``; or one
            ``Tensor[N / V, V * C, S, 1]``, a copy unless :meth:`views`.
        """
        if self.joins:
            # A single channel, whose stride means nothing, would make a view of what is none.
            ranks = self._joined(x).contiguous()
            return [self._to_image(ranks.flatten(2) if self.last else ranks.flatten(1, 2))]
        sizes = [size for size in share_sizes(x.shape[0], self.vt_world_size) if size]
        return list(self.whole(x).split(sizes))

    def views(self, x: Tensor) -> bool:
        """Say whether what is cut are views."""
        return not self.joins or self._joined(x).is_contiguous()

    def put(self, joined: Tensor, x: Tensor) -> None:
        """Write what was cut as one back into ``x``."""
        target = self._joined(x)
        rows = joined[..., 0]
        target.copy_((rows.transpose(1, 2) if self.last else rows).view(target.shape))

    def whole(self, x: Tensor) -> Tensor:
        """View the batch as ``Tensor[N, C, S, 1]``."""
        return self._to_image(self._as_it_lies(x))

    def _joined(self, x: Tensor) -> Tensor:
        """View the batch as ``Tensor[N / V, V, C, S]``, or ``[N / V, S, V, C]`` if last."""
        rows = self._as_it_lies(x)
        ranks: Tensor
        if self.interleaved:
            ranks = rows.unflatten(0, (-1, self.vt_world_size))
        else:
            ranks = rows.unflatten(0, (self.vt_world_size, -1)).transpose(0, 1)
        return ranks.transpose(1, 2) if self.last else ranks

    def _as_it_lies(self, x: Tensor) -> Tensor:
        """View the batch as ``Tensor[N, C, S]``, or ``[N, S, C]`` if last."""
        samples, channels = x.shape[:2]
        if self.last:
            return x.movedim(1, -1).view(samples, -1, channels)
        return x.view(samples, channels, -1)

    def _to_image(self, rows: Tensor) -> Tensor:
        """View ``Tensor[n, c, S]``, or ``[n, S, c]`` if last, as ``Tensor[n, c, S, 1]``."""
        return rows[:, :, None].movedim(-1, 1) if self.last else rows[..., None]


def _vectors(ranks: Tensor, parts: list[Tensor]) -> tuple[Tensor, ...]:
    """Cut ``Tensor[V, C]`` into one vector for the channels of each part."""
    return ranks.view(-1, parts[0].shape[1]).unbind()


def _repeated(vector: Tensor | None, parts: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """Return ``Tensor[C]`` for the channels of a part."""
    if vector is None:
        return None
    return vector.to(dtype).repeat(parts[0].shape[1] // len(vector))
