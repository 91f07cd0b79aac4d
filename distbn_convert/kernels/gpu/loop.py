"""Kernels that read a rank's share of a channel twice, the second time hopefully from L2.

One program for each rank and block of channels, as in :mod:`.resident`, for shares that do not
fit in registers. The second sweep runs backwards, so that it begins with what was read last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sweeps import differentiate_rows, lane_gradients, lane_moments, normalize_rows
from .tiles import finish, load_affine, locate

__all__ = ["loop_backward", "loop_forward"]


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def loop_forward(
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
    """Normalise each rank's share."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, False,
    )  # fmt: skip
    mean, m2 = lane_moments(
        x + start, 0, values, lanes, channels, vt_world_size,
        ROWS, CHANNELS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
    rstd = finish(
        mean, m2, values, rank, lanes, channels,
        mean_out, rstd_out, running_mean, running_var, counts, momentum, eps,
    )  # fmt: skip
    scale, shift = load_affine(weight, bias, rstd, lanes, channels)
    normalize_rows(
        x + start, y + start, mean, scale, shift, 0, values, lanes, channels, vt_world_size,
        ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def loop_backward(
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
    """Differentiate :func:`loop_forward`."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, False,
    )  # fmt: skip
    valid = lanes < channels
    cell = rank * channels + lanes
    mean = tl.load(mean_in + cell, mask=valid, other=0.0)
    rstd = tl.load(rstd_in + cell, mask=valid, other=0.0)
    sum_dy, sum_dy_x = lane_gradients(
        x + start, dy + start, mean, 0, values, lanes, channels, vt_world_size,
        ROWS, CHANNELS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
    sum_dy_x *= rstd
    tl.store(sum_dy_out + cell, sum_dy, mask=valid)
    tl.store(sum_dy_x_out + cell, sum_dy_x, mask=valid)
    count = tl.maximum(values, 1).to(tl.float32)
    mean_dy = tl.div_rn(sum_dy, count)
    slope = tl.div_rn(sum_dy_x, count) * rstd
    scale, _ = load_affine(weight, None, rstd, lanes, channels)
    differentiate_rows(
        x + start, dy + start, dx + start, mean, mean_dy, slope, scale,
        0, values, lanes, channels, vt_world_size,
        ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
