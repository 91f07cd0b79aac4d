"""A GPU in NumPy, that runs what Triton's compiler makes of the kernels, with no GPU.

Triton's interpreter executes a kernel's source; this executes its PTX: threads and warps, vectors
and masks, shared memory and barriers, atomic operations and their order, as the compiler laid them
out. What it cannot show is what NVIDIA's assembler makes of that, and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .launch import Launch
from .text import Program, parse

__all__ = ["Launch", "Program", "emulated_device", "parse"]


@contextmanager
def emulated_device(
    room: int, edit: Callable[[str], str] = lambda text: text, capability: int = 90
) -> Iterator[list[Launch]]:
    """Run every launch of a Triton kernel here, on tensors of the CPU.

    Args:
        room: how many programs of a launch run at once.
        edit: changes a kernel's PTX. Default: nothing
        capability: ten times the compute capability of what is compiled for. Default: 90

    Yields:
        the launches that have run.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from ..dispatched import AbsentDevice

    run, launches = JITFunction.run, []
    parsed: dict[str, Program] = {}

    def emulate(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in parsed:
            parsed[compiled.hash] = parse(edit(compiled.asm["ptx"]))
        values = dict(zip(self.arg_names, args, strict=False)) | options
        pairs = [(values.get(name), compiled.src.signature[name]) for name in self.arg_names]
        arguments = [leaf for pair in pairs for leaf in _leaves(*pair)]
        launches.append(Launch(parsed[compiled.hash], (*grid, 1, 1)[:3], arguments, room))
        launches[-1].run()
        # Returns nothing, so that it is asked at every call.

    JITFunction.run = emulate
    driver.set_active(AbsentDevice(capability))
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver.set_active(None)  # what it is before it is first asked for


def _leaves(value: Any, kind: Any) -> list[Any]:
    """Return what a kernel takes at run time, by the types that it was compiled for."""
    if isinstance(kind, tuple):
        return [leaf for pair in zip(value, kind, strict=True) for leaf in _leaves(*pair)]
    return [] if kind == "constexpr" else [value]
