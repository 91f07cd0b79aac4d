"""Which class has virtual ranks for which plain class: one table for both directions."""

from __future__ import annotations

import importlib
import sys

from torch import nn

from .errors import RegistryError
from .layers import DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d, DistBatchNormMixin

__all__ = ["dist_class_of", "plain_class_of", "register_pair"]

_DIST_OF: dict[type[nn.Module], type[DistBatchNormMixin]] = {}
_PLAIN_OF: dict[type[nn.Module], type[nn.Module]] = {}

# Pairs for classes of other packages, loaded when the user has imported that package.
_INTEGRATIONS = {"timm": "distbn_convert.integrations.timm"}


def register_pair(plain: type[nn.Module], dist: type[DistBatchNormMixin]) -> None:
    """Tell the converter which class gives a BatchNorm subclass of yours virtual ranks.

    Conversion changes the class of a module and keeps its attributes, so ``dist`` must derive
    from ``plain``. If ``plain.forward`` calls ``super().forward``, an empty class is enough.

    Args:
        plain: **type**, the class to convert; matched exactly, subclasses of it are not.
        dist: **type**, derives from ``plain`` and from DistBatchNorm1d, 2d or 3d.

    Raises:
        RegistryError: a class does not fit, or ``plain`` or ``dist`` is already registered.

    Example::

        >>> class BatchNormReLU(nn.BatchNorm2d):
        ...     def forward(self, input):
        ...         return super().forward(input).relu()
        >>> class DistBatchNormReLU(BatchNormReLU, DistBatchNorm2d):
        ...     pass
        >>> register_pair(BatchNormReLU, DistBatchNormReLU)
    """
    if not (isinstance(plain, type) and issubclass(plain, nn.modules.batchnorm._BatchNorm)):
        raise RegistryError(
            f"plain must be a subclass of BatchNorm1d, 2d or 3d, but got {plain!r}; "
            "give the class itself."
        )
    fits = isinstance(dist, type) and issubclass(dist, plain)
    if not (fits and issubclass(dist, DistBatchNormMixin)):
        raise RegistryError(
            f"dist must derive from {plain.__name__} and from DistBatchNorm1d, 2d or 3d, but got "
            f"{dist!r}; write class Dist{plain.__name__}({plain.__name__}, DistBatchNorm2d): ..."
        )
    if plain in _DIST_OF or dist in _PLAIN_OF or issubclass(plain, DistBatchNormMixin):
        raise RegistryError(
            f"expected classes that are in no pair yet, but {plain.__name__} or {dist.__name__} "
            "already is; register each class once."
        )
    _DIST_OF[plain] = dist
    _PLAIN_OF[dist] = plain


def dist_class_of(plain: type[nn.Module]) -> type[DistBatchNormMixin] | None:
    """Return the class with virtual ranks for exactly ``plain``, or None."""
    _load_integrations()
    return _DIST_OF.get(plain)


def plain_class_of(dist: type[nn.Module]) -> type[nn.Module] | None:
    """Return the plain class for exactly ``dist``, or None."""
    _load_integrations()
    return _PLAIN_OF.get(dist)


def _load_integrations() -> None:
    for package, integration in _INTEGRATIONS.items():
        if package in sys.modules and integration not in sys.modules:
            importlib.import_module(integration)


register_pair(nn.BatchNorm1d, DistBatchNorm1d)
register_pair(nn.BatchNorm2d, DistBatchNorm2d)
register_pair(nn.BatchNorm3d, DistBatchNorm3d)
