"""Which releases of other packages the tests run with; scripts/test_torch tries older ones."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest

from distbn_convert.kernels.gpu.available import LEAST_TRITON


def version_of(package: str) -> tuple[int, ...]:
    """Its first two numbers, or none where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return ()
    return tuple(int(part) for part in version(package).split(".")[:2])


# Whether Triton compiles the GPU kernels; why it does not.
COMPILES = version_of("triton") >= LEAST_TRITON
NO_KERNELS = "triton is not installed, or older than the GPU kernels need"
can_compile = pytest.mark.skipif(not COMPILES, reason=NO_KERNELS)


def since_torch(major: int, minor: int, reason: str) -> pytest.MarkDecorator:
    """Skip with an older torch, for a reason that is no fault of this package."""
    before = version_of("torch") < (major, minor)
    return pytest.mark.skipif(before, reason=f"before torch {major}.{minor} {reason}")
