"""Compile the GPU kernels through Triton's own dispatch, for a device that is not there.

``python -m tests.dispatched``: arguments are bound, specialised and compiled as a call on sm_90
would, and nothing is launched. Ahead-of-time compilation goes around that path.
"""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from distbn_convert.kernels import gpu
from distbn_convert.kernels.gpu import launch

from .kernel_cases import CASES, KINDS, compute, force, make


class AbsentDevice:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1  # nothing that is compiled for it is taken for a real one's

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def main() -> None:
    driver.set_active(AbsentDevice())
    run, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(self.fn.__name__)
        return run(self, *args, **kwargs | {"warmup": True})

    JITFunction.run = compile_only
    for kind in KINDS:
        launch.select_kernel = force(kind)
        for case in (CASES[1], CASES[5], CASES[10], *CASES[13:16]):
            compute(gpu, case, make(case))
    print(*sorted(set(compiled)))


if __name__ == "__main__":
    main()
