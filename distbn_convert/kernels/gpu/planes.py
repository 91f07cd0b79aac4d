"""Kernels that hold a rank's share of whole channels in registers, channels second: one read.

One program for each rank and block of channels. Its tile is ``[samples, columns]``, and a column is
one position of one of the block's channels, which lie behind each other in memory. So what a thread
reads is a run of memory for each sample, a stride apart: nothing is divided to find it, the mask is
one for all samples, and of maps with an odd number of positions several values are moved at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .held import correct
from .tiles import (
    Affine,
    corrections,
    differentiate,
    divide,
    finish,
    load_parameters,
    load_running,
    load_saved,
    locate,
    make_affine,
    positions_of,
    reciprocal,
    rectify,
    rstd_of,
    store_sums,
    sum_products,
    transform,
)

__all__ = ["planes_backward", "planes_forward"]


class Planes(NamedTuple):
    """Where the tile lies, on the device.

    ``offsets`` and ``mask`` are ``[SAMPLES, COLUMNS]``, ``owners`` says which of the block's
    channels a column is of ``[COLUMNS]``.
    """

    offsets: Any
    mask: Any
    owners: Any


@triton.jit
def lay_out(program, block, TILE: tl.constexpr):
    """Return where the samples and columns of a program's block are."""
    rows, columns = tl.arange(0, TILE.ROWS), tl.arange(0, TILE.COLUMNS)
    blocks = tl.cdiv(block.channels, TILE.CHANNELS)
    first = (program - divide(program, blocks) * blocks) * TILE.CHANNELS
    positions = positions_of(block, TILE)
    width = tl.minimum(block.channels - first, TILE.CHANNELS) * positions
    mask = (rows * positions < block.total)[:, None] & (columns < width)[None, :]
    if TILE.WIDE:
        rows, first = rows.to(tl.int64), first.to(tl.int64)
    rows = rows * block.channels * positions
    if TILE.INTERLEAVED:
        rows = rows * block.vt_world_size
    offsets = rows[:, None] + (first * positions + columns)[None, :]
    offsets = tl.multiple_of(tl.max_contiguous(offsets, (1, TILE.VECTOR)), (1, TILE.VECTOR))
    mask = tl.max_constancy(mask, (1, TILE.VECTOR))
    if TILE.DIVISOR > 0:
        owners = columns // TILE.DIVISOR
    else:
        owners = divide(columns, positions)
    return Planes(offsets, mask, owners)


@triton.jit
def sum_channels(value, planes, TILE: tl.constexpr):
    """Sum the columns ``[COLUMNS]`` of each channel ``[CHANNELS]``."""
    channels = tl.arange(0, TILE.CHANNELS)
    mine = planes.owners[None, :] == channels[:, None]
    return tl.sum(tl.where(mine, value[None, :], 0.0), 1)


@triton.jit
def spread(value, planes, TILE: tl.constexpr):
    """Return each column's ``[COLUMNS]`` of its channel's value ``[CHANNELS]``."""
    if TILE.CHANNELS == 1:
        spread = tl.sum(value, 0) + tl.zeros([1], tl.float32)
    else:
        spread = tl.gather(value, tl.minimum(planes.owners, TILE.CHANNELS - 1), 0)
    return spread


@triton.jit
def spread_affine(affine, planes, TILE: tl.constexpr):
    """Return an affine of the columns."""
    return Affine(
        spread(affine.mean, planes, TILE),
        spread(affine.scale, planes, TILE),
        spread(affine.shift, planes, TILE),
    )


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def planes_forward(
    x,  # [N, C, S]
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
    planes = lay_out(program, block, TILE)
    x += block.start
    tile = tl.load(x + planes.offsets, mask=planes.mask, other=0.0, eviction_policy="evict_first")
    running = load_running(statistics, block)
    parameters = load_parameters(weight, bias, block)
    total = sum_channels(tl.sum(tile.to(tl.float32), 0), planes, TILE)
    part = reciprocal(tl.maximum(block.total, 1).to(tl.float32))
    # Rounded by name: what it is subtracted from must not be fused with the product.
    mean = tl.fma(total, tl.zeros_like(total) + part, tl.zeros_like(total))
    deviation = tile.to(tl.float32) - spread(mean, planes, TILE)[None, :]
    deviation = tl.where(planes.mask, deviation, 0.0)
    m2 = sum_channels(sum_products(deviation, deviation, TILE), planes, TILE)
    if tile.dtype == tl.float32:
        rest = sum_channels(tl.sum(deviation, 0), planes, TILE)
        mean, m2 = correct(mean, m2, rest, block.total)
    rstd = rstd_of(m2, block, statistics)
    finish(mean, m2, rstd, running, block, statistics)
    affine = spread_affine(make_affine(parameters, mean, rstd), planes, TILE)
    out = transform(tile, affine)
    if residual is not None:
        added = residual + block.start + planes.offsets
        out += tl.load(added, mask=planes.mask, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
    if TILE.RELU:
        out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + block.start + planes.offsets, out.to(y.dtype.element_ty), mask=planes.mask)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def planes_backward(
    x,  # [N, C, S]
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
    planes = lay_out(program, block, TILE)
    tile = x + block.start + planes.offsets
    tile = tl.load(tile, mask=planes.mask, other=0.0, eviction_policy="evict_first")
    grad = dy + block.start + planes.offsets
    grad = tl.load(grad, mask=planes.mask, other=0.0, eviction_policy="evict_first")
    saved, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
    affine = spread_affine(saved, planes, TILE)
    if output is not None:
        out = output + block.start + planes.offsets
        out = tl.load(out, mask=planes.mask, other=0.0, eviction_policy="evict_first")
        grad = rectify(grad, out)
        tl.store(grad_residual + block.start + planes.offsets, grad, mask=planes.mask)
    elif TILE.RELU:
        grad = rectify(grad, transform(tile, affine).to(tile.dtype))
    wide = grad.to(tl.float32)
    sum_dy = sum_channels(tl.sum(wide, 0), planes, TILE)
    centred = tile.to(tl.float32) - affine.mean[None, :]
    product = sum_products(wide, centred, TILE)
    sum_dy_x = sum_channels(product, planes, TILE) * rstd
    store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)
    mean_dy, slope = corrections(sum_dy, sum_dy_x, rstd, block)
    mean_dy, slope = spread(mean_dy, planes, TILE), spread(slope, planes, TILE)
    out = differentiate(tile, grad, affine, mean_dy, slope)
    tl.store(dx + block.start + planes.offsets, out.to(dx.dtype.element_ty), mask=planes.mask)
