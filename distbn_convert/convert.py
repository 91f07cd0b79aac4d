"""Give every BatchNorm of a model virtual ranks, and take them back.

A conversion changes the class of each module and replicates its statistics; nothing is rebuilt.
So parameters, hooks and their handles, flags, attributes and every reference to the module, from
two parents or from a list of yours, stay what they were.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from .errors import (
    AlreadyConvertedError,
    ConversionError,
    NothingToConvertError,
    UnsupportedModuleError,
)
from .layers import STATISTICS, DistBatchNormMixin
from .plan import (
    ConversionPlan,
    FilterFn,
    PlanEntry,
    RankSettings,
    accepts,
    plan_conversion,
    walk,
    wrapper_advice,
)
from .processes import gather_rows, group_place
from .registry import plain_class_of
from .replicas import check_reduction, reduce_rows, replicate

__all__ = ["convert_model", "revert_model"]


def convert_model(
    model: nn.Module,
    vt_world_size: int,
    *,
    partition: str = "contiguous",
    eval_reduction: str = "mean",
    eval_rank: int = 0,
    accumulation_steps: int = 1,
    filter_fn: FilterFn | None = None,
    unsupported: str = "raise",
) -> nn.Module:
    """Replace each BatchNorm by one of V virtual ranks, in place.

    In training each rank's share of the batch is then normalised by its own statistics, as V
    GPUs under DistributedDataParallel do; in evaluation the model computes what it computed
    before, bit for bit.

    Args:
        model: **nn.Module**, changed in place.
        vt_world_size: **int**, number of virtual ranks V.
        partition: **str**, ``"contiguous"`` (rank v takes block v of the batch) or
            ``"interleaved"`` (sample p belongs to rank p mod V). Default: ``"contiguous"``
        eval_reduction: **str**, how evaluation reduces the ranks: ``"mean"``, ``"select"`` or
            ``"pooled"``. Default: ``"mean"``
        eval_rank: **int**, the rank that ``"select"`` takes. Default: 0
        accumulation_steps: **int**, A micro-steps stand for V * A ranks. Default: 1
        filter_fn: **callable(module, fqn) -> bool**, takes the layers to convert; asked for
            every BatchNorm, a shared one once for each of its names. Default: None, all
        unsupported: **str**, ``"raise"`` or ``"skip"``: refuse layers that cannot be converted,
            or leave them alone with a warning. Default: ``"raise"``

    Returns:
        nn.Module: ``model`` itself, also if it is a BatchNorm.

    Raises:
        ConfigurationError: an argument is outside its allowed values.
        UnsupportedModuleError: a BatchNorm subclass without a registered pair; a lazy, Sync,
            quantised or scripted layer; a compiled, DDP-, FSDP- or DataParallel-wrapped model.
        AlreadyConvertedError: a layer has virtual ranks with other settings.
        NothingToConvertError: the model holds no BatchNorm, or the filter takes none.

    Note:
        All that can be refused is refused before the model is touched. ``weight`` and ``bias`` are
        the same Parameters afterwards, so optimizers made before stay valid. Converting again
        with the same settings changes nothing.

    Example::

        >>> model = torchvision.models.resnet18()
        >>> model = convert_model(model, vt_world_size=8)
        >>> model.bn1.running_mean.shape
        torch.Size([8, 64])
    """
    plan = plan_conversion(
        model,
        vt_world_size,
        partition=partition,
        eval_reduction=eval_reduction,
        eval_rank=eval_rank,
        accumulation_steps=accumulation_steps,
        filter_fn=filter_fn,
        unsupported=unsupported,
    )
    _raise_refusals(plan)
    entries = plan.of("convert")
    already = any(isinstance(entry.module, DistBatchNormMixin) for entry in plan)
    if not entries and not already:
        raise _nothing(plan.entries, filter_fn, "BatchNorm", "convert")
    _warn_skipped(plan)

    settings = RankSettings(vt_world_size, partition, eval_reduction, eval_rank, accumulation_steps)
    buffers = _replicate_all(entries, vt_world_size * accumulation_steps)
    for entry in entries:
        assert entry.target is not None
        entry.module.__class__ = entry.target
        for name, value in vars(settings).items():
            setattr(entry.module, name, value)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    if entries and not _check_hooks(model):
        model.register_load_state_dict_pre_hook(_check_state_dict)
    return model


def revert_model(
    model: nn.Module,
    reduction: str = "mean",
    rank: int = 0,
    *,
    filter_fn: FilterFn | None = None,
    process_group: Any = None,
) -> nn.Module:
    """Turn each layer with virtual ranks back into the BatchNorm that it was, in place.

    Args:
        model: **nn.Module**, changed in place.
        reduction: **str**, ``"mean"`` (average of the ranks), ``"select"`` (one rank) or
            ``"pooled"`` (law of total variance). Default: ``"mean"``
        rank: **int**, the rank that ``"select"`` takes. Default: 0
        filter_fn: **callable(module, fqn) -> bool**, takes the layers to revert. Default: None, all
        process_group: **ProcessGroup**, reduce over the rows of all its processes together, one
            collective, each of them calling this; ``torch.distributed.group.WORLD`` for all
            there are. Rows, and ``rank``, count through the processes: process r of R holds rV
            to rV + V - 1. Default: None, the rows of this process alone

    Returns:
        nn.Module: ``model`` itself. Its evaluation equals, bit for bit, that of the converted
        model with ``eval_reduction=reduction``; reverting right after converting restores every
        statistic bit for bit. ``num_batches_tracked`` is the selected rank's, else the largest.

    Raises:
        ConfigurationError: unknown reduction, a rank out of range, or a process outside the group.
        UnsupportedModuleError: a compiled, DDP-, FSDP- or DataParallel-wrapped model.
        NothingToConvertError: no layer has virtual ranks, or the filter takes none.
        ConversionError: a reduced statistic is too large for its dtype.

    Example::

        >>> model = revert_model(model, reduction="mean")
        >>> model.bn1.running_mean.shape
        torch.Size([64])
    """
    check_reduction(reduction, 0, 1)
    modules = list(walk(model))
    for module, names in modules:
        advice = wrapper_advice(module)
        if advice is not None:
            raise UnsupportedModuleError(
                f"{_where(names[0])} cannot be reverted: {advice.replace('convert', 'revert')}."
            )
    candidates = [
        (module, names) for module, names in modules if isinstance(module, DistBatchNormMixin)
    ]
    chosen = [module for module, names in candidates if accepts(filter_fn, module, names)]
    if not chosen:
        found = tuple(
            PlanEntry(names[0], (), module, "keep", None, "") for module, names in candidates
        )
        raise _nothing(found, filter_fn, "layer with virtual ranks", "revert")
    plain_classes = [_plain_class(module) for module in chosen]
    reduced = _reduce_all(chosen, reduction, rank, process_group)
    for module, plain, statistics in zip(chosen, plain_classes, reduced, strict=True):
        module.__class__ = plain  # type: ignore[assignment]
        for name in RankSettings.__dataclass_fields__:
            delattr(module, name)
        module._buffers.update(statistics)
    for module, _ in modules:
        keys = _check_hooks(module)
        if keys and not any(isinstance(child, DistBatchNormMixin) for child in module.modules()):
            for key in keys:
                del module._load_state_dict_pre_hooks[key]
    return model


def _replicate_all(entries: list[PlanEntry], ranks: int) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the new buffers: module, name, rows; what two layers share stays shared."""
    replicated: dict[int, Tensor] = {}
    buffers = []
    for entry in entries:
        for name in STATISTICS:
            statistic = getattr(entry.module, name)
            if statistic is not None:
                if id(statistic) not in replicated:
                    replicated[id(statistic)] = replicate(statistic, ranks)
                buffers.append((entry.module, name, replicated[id(statistic)]))
    return buffers


