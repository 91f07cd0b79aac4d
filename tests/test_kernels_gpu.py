"""The GPU backend where there is no GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distbn_convert.kernels import gpu, reference, select_backend
from distbn_convert.kernels.gpu import rule
from distbn_convert.kernels.gpu.rule import Choice

from .aot import RESNET50, compile_kernel, configurations, kernels_of
from .kernel_cases import KINDS
from .versions import can_compile, version_of

needs_triton = pytest.mark.skipif(
    version_of("triton") < (3, 6),
    reason="triton is not installed, or older than 3.6: its interpreter ignores some masks",
)
can_interpret = pytest.mark.skipif(
    version_of("triton") < (3, 7) and version_of("numpy") >= (2, 4),
    reason="Triton's interpreter before 3.7 fails with numpy 2.4 and newer",
)
LAYERS = [(channels, side * side) for channels, side in RESNET50]
ROOT = Path(__file__).parent.parent


@needs_triton
@can_interpret
@pytest.mark.parametrize("case", [*KINDS, "concurrency", "schedule", "operator"])
def test_interpreted_kernels_agree_with_the_definition(case: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.interpreter", case]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@can_compile
def test_every_kernel_is_dispatched_as_a_call_on_a_device_would() -> None:
    command = [sys.executable, "-m", "tests.dispatched"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert run.stdout.split() == [
        "cooperative_backward",
        "cooperative_forward",
        "loop_backward",
        "loop_forward",
        "merge_gradients",
        "merge_moments",
        "pipelined_backward",
        "pipelined_forward",
        "planes_backward",
        "planes_forward",
        "resident_backward",
        "resident_forward",
        "split_backward",
        "split_forward",
        "split_gradients",
        "split_moments",
        "sum_ranks",
        "swept_backward",
        "swept_forward",
        "ticketed_backward",
        "ticketed_forward",
    ]


def share(channels: int, positions: int, itemsize: int, last: bool, **changes: Any) -> Any:
    from distbn_convert.kernels.gpu.launch import Share

    values = {
        "samples": 256,
        "channels": channels,
        "positions": positions,
        "vt_world_size": 8,
        "interleaved": False,
        "last": last,
        "itemsize": itemsize,
    }
    return Share(**(values | changes))


@needs_triton
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("capability", "epilogue", "sized"),
    [
        (80, "none", True),
        (80, "add+relu", True),
        (90, "none", True),
        (90, "relu", True),
        (90, "add+relu", True),
        (80, "relu", False),
        (90, "add+relu", False),
    ],
)
def test_every_kernel_of_resnet50_compiles_without_spills(
    capability: int, last: bool, epilogue: str, sized: bool
) -> None:
    # Of contiguous shares in channels_last rows are not divided by S.
    changes = {"sized": sized, "interleaved": last and not sized}
    found = {}
    for channels, positions in LAYERS:
        for itemsize in (2, 4):
            for backward in (False, True):
                described = share(channels, positions, itemsize, last, **changes)
                found |= configurations(described, backward, epilogue)
    for (name, itemsize, key), (kernel, constants, given) in found.items():
        resources = compile_kernel(kernel, itemsize, constants, capability, **given)
        what = f"{name}, {itemsize} bytes, {key}"
        assert resources.stack == 0, f"{what} spills {resources.stack} bytes"
        if capability == 90 and constants["TILE"].VECTOR.value * itemsize == 16:
            assert "LDG.E.128" in strip_hints(resources.machine_code), what


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_pipelined_kernels_hold_two_slabs_without_spills(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rule, "ENABLED", rule.WAITING)
    found = {}
    for layer, backward, epilogue in itertools.product(LAYERS, (False, True), ("none", "relu")):
        described = share(*layer, 2, True)
        if described.choose(backward).kind == "pipelined":
            found |= configurations(described, backward, epilogue)
    assert len(found) == 12
    for (name, _, key), (kernel, constants, given) in found.items():
        resources = compile_kernel(kernel, 2, constants, capability, **given)
        assert resources.stack == 0, f"{name}, {key} spills {resources.stack} bytes"
        if capability == 90:
            assert "LDG.E.128" in strip_hints(resources.machine_code)
            early = early_waits(resources.machine_code) if version_of("triton") >= (3, 7) else []
            assert not early, f"{name}, {key} waits for the next slab"


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_staged_and_swept_kernels_compile_without_spills(
    capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    epilogues, layouts = ("none", "relu", "add+relu"), (False, True)
    for enabled in ({"staged"}, {"swept"}, {"staged", "swept"}):
        monkeypatch.setattr(rule, "ENABLED", rule.ENABLED.union(enabled))
        cases = itertools.product(LAYERS, (2, 4), epilogues, layouts)
        for layer, itemsize, epilogue, last in cases:
            described = share(*layer, itemsize, last)
            choice = described.choose(True, epilogue == "add+relu")
            if choice.stages > 1 or choice.kind == "swept":
                found |= configurations(described, True, epilogue)
        monkeypatch.undo()
    assert len(found) == 19
    for (name, itemsize, key), (kernel, constants, given) in found.items():
        resources = compile_kernel(kernel, itemsize, constants, capability, **given)
        what = f"{name}, {itemsize} bytes, {key}"
        assert resources.stack == 0, f"{what} spills {resources.stack} bytes"
        if capability == 90 and constants["TILE"].STAGES.value > 1:
            # Two tensors of each loop, before it and in it.
            assert len(re.findall(r"LDG\.E\.E[LF]", resources.machine_code)) >= 8, what


def early_waits(machine_code: str) -> list[str]:
    """What waits for the next slab before most of this one is written.

    Of six barriers, an instruction is counted at one while it runs (``wrote``), and waits until
    nothing is at some of them (``waits``).
    """
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);.*\n\s+/\* (0x[0-9a-f]{16}) ", machine_code)
    codes = [(text, int(word, 16) >> 46 & 7, int(word, 16) >> 52 & 63) for text, word in found]
    texts = [text for text, *_ in codes]
    asked = next(at for at, text in enumerate(texts) if "REDG" in text)
    waited = next(at for at, text in enumerate(texts) if at > asked and "CCTL.IVALL" in text)
    ahead = {wrote for text, wrote, _ in codes[asked:waited] if ".EF" in text}
    assert len(ahead) == 1
    written = [at for at, text in enumerate(texts) if "STG.E.128" in text][-2]
    return [text for text, _, waits in codes[waited:written] if waits >> min(ahead) & 1]


def order_of_memory(kernel: Any, described: Any, backward: bool) -> str:
    """The machine code's accesses of memory and its barriers, repeated ones once."""
    choice = described.choose(backward)
    assert kernel.__name__.startswith(choice.kind)
    code = compile_kernel(kernel, 2, described.constants(choice, False), 90).machine_code
    names = r"\b(ATOMG|REDG|MEMBAR\.\w+\.GPU|CCTL\.IVALL|BAR\.SYNC|LDG|STG)"
    return " ".join(key for key, _ in itertools.groupby(re.findall(names, code)))


