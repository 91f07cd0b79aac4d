"""Convert checkpoints to virtual ranks and back, without model code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import convert_checkpoint, inspect_checkpoint, revert_checkpoint
    from .gather import gather_checkpoints
    from .options import Options
    from .plot import plot_spread
    from .report import CheckpointReport, FileInfo, GroupReport, Spread, VerifyReport
    from .save import save_state_dict
    from .verify import verify_checkpoint

# Public name -> the module that defines it; importing this package imports no torch.
_HOME = {
    "CheckpointReport": "report",
    "FileInfo": "report",
    "GroupReport": "report",
    "Options": "options",
    "Spread": "report",
    "VerifyReport": "report",
    "convert_checkpoint": "api",
    "gather_checkpoints": "gather",
    "inspect_checkpoint": "api",
    "plot_spread": "plot",
    "revert_checkpoint": "api",
    "save_state_dict": "save",
    "verify_checkpoint": "verify",
}

__all__ = [
    "CheckpointReport",
    "FileInfo",
    "GroupReport",
    "Options",
    "Spread",
    "VerifyReport",
    "convert_checkpoint",
    "gather_checkpoints",
    "inspect_checkpoint",
    "plot_spread",
    "revert_checkpoint",
    "save_state_dict",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
