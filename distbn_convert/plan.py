"""What a conversion would do, module by module, decided before anything is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .checks import IMPLEMENTATIONS
from .errors import ConfigurationError, ConversionError, UnsupportedModuleError
from .layers import ADDED_NAMES, STATISTICS, DistBatchNormMixin, RankSettings
from .registry import dist_class_of

__all__ = ["ConversionPlan", "FilterFn", "PlanEntry", "plan_conversion", "walk"]

FilterFn = Callable[[nn.Module, str], bool]
Action = Literal["convert", "already", "frozen", "filtered", "skip", "refuse"]

# Wrappers hold on to the classes and tensors that a conversion replaces. By name, so that no
# wrapper's package is imported: name -> what to do instead.
_WRAPPERS = {
    "DistributedDataParallel": "convert its .module before wrapping it",
    "DataParallel": "convert its .module, and wrap that",
    "FullyShardedDataParallel": "convert the model before wrapping it",
    "FSDPModule": "convert the model before fully_shard",
    "OptimizedModule": "convert the model before torch.compile",
    "Module.compile()": "convert the model before compiling it",
}
_OR_SKIP = ", or pass unsupported='skip'"
_QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.", "torch.nn.qat.")


@dataclass(frozen=True)
class PlanEntry:
    """What happens to one module.

    Attributes:
        fqn: the module's name in the model, ``""`` for the root.
        aliases: its other names, if it is reachable by several.
        module: the module itself.
        action: ``"convert"``; ``"refuse"`` (an error); or left as it is: ``"already"`` converted,
            ``"frozen"``, ``"filtered"`` by filter_fn, ``"skip"`` (unsupported, or of another
            package; with a warning).
        target: the class it becomes; None unless the action is ``"convert"``.
        reason: why, in a sentence.
    """

    fqn: str
    aliases: tuple[str, ...]
    module: nn.Module = field(repr=False)
    action: Action
    target: type[DistBatchNormMixin] | None
    reason: str

    def __str__(self) -> str:
        names = ", ".join(repr(name) for name in (self.fqn, *self.aliases))
        target = f" -> {self.target.__name__}" if self.target else ""
        return f"{self.action:9}{names} {type(self.module).__name__}{target}: {self.reason}"


class ConversionPlan(tuple[PlanEntry, ...]):
    """The entries of a plan, one for each module that matters; ``print`` shows them as lines."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    def of(self, *actions: Action) -> list[PlanEntry]:
        """Return the entries with one of these actions."""
        return [entry for entry in self if entry.action in actions]


def plan_conversion(
    model: nn.Module,
    vt_world_size: int,
    *,
    partition: str = "contiguous",
    eval_reduction: str = "mean",
    eval_rank: int = 0,
    accumulation_steps: int = 1,
    filter_fn: FilterFn | None = None,
    unsupported: str = "raise",
) -> ConversionPlan:
    """Say what :func:`~distbn_convert.convert_model` would do, and change nothing.

    Args:
        model: **nn.Module**, the model.
        vt_world_size: as in :func:`~distbn_convert.convert_model`, like all that follow.
        partition: as there. Default: ``"contiguous"``
        eval_reduction: as there. Default: ``"mean"``
        eval_rank: as there. Default: 0
        accumulation_steps: as there. Default: 1
        filter_fn: as there. Default: None
        unsupported: as there. Default: ``"raise"``

    Returns:
        ConversionPlan: a tuple with one PlanEntry for each BatchNorm and each module that cannot
        be converted: its names, what becomes of it, and why.

    Raises:
        ConfigurationError: an argument is outside its allowed values.
        UnsupportedModuleError: ``model`` is no nn.Module.
        ConversionError: the filter takes a module under one name and not under another.

    Example::

        >>> print(plan_conversion(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), 4))
        convert  '1' BatchNorm2d -> DistBatchNorm2d: 4 virtual ranks
    """
    settings = RankSettings(vt_world_size, partition, eval_reduction, eval_rank, accumulation_steps)
    if unsupported not in ("raise", "skip"):
        raise ConfigurationError(
            f"unsupported must be 'raise' or 'skip', but got {unsupported!r}; "
            "'skip' leaves unknown layers alone with a warning."
        )
    check_filter(filter_fn)
    entries = []
    for module, names in walk(model):
        verdict = _judge(module, settings)
        if verdict is None:
            continue
        action, target, reason = verdict
        if action not in ("frozen", "skip") and wrapper_of(module) is None:
            if not accepts(filter_fn, module, names):
                action, target, reason = "filtered", None, "filter_fn leaves it out"
            elif action == "refuse" and unsupported == "skip":
                action, reason = "skip", reason.removesuffix(_OR_SKIP)
        entries.append(PlanEntry(names[0], tuple(names[1:]), module, action, target, reason))
    return ConversionPlan(entries)


