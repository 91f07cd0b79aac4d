"""torchvision's model zoo with virtual ranks, under torchvision's names and conventions."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from .convert import convert_model
from .errors import ConfigurationError
from .plan import FilterFn, plan_conversion

__all__ = ["count_batch_norms", "get_model", "list_models"]

list_models = torchvision.models.list_models


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
        DistBNError: as :func:`~distbn_convert.convert_model`.

    Example::

        >>> model = get_model("resnet18", vt_world_size=8, num_classes=10)
    """
    try:
        model = _builder(name)(weights=weights, **kwargs)
    except KeyError as error:
        if not isinstance(weights, str):
            raise
        known = ", ".join(torchvision.models.get_model_weights(name).__members__)
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
    """Count the layers that :func:`get_model` would convert, without filling the model's memory.

    Args:
        name: **str**, a torchvision model.

    Returns:
        int: the number of BatchNorm layers, 0 if there is nothing to convert.

    Raises:
        ConfigurationError: torchvision knows no model of that name.
    """
    builder = _builder(name)
    bare = {"weights_backbone": None, "init_weights": False}  # no download, no waiting
    kwargs = {key: value for key, value in bare.items() if key in signature(builder).parameters}
    with _SkipInit():
        model = builder(**kwargs)
    return len(plan_conversion(model, 1, unsupported="skip").of("convert"))


def _builder(name: str) -> Callable[..., nn.Module]:
    try:
        builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    except ValueError as error:
        raise ConfigurationError(
            f"expected the name of a torchvision model, but got {name!r}; list_models() "
            "(distbn-convert models) names them all."
        ) from error
    return builder


class _SkipInit(TorchFunctionMode):
    """Leave new parameters unwritten, so that the system never gives them memory.

    The meta device would do, but RegNet's builder computes its widths with tensors.
    """

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
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)
