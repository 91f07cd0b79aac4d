"""Kernels that hold a rank's share of a channel in registers: the input is read once.

One program for each rank and block of channels, one tile for its whole share.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .held import differentiate_tile, keep_packed, load_gradients, load_moments, normalize_tile
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
    running = load_running(statistics, block)
    # Of many channels, these would take the registers that hold the tile.
    if not TILE.LAST:
        parameters = load_parameters(weight, bias, block)
    tile, mean, m2 = load_moments(x, 0, block.total, block, TILE)
    rstd = rstd_of(m2, block, statistics)
    finish(mean, m2, rstd, running, block, statistics)
    if TILE.LAST:
        parameters = load_parameters(weight, bias, block)
    affine = make_affine(parameters, mean, rstd)
    tile = keep_packed(tile, channels >> 30)
    normalize_tile(tile, y, residual, affine, 0, block.total, block, TILE)


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
    affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
    tile, grad, sum_dy, sum_dy_x = load_gradients(
        x, dy, output, grad_residual, affine, 0, block.total, block, TILE
    )
    sum_dy_x *= rstd
    store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)
    mean_dy, slope = corrections(sum_dy, sum_dy_x, rstd, block)
    # So that offsets and masks need not be kept beside the tile either.
    zero = channels >> 30
    tile, grad, stop = keep_packed(tile, zero), keep_packed(grad, zero), block.total + zero
    differentiate_tile(tile, grad, dx, affine, mean_dy, slope, zero, stop, block, TILE)
