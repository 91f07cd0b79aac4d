"""The vectors that the CPU kernel is written in, for each set of instructions that it knows."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from distbn_convert.kernels import cpu
from distbn_convert.kernels.cpu import build

pytestmark = pytest.mark.skipif(
    not cpu.load(torch.float32), reason="the CPU kernel cannot be built here; its log line says why"
)

CAPABILITIES = {"DEFAULT": 16, "AVX2": 32, "AVX512": 64}  # in order, and their vectors' bytes


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_count_of_values_is_loaded_and_stored_and_no_more(
    capability: str, tmp_path: Path
) -> None:
    if capability != "DEFAULT" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{capability} is x86's, and this machine is {platform.machine()}")
    program = tmp_path / "check"
    sources = Path(build.__file__).parent
    command = [
        *shlex.split(os.environ.get("CXX", "c++")),
        *("-O3", "-std=c++20", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        *build._CAPABILITY_FLAGS.get(capability, ()),
        *(f"-I{build._TORCH / 'include'}", f"-I{sources}"),
        *(str(Path(__file__).with_name("simd_check.cpp")), "-o", str(program)),
    ]
    subprocess.run(command, check=True)
    order = list(CAPABILITIES)
    own = torch.backends.cpu.get_cpu_capability()
    if own not in order or order.index(capability) > order.index(own):
        pytest.skip(f"it compiles, but this machine has {own} and cannot run {capability}")
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"{CAPABILITIES[capability]} bytes\n"), run.stderr
