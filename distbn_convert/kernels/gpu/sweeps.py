"""Loops over the rows of a share that the loop and the split kernels share, in Triton.

Two gather (moments, gradient sums) and two write (output, input gradient). The parameters
are those of :mod:`.tiles`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import merge_lanes, place

__all__ = ["differentiate_rows", "lane_gradients", "lane_moments", "normalize_rows"]


@triton.jit
def lane_moments(
    x,
    begin,
    stop,
    lanes,
    channels,
    vt_world_size,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the mean and the sum of squared deviations of rows ``begin`` to ``stop``.

    Each lane of the tile keeps Welford's two numbers for the values that it meets; the lanes
    are merged at the end. All lanes have met the same number of values, so that one
    reciprocal serves the whole tile.
    """
    mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    m2 = tl.zeros([ROWS, CHANNELS], tl.float32)
    met = 0.0
    offsets, mask = place(
        begin, stop, lanes, channels, vt_world_size,
        ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
    )  # fmt: skip
    ahead = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
    for row in range(begin, stop, ROWS):
        value, valid = ahead, mask
        # The next tile is asked for before this one is used, or too few bytes are in flight.
        offsets, mask = place(
            row + ROWS, stop, lanes, channels, vt_world_size,
            ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
        )  # fmt: skip
        ahead = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
        deviation = tl.where(valid, value.to(tl.float32) - mean, 0.0)
        met += 1.0
        step = deviation * (1.0 / met)
        mean += step
        m2 += deviation * (deviation - step)
    behind = begin + tl.arange(0, ROWS)
    count = tl.maximum(stop - behind + ROWS - 1, 0) // ROWS
    count = tl.where((lanes < channels)[None, :], count.to(tl.float32)[:, None], 0.0)
    return merge_lanes(mean, m2, count)


@triton.jit
def lane_gradients(
    x,
    dy,
    mean,
    begin,
    stop,
    lanes,
    channels,
    vt_world_size,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the sums of ``dy`` and ``dy * (x - mean)`` over rows ``begin`` to ``stop``."""
    sum_dy = tl.zeros([ROWS, CHANNELS], tl.float32)
    sum_dy_x = tl.zeros([ROWS, CHANNELS], tl.float32)
    for row in range(begin, stop, ROWS):
        offsets, mask = place(
            row, stop, lanes, channels, vt_world_size,
            ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
        )  # fmt: skip
        value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
        grad = tl.load(dy + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
        grad = grad.to(tl.float32)
        sum_dy += grad
        sum_dy_x += grad * (value.to(tl.float32) - mean[None, :])
    return tl.sum(sum_dy, 0), tl.sum(sum_dy_x, 0)


@triton.jit
def normalize_rows(
    x,
    y,
    mean,
    scale,
    shift,
    begin,
    stop,
    lanes,
    channels,
    vt_world_size,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write ``(x - mean) * scale + shift``, last rows first: they are the likeliest in L2."""
    tiles = tl.cdiv(stop - begin, ROWS)
    for tile in range(tiles):
        offsets, mask = place(
            begin + (tiles - 1 - tile) * ROWS, stop, lanes, channels, vt_world_size,
            ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
        )  # fmt: skip
        value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        out = (value.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
        tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def differentiate_rows(
    x,
    dy,
    dx,
    mean,
    mean_dy,
    slope,
    scale,
    begin,
    stop,
    lanes,
    channels,
    vt_world_size,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    LAST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write ``(dy - mean_dy - (x - mean) * slope) * scale``, last rows first."""
    tiles = tl.cdiv(stop - begin, ROWS)
    for tile in range(tiles):
        offsets, mask = place(
            begin + (tiles - 1 - tile) * ROWS, stop, lanes, channels, vt_world_size,
            ROWS, VECTOR, DIVISOR, LAST, INTERLEAVED, WIDE,
        )  # fmt: skip
        value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        grad = tl.load(dy + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        out = grad.to(tl.float32) - mean_dy[None, :]
        out = (out - (value.to(tl.float32) - mean[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=mask)