# What a program hands in, then its arrival, behind a barrier and a fence.
ARRIVAL = r"STG BAR.SYNC MEMBAR.\w+.GPU (REDG|ATOMG) "
# Waiting empties L1 before a barrier lets any thread load.
WAIT = r"(LDG|ATOMG) CCTL.IVALL BAR.SYNC LDG( BAR.SYNC LDG)*"


@needs_triton
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_programs_that_wait_for_others_acquire_and_release(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbn_convert.kernels.gpu import cooperative, pipelined, swept, ticketed

    kernels = ticketed.ticketed_forward, ticketed.ticketed_backward
    order = order_of_memory(kernels[backward], share(1024, 196, 2, True), backward)
    # The last to arrive, whose L1 is emptied, merges, and announces the slab's statistics.
    assert re.search(ARRIVAL + r"CCTL.IVALL BAR.SYNC LDG.* " + ARRIVAL, order), order
    assert re.search(WAIT + r" STG", order), order
    kernels = cooperative.cooperative_forward, cooperative.cooperative_backward
    order = order_of_memory(kernels[backward], share(64, 12544, 2, False), backward)
    assert re.search(ARRIVAL + r".*" + WAIT + r".* STG", order), order
    # The next slab is asked for between the arrival and the wait.
    monkeypatch.setattr(rule, "ENABLED", rule.WAITING)
    kernels = pipelined.pipelined_forward, pipelined.pipelined_backward
    order = order_of_memory(kernels[backward], share(128, 784, 2, True), backward)
    assert re.search(ARRIVAL + WAIT + r".* STG", order), order
    if backward:
        order = order_of_memory(swept.swept_backward, share(64, 3136, 2, False), backward)
        assert re.search(ARRIVAL + r".*" + WAIT + r".* STG", order), order


def strip_hints(machine_code: str) -> str:
    """Machine code without the cache hints of its loads."""
    return machine_code.replace(".EF", "").replace(".EL", "").replace(".LU", "")


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, str | None]]] = {
    "interleaved, no affine, cumulative average": (
        {"interleaved": True},
        {"weight": None, "bias": None, "counts": "*i64", "momentum": None},
    ),
    "64-bit offsets, no statistics": (
        {"samples": 2**20, "positions": 4096},
        {"running_mean": None, "running_var": None},
    ),
    "odd sizes, half parameters": (
        {"positions": 49, "channels": 37},
        {"weight": "*fp16", "bias": "*bf16", "running_mean": "*bf16", "running_var": "*fp16"},
    ),
}


