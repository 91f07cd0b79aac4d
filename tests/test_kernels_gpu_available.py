"""Where the GPU kernels do not run, torch's own batch norm does, and the log says why."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distbn_convert.kernels.gpu.available import runs_on

from .versions import can_compile

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


@can_compile
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
    """Triton's driver on a machine that has all that it needs, or had it."""

    def get_current_target(self) -> None:
        pass


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A new GPU with a new Triton."""
    import triton

    monkeypatch.setattr(triton, "__version__", "3.8.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    triton.runtime.driver.set_active(Ready())
    with caplog.at_level(logging.INFO):
        yield
    triton.runtime.driver.set_active(None)  # what it is before it is first asked for


def check(caplog: pytest.LogCaptureFixture, missing: str | None, level: str = "WARNING") -> None:
    """Whether the kernels run, and the one line that says why not."""
    assert runs_on.__wrapped__(torch.device("cuda", 1)) is (missing is None)
    if missing is None:
        assert not caplog.records
        return
    (record,) = caplog.records
    assert record.levelname == level
    assert missing in record.getMessage()
    assert "the GPU kernels are not used, torch's batch norm is" in record.getMessage()


@can_compile
@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("release", "missing"),
    [
        ("3.4.0", None),
        ("3.10.0+git1234", None),
        ("3.3.1", "they need Triton 3.4, which torch 2.8 brings, and 3.3.1 is installed"),
        ("2.3.0", "they need Triton 3.4, which torch 2.8 brings, and 2.3.0 is installed"),
    ],
)
def test_what_a_triton_must_be(
    release: str,
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("triton.__version__", release)
    check(caplog, missing)


LEAST = "compute capability 8.0 (or 7.5 with DISTBN_GPU_KERNEL=on)"


@can_compile
@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("capability", "cuda", "switch", "missing"),
    [
        ((8, 0), "12.8", "", None),
        ((12, 0), "13.0", "", None),
        ((7, 5), "12.8", "", f"they need {LEAST}, and cuda:1 has 7.5"),
        ((7, 5), "12.8", "On", None),
        ((7, 0), "12.8", "on", f"they need {LEAST}, and cuda:1 has 7.0"),
        ((9, 0), None, "on", "the device is not NVIDIA's"),
    ],
)
def test_what_a_device_must_be(
    capability: tuple[int, int],
    cuda: str | None,
    switch: str,
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("DISTBN_GPU_KERNEL", switch)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check(caplog, missing, "INFO")


@can_compile
@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize(
    ("release", "missing"), [("3.6.0", "RuntimeError: no C compiler was found"), ("3.8.0", None)]
)
def test_a_compiler_that_has_gone_is_missed_where_triton_needs_it_again(
    release: str,
    missing: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("triton.__version__", release)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    check(caplog, missing)
