"""Kernels that hold a rank's share of a channel in registers: the input is read once.

One program for each rank and block of channels, one tile for its whole share; the tile is
kept in the input's own dtype and widened twice, which halves the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import finish, load_affine, load_row, locate, place, rectify, transform

__all__ = ["resident_backward", "resident_forward"]


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def resident_forward(
    x,  # [N, C, S] in either layout
    y,  # as x
    weight,  # [C] or None
    bias,  # [C] or None
    residual,  # as x, or None
    statistics,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    TILE: tl.constexpr,
):
    """Normalise, with exact two-pass statistics."""
    program = tl.program_id(0)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    offsets, mask = place(0, block.total, block, TILE)
    x += block.start
    tile = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    # Sums around the first value, so that a large mean costs no digits.
    first = x + (block.lanes if TILE.LAST else block.lanes.to(tl.int64) * TILE.DIVISOR)
    seen = block.lanes < tl.where(block.total > 0, channels, 0)
    pivot = tl.load(first, mask=seen, other=0.0).to(tl.float32)
    count = tl.maximum(block.total, 1).to(tl.float32)
    deviation = tl.where(mask, tile.to(tl.float32) - pivot[None, :], 0.0)
    mean = pivot + tl.div_rn(tl.sum(deviation, 0), count)
    deviation = tl.where(mask, tile.to(tl.float32) - mean[None, :], 0.0)
    m2 = tl.sum(deviation * deviation, 0)
    rstd = finish(mean, m2, block, statistics)
    out = transform(tile, load_affine(weight, bias, mean, rstd, block))
    if residual is not None:
        added = residual + block.start + offsets
        out += tl.load(added, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if TILE.RELU:
        out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + block.start + offsets, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def resident_backward(
    x,  # [N, C, S] in either layout
    dy,  # as x
    output,  # as x, or None: not to be masked, or by what TILE.RELU computes
    dx,  # as x
    grad_residual,  # as x, written if there is an output
    weight,  # [C] or None
    bias,  # [C] or None, read for TILE.RELU
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    sum_dy_out,  # [V, C] float32: each rank's share of dbias
    sum_dy_x_out,  # [V, C] float32: and of dweight
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    TILE: tl.constexpr,
):
    """Differentiate: input and upstream gradient are each read once."""
    program = tl.program_id(0)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    offsets, mask = place(0, block.total, block, TILE)
    tile = x + block.start + offsets
    tile = tl.load(tile, mask=mask, other=0.0, eviction_policy="evict_first")
    grad = dy + block.start + offsets
    grad = tl.load(grad, mask=mask, other=0.0, eviction_policy="evict_first")
    rstd = load_row(rstd_in, block)
    affine = load_affine(weight, bias, load_row(mean_in, block), rstd, block)
    if output is not None:
        out = output + block.start + offsets
        grad = rectify(grad, tl.load(out, mask=mask, other=0.0, eviction_policy="evict_first"))
        tl.store(grad_residual + block.start + offsets, grad, mask=mask)
    elif TILE.RELU:
        grad = rectify(grad, transform(tile, affine).to(tile.dtype))
    sum_dy = tl.sum(grad.to(tl.float32), 0)
    centred = tile.to(tl.float32) - affine.mean[None, :]
    sum_dy_x = tl.sum(grad.to(tl.float32) * centred, 0) * rstd
    tl.store(sum_dy_out + block.cells, sum_dy, mask=block.valid)
    tl.store(sum_dy_x_out + block.cells, sum_dy_x, mask=block.valid)
    count = tl.maximum(block.total, 1).to(tl.float32)
    mean_dy = tl.div_rn(sum_dy, count)
    slope = tl.div_rn(sum_dy_x, count) * rstd
    dx_tile = grad.to(tl.float32) - mean_dy[None, :]
    centred = tile.to(tl.float32) - affine.mean[None, :]
    dx_tile = (dx_tile - centred * slope[None, :]) * affine.scale[None, :]
    tl.store(dx + block.start + offsets, dx_tile.to(dx.dtype.element_ty), mask=mask)
