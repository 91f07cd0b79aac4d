"""Which GPU kernel the rule takes, with which tile."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from distbn_convert.kernels.gpu import rule
from distbn_convert.kernels.gpu.rule import Choice, select_kernel

from .aot import RESNET50

LAYERS = [(channels, side * side) for channels, side in RESNET50]


def choose(channels: int, positions: int, **changes: Any) -> Choice:
    """The rule's answer for ResNet-50's batch of 256 over 8 ranks in bf16, or with changes."""
    values = {
        "backward": False,
        "channels_last": False,
        "itemsize": 2,
        "vector": 8,
        "channels": channels,
        "samples": 32,
        "values": 32 * positions,
        "vt_world_size": 8,
    }
    return select_kernel(**(values | changes))


@pytest.mark.parametrize(
    ("layer", "changes", "kind"),
    [
        ((2048, 49), {"vector": 1}, "planes"),
        ((2048, 49), {"vector": 1, "samples": 33, "values": 33 * 49}, "resident"),
        ((2048, 729), {"vector": 1}, "loop"),
        ((1024, 196), {}, "resident"),
        ((512, 784), {}, "resident"),
        ((512, 784), {"backward": True}, "loop"),
        ((512, 784), {"backward": True, "itemsize": 4, "vector": 4}, "loop"),
        ((512, 784), {"vector": 1}, "loop"),
        ((256, 3136), {}, "loop"),
        ((256, 3136), {"backward": True}, "loop"),
        ((256, 3136), {"itemsize": 4, "vector": 4}, "cooperative"),
        ((16, 3136), {}, "cooperative"),
        ((64, 12544), {}, "cooperative"),
        ((64, 12544), {"backward": True}, "cooperative"),
        ((64, 12544), {"multiprocessors": 14}, "ticketed"),
        ((64, 12544), {"itemsize": 4, "vector": 4}, "cooperative"),
        ((64, 12544), {"itemsize": 4, "vector": 4, "residual": True}, "cooperative"),
        ((64, 12544), {"itemsize": 4, "vector": 4, "backward": True}, "cooperative"),
        ((16, 12544), {}, "cooperative"),
        ((256, 3136), {"vt_world_size": 1, "samples": 256, "values": 256 * 3136}, "ticketed"),
        ((256, 3136), {"vt_world_size": 1, "values": 2**25}, "split"),
        ((2048, 49), {"channels_last": True}, "loop"),
        ((2048, 49), {"channels_last": True, "backward": True}, "loop"),
        ((256, 49), {"channels_last": True}, "split"),
        ((1024, 196), {"channels_last": True}, "ticketed"),
        ((256, 196), {"channels_last": True}, "split"),
        ((256, 3136), {"channels_last": True}, "split"),
        ((256, 3136), {"channels_last": True, "backward": True}, "split"),
        ((64, 12544), {"channels_last": True}, "split"),
        ((512, 1), {"channels_last": True}, "resident"),
    ],
    ids=str,
)
def test_rule_reads_once_what_fits_and_cuts_what_would_idle(
    layer: tuple[int, int], changes: dict[str, Any], kind: str
) -> None:
    assert choose(*layer, **changes).kind == kind


# Multiprocessors and MiB of L2 of other GPUs, in the order of their releases.
A100, RTX_3090, A10, RTX_4090, B200 = (108, 40), (82, 6), (72, 6), (128, 72), (148, 126)


@pytest.mark.parametrize("device", [A100, RTX_4090, B200], ids=str)
def test_as_much_l2_for_each_multiprocessor_keeps_as_much(
    device: tuple[int, int],
) -> None:
    multiprocessors, mebibytes = device
    for layer, backward, last in itertools.product(LAYERS, (False, True), (False, True)):
        settings = {"backward": backward, "channels_last": last, "multiprocessors": multiprocessors}
        choice = choose(*layer, **settings, l2_bytes=mebibytes * 2**20)
        kept = choose(*layer, **settings, l2_bytes=2**30)
        assert choice == kept or (kept.kind == "ticketed" and choice.depth < kept.depth)


@pytest.mark.parametrize("device", [RTX_3090, A10], ids=str)
@pytest.mark.parametrize(
    ("layer", "changes", "kind"),
    [
        ((512, 784), {}, "resident"),
        ((512, 784), {"backward": True}, "cooperative"),
        ((512, 784), {"backward": True, "itemsize": 4, "vector": 4}, "cooperative"),
        ((256, 3136), {}, "cooperative"),
        ((256, 3136), {"backward": True}, "cooperative"),
        ((256, 196), {"vector": 4, "backward": True}, "resident"),
        ((2048, 49), {"channels_last": True}, "loop"),
        ((1024, 196), {"channels_last": True}, "split"),
        ((256, 3136), {"vt_world_size": 1, "samples": 256, "values": 256 * 3136}, "split"),
    ],
    ids=str,
)
def test_what_little_l2_would_not_keep_is_held_or_cut(
    layer: tuple[int, int], changes: dict[str, Any], kind: str, device: tuple[int, int]
) -> None:
    multiprocessors, mebibytes = device
    resources = {"multiprocessors": multiprocessors, "l2_bytes": mebibytes * 2**20}
    assert choose(*layer, **changes, **resources).kind == kind


def test_what_the_readme_counts_of_a_gpu_with_little_l2_is_moved() -> None:
    """Of the contiguous bf16 backward; a second read comes from memory where L2 is little."""
    multiprocessors, mebibytes = RTX_3090
    moved = {mebibytes * 2**20: 0, 2**30: 0}
    for (channels, positions), count in zip(LAYERS, RESNET50.values(), strict=True):
        for l2_bytes in moved:
            vector = math.gcd(positions, 8)
            resources = {"multiprocessors": multiprocessors, "l2_bytes": l2_bytes}
            kind = choose(channels, positions, backward=True, vector=vector, **resources).kind
            tensors = 3 if kind in ("planes", "resident", "cooperative") else 5
            moved[l2_bytes] += tensors * count * channels * positions
    least = 3 * sum(c * s * n for (c, s), n in zip(LAYERS, RESNET50.values(), strict=True))
    assert [round(sum / least, 2) for sum in moved.values()] == [1.05, 1.51]


@pytest.mark.parametrize("enabled", [*({kind} for kind in sorted(rule.WAITING)), set()], ids=str)
def test_kernels_that_wait_can_be_left_out(
    enabled: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "ENABLED", frozenset(enabled))
    kinds = {
        choose(channels, positions, channels_last=last, backward=backward).kind
        for channels, positions in LAYERS
        for backward in (False, True)
        for last in (False, True)
    }
    assert kinds & rule.WAITING == enabled
    first = next((kind for kind in ("cooperative", "ticketed") if kind in enabled), "split")
    assert choose(64, 12544).kind == first


@pytest.mark.parametrize(
    ("layer", "last", "itemsize", "residual", "staged"),
    [
        ((64, 3136), False, 2, False, (8192, 2)),
        ((64, 3136), False, 2, True, (8192, 2)),
        ((512, 784), False, 2, False, (4096, 2)),
        ((512, 784), False, 4, False, (8192, 2)),
        ((512, 784), False, 4, True, (8192, 1)),
        ((2048, 49), True, 2, False, (64, 2)),
        ((2048, 49), True, 4, False, (128, 2)),
        ((2048, 49), True, 4, True, (128, 1)),
    ],
    ids=str,
)
def test_staged_loops_ask_for_the_next_tile_if_they_have_registers(
    layer: tuple[int, int],
    last: bool,
    itemsize: int,
    residual: bool,
    staged: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = {"channels_last": last, "itemsize": itemsize, "vector": 16 // itemsize}
    changes |= {"residual": residual}
    assert choose(*layer, backward=True, **changes).stages == 1
    forward = choose(*layer, **changes)
    monkeypatch.setattr(rule, "ENABLED", rule.ENABLED | {"staged"})
    choice = choose(*layer, backward=True, **changes)
    assert (choice.kind, choice.rows, choice.stages) == ("loop", *staged)
    assert choose(*layer, **changes) == forward


def test_loops_that_l2_would_lose_are_swept_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "ENABLED", rule.ENABLED | {"swept"})
    swept = [
        (layer, backward)
        for layer in LAYERS
        for backward in (False, True)
        if choose(*layer, backward=backward).kind == "swept"
    ]
    assert swept == [((64, 3136), True), ((256, 3136), True), ((128, 3136), True)]
    choice = choose(64, 3136, backward=True)
    assert (choice.splits, choice.size, choice.rows) == (4, 25088, 4096)
    assert choose(64, 3136, backward=True, multiprocessors=15).kind == "loop"


def test_programs_that_wait_for_one_are_few_beside_those_that_a_device_holds() -> None:
    for multiprocessors, most in ((4, 0), (8, 2), (14, 2), (72, 13), (108, 25), (132, 25)):
        pieces = [0]
        for values, backward, itemsize in itertools.product(
            (25088, 50176, 100352, 401408, 802816), (False, True), (2, 4)
        ):
            choice = choose(
                1,
                1,
                values=values,
                backward=backward,
                itemsize=itemsize,
                multiprocessors=multiprocessors,
            )
            if choice.kind == "cooperative":
                pieces.append(choice.splits)
                assert 4 * choice.splits <= multiprocessors
        assert max(pieces) == most


@pytest.mark.parametrize(
    ("layer", "changes", "slabs"),
    [
        ((64, 3136), {}, (32, 128, 1)),
        ((512, 784), {}, (64, 64, 2)),
        ((256, 196), {}, (64, 16, 8)),
        ((64, 3136), {"backward": True}, (16, 128, 1)),
        ((256, 196), {"backward": True}, (64, 32, 4)),
        ((512, 784), {"multiprocessors": 108}, (64, 54, 2)),
        ((64, 12544), {}, None),
        ((512, 784), {"itemsize": 4, "vector": 4}, None),
        ((508, 784), {"vector": 4}, None),
        ((512, 784), {"residual": True}, None),
        ((32, 784), {"vt_world_size": 1}, None),
    ],
    ids=str,
)
def test_pipelined_programs_hold_wide_slabs_and_all_run_at_once(
    layer: tuple[int, int],
    changes: dict[str, Any],
    slabs: tuple[int, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose(*layer, channels_last=True, **changes).kind != "pipelined"
    monkeypatch.setattr(rule, "ENABLED", rule.WAITING)
    choice = choose(*layer, channels_last=True, **changes)
    found = choice.channels, choice.splits, choice.groups
    assert (found if choice.kind == "pipelined" else None) == slabs


@pytest.mark.parametrize("enabled", [rule.ENABLED, rule.WAITING], ids=sorted)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_choice_covers_its_share_with_legal_tiles(
    itemsize: int,
    backward: bool,
    last: bool,
    enabled: frozenset[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rule, "ENABLED", enabled)
    for channels in (1, 3, 24, 64, 2048):
        for values in (1, 2, 7, 98, 6272, 25088, 401408, 2**31 + 5):
            for ranks in (1, 8, 1000):
                choice = select_kernel(
                    backward=backward,
                    channels_last=last,
                    itemsize=itemsize,
                    vector=8 if last and channels % 8 == 0 else 1,
                    channels=channels,
                    samples=1,
                    values=values,
                    vt_world_size=ranks,
                )
                for size in (choice.rows, choice.channels, choice.warps):
                    assert size & (size - 1) == 0
                    assert size >= 1
                assert choice.rows * choice.channels <= 2**17
                assert choice.warps <= 32
                assert choice.splits <= 128
                covered = {
                    "resident": choice.rows,
                    "planes": choice.rows * values,
                    "loop": values,
                }.get(choice.kind, choice.splits * choice.size)
                assert covered >= values
                if choice.kind == "pipelined":
                    assert choice.size <= choice.rows
                    assert choice.rows * choice.channels <= 2**15 // (1 + backward)
                    assert choice.splits * choice.groups <= 128
                elif choice.kind in ("cooperative", "swept"):
                    assert choice.kind == "swept" or choice.size <= choice.rows
                    assert choice.size % 8 == 0  # what a thread may move at once
                else:
                    assert choice.size % choice.rows == 0
                cut = choice.kind in ("split", "swept", "ticketed", "cooperative", "pipelined")
                assert not cut or (choice.splits - 1) * choice.size < values
                if choice.kind == "ticketed":
                    assert 2 <= choice.depth <= -(-channels // choice.channels) * ranks