@needs_triton
@pytest.mark.parametrize(
    ("variant", "last"),
    [
        ("interleaved, no affine, cumulative average", False),
        ("interleaved, no affine, cumulative average", True),
        ("64-bit offsets, no statistics", False),
        ("odd sizes, half parameters", False),
        ("odd sizes, half parameters", True),
    ],
)
def test_every_variant_of_every_kernel_compiles(variant: str, last: bool) -> None:
    from distbn_convert.kernels.gpu.split import merge_gradients, merge_moments

    changes, types = VARIANTS[variant]
    described = share(64, 256, 2, last)._replace(**changes)
    assert described.wide() == variant.startswith("64-bit")
    for kind in KINDS:
        cut = Choice(kind, 256, 8 if last else 1, 1, 128, 256, 2)
        if kind == "pipelined" and not (last and described.vector() > 1):
            continue
        if kind == "planes":
            if last:
                continue
            cut = Choice(kind, 2, 2, 16)
        if kind == "staged":
            cut = cut._replace(kind="loop", stages=3)
        constants = described.constants(cut, relu=True)
        for backward in (False, True):
            for kernel in kernels_of(cut.kind, backward):
                compile_kernel(kernel, 2, constants, 90, **types)
    merging = described.merging(Choice("split", 256, 8, 1, 128, 256))
    for kernel in (merge_moments, merge_gradients):
        assert compile_kernel(kernel, 2, merging, 90, **types).stack == 0


@needs_triton
@pytest.mark.parametrize(
    ("shape", "last"),
    [((4, 3, 5, 5), False), ((4, 3, 5), False), ((4, 3), True), ((4, 3, 1, 1), True)],
    ids=str,
)
def test_memory_is_described_without_a_copy(shape: tuple[int, ...], last: bool) -> None:
    from distbn_convert.kernels.layout import arrange

    x = torch.randn(shape)
    assert arrange(x)[0] is x
    assert arrange(x)[1] is last
    turned = x.movedim(1, -1).contiguous().movedim(-1, 1)
    assert arrange(turned)[0] is turned
    assert arrange(turned)[1] is True
    gaps = torch.stack([x, x], -1)[..., 0]
    assert arrange(gaps)[0].is_contiguous()


@needs_triton
def test_offsets_widen_before_32_bits_overflow() -> None:
    assert not share(64, 3136, 2, False).wide()
    assert not share(2**10, 2**14, 2, False, samples=8 * 2**6).wide()
    assert share(2**10, 2**14, 2, False, samples=8 * 2**7).wide()
    assert share(2**10, 2**14, 2, False, samples=8 * 2**4, interleaved=True).wide()


def test_the_backend_takes_cuda_tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu.supports(torch.ones(2))
    assert select_backend(torch.ones(2)) is not gpu

    class Input:
        is_cuda = True
        device = torch.device("cuda")
        dtype = torch.bfloat16

    monkeypatch.setattr(gpu, "runs_on", lambda device: True)
    monkeypatch.delenv(gpu.SWITCH, raising=False)
    assert gpu.supports(Input())
    monkeypatch.setenv(gpu.SWITCH, "off")
    assert not gpu.supports(Input())
    monkeypatch.setenv(gpu.SWITCH, "on")
    Input.dtype = torch.float64
    assert not gpu.supports(Input())
    Input.dtype = torch.float32
    monkeypatch.setattr(gpu, "runs_on", lambda device: False)
    assert not gpu.supports(Input())


def test_an_empty_batch_is_left_to_the_definition() -> None:
    x = torch.empty(0, 3, 4)
    ours = gpu.forward(x, None, None, x, *(None,) * 3, 0.1, 1e-5, 2, False, True)
    theirs = reference.forward(x, None, None, x, *(None,) * 3, 0.1, 1e-5, 2, False, True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        gpu.backward(x, x, None, None, *ours, 2, False, True),
        reference.backward(x, x, None, None, *theirs, 2, False, True),
    )


def test_triton_is_not_imported_before_a_cuda_tensor_comes() -> None:
    code = (
        "import torch, sys; from distbn_convert.functional import dist_batch_norm;"
        "dist_batch_norm(torch.randn(4, 2, 3), vt_world_size=2);"
        "assert 'distbn_convert.kernels.gpu.launch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_check_of_a_gpu_machine_says_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(
        [ROOT / "scripts" / "gpu_check"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1
    expected = "a CUDA device" if importlib.util.find_spec("triton") else "has no triton"
    assert run.stderr.startswith("Error: expected")
    assert expected in run.stderr
