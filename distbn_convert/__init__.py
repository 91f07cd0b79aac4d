"""Train on one device as if it were many: batch norm with the statistics of V virtual GPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import checkpoint, errors, functional, models
    from .convert import convert_model, revert_model
    from .layers import DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d, DistBatchNormMixin
    from .plan import ConversionPlan, PlanEntry, plan_conversion
    from .population import recalibrate
    from .registry import register_pair
    from .samplers import VirtualDistributedSampler
    from .sync import sync_running_stats

__version__ = "0.1.0"

__all__ = [
    "ConversionPlan",
    "DistBatchNorm1d",
    "DistBatchNorm2d",
    "DistBatchNorm3d",
    "DistBatchNormMixin",
    "PlanEntry",
    "VirtualDistributedSampler",
    "__version__",
    "checkpoint",
    "convert_model",
    "errors",
    "functional",
    "models",
    "plan_conversion",
    "recalibrate",
    "register_pair",
    "revert_model",
    "sync_running_stats",
]

# Public name -> the module that defines it. Importing the package imports none of them (PEP 562),
# so that the command line answers without waiting for torch.
_HOME = {
    "ConversionPlan": "plan",
    "DistBatchNorm1d": "layers",
    "DistBatchNorm2d": "layers",
    "DistBatchNorm3d": "layers",
    "DistBatchNormMixin": "layers",
    "PlanEntry": "plan",
    "VirtualDistributedSampler": "samplers",
    "convert_model": "convert",
    "plan_conversion": "plan",
    "recalibrate": "population",
    "register_pair": "registry",
    "revert_model": "convert",
    "sync_running_stats": "sync",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    if name in ("checkpoint", "errors", "functional", "models"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
