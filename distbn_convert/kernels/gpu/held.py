"""Arithmetic on a tile that stays in registers, for :mod:`.resident` and :mod:`.cooperative`.

It is one program's rows ``begin`` to ``stop`` of a block, read from memory once, kept in the
input's own dtype and widened whenever it is used, which can halve the registers.

Products are masked, not their factors: a product that two threads exchange to add it up must not
be fused into the sum, which would leave each with other bits; and the mask is applied once to
what a thread has added up of adjacent values, not to each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import lane_offset, place, reciprocal, rectify, row_offset, transform

__all__ = ["differentiate_tile", "load_gradients", "load_moments", "normalize_tile"]


@triton.jit
def load_moments(x, begin, stop, block, TILE: tl.constexpr):
    """Return the tile, its mean and its sum of squared deviations, by an exact two-pass."""
    x += block.start
    offsets, mask = place(begin, stop, block, TILE)
    # Sums around the first value, so that a large mean costs no digits. Asked for before the tile,
    # it takes fewer registers.
    first = x + row_offset(begin, block, TILE) + lane_offset(block, TILE)
    seen = block.lanes < tl.where(begin < stop, block.channels, 0)
    pivot = tl.load(first, mask=seen, other=0.0).to(tl.float32)
    tile = tl.load(x + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    part = reciprocal(tl.maximum(stop - begin, 1).to(tl.float32))
    deviation = tl.where(mask, tile.to(tl.float32) - pivot[None, :], 0.0)
    mean = pivot + tl.sum(deviation, 0) * part
    deviation = tile.to(tl.float32) - mean[None, :]
    return tile, mean, tl.sum(tl.where(mask, deviation * deviation, 0.0), 0)


@triton.jit
def normalize_tile(tile, y, residual, affine, begin, stop, block, TILE: tl.constexpr):
    """Write ``relu?((tile - mean) * scale + shift + residual?)``."""
    offsets, mask = place(begin, stop, block, TILE)
    out = transform(tile, affine)
    if residual is not None:
        added = residual + block.start + offsets
        out += tl.load(added, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if TILE.RELU:
        out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + block.start + offsets, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def load_gradients(x, dy, output, grad_residual, affine, begin, stop, block, TILE: tl.constexpr):
    """Return tiles of ``x`` and of ``dy``, and the sums of ``dy`` and ``dy * (x - mean)``.

    ``dy`` counts where the ReLU lets it through; with ``output``, which says where that is, it
    is written to ``grad_residual``.
    """
    offsets, mask = place(begin, stop, block, TILE)
    tile = x + block.start + offsets
    tile = tl.load(tile, mask=mask, other=0.0, eviction_policy="evict_first")
    grad = dy + block.start + offsets
    grad = tl.load(grad, mask=mask, other=0.0, eviction_policy="evict_first")
    if output is not None:
        out = output + block.start + offsets
        grad = rectify(grad, tl.load(out, mask=mask, other=0.0, eviction_policy="evict_first"))
        tl.store(grad_residual + block.start + offsets, grad, mask=mask)
    elif TILE.RELU:
        grad = rectify(grad, transform(tile, affine).to(tile.dtype))
    sum_dy = tl.sum(grad.to(tl.float32), 0)
    centred = tile.to(tl.float32) - affine.mean[None, :]
    product = tl.where(mask, grad.to(tl.float32) * centred, 0.0)
    return tile, grad, sum_dy, tl.sum(product, 0)


@triton.jit
def differentiate_tile(
    tile, grad, dx, affine, mean_dy, slope, begin, stop, block, TILE: tl.constexpr
):
    """Write ``(grad - mean_dy - (tile - mean) * slope) * scale``."""
    offsets, mask = place(begin, stop, block, TILE)
    out = grad.to(tl.float32) - mean_dy[None, :]
    centred = tile.to(tl.float32) - affine.mean[None, :]
    out = (out - centred * slope[None, :]) * affine.scale[None, :]
    tl.store(dx + block.start + offsets, out.to(dx.dtype.element_ty), mask=mask)
