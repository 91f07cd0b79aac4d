"""Which class has virtual ranks for which plain class: one table for both directions."""

from __future__ import annotations

import contextlib
import importlib
import sys

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import RegistryError
from .layers import (
    ADDED_NAMES,
    DistBatchNorm1d,
    DistBatchNorm2d,
    DistBatchNorm3d,
    DistBatchNormMixin,
)

__all__ = ["dist_class_of", "plain_class_of", "register_pair"]

_DIST_OF: dict[type[nn.Module], type[DistBatchNormMixin]] = {}
_PLAIN_OF: dict[type[nn.Module], type[nn.Module]] = {}

_DIMENSIONS: dict[type[nn.Module], type[DistBatchNormMixin]] = {
    nn.BatchNorm1d: DistBatchNorm1d,
    nn.BatchNorm2d: DistBatchNorm2d,
    nn.BatchNorm3d: DistBatchNorm3d,
}
_TORCH_FORWARDS = {cls.forward for cls in _DIMENSIONS}

# Pairs for classes of other packages, loaded when the user has imported that package.
_INTEGRATIONS = {"timm": "distbn_convert.integrations.timm"}


def register_pair(plain: type[nn.Module], dist: type[DistBatchNormMixin]) -> None:
    """Tell the converter which class gives a BatchNorm subclass of yours virtual ranks.

    Conversion changes the class of a module and keeps its attributes, so ``dist`` must derive
    from ``plain``. If ``plain.forward`` calls ``super().forward``, an empty class is enough.

    Args:
        plain: **type**, the class to convert; matched exactly, subclasses of it are not.
        dist: **type**, derives from ``plain`` and from DistBatchNorm1d, 2d or 3d; from
            DistBatchNormMixin, if ``plain`` derives from torch's ``_BatchNorm`` alone.

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
    if not (isinstance(plain, type) and issubclass(plain, _BatchNorm)) or issubclass(
        plain, nn.SyncBatchNorm
    ):
        raise RegistryError(
            f"plain must be a subclass of torch's BatchNorm, not SyncBatchNorm, but got {plain!r}; "
            "give the class itself."
        )
    if issubclass(plain, DistBatchNormMixin):
        raise RegistryError(
            f"plain must be a class without virtual ranks, but got {plain.__name__}; "
            "give the one that it stands for."
        )
    taken = sorted(name for name in ADDED_NAMES if hasattr(plain, name))
    if taken:
        raise RegistryError(
            f"expected a class without the names of a layer with virtual ranks, but "
            f"{plain.__name__} has {', '.join(taken)}; rename that."
        )
    bases = (dist for torchs, dist in _DIMENSIONS.items() if issubclass(plain, torchs))
    base = next(bases, DistBatchNormMixin)
    advice = f"write class Dist{plain.__name__}({plain.__name__}, {base.__name__}): ..."
    if not (isinstance(dist, type) and issubclass(dist, plain) and issubclass(dist, base)):
        raise RegistryError(
            f"dist must derive from {plain.__name__} and from {base.__name__}, but got {dist!r}; "
            f"{advice}"
        )
    if plain.forward not in _TORCH_FORWARDS and dist.forward is DistBatchNormMixin.forward:
        raise RegistryError(
            f"{dist.__name__} must keep the forward of {plain.__name__}, but its bases put batch "
            f"norm's in front; {advice}"
        )
    if plain in _DIST_OF or dist in _PLAIN_OF:
        raise RegistryError(
            f"expected classes that are in no pair yet, but {plain.__name__} or {dist.__name__} "
            "already is; register each class once."
        )
    try:
        object.__setattr__(plain.__new__(plain), "__class__", dist)
    except TypeError as error:
        raise RegistryError(
            f"a {plain.__name__} must be able to become a {dist.__name__}, but {error}; "
            "use no __slots__."
        ) from error
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
    for package, integration in list(_INTEGRATIONS.items()):
        if package in sys.modules:
            del _INTEGRATIONS[package]
            # A version without the class that the integration knows has nothing to register;
            # whatever it has instead is an unknown subclass, refused by name.
            with contextlib.suppress(ImportError):
                importlib.import_module(integration)


for _plain, _dist in _DIMENSIONS.items():
    register_pair(_plain, _dist)
