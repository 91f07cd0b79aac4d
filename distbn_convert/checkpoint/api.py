"""The public functions on one checkpoint: convert, revert, inspect."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from .intact import check_checksums
from .job import Job, file_info
from .keywords import InPlaceKeywords, ReadingKeywords, Unpack, shows_options
from .options import Options
from .places import StrPath, as_path
from .report import CheckpointReport, GroupReport
from .stores import Store, open_store
from .survey import Survey, survey

if TYPE_CHECKING:
    from .edit import Replacements

__all__ = ["convert_checkpoint", "inspect_checkpoint", "revert_checkpoint"]

MAX_RANKS = 65536


@shows_options(InPlaceKeywords)
def convert_checkpoint(
    src: StrPath, dst: StrPath | None, vt_world_size: int, **options: Unpack[InPlaceKeywords]
) -> CheckpointReport:
    """Give every BatchNorm in a checkpoint virtual ranks, without the model's code.

    ``running_mean`` and ``running_var`` become ``(V, C)``, ``num_batches_tracked`` becomes
    ``(V,)``, wherever state dicts are in the file. Everything else is carried through bit for
    bit: optimizer, arguments, epoch, order, ties.

    Args:
        src: **path** of a checkpoint of any format that is handled; never modified.
        dst: **path** of the output; None with ``in_place=True``.
        vt_world_size: **int**, number of virtual ranks V, 1 to 65536.
        **options: see :class:`Options`.

    Returns:
        CheckpointReport: what was done, group by group.

    Raises:
        ConfigurationError: an argument is outside its allowed values.
        CheckpointError: see the tree in :mod:`distbn_convert.errors`; nothing was written.

    Example::

        >>> report = convert_checkpoint("plain.pth", "virtual.pth", vt_world_size=8)
        >>> report.counts
        {'converted': 20}
    """
    from .edit import replicate_groups

    whole = isinstance(vt_world_size, int) and not isinstance(vt_world_size, bool)
    if not whole or not 1 <= vt_world_size <= MAX_RANKS:
        raise ConfigurationError(
            f"vt_world_size must be an int from 1 to {MAX_RANKS}, but got {vt_world_size!r}."
        )

    def compute(store: Store, found: Survey) -> Replacements:
        return replicate_groups(found.chosen, store.tensor, vt_world_size)

    job = Job("convert", src, dst, Options(**options))
    return job.run("plain", "converted", compute, virtual_ranks=vt_world_size)


@shows_options(InPlaceKeywords)
def revert_checkpoint(
    src: StrPath,
    dst: StrPath | None,
    reduction: str = "mean",
    rank: int = 0,
    **options: Unpack[InPlaceKeywords],
) -> CheckpointReport:
    """Turn the virtual ranks in a checkpoint back into plain BatchNorm statistics.

    Right after :func:`convert_checkpoint` every statistic comes back bit for bit.

    Args:
        src: **path** of a converted checkpoint; never modified.
        dst: **path** of the output; None with ``in_place=True``.
        reduction: **str**, ``"mean"`` (average of the ranks), ``"select"`` (one rank) or
            ``"pooled"`` (law of total variance). Default: ``"mean"``
        rank: **int**, the rank that ``"select"`` takes. Default: 0
        **options: see :class:`Options`.

    Returns:
        CheckpointReport: what was done, group by group.

    Raises:
        ConfigurationError: an argument is outside its allowed values.
        CheckpointError: see the tree in :mod:`distbn_convert.errors`; nothing was written.

    Example::

        >>> report = revert_checkpoint("virtual.pth", "plain.pth", reduction="select", rank=0)
        >>> report.counts
        {'reverted': 20}
    """
    from ..replicas import check_reduction
    from .edit import pooled_excess, reduce_groups

    check_reduction(reduction, 0, 1)

    def compute(store: Store, found: Survey) -> Replacements:
        new = reduce_groups(found.chosen, store.tensor, reduction, rank)
        if reduction == "mean":
            excess = max(
                pooled_excess(*(store.tensor(group.path, key) for key in group.keys[:2]))
                for group in found.chosen
            )
            if excess > 0.05:
                found.notes.append(
                    "the running means differ between ranks, which 'mean' ignores; 'pooled' would "
                    f"give up to {excess:.0%} larger variances."
                )
        return new

    job = Job("revert", src, dst, Options(**options))
    return job.run("virtual", "reverted", compute, reduction=reduction)


@shows_options(ReadingKeywords)
def inspect_checkpoint(src: StrPath, **options: Unpack[ReadingKeywords]) -> CheckpointReport:
    """List the BatchNorms in a checkpoint and how far their virtual ranks disagree.

    No torch is imported for safetensors.

    Args:
        src: **path** of a checkpoint of any format that is handled.
        **options: see :class:`Options`; those of writing have no effect.

    Returns:
        CheckpointReport: with ``groups[i].spread`` for virtual groups. No groups is no error.

    Raises:
        ConfigurationError: an option is outside its allowed values.
        CheckpointError: the file cannot be read.
    """
    started = time.monotonic()
    path, chosen = as_path(src), Options(**options)
    if chosen.check_input:
        check_checksums(path)
    store = open_store(path, chosen.reading)
    found = survey(store, path, chosen.selection, None)
    groups = found.examine(store, path, chosen.strict, spread=True)
    return CheckpointReport(
        command="inspect",
        source=file_info(path, store.format, chosen.sha256),
        virtual_ranks=_common_ranks(groups),
        groups=groups,
        tensors=store.tensors,
        opaque_globals=tuple(store.opaque_globals),
        warnings=(*store.warnings, *found.concerns, *found.notes),
        elapsed_s=time.monotonic() - started,
    )


def _common_ranks(groups: tuple[GroupReport, ...]) -> int | None:
    ranks = {group.ranks for group in groups if group.action != "skipped"}
    return ranks.pop() if len(ranks) == 1 else None
