"""Kernels that hold a rank's share of a channel in registers: the input is read once.

One program for each rank and block of channels, one tile for its whole share; the tile is
kept in the input's own dtype and widened twice, which halves the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import finish, locate, place

__all__ = ["resident_backward", "resident_forward"]


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def resident_forward(
    x,  # [N, C, S] in either layout
    y,  # as x
    weight,  # [C] or None
    bias,  # [C] or None
    mean_out,  # [V, C] float32
    rstd_out,  # [V, C] float32
    running_mean,  # [V, C] or None
    running_var,  # [V, C] or None
    counts,  # [V] int64, read if momentum is None
    momentum,  # float or None
    eps,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Normalise, with exact two-pass statistics."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, False,
    )  # fmt: skip
    offsets, mask = place(
        0, values, lanes, channels, vt_world_size,
        ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
    tile = tl.load(x + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    # Sums around the first value, so that a large mean costs no digits.
    valid = lanes < channels
    first = x + start + (lanes if LAST else lanes.to(tl.int64) * DIVISOR)
    seen = lanes < tl.where(values > 0, channels, 0)
    pivot = tl.load(first, mask=seen, other=0.0).to(tl.float32)
    count = tl.maximum(values, 1).to(tl.float32)
    deviation = tl.where(mask, tile.to(tl.float32) - pivot[None, :], 0.0)
    mean = pivot + tl.div_rn(tl.sum(deviation, 0), count)
    deviation = tl.where(mask, tile.to(tl.float32) - mean[None, :], 0.0)
    m2 = tl.sum(deviation * deviation, 0)
    rstd = finish(
        mean, m2, values, rank, lanes, channels,
        mean_out, rstd_out, running_mean, running_var, counts, momentum, eps,
    )  # fmt: skip
    if weight is not None:
        rstd *= tl.load(weight + lanes, mask=valid, other=0.0).to(tl.float32)
    out = (tile.to(tl.float32) - mean[None, :]) * rstd[None, :]
    if bias is not None:
        out += tl.load(bias + lanes, mask=valid, other=0.0).to(tl.float32)[None, :]
    tl.store(y + start + offsets, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def resident_backward(
    x,  # [N, C, S] in either layout
    dy,  # as x
    dx,  # as x
    weight,  # [C] or None
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    sum_dy_out,  # [V, C] float32: each rank's share of dbias
    sum_dy_x_out,  # [V, C] float32: and of dweight
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Differentiate: input and upstream gradient are each read once."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, False,
    )  # fmt: skip
    offsets, mask = place(
        0, values, lanes, channels, vt_world_size,
        ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
    tile = tl.load(x + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    grad = tl.load(dy + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    valid = lanes < channels
    cell = rank * channels + lanes
    mean = tl.load(mean_in + cell, mask=valid, other=0.0)
    rstd = tl.load(rstd_in + cell, mask=valid, other=0.0)
    sum_dy = tl.sum(grad.to(tl.float32), 0)
    sum_dy_x = tl.sum(grad.to(tl.float32) * (tile.to(tl.float32) - mean[None, :]), 0) * rstd
    tl.store(sum_dy_out + cell, sum_dy, mask=valid)
    tl.store(sum_dy_x_out + cell, sum_dy_x, mask=valid)
    count = tl.maximum(values, 1).to(tl.float32)
    mean_dy = tl.div_rn(sum_dy, count)
    slope = tl.div_rn(sum_dy_x, count) * rstd
    if weight is not None:
        rstd *= tl.load(weight + lanes, mask=valid, other=0.0).to(tl.float32)
    out = grad.to(tl.float32) - mean_dy[None, :]
    out = (out - (tile.to(tl.float32) - mean[None, :]) * slope[None, :]) * rstd[None, :]
    tl.store(dx + start + offsets, out.to(dx.dtype.element_ty), mask=mask)
