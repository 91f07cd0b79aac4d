"""Where the GPU kernels do not run, torch's own batch norm does, and the log says why."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distbn_convert.kernels.gpu.available import LEAST_TRITON, runs_on

from .versions import version_of

needs_triton = pytest.mark.skipif(
    version_of("triton") < LEAST_TRITON,
    reason="triton is not installed, or older than the kernels need",
)
# A GPU that is not there: all that is asked of it before Triton compiles.
CODE = """
import logging, torch
logging.basicConfig()
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.version.cuda = "13.0"
from distbn_convert.kernels.gpu.available import runs_on
print([runs_on(torch.device("cuda", 0)) for _ in range(3)])
"""


@needs_triton
@pytest.mark.parametrize(
    ("compiler", "told"),
    [("", "Failed to find C compiler"), ("false", "returned non-zero exit status 1")],
    ids=["no compiler", "a compiler without headers"],
)
def test_a_machine_where_triton_cannot_compile(tmp_path: Path, compiler: str, told: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    environment |= {"CC": compiler} if compiler else {"PATH": ""}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    command = [sys.executable, "-c", CODE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.stdout == "[False, False, False]\n", run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("WARNING:")]
    assert len(lines) == 1
    assert "the GPU kernels are not used, torch's batch norm is" in lines[0]
    assert "set DISTBN_GPU_KERNEL=off to silence this" in lines[0]
    assert told in lines[0]


class Ready:
    """Triton's driver on a machine that has all that it needs."""

    def get_current_target(self) -> None:
        pass


@needs_triton
@pytest.mark.parametrize(
    ("release", "capability", "cuda", "missing"),
    [
        ("3.4.0", (8, 0), "12.8", None),
        ("3.10.0+git1234", (12, 0), "13.0", None),
        ("3.3.1", (9, 0), "12.6", "they need Triton 3.4, and 3.3.1 is installed"),
        ("2.3.0", (9, 0), "12.1", "they need Triton 3.4, and 2.3.0 is installed"),
        ("3.6.0", (7, 5), "12.8", "they need compute capability 8.0, and cuda:1 has 7.5"),
        ("3.6.0", (9, 0), None, "the device is not NVIDIA's"),
    ],
)
def test_what_a_device_and_a_triton_must_be(
    release: str,
    capability: tuple[int, int],
    cuda: str | None,
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", release)
    triton.runtime.driver.set_active(Ready())
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level(logging.INFO):
        taken = runs_on.__wrapped__(torch.device("cuda", 1))
    triton.runtime.driver.set_active(None)  # what it is before it is first asked for
    assert taken is (missing is None)
    told = [f"the GPU kernels are not used, torch's batch norm is: {missing}"] if missing else []
    assert caplog.messages == told
