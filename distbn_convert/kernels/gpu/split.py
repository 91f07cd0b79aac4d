"""Kernels that cut a rank's share of a channel between programs: for anything, at two reads.

Where ranks times blocks of channels are too few to fill the device, or a share is too large for
L2, each share is cut along its values into ``splits`` pieces. One launch writes the partial
results of each piece, one merges them in a fixed order, one applies them, last piece first (and
sums what the ranks have, in a backward).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import merge_pieces, piece_of, store_partials, store_totals, sum_pieces
from .sweeps import differentiate_rows, lane_gradients, lane_moments, normalize_rows
from .tiles import (
    corrections,
    finish,
    load_row,
    load_running,
    load_saved,
    locate,
    rstd_of,
    store_sums,
)

__all__ = [
    "merge_gradients",
    "merge_moments",
    "split_backward",
    "split_forward",
    "split_gradients",
    "split_moments",
]


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
    running = load_running(statistics, block)
    mean, m2 = merge_pieces(partials, splits, size, block, SPLITS)
    finish(mean, m2, rstd_of(m2, block, statistics), running, block, statistics)


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
    affine, _ = load_saved(weight, bias, mean_in, rstd_in, block)
    normalize_rows(x, y, residual, affine, begin, stop, block, TILE, "")


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
    affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
    sum_dy, sum_dy_x = lane_gradients(
        x, dy, output, grad_residual, affine, begin, stop, block, TILE
    )
    store_partials(partials, sum_dy, sum_dy_x * rstd, split, block)


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def merge_gradients(
    partials,  # [splits, 2, V, C] float32
    sum_dy_out,  # [V, C] float32: each rank's share of dbias
    sum_dy_x_out,  # [V, C] float32: and of dweight
    splits,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sum the pieces of each share."""
    program = tl.program_id(0)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    sum_dy, sum_dy_x = sum_pieces(partials, splits, block, SPLITS)
    store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)


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
    dbias,  # [C] float32
    dweight,  # [C] float32
    size,  # rows of a piece
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    TILE: tl.constexpr,
):
    """Write the gradient of each piece; for the last of each channel, which start first, dbias
    and dweight."""
    program, split = last_first()
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    if (split == tl.num_programs(1) - 1) & (block.rank == vt_world_size - 1):
        store_totals(sum_dy_in, sum_dy_x_in, dbias, dweight, block.lanes, channels, vt_world_size)
    begin, stop = piece_of(split, size, block)
    affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
    sum_dy, sum_dy_x = load_row(sum_dy_in, block), load_row(sum_dy_x_in, block)
    mean_dy, slope = corrections(sum_dy, sum_dy_x, rstd, block)
    differentiate_rows(x, dy, dx, affine, mean_dy, slope, begin, stop, block, TILE, "")


@triton.jit
def last_first():
    """Return block and piece in reverse, so that what was read last is read first."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    return program, tl.num_programs(1) - 1 - tl.program_id(1)