def _check_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict with other ranks before any module has loaded its part of it."""
    for name, child in module.named_modules():
        if isinstance(child, DistBatchNormMixin):
            child.check_state_dict(state_dict, f"{prefix}{name}." if name else prefix)


def _check_hooks(module: nn.Module) -> list[int]:
    """Return the keys under which ``module`` has :func:`_check_state_dict` as a hook."""
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) is _check_state_dict]


def _plain_class(module: DistBatchNormMixin) -> type[nn.Module]:
    plain = plain_class_of(type(module))
    if plain is None:
        raise UnsupportedModuleError(
            f"{type(module).__name__} has virtual ranks but no plain class to return to; "
            "register_pair it with one first."
        )
    return plain


def _reduce_all(
    modules: list[DistBatchNormMixin], reduction: str, rank: int, process_group: Any
) -> list[dict[str, Tensor]]:
    """Return each layer's reduced statistics by name, over the group's processes if given."""
    processes = 1 if process_group is None else group_place(process_group)[0]
    for module in modules:
        check_reduction(reduction, rank, processes * module.num_ranks)
    named = [
        {name: buffer for name in STATISTICS if (buffer := getattr(module, name)) is not None}
        for module in modules
    ]
    rows = [buffer for buffers in named for buffer in buffers.values()]
    gathered = iter(rows if process_group is None else gather_rows(rows, process_group))
    stacked = [{name: next(gathered) for name in buffers} for buffers in named]
    return [reduce_rows(rows, reduction, rank) for rows in stacked]


def _where(fqn: str) -> str:
    return f"module {fqn!r}" if fqn else "the model"


def _raise_refusals(plan: ConversionPlan) -> None:
    refused = plan.of("refuse")
    if not refused:
        return
    kind: type[ConversionError] = UnsupportedModuleError
    if all(isinstance(entry.module, DistBatchNormMixin) for entry in refused):
        kind = AlreadyConvertedError
    raise kind(f"the model was not changed: {_list(refused)}.")


def _warn_skipped(plan: ConversionPlan) -> None:
    skipped = [entry for entry in plan.of("keep") if entry.reason.startswith("unsupported")]
    if skipped:
        warnings.warn(f"left alone: {_list(skipped)}.", stacklevel=3)


def _list(entries: list[PlanEntry]) -> str:
    """Join the entries, those with one reason together."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.reason, []).append(_where(entry.fqn))
    return "; ".join(f"{', '.join(places)}: {reason}" for reason, places in names.items())


def _nothing(
    entries: tuple[PlanEntry, ...], filter_fn: FilterFn | None, what: str, verb: str
) -> NothingToConvertError:
    left_out = [entry for entry in entries if not entry.reason.startswith("frozen")]
    if filter_fn is not None and left_out:
        name = getattr(filter_fn, "__qualname__", repr(filter_fn))
        names = ", ".join(repr(entry.fqn) for entry in left_out[:3])
        return NothingToConvertError(
            f"expected filter_fn to take some {what}, but {name} took none of {len(left_out)} "
            f"({names}, ...); check the names that it compares with."
        )
    others = f" ({_list(list(entries))})" if entries else ""
    return NothingToConvertError(
        f"expected a model with some {what} to {verb}, but found none{others}; "
        "check that this is the model you meant."
    )
