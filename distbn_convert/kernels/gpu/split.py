"""Kernels that cut a rank's share of a channel between programs: for anything, at two reads.

Where ranks times blocks of channels are too few to fill the device, or a share is too large for
L2, each share is cut along its values into ``splits`` pieces. One launch writes the partial
results of each piece, one merges them in a fixed order, one applies them, last piece first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sweeps import differentiate_rows, lane_gradients, lane_moments, normalize_rows
from .tiles import finish, load_affine, load_row, locate, merge_lanes

__all__ = [
    "merge_moments",
    "merge_pieces",
    "piece_of",
    "split_backward",
    "split_forward",
    "split_gradients",
    "split_moments",
    "store_partials",
    "sum_pieces",
]


@triton.jit
def piece_of(split, size, block):
    """Return the rows of a piece of the share."""
    begin = tl.minimum(split.to(block.total.dtype) * size, block.total)
    return begin, tl.minimum(begin + size, block.total)


@triton.jit
def store_partials(partials, first, second, split, block):
    """Store two numbers for each of the piece's channels in ``[splits, 2, V, C]``."""
    cells = block.vt_world_size.to(tl.int64) * block.channels
    partials += split * 2 * cells + block.cells
    tl.store(partials, first, mask=block.valid)
    tl.store(partials + cells, second, mask=block.valid)


@triton.jit
def load_partials(partials, which: tl.constexpr, splits, block, SPLITS: tl.constexpr):
    """Return the first or second number of all pieces ``[SPLITS, CHANNELS]``, and a mask.

    From L2 (``.cg``), where the programs of the same launch that wrote them can be seen.
    """
    split = tl.arange(0, SPLITS)
    mask = (split < splits)[:, None] & block.valid[None, :]
    cells = block.vt_world_size.to(tl.int64) * block.channels
    offsets = (split[:, None] * 2 + which) * cells + block.cells[None, :]
    return tl.load(partials + offsets, mask=mask, other=0.0, cache_modifier=".cg"), mask


@triton.jit
def merge_pieces(partials, splits, size, block, SPLITS: tl.constexpr):
    """Return mean and sum of squared deviations of a share, its pieces in a fixed order."""
    # One kind of number after the other: together they cost a program its registers.
    m2, mask = load_partials(partials, 1, splits, block, SPLITS)
    within = tl.sum(m2, 0)
    mean, _ = load_partials(partials, 0, splits, block, SPLITS)
    split = tl.arange(0, SPLITS).to(block.total.dtype)
    count = tl.minimum(tl.maximum(block.total - split * size, 0), size)
    count = tl.where(mask, count.to(tl.float32)[:, None], 0.0)
    mean, between = merge_lanes(mean, tl.zeros_like(mean), count)
    return mean, within + between


@triton.jit
def sum_pieces(partials, splits, block, SPLITS: tl.constexpr):
    """Return both sums of a share, its pieces in a fixed order."""
    first, _ = load_partials(partials, 0, splits, block, SPLITS)
    second, _ = load_partials(partials, 1, splits, block, SPLITS)
    return tl.sum(first, 0), tl.sum(second, 0)


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
    TILE: tl.constexpr,
):
    """Compute the moments of each piece."""
    program, split = tl.program_id(0), tl.program_id(1)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    mean, m2 = lane_moments(x, begin, stop, block, TILE)
    store_partials(partials, mean, m2, split, block)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def merge_moments(
    partials,  # [splits, 2, V, C] float32
    statistics,
    splits,
    size,  # rows of a piece
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Merge the pieces of each share and update the running statistics."""
    program = tl.program_id(0)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    mean, m2 = merge_pieces(partials, splits, size, block, SPLITS)
    finish(mean, m2, block, statistics)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def split_forward(
    x,  # [N, C, S] in either layout
    y,  # as x
    weight,  # [C] or None
    bias,  # [C] or None
    residual,  # as x, or None
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    size,  # rows of a piece
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    TILE: tl.constexpr,
):
    """Normalise each piece."""
    program, split = last_first()
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    mean, rstd = load_row(mean_in, block), load_row(rstd_in, block)
    affine = load_affine(weight, bias, mean, rstd, block)
    normalize_rows(x, y, residual, affine, begin, stop, block, TILE)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def split_gradients(
    x,  # [N, C, S] in either layout
    dy,  # as x
    output,  # as x, or None: not to be masked, or by what TILE.RELU computes
    grad_residual,  # as x, written if there is an output
    weight,  # [C] or None, read for TILE.RELU as bias is
    bias,  # [C] or None
    mean_in,  # [V, C] float32
    rstd_in,  # [V, C] float32
    partials,  # [splits, 2, V, C] float32: sums of dy and of dy * normalised x
    size,  # rows of a piece
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    TILE: tl.constexpr,
):
    """Compute the two sums of each piece that the gradients need."""
    program, split = tl.program_id(0), tl.program_id(1)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    rstd = load_row(rstd_in, block)
    affine = load_affine(weight, bias, load_row(mean_in, block), rstd, block)
    sum_dy, sum_dy_x = lane_gradients(
        x, dy, output, grad_residual, affine, begin, stop, block, TILE
    )
    store_partials(partials, sum_dy, sum_dy_x * rstd, split, block)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size"])
def split_backward(
    x,  # [N, C, S] in either layout
    dy,  # as x
    dx,  # as x
    weight,  # [C] or None
    bias,  # [C] or None, read for TILE.RELU
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
    TILE: tl.constexpr,
):
    """Write the gradient of each piece."""
    program, split = last_first()
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    rstd = load_row(rstd_in, block)
    affine = load_affine(weight, bias, load_row(mean_in, block), rstd, block)
    count = tl.maximum(block.total, 1).to(tl.float32)
    mean_dy = tl.div_rn(load_row(sum_dy_in, block), count)
    slope = tl.div_rn(load_row(sum_dy_x_in, block), count) * rstd
    differentiate_rows(x, dy, dx, affine, mean_dy, slope, begin, stop, block, TILE)


@triton.jit
def last_first():
    """Return block and piece in reverse, so that what was read last is read first."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    return program, tl.num_programs(1) - 1 - tl.program_id(1)
