"""What a checkpoint may hold besides tensors: the classes that training scripts really save.

Each is plain data: making one runs no code of the file.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import importlib.util
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import RefusedError
from .opaque import known_global

__all__ = ["allowed_globals", "is_ordinary"]

_TORCH_OWN = (
    "collections.Counter",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.Tensor",
    "builtins.bytearray",
    "builtins.set",
    "builtins.complex",
    "torch._tensor._rebuild_from_type_v2",
    "torch.storage.",
    "torch._utils._rebuild_",
)


def allowed_globals(extra: Sequence[str] = ()) -> list[Any]:
    """List what ``torch.serialization.safe_globals`` takes, as (object, name in the pickle).

    Args:
        extra: full names of more classes, ``"mypackage.Config"``; their modules are imported.

    Raises:
        RefusedError: a name of ``extra`` cannot be imported.
    """
    plain = [
        argparse.Namespace,
        types.SimpleNamespace,
        bytes,  # how protocol 2 spells b""
        frozenset,
        datetime.datetime,
        datetime.date,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
        type(torch.__version__),
    ]
    pairs: list[Any] = [(cls, f"{cls.__module__}.{cls.__name__}") for cls in plain]
    for name in ("PosixPath", "PurePosixPath"):  # 3.13 moved them to pathlib._local, and back
        pairs += [(getattr(pathlib, name), f"pathlib{part}.{name}") for part in ("", "._local")]
    if importlib.util.find_spec("numpy") is not None:
        pairs += _numpy_globals()
    return pairs + [(_import(name), name) for name in extra]


def is_ordinary(name: str) -> bool:
    """Whether a global of a pickle is torch's own or on the list, so that nobody need be told."""
    module, _, attribute = name.rpartition(".")
    return (
        known_global(module, attribute) is not None
        or name.startswith(_TORCH_OWN)
        or (module.startswith("torch") and attribute.endswith("Storage"))
        or name in _listed_names()
    )


@functools.cache
def _listed_names() -> frozenset[str]:
    return frozenset(name for _, name in allowed_globals())


def _numpy_globals() -> list[Any]:
    import numpy

    scalar = numpy.float64(0).__reduce__()[0]
    reconstruct = numpy.empty(0).__reduce__()[0]
    pairs: list[Any] = [
        (numpy.dtype, "numpy.dtype"),
        (numpy.ndarray, "numpy.ndarray"),
    ]
    for core in ("numpy._core", "numpy.core"):  # numpy 2 renamed it; files of both exist
        pairs += [
            (scalar, f"{core}.multiarray.scalar"),
            (reconstruct, f"{core}.multiarray._reconstruct"),
        ]
    kinds = {type(numpy.dtype(code)) for code in "?bhilqBHILQefdgFDGSUmM"}
    return pairs + [(kind, f"{kind.__module__}.{kind.__name__}") for kind in kinds]


def _import(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RefusedError(
            f"expected --allow-global to name a class that can be imported, but got {name!r}: "
            f"{error}; install its package, or use --opaque instead."
        ) from error