def walk(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return each module once, with all its names in the order of ``named_modules``.

    What lies inside a module that must be taken whole (quantised, scripted) is left out.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModuleError(
            f"expected an nn.Module, but got {type(model).__name__}; pass the model itself "
            "(for a checkpoint's state dict, load it into the model first)."
        )
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in _paths(model, "", frozenset()):
        found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _paths(module: nn.Module, name: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield every path to every module; a module inside itself ends the path."""
    yield name, module
    if _is_opaque(module):
        return
    above |= {id(module)}
    for child_name, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _paths(child, f"{name}.{child_name}" if name else child_name, above)


def check_filter(filter_fn: FilterFn | None) -> None:
    """Raise ConfigurationError if a filter is none that can be called."""
    if filter_fn is not None and not callable(filter_fn):
        raise ConfigurationError(
            f"filter_fn must be a function of (module, fqn), but got {filter_fn!r}; "
            "pass for example lambda module, fqn: fqn.startswith('backbone')."
        )


def accepts(filter_fn: FilterFn | None, module: nn.Module, names: list[str]) -> bool:
    """Ask the filter for each name of a module; the answers must agree."""
    if filter_fn is None:
        return True
    answers = {name: bool(filter_fn(module, name)) for name in names}
    if len(set(answers.values())) > 1:
        taken = next(name for name, answer in answers.items() if answer)
        left = next(name for name, answer in answers.items() if not answer)
        raise ConversionError(
            f"filter_fn takes {taken!r} and leaves out {left!r}, but both names are one shared "
            "module; give the same answer for both."
        )
    return answers[names[0]]


def wrapper_of(module: nn.Module) -> str | None:
    """Return the name of the wrapper that a module is, None for any other module."""
    for base in type(module).__mro__:
        if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
            return base.__name__
    return "Module.compile()" if getattr(module, "_compiled_call_impl", None) is not None else None


def _is_opaque(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith(
        _QUANTIZED
    )


def _judge(
    module: nn.Module, settings: RankSettings
) -> tuple[Action, type[DistBatchNormMixin] | None, str] | None:
    """Decide about one module; None if it has nothing to do with batch norm."""
    wrapper = wrapper_of(module)
    if wrapper is not None:
        if not any(isinstance(child, _BatchNorm) for child in module.modules()):
            return None
        return "refuse", None, f"wrapped by {wrapper}; {_WRAPPERS[wrapper]}"
    if _is_opaque(module):
        return _judge_opaque(module)
    if isinstance(module, DistBatchNormMixin):
        return _judge_converted(module, settings)
    if not isinstance(module, _BatchNorm):
        if "FrozenBatchNorm" in type(module).__name__:
            return "frozen", None, "it never uses batch statistics, so ranks change nothing"
        if _keeps_statistics(module):
            return (
                "skip",
                None,
                "it keeps running statistics but is no BatchNorm of torch's; if it trains on those "
                "of the batch, it goes on with the whole batch's",
            )
        return None
    reason = _why_unsupported(module)
    if reason is not None:
        return "refuse", None, reason
    return "convert", dist_class_of(type(module)), f"{settings.num_ranks} virtual ranks"


def _keeps_statistics(module: nn.Module) -> bool:
    """Whether a layer that is no ``_BatchNorm`` may be a batch norm of some other package.

    One of complex numbers has other names for its statistics; its own name tells.
    """
    if isinstance(module, _InstanceNorm):  # of each sample by itself
        return False
    kept = {name for name, buffer in module._buffers.items() if buffer is not None}
    if kept >= {"running_mean", "running_var"}:
        return True
    if not kept or "BatchNorm" not in type(module).__name__:
        return False
    return not any(isinstance(inner, _BatchNorm) for inner in module.modules())


def _judge_opaque(module: nn.Module) -> tuple[Action, None, str] | None:
    if isinstance(module, torch.jit.ScriptModule):
        inside = (getattr(child, "original_name", "") for child in module.modules())
        if any("BatchNorm" in name for name in inside):
            return "refuse", None, "it is TorchScript; convert the model before scripting it"
    elif any(isinstance(child, _BatchNorm) for child in module.modules()):
        return "refuse", None, "it is quantised or fused; convert the float model before that"
    return None


def _judge_converted(
    module: DistBatchNormMixin, settings: RankSettings
) -> tuple[Action, None, str]:
    for name, wanted in vars(settings).items():
        has = getattr(module, name)
        if has != wanted:
            return (
                "refuse",
                None,
                f"it already has virtual ranks, with {name}={has!r} where {wanted!r} was asked for;"
                " call revert_model first",
            )
    return "already", None, f"it has these {module.num_ranks} virtual ranks"


def _why_unsupported(module: _BatchNorm) -> str | None:
    """Return why a ``_BatchNorm`` cannot get virtual ranks, None if it can."""
    cls = type(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy and has no channels yet; run one batch through the model first"
    if isinstance(module, nn.SyncBatchNorm):
        return (
            "it synchronises its statistics, the opposite of virtual ranks; "
            "replace it by BatchNorm first"
        )
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized; convert before parametrizing, or remove that"
    if dist_class_of(cls) is None:
        return (
            f"{cls.__module__}.{cls.__qualname__} is a subclass whose behaviour would be lost; "
            f"register_pair its class with virtual ranks{_OR_SKIP}"
        )
    if "forward" in vars(module):
        return "its forward was replaced on the instance; convert before patching it"
    own = vars(module)
    taken = ADDED_NAMES & {*own, *module._modules, *module._parameters, *module._buffers}
    if own.get("impl") in IMPLEMENTATIONS:
        taken -= {"impl"}
    if taken:
        return (
            f"it has an attribute {min(taken)} of its own, which a layer with virtual ranks needs; "
            "rename it first"
        )
    shapes = ((module.num_features,), (module.num_features,), ())
    for name, shape in zip(STATISTICS, shapes, strict=True):
        statistic = getattr(module, name)
        if statistic is not None and statistic.shape != shape:
            return f"its {name} has shape {tuple(statistic.shape)}, expected {shape}; mend it first"
    return None
