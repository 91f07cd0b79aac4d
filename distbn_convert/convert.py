"""Give every BatchNorm of a model virtual ranks, and take them back.

A conversion changes the class of each module and replicates its statistics; nothing is rebuilt.
So parameters, hooks and their handles, flags, attributes and every reference to the module, from
two parents or from a list of yours, stay what they were.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .errors import (
    AlreadyConvertedError,
    ConversionError,
    NothingToConvertError,
    UnsupportedModuleError,
)
from .layers import STATISTICS, DistBatchNormMixin, RankSettings
from .plan import (
    ConversionPlan,
    FilterFn,
    PlanEntry,
    accepts,
    check_filter,
    plan_conversion,
    walk,
    wrapper_of,
)
from .processes import gather_rows, group_place
from .registry import plain_class_of
from .replicas import check_reduction, reduce_rows, replicate

__all__ = ["convert_model", "revert_model"]

NewBuffer = tuple[nn.Module, str, Tensor]
Model = TypeVar("Model", bound=nn.Module)

# Wrappers that hold on to the tensors which reverting replaces -> what to do instead.
_UNWRAP = {
    "DistributedDataParallel": "call revert_model on its .module and leave the wrapper",
    "DataParallel": "call revert_model on its .module, and wrap that",
    "FullyShardedDataParallel": "load its full state dict into a converted model and revert that",
    "FSDPModule": "load its full state dict into a converted model and revert that",
}


def convert_model(
    model: Model,
    vt_world_size: int,
    *,
    partition: str = "contiguous",
    eval_reduction: str = "mean",
    eval_rank: int = 0,
    accumulation_steps: int = 1,
    filter_fn: FilterFn | None = None,
    unsupported: str = "raise",
) -> Model:
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
            every BatchNorm, a shared one once for each of its names (the answers must agree).
            Default: None, all
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
        with the same settings changes nothing. ``load_state_dict`` of the model then refuses a
        checkpoint with another number of ranks before it loads any part of it. A layer that keeps
        running statistics and is no BatchNorm of torch's is left alone with a warning, whatever
        ``unsupported`` says; ``filter_fn`` is not asked for it.

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
    if not plan.of("convert", "already"):
        raise _nothing(list(plan), filter_fn, "BatchNorm", "convert")
    if plan.of("skip"):
        warnings.warn(f"left alone: {_list(plan.of('skip'))}.", stacklevel=2)

    settings = RankSettings(vt_world_size, partition, eval_reduction, eval_rank, accumulation_steps)
    entries = plan.of("convert")
    buffers = _replicate_all(entries, settings.num_ranks)
    for entry in entries:
        assert entry.target is not None
        entry.module.__class__ = entry.target
        settings.apply_to(entry.module)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    if entries and not _check_hooks(model):
        model.register_load_state_dict_pre_hook(_check_state_dict)  # type: ignore[no-untyped-call]
    return model


def revert_model(
    model: Model,
    reduction: str = "mean",
    rank: int = 0,
    *,
    filter_fn: FilterFn | None = None,
    process_group: Any = None,
) -> Model:
    """Turn each layer with virtual ranks back into the BatchNorm that it was, in place.

    Args:
        model: **nn.Module**, changed in place.
        reduction: **str**, ``"mean"`` (average of the ranks), ``"select"`` (one rank) or
            ``"pooled"`` (law of total variance). Default: ``"mean"``
        rank: **int**, the rank that ``"select"`` takes. Default: 0
        filter_fn: **callable(module, fqn) -> bool**, takes the layers to revert. Default: None, all
        process_group: **ProcessGroup**, reduce over the rows of all its processes together, each
            of them calling this; ``torch.distributed.group.WORLD`` for all there are. Rows, and
            ``rank``, count through the processes: process r of R holds rV to rV + V - 1.
            Default: None, the rows of this process alone

    Returns:
        nn.Module: ``model`` itself. Its evaluation equals, bit for bit, that of the converted
        model with ``eval_reduction=reduction``; reverting right after converting restores every
        statistic bit for bit. ``num_batches_tracked`` is the selected rank's, else the largest.

    Raises:
        ConfigurationError: unknown reduction, a rank out of range, a process outside the group,
            layers that differ between its processes, or a filter_fn that is no function.
        UnsupportedModuleError: a DDP-, FSDP- or DataParallel-wrapped model, a layer whose forward
            was replaced or that is parametrized.
        NothingToConvertError: no layer has virtual ranks, or the filter takes none.
        ConversionError: a reduced statistic is too large for its dtype.

    Example::

        >>> model = revert_model(model, reduction="mean")
        >>> model.bn1.running_mean.shape
        torch.Size([64])
    """
    check_filter(filter_fn)
    modules = walk(model)
    candidates = [
        PlanEntry(names[0], tuple(names[1:]), module, "filtered", None, "")
        for module, names in modules
        if isinstance(module, DistBatchNormMixin)
    ]
    entries = [e for e in candidates if accepts(filter_fn, e.module, [e.fqn, *e.aliases])]
    if not entries:
        if process_group is not None:  # the others may have some, and wait for this process
            gather_rows([], process_group)
        raise _nothing(candidates, filter_fn, "layers with virtual ranks", "revert")
    _raise_unless_revertible(modules, entries)
    buffers = _reduce_all(entries, reduction, rank, process_group)
    for entry in entries:
        entry.module.__class__ = plain_class_of(type(entry.module))  # type: ignore[assignment]
        for name in RankSettings.__dataclass_fields__:
            delattr(entry.module, name)
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    for module, _ in modules:
        keys = _check_hooks(module)
        if keys and not any(isinstance(child, DistBatchNormMixin) for child in module.modules()):
            for key in keys:
                del module._load_state_dict_pre_hooks[key]
    return model


@torch.inference_mode(False)
def _replicate_all(entries: list[PlanEntry], ranks: int) -> list[NewBuffer]:
    """Replicate the statistics of all layers; what two layers share stays shared."""
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


@torch.inference_mode(False)
def _reduce_all(
    entries: list[PlanEntry], reduction: str, rank: int, process_group: Any
) -> list[NewBuffer]:
    """Reduce the statistics of all layers, over the group's processes if given.

    What two layers share stays shared.
    """
    processes = 1 if process_group is None else group_place(process_group)[0]
    layers = []
    for entry in entries:
        buffers = {name: getattr(entry.module, name) for name in STATISTICS}
        layers.append({name: buffer for name, buffer in buffers.items() if buffer is not None})
    rows = [buffer for buffers in layers for buffer in buffers.values()]
    gathered = iter(rows if process_group is None else gather_rows(rows, process_group))
    shared: dict[tuple[str | int, ...], Tensor] = {}
    new = []
    for entry, buffers in zip(entries, layers, strict=True):
        ranks = cast(DistBatchNormMixin, entry.module).num_ranks
        # Not before: a process that raises alone leaves the others waiting for it.
        check_reduction(reduction, rank, processes * ranks)
        stacked = {name: next(gathered) for name in buffers}
        for name, value in reduce_rows(stacked, reduction, rank).items():
            # A pooled variance depends on the mean as well.
            pair = ("running_mean", "running_var")
            sources = [buffers[key] for key in (pair if name == "running_var" else (name,))]
            value = shared.setdefault((name, *map(id, sources)), value)
            new.append((entry.module, name, value))
    return new


def _check_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a state dict with other ranks before any module has loaded its part of it."""
    for child, names in walk(module):
        if isinstance(child, DistBatchNormMixin):
            for name in names:
                # Torch's wrapper for activation checkpointing takes its name out of the keys.
                path = f"{name}.".replace("_checkpoint_wrapped_module.", "") if name else ""
                child.check_state_dict(state_dict, prefix + path)


