"""Kernels that read a share twice in one launch, ``depth`` slabs apart, the second time from L2.

For maps that are too large for registers. A *slab* is one rank's share of a block
of channels; it is cut into ``splits`` pieces, and each piece is visited by two programs: one
gathers its statistics, the other applies those of its whole slab. Programs take tickets, and
tickets are dealt so that slab ``k`` is applied right before the statistics of slab ``k + depth``
are gathered: with ``depth`` slabs in L2, what is applied is still there, and with two or more there
is always other work between a slab's statistics and the wait for them.

Why no program waits forever: one waits only for statistics whose tickets come before its own. A
ticket is taken by a program that runs already, and one that gathers never waits, so that those
all end, however few programs run at once. The order of ``program_id`` is not relied upon.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pieces import merge_pieces, piece_of, store_partials, sum_pieces
from .sweeps import differentiate_rows, lane_gradients, lane_moments, normalize_rows
from .tiles import (
    corrections,
    divide,
    finish,
    load_parameters,
    load_row,
    load_running,
    load_saved,
    locate,
    make_affine,
    rstd_of,
    store_sums,
)
from .waiting import announce, arrive, await_count, counter_of, take_ticket

__all__ = ["ticketed_backward", "ticketed_forward"]


@triton.jit
def take_turn(sync, splits, depth):
    """Return whether to gather, which slab and which of its pieces.

    Phases of ``splits`` tickets: gather slabs 0 to ``depth - 1``, then apply one and gather one
    in turn, then apply the last ``depth``.
    """
    ticket = take_ticket(sync)
    slabs = divide(tl.num_programs(0), 2 * splits)
    phase = divide(ticket, splits)
    after = tl.maximum(phase - depth, 0)
    paired = after < 2 * (slabs - depth)
    gathers = (phase < depth) | (paired & (after % 2 == 1))
    slab = tl.where(paired, after // 2, after - (slabs - depth))
    slab = tl.where(gathers, tl.where(phase < depth, phase, depth + after // 2), slab)
    return gathers, slab, ticket - phase * splits


@triton.jit(
    do_not_specialize=[
        "positions", "quotient", "remainder", "vt_world_size", "size", "splits", "depth",
    ]
)  # fmt: skip
def ticketed_forward(
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
    depth,  # slabs between the two visits, at most all
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Normalise: one program gathers moments of a piece, another normalises it."""
    gathers, slab, split = take_turn(sync, splits, depth)
    block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    counter = counter_of(sync, slab)
    if gathers:
        mean, m2 = lane_moments(x, begin, stop, block, TILE)
        store_partials(partials, mean, m2, split, block)
        if arrive(counter) == splits - 1:
            running = load_running(statistics, block)
            mean, m2 = merge_pieces(partials, splits, size, block, SPLITS)
            finish(mean, m2, rstd_of(m2, block, statistics), running, block, statistics)
            announce(counter)
    else:
        parameters = load_parameters(weight, bias, block)
        await_count(counter, splits + 1)
        mean, rstd = load_row(statistics.mean, block), load_row(statistics.rstd, block)
        affine = make_affine(parameters, mean, rstd)
        normalize_rows(x, y, residual, affine, begin, stop, block, TILE, ".cs")


@triton.jit(
    do_not_specialize=[
        "positions", "quotient", "remainder", "vt_world_size", "size", "splits", "depth",
    ]
)  # fmt: skip
def ticketed_backward(
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
    depth,  # slabs between the two visits, at most all
    channels,
    positions,
    quotient,
    remainder,
    vt_world_size,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Differentiate: one program gathers the sums of a piece, another writes its gradient."""
    gathers, slab, split = take_turn(sync, splits, depth)
    block = locate(slab, channels, positions, quotient, remainder, vt_world_size, TILE)
    begin, stop = piece_of(split, size, block)
    counter = counter_of(sync, slab)
    if gathers:
        affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
        sum_dy, sum_dy_x = lane_gradients(
            x, dy, output, grad_residual, affine, begin, stop, block, TILE
        )
        store_partials(partials, sum_dy, sum_dy_x * rstd, split, block)
        if arrive(counter) == splits - 1:
            sum_dy, sum_dy_x = sum_pieces(partials, splits, block, SPLITS)
            store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)
            announce(counter)
    else:
        affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
        await_count(counter, splits + 1)
        sum_dy, sum_dy_x = load_row(sum_dy_out, block), load_row(sum_dy_x_out, block)
        mean_dy, slope = corrections(sum_dy, sum_dy_x, rstd, block)
        if output is not None:
            dy = grad_residual
        differentiate_rows(x, dy, dx, affine, mean_dy, slope, begin, stop, block, TILE, ".cs")
