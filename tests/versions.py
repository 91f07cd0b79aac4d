"""Which releases of other packages the tests run with; scripts/test_torch tries older ones."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest


def version_of(package: str) -> tuple[int, ...]:
    """Its first two numbers, or none where it is not installed."""
    if importlib.util.find_spec(package) is None:
        return ()
    return tuple(int(part) for part in version(package).split(".")[:2])


def since_torch(major: int, minor: int, reason: str) -> pytest.MarkDecorator:
    """Skip with an older torch, for a reason that is no fault of this package."""
    before = version_of("torch") < (major, minor)
    return pytest.mark.skipif(before, reason=f"before torch {major}.{minor} {reason}")
