"""Kernels that give a rank's share of a channel to several programs, each of which reads its piece
twice, the second time hopefully from L2.

As :mod:`.loop`, which gives a share to one program, so that the shares of all programs at once may
be more than L2 holds until they are read again; here those are fewer by ``splits``. Each program
gathers its piece, hands in its partial results and waits for those of the others, as in
:mod:`.cooperative`, whose reasons why no program waits forever hold here too. See :mod:`.waiting`
for the order of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import exchange_partials, merge_pieces, piece_of, sum_pieces, take_piece
from .sweeps import differentiate_rows, lane_gradients, lane_moments, normalize_rows
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

__all__ = ["swept_backward", "swept_forward"]


@triton.jit(
    do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size", "splits"]
)
def swept_forward(
    x,  # [N, C, S] in either layout
    y,  # as x
    weight,  # [C] or None
    bias,  # [C] or None
    residual,  # as x, or None
    statistics,
    partials,  # [splits, 2, V, C] float32: mean and sum of squared deviations
    sync,  # [1 + slabs] int32, zero: tickets, arrivals at each slab
    size,  # rows of a piece
    splits,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Normalise each piece by the statistics of its share."""
    slab, split = take_piece(sync, splits)
    block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    parameters = load_parameters(weight, bias, block)
    mean, m2 = lane_moments(x, begin, stop, block, TILE)
    exchange_partials(partials, mean, m2, sync, slab, splits, split, block)
    mean, m2 = merge_pieces(partials, splits, size, block, SPLITS)
    rstd = rstd_of(m2, block, statistics)
    if split == 0:
        finish(mean, m2, rstd, load_running(statistics, block), block, statistics)
    affine = make_affine(parameters, mean, rstd)
    normalize_rows(x, y, residual, affine, begin, stop, block, TILE, ".cs")


@triton.jit(
    do_not_specialize=["positions", "quotient", "remainder", "vt_world_size", "size", "splits"]
)
def swept_backward(
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
    size,  # rows of a piece
    splits,
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Differentiate :func:`swept_forward`."""
    slab, split = take_piece(sync, splits)
    block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
    sum_dy, sum_dy_x = lane_gradients(
        x, dy, output, grad_residual, affine, begin, stop, block, TILE
    )
    # Whose barrier also orders what is written to grad_residual before it is read below.
    exchange_partials(partials, sum_dy, sum_dy_x * rstd, sync, slab, splits, split, block)
    sum_dy, sum_dy_x = sum_pieces(partials, splits, block, SPLITS)
    if split == 0:
        store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)
    mean_dy, slope = corrections(sum_dy, sum_dy_x, rstd, block)
    if output is not None:
        dy = grad_residual
    differentiate_rows(x, dy, dx, affine, mean_dy, slope, begin, stop, block, TILE, ".cs")
