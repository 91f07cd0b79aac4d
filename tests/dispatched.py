"""Compile the GPU kernels through Triton's own dispatch, with nothing launched.

``python -m tests.dispatched``: a few of each, for a device that is not there: arguments are bound,
specialised and compiled as a call on sm_90 would. Ahead-of-time compilation goes around that path.

``python -m tests.dispatched 3 12``: the fourth twelfth of what the tests on a device and
``scripts/gpu_bench.py`` need, so that all cores compile it into Triton's cache, for the device that
is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from distbn_convert.kernels import gpu
from distbn_convert.kernels.gpu import launch, rule

from .aot import RESNET50
from .kernel_cases import CASES, DIVIDED, KINDS, Case, compute, force, make

_SELECT, _NARROW, _ENABLED = launch.select_kernel, launch._NARROW, rule.ENABLED
_MOST_SIZES = launch._MOST_SIZES


class AbsentDevice:
    """What Triton asks of a driver before it launches."""

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return -self.capability  # so that nothing that is compiled for it is taken for another's

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class RecordingDevice(AbsentDevice):
    """A driver that launches nothing, and keeps what it should have launched."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, ...]] = []
        self.at_once: set[str] = set()  # kernels all of whose programs must run at once
        self.utils = self  # what Triton loads compiled kernels with

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 2**20}

    def load_binary(self, *binary: Any) -> tuple[Any, ...]:
        """A module and a function, registers, spills, and the most threads."""
        return "module", "function", 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what launches a compiled kernel."""
        if metadata.launch_cooperative_grid:
            self.at_once.add(metadata.hash)
        return partial(self.launch, metadata.hash)

    def launch(self, kernel: str, x: int, y: int, z: int, *arguments: Any) -> None:
        """Take a grid, the stream, three things of Triton's own, two hooks, and the arguments."""
        self.launches.append((kernel, (x, y, z), arguments[6:]))


def run_case(kind: str, case: Case, sized: bool = True) -> None:
    """What a kernel of that kind compiles for a case, for its S or for every S."""
    launch._sizes.clear()
    launch._MOST_SIZES = _MOST_SIZES if sized else 0
    launch.select_kernel, launch._NARROW = force(kind), 0 if case.wide else _NARROW
    compute(gpu, case, make(case))
    launch.select_kernel, launch._NARROW, launch._MOST_SIZES = _SELECT, _NARROW, _MOST_SIZES


def run_batch(
    shape: tuple[int, ...],
    ranks: int,
    channels_last: bool,
    dtype: torch.dtype,
    settings: tuple[bool, bool, bool] = (False, False, False),
    enabled: frozenset[str] = _ENABLED,
    sized: bool = True,
) -> None:
    """What the rule's choice compiles for a batch, whose memory is never touched.

    ``settings`` are whether it is interleaved, has a residual, and a ReLU.
    """
    interleaved, added, relu = settings
    size = [shape[0], *shape[2:], shape[1]] if channels_last else shape
    x = torch.empty(size, dtype=dtype)
    x = x.movedim(-1, 1) if channels_last else x
    channels, rows = torch.empty(shape[1]), torch.empty(ranks, shape[1])
    counts, residual = torch.empty(ranks, dtype=torch.int64), x if added else None
    rule.ENABLED = enabled
    launch._sizes.clear()
    launch._MOST_SIZES = _MOST_SIZES if sized else 0
    for counted in (counts, None):
        statistics = rows, rows, counted, 0.1, 1e-5, ranks, interleaved, relu
        gpu.forward(x, channels, channels, residual, *statistics)
    kept = x if added and relu else None
    gpu.backward(x, x, channels, channels, kept, rows, rows, ranks, interleaved, relu)
    rule.ENABLED, launch._MOST_SIZES = _ENABLED, _MOST_SIZES


def everything() -> Iterator[Callable[[], None]]:
    """All that a device is about to run, or nearly."""
    from .test_kernels_gpu_device import SHAPES

    for kind, case in product(KINDS, CASES):
        yield partial(run_case, kind, case)
    for kind, case in product(KINDS, DIVIDED[1::2]):
        yield partial(run_case, kind, case, sized=False)
    epilogues = (
        (torch.float16, (False, False, False)),
        (torch.bfloat16, (False, True, True)),
        (torch.float32, (True, False, True)),
    )
    for last, (shape, ranks), (dtype, settings) in product((False, True), SHAPES, epilogues):
        yield partial(run_batch, shape, ranks, last, dtype, settings)
    subsets = [frozenset({"ticketed"}), frozenset[str](), _ENABLED | {"pipelined"}]
    subsets += [_ENABLED | {"staged"}, _ENABLED | {"staged", "swept"}]
    subsets += [frozenset({kind}) for kind in ("cooperative", "pipelined", "staged", "swept")]
    for last, (shape, ranks), enabled in product((False, True), SHAPES[2:5], subsets):
        yield partial(run_batch, shape, ranks, last, torch.bfloat16, enabled=enabled)
    formats = [(False, torch.bfloat16), (False, torch.float32)]
    formats += [(True, torch.bfloat16), (True, torch.float16)]
    for (last, dtype), (channels, side) in product(formats, RESNET50):
        shape = 256, channels, side, side
        for relu, enabled in product((False, True), [_ENABLED, *subsets[:5]]):
            if dtype is torch.bfloat16 or not relu:
                settings = False, False, relu
                yield partial(run_batch, shape, 8, last, dtype, settings, enabled)
                if enabled is _ENABLED and not last:
                    yield partial(run_batch, shape, 8, last, dtype, settings, sized=False)


@contextmanager
def nothing_launched() -> Iterator[list[str]]:
    """Compile what would be launched; yield the kernels' names, of every call."""
    run, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled.append(self.fn.__name__)
        run(self, *args, **kwargs | {"warmup": True})  # returns nothing that could be launched

    resources_of, (major, minor) = launch.resources_of, (9, 0)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        resources = resources_of(torch.device("cuda"))
        launch.resources_of = lambda device: resources
    driver.set_active(AbsentDevice(10 * major + minor))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run, launch.resources_of = run, resources_of


def main(part: int | None = None, parts: int = 1) -> None:
    with nothing_launched() as compiled:
        if part is None:
            for kind, case in product(KINDS, (CASES[1], CASES[5], CASES[10], *CASES[13:16])):
                run_case(kind, case)
            print(*sorted(set(compiled)))
            return
        for job in list(everything())[part::parts]:
            job()
        print(len(compiled), "calls compiled")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
