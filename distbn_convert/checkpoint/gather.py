"""Several checkpoints, one saved by each real rank, united into one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import ConfigurationError, ReadError
from .beside import files_beside, same_content
from .compare import differences, same_bits
from .edit import Replacements, gather_groups
from .groups import Group, KeyPath, Specs, dotted
from .intact import check_checksums
from .job import Job
from .keywords import Unpack, WritingKeywords, shows_options
from .options import Options
from .places import StrPath, as_path
from .report import CheckpointReport
from .stores import Store, open_store
from .survey import Survey, survey
from .torchstore import TreeStore
from .words import and_more

__all__ = ["gather_checkpoints"]

_REDUCTIONS = ("stack", "mean", "pooled")


@shows_options(WritingKeywords)
def gather_checkpoints(
    srcs: Sequence[StrPath],
    dst: StrPath | None,
    reduction: str = "stack",
    **options: Unpack[WritingKeywords],
) -> CheckpointReport:
    """Unite checkpoints that real ranks saved one by one.

    BatchNorm buffers are never synchronised by FSDP, and by DDP only before a forward, so each
    rank's file has its own. Here the statistics of file r become virtual rank r (of files with V
    virtual ranks each, ranks rV to rV + V - 1), or they are reduced.

    Args:
        srcs: **sequence of path**, at least two, in the order of the ranks.
        dst: **path** of the output.
        reduction: **str**, ``"stack"``, ``"mean"`` or ``"pooled"``. Default: ``"stack"``
        **options: see :class:`Options`.

    Returns:
        CheckpointReport: its ``source`` is the first file, from which everything outside the state
        dicts is taken.

    Raises:
        ConfigurationError: an argument is outside its allowed values.
        ReadError: the state dicts differ in more than BatchNorm statistics.
        CheckpointError: see the tree in :mod:`distbn_convert.errors`; nothing was written.

    Example::

        >>> report = gather_checkpoints(["rank0.pth", "rank1.pth"], "all.pth")
        >>> report.counts
        {'gathered': 20}
    """
    chosen_options = Options(**options)
    if reduction not in _REDUCTIONS:
        raise ConfigurationError(
            f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, but got {reduction!r}."
        )
    if isinstance(srcs, (str, bytes, os.PathLike)):
        raise ConfigurationError(
            f"expected a sequence of at least two paths, but got {srcs!r}; write "
            '["rank0.pth", "rank1.pth"], or sorted(folder.glob("rank*.pth")).'
        )
    if len(srcs) < 2 or chosen_options.in_place:
        raise ConfigurationError(
            f"expected at least two inputs and another output, but got {len(srcs)} inputs"
            f"{' and in_place' if chosen_options.in_place else ''}."
        )

    def compute(first: Store, found: Survey) -> Replacements:
        stores, chosen = [first], found.chosen
        for src in srcs[1:]:
            path = as_path(src)
            job.watch(path)
            if chosen_options.check_input:
                check_checksums(path)
            stores.append(open_store(path, chosen_options.reading))
            job.keep(stores[-1])
            job.watch_read(path, stores[-1])
            other = survey(stores[-1], path, chosen_options.selection, "any")
            _check_same(srcs[0], src, stores, (chosen, other.chosen))
            other.examine(stores[-1], path, chosen_options.strict)
            found.concerns += [f"{src}: {it}" for it in other.concerns if it not in found.concerns]
            if job.format is None:  # else nothing but the state dict is taken
                names = _other_differences(stores, chosen) + _other_files(job.src, path, stores)
                found.notes.extend(_first_taken(src, names))
            if chosen_options.verify:
                stores[-1].check([(group.path, key) for group in chosen for key in group.keys])
        return gather_groups(chosen, [store.tensor for store in stores], reduction)

    job = Job("gather", srcs[0], dst, chosen_options)
    report = job.run("any", "gathered", compute, reduction=reduction)
    ranks = {(group.ranks or 1) * len(srcs) for group in report.groups if group.action != "skipped"}
    report.virtual_ranks = ranks.pop() if reduction == "stack" and len(ranks) == 1 else None
    return report


def _check_same(
    first: StrPath, second: StrPath, stores: list[Store], groups: tuple[list[Group], list[Group]]
) -> None:
    """Raise ReadError unless two files agree in all but the statistics of the groups."""
    statistics = {(group.path, key) for group in groups[0] for key in group.keys}
    grad = all(isinstance(store, TreeStore) for store in (stores[0], stores[-1]))
    found = []
    for path, specs, others in _paired(stores, groups[0]):
        keys = [key for key, spec in specs.items() if spec is not None]
        for key in [*keys, *(k for k, spec in others.items() if spec and k not in specs)]:
            spec, other = specs.get(key), others.get(key)
            where = dotted((*path, key))
            if spec is None or other is None:
                found.append(f"{where} is in {first if other is None else second} alone")
            elif spec != other:
                found.append(
                    f"{where} is {spec.dtype} {spec.shape} and {other.dtype} {other.shape}"
                )
            elif (path, key) not in statistics and not same_bits(
                stores[0].tensor(path, key), stores[-1].tensor(path, key), grad
            ):
                found.append(f"the values of {where} differ")
    if not found:  # then there may be more in a mapping that the first file does not have
        known = {(group.path, group.keys) for group in groups[0]}
        added = [group for group in groups[1] if (group.path, group.keys) not in known]
        found = [f"{group.full_name} is in {second} alone" for group in added]
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ReadError(
            f"{first} and {second} are not of one run, where only BatchNorm statistics differ: "
            f"{'; '.join(found[:3])}{more}."
        )


def _paired(stores: list[Store], groups: list[Group]) -> Iterator[tuple[KeyPath, Specs, Specs]]:
    """Yield the path of each mapping that holds groups, what is in it, and in the last store's."""
    paths = {group.path for group in groups}
    others = dict(stores[-1].mappings())
    for path, specs in stores[0].mappings():
        if path in paths:
            yield path, specs, others.get(path, {})


def _other_differences(stores: list[Store], groups: list[Group]) -> list[str]:
    """Name where files differ beside the tensors of state dicts, as random states do."""
    if not all(isinstance(store, TreeStore) for store in stores):
        return []
    compared = {
        (*path, key)
        for path, specs, _ in _paired(stores, groups)
        for key, spec in specs.items()
        if spec is not None
    }
    trees = [store.tree for store in stores if isinstance(store, TreeStore)]
    paths = [path for path, _ in differences(trees[0], trees[-1]) if path not in compared]
    return [dotted(path) or "its keys" for path in paths]


def _other_files(first: Path, second: Path, stores: list[Store]) -> list[str]:
    """Name the files beside the weights of two folders that differ, or that one has alone."""
    own = {*stores[0].files(), *stores[-1].files()}
    one, two = files_beside(first, own), files_beside(second, own)
    alone = one.keys() ^ two.keys()
    return [
        name
        for name in sorted(one.keys() | two.keys())
        if name in alone or not same_content(one[name], two[name])
    ]


def _first_taken(src: StrPath, names: list[str]) -> Iterator[str]:
    """Yield a note if a file differs from the first one in what is taken from that."""
    if names:
        where = and_more(names)
        yield f"{src} differs from the first file in {where}; the first file's were taken."
