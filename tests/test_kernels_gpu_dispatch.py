"""Launches of compiled kernels against those of Triton's dispatch, for an absent device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from distbn_convert.kernels import gpu

from .kernel_cases import CASES, KINDS, Case, compute, force, make
from .versions import COMPILES, NO_KERNELS

if not COMPILES:
    pytest.skip(NO_KERNELS, allow_module_level=True)

from triton.runtime import driver

from distbn_convert.kernels.gpu import launch
from distbn_convert.kernels.gpu.dispatch import Kernel

from .dispatched import RecordingDevice

# One, as Triton keeps what is loaded.
RECORDING = RecordingDevice()


@pytest.fixture
def device() -> Iterator[RecordingDevice]:
    launch._plan.cache_clear()  # what is compiled for another device is not for this one
    launch._sizes.clear()
    driver.set_active(RECORDING)
    RECORDING.launches.clear()
    yield RECORDING
    driver.set_active(None)  # what it is before it is first asked for
    launch._plan.cache_clear()


def addresses(argument: Any) -> Any:
    """What a kernel is given, in whatever form."""
    if isinstance(argument, tuple):
        return tuple(map(addresses, argument))
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


@pytest.fixture
def compared(device: RecordingDevice, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launch all three times: as Triton does, and twice as we do, the second time of necessity
    without it."""
    call, kernels = Kernel.__call__, []

    def thrice(self: Kernel, index: int, *arguments: Any) -> None:
        before = len(device.launches)
        self.function[self.grid](*arguments, **self.options)
        call(self, index, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(type(self.function), "run", None)
            call(self, index, *arguments)
        expected, *ours = device.launches[before:]
        given = [(hash, grid, addresses(values)) for hash, grid, values in (expected, *ours)]
        assert given[0] == given[1] == given[2], self.function.__name__
        kernels.append(self.function.__name__)

    monkeypatch.setattr(Kernel, "__call__", thrice)
    return kernels


@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_is_what_triton_would_launch(
    kind: str, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "select_kernel", force(kind))
    for case in (*CASES[:6], CASES[10], *CASES[13:16]):
        compute(gpu, case, make(case))
    assert any(name.startswith(kind.replace("staged", "loop")) for name in compared)
    assert ("sum_ranks" in compared) == (kind != "split")  # whose last launch sums them


@pytest.mark.parametrize("kind", KINDS)
def test_pipelined_programs_alone_are_launched_all_at_once(
    kind: str, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "select_kernel", force(kind))
    case = Case((8, 4, 8), dtype=torch.bfloat16, channels_last=kind != "planes")
    for _ in range(2):  # by Triton's dispatch, and ours
        compute(gpu, case, make(case))
    at_once = [hash in device.at_once for hash, *_ in device.launches]
    assert at_once == ([True, True, False] * 2 if kind == "pipelined" else [False] * len(at_once))


def shifted(tensor: Tensor, nbytes: int | None = None) -> Tensor:
    """The same numbers, so many bytes behind a multiple of 16, by default those of one."""
    by = 1 if nbytes is None else nbytes // tensor.element_size()
    return torch.cat([tensor.new_zeros(by), tensor.flatten()])[by:].view(tensor.shape)


CHANGES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("nothing", lambda tensors: None),
    ("x is not aligned", lambda tensors: tensors.update(x=shifted(tensors["x"]))),
    ("x is to 8 bytes", lambda tensors: tensors.update(x=shifted(tensors["x"], 8))),
    ("weight is to 8 bytes", lambda tensors: tensors.update(weight=shifted(tensors["weight"], 8))),
    ("dy is not aligned", lambda tensors: tensors.update(dy=shifted(tensors["dy"]))),
    ("weight is not aligned", lambda tensors: tensors.update(weight=shifted(tensors["weight"]))),
    ("statistics are not aligned", lambda tensors: tensors.update(mean=shifted(tensors["mean"]))),
    ("weight in half", lambda tensors: tensors.update(weight=tensors["weight"].bfloat16())),
    ("no weight", lambda tensors: tensors.update(weight=None)),
    ("no bias", lambda tensors: tensors.update(bias=None)),
    ("no statistics", lambda tensors: tensors.update(mean=None, var=None)),
    ("no counters", lambda tensors: tensors.update(counts=None)),
    ("nothing again", lambda tensors: None),
]