def _check_hooks(module: nn.Module) -> list[int]:
    """Return the keys under which ``module`` has :func:`_check_state_dict` as a hook."""
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) is _check_state_dict]


def _raise_unless_revertible(
    modules: list[tuple[nn.Module, list[str]]], entries: list[PlanEntry]
) -> None:
    """Refuse what would leave a wrapper or a layer broken. A compiled model just recompiles."""
    for module, names in modules:
        wrapper = wrapper_of(module)
        if wrapper is not None and wrapper in _UNWRAP:
            raise UnsupportedModuleError(
                f"{_where(names[0])} cannot be reverted: wrapped by {wrapper}; {_UNWRAP[wrapper]}."
            )
    for entry in entries:
        reason = None
        if "forward" in vars(entry.module):
            reason = "its forward was replaced on the instance; undo that first"
        elif hasattr(entry.module, "parametrizations"):
            reason = "its parameters are parametrized; remove the parametrization first"
        elif plain_class_of(type(entry.module)) is None:
            name = type(entry.module).__name__
            reason = f"{name} has no plain class to return to; register_pair it with one first"
        if reason is not None:
            raise UnsupportedModuleError(f"{_where(entry.fqn)} cannot be reverted: {reason}.")


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


def _list(entries: list[PlanEntry]) -> str:
    """Join the entries, those with one reason together."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.reason, []).append(_where(entry.fqn))
    return "; ".join(f"{', '.join(places)}: {reason}" for reason, places in names.items())


def _nothing(
    entries: list[PlanEntry], filter_fn: FilterFn | None, what: str, verb: str
) -> NothingToConvertError:
    filtered = [entry for entry in entries if entry.action == "filtered"]
    if filtered:
        name = getattr(filter_fn, "__qualname__", repr(filter_fn))
        names = ", ".join(repr(entry.fqn) for entry in filtered[:3])
        more = ", ..." if len(filtered) > 3 else ""
        return NothingToConvertError(
            f"expected filter_fn to take some {what}, but {name} took none of {len(filtered)} "
            f"({names}{more}); check the names that it compares with."
        )
    others = f" ({_list(entries)})" if entries else ""
    return NothingToConvertError(
        f"expected a model with some {what} to {verb}, but found none{others}; "
        "check that this is the model you meant."
    )
