"""Kernels that read a rank's share of a channel twice, the second time hopefully from L2.

One program for each rank and block of channels, as in :mod:`.resident`, for shares that do not
fit in registers. The second sweep runs backwards, so that it begins with what was read last.
"""

from __future__ import annotations

import triton
import triton.language as tl

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

__all__ = ["loop_backward", "loop_forward"]


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def loop_forward(
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
    """Normalise each rank's share."""
    program = tl.program_id(0)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    parameters, running = load_parameters(weight, bias, block), load_running(statistics, block)
    mean, m2 = lane_moments(x, 0, block.total, block, TILE)
    rstd = rstd_of(m2, block, statistics)
    finish(mean, m2, rstd, running, block, statistics)
    affine = make_affine(parameters, mean, rstd)
    normalize_rows(x, y, residual, affine, 0, block.total, block, TILE, ".cs")


@triton.jit(do_not_specialize=["positions", "quotient", "remainder", "vt_world_size"])
def loop_backward(
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
    """Differentiate :func:`loop_forward`."""
    program = tl.program_id(0)
    block = locate(program, channels, positions, quotient, remainder, vt_world_size, TILE)
    affine, rstd = load_saved(weight, bias, mean_in, rstd_in, block)
    sum_dy, sum_dy_x = lane_gradients(
        x, dy, output, grad_residual, affine, 0, block.total, block, TILE
    )
    sum_dy_x *= rstd
    store_sums(sum_dy_out, sum_dy_x_out, sum_dy, sum_dy_x, block)
    mean_dy, slope = corrections(sum_dy, sum_dy_x, rstd, block)
    if output is not None:
        # What is read below may have been written by another thread of this program.
        tl.debug_barrier()
        dy = grad_residual
    differentiate_rows(x, dy, dx, affine, mean_dy, slope, 0, block.total, block, TILE, ".cs")