def test_one_plan_launches_a_kernel_for_each_kind_of_arguments(
    compared: list[str], device: RecordingDevice
) -> None:
    case = Case((8, 4, 8), dtype=torch.bfloat16)
    names: dict[str, set[str]] = {}
    for what, change in CHANGES:
        for momentum in (0.1, 1, 0.25, None):
            tensors = make(case)
            change(tensors)
            if momentum is None and tensors["counts"] is None:
                continue
            before = len(device.launches)
            compute(gpu, replace(case, momentum=momentum), tensors)
            names.setdefault(what, set()).update(hash for hash, *_ in device.launches[before:])
    assert launch._plan.cache_info().misses == 2  # a forward and a backward
    for what in ("x", "weight"):
        assert names.pop(f"{what} is to 8 bytes") == names[f"{what} is not aligned"]
    assert names.pop("nothing again") == names["nothing"]
    assert len(set(map(frozenset, names.values()))) == len(names), "all differ"


def test_numbers_are_looked_at_as_triton_does(compared: list[str]) -> None:
    x = torch.randn(8, 4, 8)
    for eps in (1e-5, 1, 16, 17, 1e-3):
        gpu.forward(x, *(None,) * 6, 0.1, eps, 2, False, False)


def test_one_launch_follows_the_other(device: RecordingDevice) -> None:
    """Two layers of one shape share a plan, not their tensors."""
    case = Case((8, 4, 8))
    for _ in range(3):
        tensors = make(case)
        before = len(device.launches)
        compute(gpu, case, tensors)
        first = addresses(device.launches[before][2])
        assert tensors["x"].data_ptr() in first
        assert tensors["weight"].data_ptr() in first


def test_each_device_has_a_kernel_of_its_own() -> None:
    compiled, launched = [], []

    class Function:
        arg_names = ("x", "size")

        def __getitem__(self, grid: Any) -> Any:
            assert grid == (4,)
            return self.compile

        def compile(self, x: Tensor, size: int, num_warps: int) -> Any:
            compiled.append((x, size, num_warps))
            return {(4, 1, 1): lambda *arguments: launched.append(arguments)}

    kernel = Kernel(Function(), (4,), {"num_warps": 2, "size": 8})
    x = torch.ones(3)
    for device in (0, 1, 0, 1, 1):
        kernel(device, x)
    assert compiled == [(x, 8, 2)] * 2
    assert launched == [(x.data_ptr(), 8)] * 3


def test_a_kernel_that_is_still_being_compiled_is_waited_for(device: RecordingDevice) -> None:
    """As Triton 3.8 compiles in this mode, what it returns is not the kernel."""
    import triton

    if not hasattr(triton, "AsyncCompileMode"):
        pytest.skip("this Triton does not compile asynchronously")
    case = Case((8, 4, 16))
    with ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        for _ in range(2):
            compute(gpu, case, make(case))
    names = [name for name, *_ in device.launches]
    assert names[:3] == names[3:]


def test_the_rule_is_told_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties(NamedTuple):
        multi_processor_count: int
        L2_cache_size: int

    found = [Properties(82, 6 * 2**20), Properties(40, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found[device.index])
    monkeypatch.setattr(launch, "resources_of", launch.resources_of.__wrapped__)
    assert launch.resources_of(torch.device("cuda", 0)) == (82, 6 * 2**20)
    assert launch.resources_of(torch.device("cuda", 1)) == (40, launch.L2_BYTES)
    x, choices = torch.empty(64, 64, 112, 112, dtype=torch.bfloat16), []
    for resources in [(132, 50 * 2**20), found[0]]:
        monkeypatch.setattr(launch, "resources_of", lambda _, resources=resources: resources)
        choices.append(launch.describe(x, False, 8, False).choose(False).kind)
    assert choices == ["loop", "cooperative"]


def test_the_device_of_the_input_becomes_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(f"changed to {index}"))
    for device, expected in ((-1, None), (0, "changed to 0"), (1, None), (2, "changed to 2")):
        with launch._on(device) as changed:
            assert changed == expected


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "interleaved channels_last"])
def test_sizes_beyond_the_first_share_kernels(
    layout: str, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_MOST_SIZES", 2)
    interleaved, last = layout.startswith("interleaved"), layout.endswith("channels_last")
    kernels = []
    for length in (40, 48, 56, 64, 40, 48, 56):
        case = Case((8, 4, length), interleaved=interleaved, channels_last=last)
        before = len(device.launches)
        compute(gpu, case, make(case))
        kernels.append(tuple(name for name, *_ in device.launches[before:]))
    first, second, *shared = kernels[:4]
    assert kernels == [first, second, *shared, first, second, shared[0]]
    assert shared[0] == shared[1]
    assert len({first, second, shared[0]}) == (1 if layout == "channels_last" else 3)
