"""Loops over the rows of a share that the kernels of more than one tile share, in Triton.

Two gather (moments, gradient sums) and two write (output, input gradient). ``begin`` and
``stop`` are rows of the block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import differentiate, lane_offset, place, reciprocal, rectify, row_offset, transform

__all__ = ["differentiate_rows", "lane_gradients", "lane_moments", "normalize_rows"]


@triton.jit
def lane_moments(x, begin, stop, block, TILE: tl.constexpr):
    """Return the mean and the sum of squared deviations of rows ``begin`` to ``stop``.

    Sums are around the first row's value, so that a large mean costs no digits: what is
    subtracted in the end is small unless that value is far from all others.
    """
    x += block.start
    first = x + row_offset(begin, block, TILE) + lane_offset(block, TILE)
    seen = block.lanes < tl.where(begin < stop, block.channels, 0)
    pivot = tl.load(first, mask=seen, other=0.0).to(tl.float32)
    offsets, mask = place(begin, stop, block, TILE)
    ahead = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
    total = tl.zeros([TILE.ROWS, TILE.CHANNELS], tl.float32)
    squares = tl.zeros([TILE.ROWS, TILE.CHANNELS], tl.float32)
    full = begin + (stop - begin) // TILE.ROWS * TILE.ROWS
    for row in range(begin, full, TILE.ROWS):
        deviation = ahead.to(tl.float32) - pivot[None, :]
        # The next tile is asked for before this one is used, or too few bytes are in flight.
        offsets, mask = place(row + TILE.ROWS, stop, block, TILE)
        ahead = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
        total += deviation
        squares += deviation * deviation
    _, mask = place(full, stop, block, TILE)
    deviation = tl.where(mask, ahead.to(tl.float32) - pivot[None, :], 0.0)
    shift = tl.sum(total + deviation, 0)
    m2 = tl.sum(squares + deviation * deviation, 0)
    part = reciprocal(tl.maximum(stop - begin, 1).to(tl.float32))
    m2 = tl.maximum(m2 - shift * shift * part, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return pivot + shift * part, m2


@triton.jit
def load_pair(
    x, dy, row, stop, block, TILE: tl.constexpr, KEEP_X: tl.constexpr, KEEP_DY: tl.constexpr
):
    """Return a tile of both; how long L2 should keep each is an eviction policy."""
    offsets, mask = place(row, stop, block, TILE)
    value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy=KEEP_X)
    grad = tl.load(dy + offsets, mask=mask, other=0.0, eviction_policy=KEEP_DY)
    return value, grad


@triton.jit
def lane_gradients(x, dy, output, grad_residual, affine, begin, stop, block, TILE: tl.constexpr):
    """Return the sums of ``dy`` and ``dy * (x - mean)`` over rows ``begin`` to ``stop``.

    With ``output``, ``dy`` counts where that is not negative or zero, and what counts is
    written to ``grad_residual``, so that the second sweep need not read ``output``.
    """
    x += block.start
    dy += block.start
    # What is read again is kept in L2; with an output that is grad_residual, not dy.
    keep: tl.constexpr = "evict_last" if output is None else "evict_first"
    if output is not None:
        output += block.start
        grad_residual += block.start
    sum_dy = tl.zeros([TILE.ROWS, TILE.CHANNELS], tl.float32)
    sum_dy_x = tl.zeros([TILE.ROWS, TILE.CHANNELS], tl.float32)
    if TILE.STAGES == 2:
        next_value, next_grad = load_pair(x, dy, begin, stop, block, TILE, "evict_last", keep)
    for row in tl.range(begin, stop, TILE.ROWS, num_stages=1 if TILE.STAGES == 2 else TILE.STAGES):
        if TILE.STAGES == 2:
            value, grad = next_value, next_grad
            row_ahead = row + TILE.ROWS
            next_value, next_grad = load_pair(
                x, dy, row_ahead, stop, block, TILE, "evict_last", keep
            )
        else:
            value, grad = load_pair(x, dy, row, stop, block, TILE, "evict_last", keep)
        if output is not None:
            offsets, mask = place(row, stop, block, TILE)
            out = tl.load(output + offsets, mask=mask, other=0.0, eviction_policy=keep)
            grad = rectify(grad, out)
            tl.store(grad_residual + offsets, grad, mask=mask, eviction_policy="evict_last")
        elif TILE.RELU:
            grad = rectify(grad, transform(value, affine).to(value.dtype))
        grad = grad.to(tl.float32)
        sum_dy += grad
        sum_dy_x += grad * (value.to(tl.float32) - affine.mean[None, :])
    return tl.sum(sum_dy, 0), tl.sum(sum_dy_x, 0)


@triton.jit
def normalize_rows(
    x, y, residual, affine, begin, stop, block, TILE: tl.constexpr, STORE: tl.constexpr
):
    """Write ``relu?((x - mean) * scale + shift + residual?)``.

    Last rows first: they are the likeliest in L2. ``STORE`` is ``".cs"`` if what is written
    should leave L2 before what is still to be read, else empty.
    """
    x += block.start
    y += block.start
    if residual is not None:
        residual += block.start
    tiles = tl.cdiv(stop - begin, TILE.ROWS)
    for tile in range(tiles):
        offsets, mask = place(begin + (tiles - 1 - tile) * TILE.ROWS, stop, block, TILE)
        value = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
        out = transform(value, affine)
        if residual is not None:
            added = tl.load(residual + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            out += added.to(tl.float32)
        if TILE.RELU:
            out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask, cache_modifier=STORE)


@triton.jit
def differentiate_rows(
    x,
    dy,
    dx,
    affine,
    mean_dy,
    slope,
    begin,
    stop,
    block,
    TILE: tl.constexpr,
    STORE: tl.constexpr,
):
    """Write ``(dy - mean_dy - (x - mean) * slope) * scale``, last rows first."""
    x += block.start
    dy += block.start
    dx += block.start
    tiles = tl.cdiv(stop - begin, TILE.ROWS)
    if TILE.STAGES == 2:
        row = begin + tl.maximum(tiles - 1, 0) * TILE.ROWS
        next_value, next_grad = load_pair(
            x, dy, row, stop, block, TILE, "evict_first", "evict_first"
        )
    for tile in tl.range(tiles, num_stages=1 if TILE.STAGES == 2 else TILE.STAGES):
        row = begin + (tiles - 1 - tile) * TILE.ROWS
        if TILE.STAGES == 2:
            value, grad = next_value, next_grad
            # There is none before the first.
            row_ahead = tl.maximum(row - TILE.ROWS, begin)
            end = tl.where(tile + 1 < tiles, stop, begin)
            next_value, next_grad = load_pair(
                x, dy, row_ahead, end, block, TILE, "evict_first", "evict_first"
            )
        else:
            value, grad = load_pair(x, dy, row, stop, block, TILE, "evict_first", "evict_first")
        offsets, mask = place(row, stop, block, TILE)
        if TILE.RELU:
            grad = rectify(grad, transform(value, affine).to(value.dtype))
        out = differentiate(value, grad, affine, mean_dy, slope)
        tl.store(dx + offsets, out.to(dx.dtype.element_ty), mask=mask, cache_modifier=STORE)
