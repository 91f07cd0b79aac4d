"""Which kernel runs, with which tile: a static rule, so that nothing is tuned at run time.

Tuning at run time would repeat the update of the running statistics, stall the first steps and
break CUDA-graph capture. The limits below come from compiling for sm_90 (registers, no spills);
the byte limits are estimates for a GPU with 132 multiprocessors and 50 MB of L2.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Choice", "select_kernel"]

_MAX_WARPS = 16
# Fewer programs than this leave multiprocessors idle, so that a share must be cut.
_ENOUGH_PROGRAMS = 256
# Shares that are live at once should stay in L2 for the second sweep of a loop: 132 programs of
# 32 warps, or 264 of 16.
_L2_BYTES = 26_500_000
_MULTIPROCESSORS = 132
# How many programs a launch that cuts shares aims at, and the most pieces that a merge holds.
_SPLIT_PROGRAMS = 1056
_MAX_SPLITS = 128


@dataclass(frozen=True)
class Choice:
    """A kernel and its tile.

    Args:
        kind: ``"resident"``, ``"loop"`` or ``"split"``.
        rows: values of a channel in one tile, a power of two.
        channels: channels in one tile, a power of two; 1 where channels are not adjacent.
        warps: warps of a program.
        splits: pieces of a share; 1 unless ``"split"``.
        size: rows of a piece, a multiple of ``rows``; 0 unless ``"split"``.
    """

    kind: str
    rows: int
    channels: int
    warps: int
    splits: int = 1
    size: int = 0


def select_kernel(
    *,
    backward: bool,
    channels_last: bool,
    itemsize: int,
    vector: int,
    channels: int,
    values: int,
    vt_world_size: int,
) -> Choice:
    """Choose the kernel of a share.

    Args:
        backward: the pass.
        channels_last: whether channels are the fast axis.
        itemsize: bytes of a value of the input.
        vector: adjacent values that a thread can move at once.
        channels: C.
        values: values of one channel of the largest share, ``ceil(N / V) * S``.
        vt_world_size: number of virtual ranks V.
    """
    rows = _power_of_two(values)
    widths = _channel_widths(channels, itemsize) if channels_last else [1]
    limit = _resident_values(backward, channels_last, itemsize, vector) * 32 * _MAX_WARPS
    for width in widths:
        if rows * width <= limit:
            return Choice("resident", rows, width, _resident_warps(rows * width, backward))
    width = widths[-1] if len(widths) < 3 else widths[1]
    programs = -(-channels // width) * vt_world_size
    share = values * width * itemsize * (2 if backward else 1)
    if programs >= _ENOUGH_PROGRAMS and (not channels_last or _fits_l2(share, 1)):
        if channels_last:
            return Choice("loop", _tile(16, width, 16), width, 16)
        warps = 16 if _fits_l2(share, 2) else 32
        return Choice("loop", _tile(warps, width, 8), width, warps)
    width = widths[0]
    programs = -(-channels // width) * vt_world_size
    tile = _tile(8, width, 16 if itemsize == 2 else 8)
    wanted = min(-(-_SPLIT_PROGRAMS // programs), _MAX_SPLITS)
    size = -(-values // (wanted * tile)) * tile
    return Choice("split", tile, width, 8, -(-values // size), size)


def _power_of_two(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()


def _resident_values(backward: bool, channels_last: bool, itemsize: int, vector: int) -> int:
    """Return how many values a thread can hold without spilling.

    The backward holds that many of two tensors; values that are moved one by one, or along
    channels, need registers for their addresses.
    """
    if backward or vector == 1 or (channels_last and itemsize == 4):
        return 32
    return 64


def _channel_widths(channels: int, itemsize: int) -> list[int]:
    """Return channels that make 128, 64 and 32 adjacent bytes; all there are if fewer."""
    every = _power_of_two(channels)
    return sorted({min(every, size // itemsize) for size in (128, 64, 32)}, reverse=True)


def _resident_warps(values: int, backward: bool) -> int:
    """Return warps of 16 values a thread, 8 in the backward, which keeps two tensors."""
    wanted = values // (32 * (8 if backward else 16))
    return min(max(wanted, 1), _MAX_WARPS)


def _fits_l2(share: int, programs: int) -> bool:
    """Say whether shares stay in L2 with that many programs on each multiprocessor."""
    return share * _MULTIPROCESSORS * programs <= _L2_BYTES


def _tile(warps: int, width: int, values: int) -> int:
    """Return the rows of a tile with that many values for each thread."""
    return max(warps * 32 * values // width, 1)
