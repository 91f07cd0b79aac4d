"""Arithmetic on a tile that stays in registers, for :mod:`.resident`, :mod:`.cooperative`
and the end of :mod:`.pipelined`.

It is one program's rows ``begin`` to ``stop`` of a block, read from memory once, kept in the
input's own dtype and widened whenever it is used, which can halve the registers. Also for
:mod:`.planes`, whose tile lies otherwise: what a mean's rounding has lost.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .tiles import differentiate, place, reciprocal, rectify, sum_products, transform

__all__ = [
    "correct",
    "differentiate_tile",
    "keep_packed",
    "load_gradients",
    "load_moments",
    "normalize_tile",
]


# Triton's interpreter has no inline assembly.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_moments(x, begin, stop, block, TILE: tl.constexpr):
    """Return the tile, its mean and its sum of squared deviations, by an exact two-pass."""
    offsets, mask = place(begin, stop, block, TILE)
    tile = tl.load(x + block.start + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    part = reciprocal(tl.maximum(stop - begin, 1).to(tl.float32))
    total = tl.sum(tile.to(tl.float32), 0)
    # Rounded by name: what it is subtracted from must not be fused with the product.
    mean = tl.fma(total, part, tl.zeros_like(total))
    tile = keep_packed(tile, stop >> 30)
    deviation = tl.where(mask, tile.to(tl.float32) - mean[None, :], 0.0)
    m2 = sum_products(deviation, deviation, TILE)
    if tile.dtype == tl.float32:
        mean, m2 = correct(mean, m2, tl.sum(deviation, 0), stop - begin)
    return tile, mean, m2


@triton.jit
def correct(mean, m2, rest, count):
    """Return the moments, with what the sum of values of a large mean has lost: ``rest``, the sum
    of their deviations. Values of 16 bits have lost as much before they were summed.
    """
    shift = rest * reciprocal(tl.maximum(count, 1).to(tl.float32))
    return mean + shift, tl.maximum(m2 - rest * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def keep_packed(tile, zero):
    """Return a tile unchanged, of which the compiler does not know that it is the same.

    It would widen 16-bit values once and keep them so, in twice the registers, from one use to the
    next. ``zero`` is a scalar that is, though the compiler cannot know.
    """
    if tile.dtype.primitive_bitwidth == 16 and not _INTERPRETED:
        zeros = tl.zeros(tile.shape, tl.int16) + zero.to(tl.int16)
        tile = tl.inline_asm_elementwise(
            "or.b32 $0, $1, $2;", "=r,r,r", [tile, zeros], dtype=tile.dtype, is_pure=True, pack=2
        )
    return tile


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
    return tile, grad, sum_dy, sum_products(grad.to(tl.float32), centred, TILE)


@triton.jit
def differentiate_tile(
    tile, grad, dx, affine, mean_dy, slope, begin, stop, block, TILE: tl.constexpr
):
    """Write ``(grad - mean_dy - (tile - mean) * slope) * scale``."""
    offsets, mask = place(begin, stop, block, TILE)
    out = differentiate(tile, grad, affine, mean_dy, slope)
    tl.store(dx + block.start + offsets, out.to(dx.dtype.element_ty), mask=mask)
