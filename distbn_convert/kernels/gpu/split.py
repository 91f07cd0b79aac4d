"""Kernels that cut a rank's share of a channel between programs: for anything, at two reads.

Where ranks times blocks of channels are too few to fill the device, or a share is too large for
L2, each share is cut along its values into ``splits`` pieces. One launch writes the partial
results of each piece, one merges them in a fixed order, one applies them, last piece first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sweeps import differentiate_rows, lane_gradients, lane_moments, normalize_rows
from .tiles import finish, load_affine, locate, merge_lanes

__all__ = ["merge_moments", "split_backward", "split_forward", "split_gradients", "split_moments"]


@triton.jit
def piece(values, size, REVERSE: tl.constexpr):
    """Return which piece of the share is this program's, and its rows."""
    split = tl.program_id(1)
    if REVERSE:
        split = tl.num_programs(1) - 1 - split
    begin = tl.minimum(split.to(values.dtype) * size, values)
    return split, begin, tl.minimum(begin + size, values)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def split_moments(
    x,  # [N, C, S] in either layout
    partials,  # [splits, 2, V, C] float32: mean and sum of squared deviations
    size,  # rows of a piece
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
    """Compute the moments of each piece."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, False,
    )  # fmt: skip
    split, begin, stop = piece(values, size, False)
    mean, m2 = lane_moments(
        x + start, begin, stop, lanes, channels, vt_world_size,
        ROWS, CHANNELS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
    cells = vt_world_size.to(tl.int64) * channels
    cell = split * 2 * cells + rank * channels + lanes
    tl.store(partials + cell, mean, mask=lanes < channels)
    tl.store(partials + cells + cell, m2, mask=lanes < channels)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def merge_moments(
    partials,  # [splits, 2, V, C] float32
    mean_out,  # [V, C] float32
    rstd_out,  # [V, C] float32
    running_mean,  # [V, C] or None
    running_var,  # [V, C] or None
    counts,  # [V] int64, read if momentum is None
    momentum,  # float or None
    eps,
    splits,
    size,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Merge the pieces of each share and update the running statistics."""
    rank, values, _, lanes = locate(
        channels, positions, quotient, remainder, CHANNELS, True, False, WIDE, 1, False
    )
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & (lanes < channels)[None, :]
    count = tl.minimum(tl.maximum(values - split.to(values.dtype) * size, 0), size)
    cells = vt_world_size.to(tl.int64) * channels
    cell = split[:, None] * 2 * cells + (rank * channels + lanes)[None, :]
    mean, m2 = merge_lanes(
        tl.load(partials + cell, mask=mask, other=0.0),
        tl.load(partials + cells + cell, mask=mask, other=0.0),
        tl.where(mask, count.to(tl.float32)[:, None], 0.0),
    )
    finish(
        mean, m2, values, rank, lanes, channels,
        mean_out, rstd_out, running_mean, running_var, counts, momentum, eps,
    )  # fmt: skip


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def split_forward(
    x,  # [N, C, S] in either layout
    y,  # as x
    weight,  # [C] or None
    bias,  # [C] or None
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    size,  # rows of a piece
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
    """Normalise each piece."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, True,
    )  # fmt: skip
    _, begin, stop = piece(values, size, True)
    cell = rank * channels + lanes
    mean = tl.load(mean_in + cell, mask=lanes < channels, other=0.0)
    rstd = tl.load(rstd_in + cell, mask=lanes < channels, other=0.0)
    scale, shift = load_affine(weight, bias, rstd, lanes, channels)
    normalize_rows(
        x + start, y + start, mean, scale, shift, begin, stop, lanes, channels, vt_world_size,
        ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def split_gradients(
    x,  # [N, C, S] in either layout
    dy,  # as x
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    partials,  # [splits, 2, V, C] float32: sums of dy and of dy * normalised x
    size,  # rows of a piece
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
    """Compute the two sums of each piece that the gradients need."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, False,
    )  # fmt: skip
    split, begin, stop = piece(values, size, False)
    mean = tl.load(mean_in + rank * channels + lanes, mask=lanes < channels, other=0.0)
    rstd = tl.load(rstd_in + rank * channels + lanes, mask=lanes < channels, other=0.0)
    sum_dy, sum_dy_x = lane_gradients(
        x + start, dy + start, mean, begin, stop, lanes, channels, vt_world_size,
        ROWS, CHANNELS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
    cells = vt_world_size.to(tl.int64) * channels
    cell = split * 2 * cells + rank * channels + lanes
    tl.store(partials + cell, sum_dy, mask=lanes < channels)
    tl.store(partials + cells + cell, sum_dy_x * rstd, mask=lanes < channels)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def split_backward(
    x,  # [N, C, S] in either layout
    dy,  # as x
    dx,  # as x
    weight,  # [C] or None
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    sum_dy_in,  # [V, C] float32
    sum_dy_x_in,  # [V, C] float32
    size,  # rows of a piece
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
    """Write the gradient of each piece."""
    rank, values, start, lanes = locate(
        channels, positions, quotient, remainder,
        CHANNELS, LAST, INTERLEAVED, WIDE, VECTOR, True,
    )  # fmt: skip
    _, begin, stop = piece(values, size, True)
    valid = lanes < channels
    cell = rank * channels + lanes
    mean = tl.load(mean_in + cell, mask=valid, other=0.0)
    rstd = tl.load(rstd_in + cell, mask=valid, other=0.0)
    count = tl.maximum(values, 1).to(tl.float32)
    mean_dy = tl.div_rn(tl.load(sum_dy_in + cell, mask=valid, other=0.0), count)
    slope = tl.div_rn(tl.load(sum_dy_x_in + cell, mask=valid, other=0.0), count) * rstd
    scale, _ = load_affine(weight, None, rstd, lanes, channels)
    differentiate_rows(
        x + start, dy + start, dx + start, mean, mean_dy, slope, scale,
        begin, stop, lanes, channels, vt_world_size,
        ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
