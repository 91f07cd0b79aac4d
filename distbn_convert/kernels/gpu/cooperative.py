"""Kernels that hold a rank's share of a channel in the registers of several programs: one read.

For shares that do not fit in one program; one channel at a time (``TILE.CHANNELS`` is 1). Each of a
slab's ``splits`` programs holds one piece, hands in its partial results, waits for those of the
others, merges them all, and finishes its piece from registers, so that nothing is read twice, not
even from L2. That each merges what only one need to costs less than to wait for that one. See
:mod:`.waiting` for the order of memory.

Why no program waits forever: tickets are dealt slab by slab, and taken by programs that run. Let
``k`` be the first slab with a piece not yet taken: the pieces of those before it are all held by
programs that run, so that those finish, and none of those behind it is taken. So at most
``splits - 1`` programs wait for one that does not run, and it starts as soon as the device has room
for ``splits`` at once. The rule keeps ``splits`` to a quarter of the multiprocessors, so that those
that wait never fill the device, unless more than four such launches run at once, each on a stream
of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .held import (
    differentiate_tile,
    keep_packed,
    load_gradients,
    load_moments,
    normalize_tile,
)
from .pieces import exchange_partials, merge_pieces, piece_of, sum_pieces, take_piece
from .tiles import (
    corrections,
    finish,
    load_parameters,
    load_running,
    load_saved,
    locate,
    make_affine,
    rstd_of,
    store_sums,
)

__all__ = ["cooperative_backward", "cooperative_forward"]


@triton.jit
def exchange(partials, first, second, sync, slab, splits, split, begin, stop, block):
    """As :func:`.pieces.exchange_partials`; return ``begin`` and ``stop`` unchanged, and a zero.

    To the compiler they may have changed, so that it computes offsets and masks again,
    where it would keep them in registers beside the tile: one more program fits on a
    multiprocessor.
    """
    zero = exchange_partials(partials, first, second, sync, slab, splits, split, block) >> 30
    return begin + zero, stop + zero, zero


@triton.jit
def detach(lane):
    """Return ``lane`` ``[1]`` by way of a scalar, which has no layout for the tile to take on."""
    return tl.sum(lane, 0) + tl.zeros([1], tl.float32)


@triton.jit(
    do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size", "splits"]
)
def cooperative_forward(
    x,  # [N, C, S] in either layout
    y,  # as x
    weight,  # [C] or None
    bias,  # [C] or None
    residual,  # as x, or None
    statistics,
    partials,  # [splits, 2, V, C] float32: mean and sum of squared deviations
    sync,  # [1 + slabs] int32, zero: tickets, arrivals at each slab
    size,  # rows of a piece, at most TILE.ROWS
    splits,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Normalise, with exact two-pass statistics of each piece."""
    slab, split = take_piece(sync, splits)
    block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    parameters = load_parameters(weight, bias, block)
    tile, mean, m2 = load_moments(x, begin, stop, block, TILE)
    begin, stop, zero = exchange(partials, mean, m2, sync, slab, splits, split, begin, stop, block)
    tile = keep_packed(tile, zero)
    mean, m2 = merge_pieces(partials, splits, size, block, SPLITS)
    rstd = rstd_of(detach(m2), block, statistics)
    affine = make_affine(parameters, detach(mean), rstd)
    normalize_tile(tile, y, residual, affine, begin, stop, block, TILE)
    if split == 0:
        running = load_running(statistics, block)
        finish(mean, m2, rstd_of(m2, block, statistics), running, block, statistics)


@triton.jit(
    do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size", "splits"]
)
def cooperative_backward(
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
    partials,  # [splits, 2, V, C] float32: the two sums of each piece
    sync,  # [1 + slabs] int32, zero: tickets, arrivals at each slab
    size,  # rows of a piece, at most TILE.ROWS
    splits,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Differentiate: input and upstream gradient are each read once."""
    slab, split = take_piece(sync, splits)
    block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
    tile, grad, sum_dy, sum_dy_x = load_gradients(
        x, dy, output, grad_residual, affine, begin, stop, block, TILE
    )
    sum_dy_x *= rstd
    begin, stop, zero = exchange(
        partials, sum_dy, sum_dy_x, sync, slab, splits, split, begin, stop, block
    )
    tile, grad = keep_packed(tile, zero), keep_packed(grad, zero)
    sum_dy, sum_dy_x = sum_pieces(partials, splits, block, SPLITS)
    if split == 0:
        store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)
    mean_dy, slope = corrections(detach(sum_dy), detach(sum_dy_x), rstd, block)
    differentiate_tile(tile, grad, dx, affine, mean_dy, slope, begin, stop, block, TILE)
