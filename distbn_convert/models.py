"""torchvision's model zoo with virtual ranks, under torchvision's names and conventions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .convert import convert_model
from .errors import ConfigurationError
from .plan import FilterFn, plan_conversion

__all__ = ["count_batch_norms", "get_model", "list_models"]


def list_models(
    module: ModuleType | None = None,
    include: Iterable[str] | str | None = None,
    exclude: Iterable[str] | str | None = None,
) -> list[str]:
    """Name torchvision's models, those without BatchNorm too.

    Args:
        module: **module** to look in, ``torchvision.models.segmentation``. Default: None, all
        include: **str or iterable of str**, patterns of names, ``"resnet*"``. Default: None, all
        exclude: **str or iterable of str**, patterns of names to leave out. Default: None

    Returns:
        list of str: the names, sorted; as ``torchvision.models.list_models``.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    names: list[str] = _zoo().list_models(module, include, exclude)
    return names


def get_model(
    name: str,
    vt_world_size: int = 8,
    weights: Any = None,
    *,
    partition: str = "contiguous",
    eval_reduction: str = "mean",
    eval_rank: int = 0,
    accumulation_steps: int = 1,
    filter_fn: FilterFn | None = None,
    unsupported: str = "raise",
    **kwargs: Any,
) -> nn.Module:
    """Build a torchvision model and convert it.

    Args:
        name: **str**, as ``torchvision.models.get_model`` takes it.
        vt_world_size: **int**, number of virtual ranks V. Default: 8
        weights: **WeightsEnum, str or None**, as torchvision takes them; pretrained statistics
            go to every rank. Default: None
        partition: as in :func:`~distbn_convert.convert_model`, like all up to ``unsupported``.
        eval_reduction: as there.
        eval_rank: as there.
        accumulation_steps: as there.
        filter_fn: as there.
        unsupported: as there.
        **kwargs: for torchvision's builder, for example ``num_classes=10``.

    Returns:
        nn.Module: the converted model.

    Raises:
        ConfigurationError: torchvision knows no model or no weights of that name.
        NothingToConvertError: the model holds no BatchNorm.
        ModuleNotFoundError: torchvision is not installed.
        DistBNError: as :func:`~distbn_convert.convert_model`.

    Example::

        >>> model = get_model("resnet18", vt_world_size=8, num_classes=10)
    """
    try:
        model = _builder(name)(weights=weights, **kwargs)
    except KeyError as error:
        if not isinstance(weights, str):
            raise
        known = ", ".join(_zoo().get_model_weights(name).__members__)
        raise ConfigurationError(
            f"expected weights of {name} ({known}), but got {weights!r}; torchvision has no others."
        ) from error
    return convert_model(
        model,
        vt_world_size,
        partition=partition,
        eval_reduction=eval_reduction,
        eval_rank=eval_rank,
        accumulation_steps=accumulation_steps,
        filter_fn=filter_fn,
        unsupported=unsupported,
    )


def count_batch_norms(name: str) -> int:
    """Count the layers that :func:`get_model` would convert, without memory for the model.

    Args:
        name: **str**, a torchvision model.

    Returns:
        int: the number of BatchNorm layers, 0 if there is nothing to convert.

    Raises:
        ConfigurationError: torchvision knows no model of that name.
        ModuleNotFoundError: torchvision is not installed.
    """
    builder = _builder(name)
    bare = {"weights_backbone": None, "init_weights": False}  # no download, no waiting
    kwargs = {key: value for key, value in bare.items() if key in signature(builder).parameters}
    with _OnMeta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, of first values that nobody sees
        model = builder(**kwargs)
    return len(plan_conversion(model, 1, unsupported="skip").of("convert"))


def _zoo() -> Any:
    """Return ``torchvision.models``, imported here alone: it is an extra."""
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"expected torchvision, whose models these are, but {error.name} is not installed; "
            "install it with: pip install 'distbn_convert[models]'",
            name=error.name,
        ) from error
    return torchvision.models


def _builder(name: str) -> Callable[..., nn.Module]:
    try:
        builder: Callable[..., nn.Module] = _zoo().get_model_builder(name)
    except ValueError as error:
        raise ConfigurationError(
            f"expected the name of a torchvision model, but got {name!r}; list_models() "
            "(distbn-convert models) names them all."
        ) from error
    return builder


class _SkipInit(TorchFunctionMode):
    """Leave new parameters unwritten, so that the system never gives them memory."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        in_place = name.endswith("_") and not name.endswith("__")
        if in_place and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


class _OnMeta(_SkipInit):
    """Make what layers are made of on the meta device, where nothing is computed.

    All else is made where it was: RegNet's builder computes its widths with tensors.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs = {**(kwargs or {}), "device": "meta"}
        return super().__torch_function__(func, types, args, kwargs)
