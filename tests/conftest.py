from __future__ import annotations

import pytest
import torch

from distbn_convert import kernels
from distbn_convert.kernels import cpu, native, reference

RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))
BACKENDS = {"reference": (reference,), "native": (native, reference), "cpu": (cpu, reference)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what another release of torch is known not to do; see scripts/test_torch."""
    for item in items:
        for mark in item.iter_markers("since_torch"):
            release, reason = mark.args
            if tuple(map(int, release.split("."))) > RELEASE:
                item.add_marker(pytest.mark.skip(reason=f"before torch {release} {reason}"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the backend that the op is made to take in this test."""
    name: str = request.param
    if name == "cpu" and not cpu.load():
        pytest.skip("the CPU kernel cannot be built here; its log line says why")
    monkeypatch.setattr(kernels, "_BACKENDS", BACKENDS[name])
    return name
