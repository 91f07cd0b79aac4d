"""The GPU kernels as the compiler made them, on a GPU in NumPy: right, and in a certain order."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from distbn_convert.kernels import gpu
from distbn_convert.kernels.gpu import rule
from distbn_convert.kernels.gpu.rule import Choice, select_kernel

from .emulator import Launch, emulated_device
from .kernel_cases import (
    CASES,
    DIVIDED,
    KINDS,
    WORDS,
    Case,
    check,
    check_nan,
    check_tiny,
    check_underflow,
    compute,
    force,
    make,
)
from .versions import COMPILES, NO_KERNELS

if not COMPILES:
    pytest.skip(NO_KERNELS, allow_module_level=True)

from distbn_convert.kernels.gpu import launch

# Of the programs that wait for one, all of a slab must run at once.
ROOM = 40


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
    launch._sizes.clear()


@pytest.fixture
def launches() -> Iterator[list[Launch]]:
    with emulated_device(ROOM) as launches:
        yield launches


def check_all(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    for case in cases:
        monkeypatch.setattr(launch, "_NARROW", 0 if case.wide else 2**31 - 2**20)
        torch.manual_seed(0)
        check(case, make(case))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_agree_with_the_definition(
    kind: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "select_kernel", force(kind))
    check_all(CASES, monkeypatch)
    words = kind == "pipelined"
    check_nan(**(WORDS if words else {}))
    check_underflow(last=words)
    check_tiny()
    assert len(launches) >= 2 * len(CASES)
    if kind == "staged":  # of 32 bits: a thread must have 4 adjacent bytes
        names = [{each.name for each in one.program.instructions} for one in launches]
        assert sum("cp.async.commit_group" in each for each in names) > len(CASES) // 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capability", [75, 100])
def test_what_other_devices_run_agrees_with_the_definition(
    capability: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before hints to L2, and with instructions for two floats and for two types at once."""
    monkeypatch.setattr(launch, "select_kernel", force(kind))
    targets = set()

    def look(text: str) -> str:
        targets.update(re.findall(r"\.target sm_(\d+)", text))
        return text

    with emulated_device(ROOM, look, capability):
        check_all(CASES[1::3], monkeypatch)
    assert targets == {str(capability)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_for_every_size_agree_with_the_definition(
    kind: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_MOST_SIZES", 0)
    monkeypatch.setattr(launch, "select_kernel", force(kind))
    check_all(DIVIDED, monkeypatch)
    assert not launch._sizes
    assert len(launches) >= 2 * len(DIVIDED)


def of_resnet50(channels: int) -> Callable[..., Choice]:
    """The rule's choice for that many channels and 8 ranks, whatever a smaller batch has."""

    def choose(**given: Any) -> Choice:
        choice = select_kernel(**given | {"channels": channels, "vt_world_size": 8})
        slabs = -(-given["channels"] // choice.channels) * given["vt_world_size"]
        return choice._replace(depth=min(choice.depth, slabs), groups=min(choice.groups, 1))

    return choose


# Tensors moved to and from memory by the launches of forward and backward: what is read twice
# counts twice, although the second read is meant to come from L2.
HELD, SWEPT, CUT = (2, 3), (3, 5), (1, 2, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "side", "last", "dtype", "epilogue", "kinds", "moved"),
    [
        (64, 56, False, "bf16", "none", "loop loop", SWEPT),
        (64, 56, False, "bf16", "none", "loop staged", SWEPT),
        (64, 56, False, "bf16", "add+relu", "loop staged", (4, 7)),
        (64, 56, False, "bf16", "relu", "loop swept", SWEPT),
        (64, 56, False, "fp32", "none", "cooperative cooperative", HELD),
        (64, 112, False, "bf16", "none", "cooperative cooperative", HELD),
        (128, 28, False, "fp32", "relu", "resident loop", (2, 5)),
        (256, 14, False, "bf16", "add+relu", "resident resident", (3, 5)),
        (512, 7, False, "fp32", "none", "planes planes", HELD),
        (512, 28, True, "bf16", "none", "split split split split", CUT),
        (1024, 14, True, "fp32", "relu", "ticketed ticketed", SWEPT),
        (256, 14, True, "bf16", "relu", "pipelined pipelined", HELD),
        (1024, 14, True, "fp16", "none", "pipelined pipelined", HELD),
        (512, 7, True, "bf16", "none", "loop loop", SWEPT),
        (512, 7, True, "bf16", "none", "loop staged", SWEPT),
        (2048, 7, True, "bf16", "add+relu", "loop loop", (4, 7)),
    ],
)
def test_layers_of_resnet50_move_what_is_counted(
    channels: int,
    side: int,
    last: bool,
    dtype: str,
    epilogue: str,
    kinds: str,
    moved: tuple[int, ...],
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tiles of 256 images over 8 ranks, on some of the channels of two of the ranks."""
    monkeypatch.setattr(launch, "select_kernel", of_resnet50(channels))
    monkeypatch.setattr(rule, "ENABLED", rule.ENABLED.union(kinds.split()))
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    shape = 64, (128 // kind.itemsize if last else 2), side, side
    residual, relu = epilogue.startswith("add"), epilogue.endswith("relu")
    case = Case(shape, 2, channels_last=last, dtype=kind, residual=residual, relu=relu)
    check(case, make(case))
    large = [one for one in launches if one.program.name.split("_")[0] not in ("merge", "sum")]
    assert [one.program.name.split("_")[0] for one in large] == [
        name.replace("staged", "loop") for name in kinds.split()
    ]
    sectors = torch.Size(shape).numel() * kind.itemsize / 32
    for one, tensors in zip(large, moved, strict=True):
        memory = one.memory
        sizes = zip(memory.sectors.values(), map(len, memory.bytes), strict=True)
        counts = [count for count, size in sizes if size >= 32 * sectors]
        found = sum(count["ld"] + count["st"] for count in counts)
        # The first value is read apart; where rows of a channel are not whole sectors, both
        # warps at an edge ask for the one between them, the second of L1 or L2.
        whole = last or side * side * kind.itemsize % 32 == 0
        most = 1.01 if whole else 1.4
        if kinds.startswith("pipelined"):  # whose every warp asks for the first values of a slab
            most = 1.06
        assert tensors <= found / sectors < tensors * most


@pytest.mark.parametrize(
    ("kind", "before", "after", "error"),
    [
        # Programs and threads that do not wait for each other.
        ("cooperative", r"\.gpu\.release", ".gpu.relaxed", "a read races with a write"),
        ("cooperative", r"\.gpu\.acquire", ".gpu.relaxed", "a read races with a write"),
        ("pipelined", r"\.gpu\.release", ".gpu.relaxed", "a read races with a write"),
        ("pipelined", r"\.gpu\.acquire", ".gpu.relaxed", "a read races with a write"),
        ("swept", r"\.gpu\.release", ".gpu.relaxed", "a read races with a write"),
        ("swept", r"\.gpu\.acquire", ".gpu.relaxed", "a read races with a write"),
        ("ticketed", r"\.gpu\.acq_rel", ".gpu.relaxed", "a read races with a write"),
        ("ticketed", r"\.gpu\.acquire", ".gpu.relaxed", "a read races with a write"),
        ("resident", r"\tbar\.sync \t0;", "", "shared memory"),
        ("planes", r"\tbar\.sync \t0;", "", "shared memory"),
        # Lanes that the mask should have kept out.
        ("resident", r"@%p\d+ (st\.global)", r"\1", "outside their tensor|two writes race"),
    ],
)
def test_what_the_kernels_need_is_found_missing(
    kind: str, before: str, after: str, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(**given: Any) -> Choice:
        return force(kind)(**given)._replace(warps=4)

    monkeypatch.setattr(launch, "select_kernel", choose)
    case = Case((32, 4, 5, 5), channels_last=kind not in ("cooperative", "planes"))
    if kind == "pipelined":
        case = replace(case, dtype=torch.bfloat16)

    def edit(text: str) -> str:
        changed = re.sub(before, after, text)
        assert changed != text
        return changed

    with emulated_device(ROOM) as launches:
        compute(gpu, case, make(case))
    assert len(launches) == 3
    with emulated_device(ROOM, edit), pytest.raises((RuntimeError, IndexError), match=error):
        compute(gpu, case, make(case))


def test_values_that_no_word_begins_with_are_moved(
    launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a pipelined kernel could not read two values at once."""
    monkeypatch.setattr(launch, "select_kernel", force("pipelined"))
    case = Case((9, 4, 2, 3), channels_last=True, dtype=torch.bfloat16)
    tensors = make(case)
    for name in ("x", "dy"):
        moved = torch.empty(tensors[name].numel() + 1, dtype=case.dtype)[1:]
        moved = moved.view(9, 2, 3, 4).movedim(-1, 1).copy_(tensors[name])
        assert moved.data_ptr() % 4
        tensors[name] = moved
    check(case, tensors)
    assert [one.program.name for one in launches][:2] == ["pipelined_forward", "pipelined_backward"]
