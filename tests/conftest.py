from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distbn_convert import kernels
from distbn_convert.kernels import cpu, native, reference

try:
    import hypothesis
except ImportError:  # scripts/gpu_check needs none
    pass
else:  # a busy machine is no failure
    hypothesis.settings.register_profile("no deadline", deadline=None)
    hypothesis.settings.load_profile("no deadline")

BACKENDS = {"reference": (reference,), "native": (native, reference), "cpu": (cpu, reference)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _compiler() -> Iterator[None]:
    """Let a test compile anew, and leave nothing of it to others."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend that the op is made to take in this test."""
    name: str = request.param
    if name == "cpu" and not cpu.load(torch.float32):
        pytest.skip("the CPU kernel cannot be built here; its log line says why")
    monkeypatch.setattr(kernels, "_BACKENDS", BACKENDS[name])
    return name
