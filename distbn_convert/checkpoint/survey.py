"""What a command finds in a store: the BatchNorms, what becomes of each, and what to tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import NothingToDoError, ReadError, RefusedError
from .groups import Group, LookAlike, Selection, describe, find_groups, key_name
from .report import GroupReport
from .spread import count_nonfinite, largest_count, measure_spread
from .stores import Store
from .words import and_more

__all__ = ["Survey", "survey"]


@dataclass
class Survey:
    """The BatchNorms of one store.

    Attributes:
        chosen: the groups to work on.
        skipped: the other groups, each with the reason.
        concerns: what may be wrong; an error under ``strict``.
        notes: what is worth knowing.
    """

    chosen: list[Group] = field(default_factory=list)
    skipped: list[tuple[Group, str]] = field(default_factory=list)
    concerns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def examine(
        self, store: Store, path: Path, strict: bool, action: str = "found", spread: bool = False
    ) -> tuple[GroupReport, ...]:
        """Report on each group, and add a concern about statistics that are not finite.

        Args:
            store: the open file.
            path: its name, for messages.
            strict: whether a concern is an error.
            action: what the command calls what it does with the chosen groups. Default: "found"
            spread: whether to measure how far virtual ranks disagree. Default: False

        Raises:
            RefusedError: there is a concern, and ``strict``.
        """
        reports = [_report(store, group, action, None, spread) for group in self.chosen]
        bad = [report for report in reports if report.nonfinite]
        if bad:
            count = sum(report.nonfinite for report in bad)
            self.concerns.append(
                f"{count} statistic{' is' if count == 1 else 's are'} NaN or infinite, "
                f"first in {bad[0].name or '(top level)'}."
            )
        if strict and self.concerns:
            raise RefusedError(f"{path}: {self.concerns[0]} Refused because of --strict.")
        return (
            *reports,
            *(_report(store, group, "skipped", reason, spread) for group, reason in self.skipped),
        )


def survey(store: Store, path: Path, selection: Selection, state: str | None) -> Survey:
    """Find the groups of a store that are selected and in the given state.

    Args:
        store: the open file.
        path: its name, for messages.
        selection: which groups the caller wants.
        state: ``"plain"`` or ``"virtual"``, what the command works on; ``"any"`` takes both, and
            None does not mind if there is nothing.

    Raises:
        NothingToDoError: there is no such group.
        ReadError: a selected group contradicts itself.
        RefusedError: a selected group's tensors cannot be handled.
    """
    found = [item for where, specs in store.mappings() for item in find_groups(specs, where)]
    groups = [item for item in found if isinstance(item, Group)]
    result = Survey()
    wanted = [item for item in found if selection.why_not(item) is None]
    result.concerns += describe([item for item in wanted if isinstance(item, LookAlike)])
    for group in groups:
        reason = selection.why_not(group)
        if reason is None:
            _check(group, path)
            reason = _wrong_state(group, state)
        if reason is None:
            result.chosen.append(group)
        else:
            result.skipped.append((group, reason))
    if not result.chosen and state is not None:
        raise _nothing(store, path, result.skipped, result.concerns)
    result.concerns += selection.unmatched(found) if groups else []
    result.concerns += store.concerns
    _tell_skipped(result)
    return result


def _check(group: Group, path: Path) -> None:
    if group.problem is not None:
        raise ReadError(f"{path}: in {group.full_name}, {group.problem}. The file is inconsistent.")
    if group.refusal is not None:
        raise RefusedError(f"{path}: a statistic of {group.full_name} {group.refusal}.")


def _wrong_state(group: Group, state: str | None) -> str | None:
    if state == "plain" and group.ranks is not None:
        return f"already virtual ({group.ranks} ranks)"
    if state == "virtual" and group.ranks is None:
        return "plain, it has no virtual ranks"
    return None


def _tell_skipped(result: Survey) -> None:
    for marker, what in (
        ("already virtual", "already virtual and were left as they are"),
        ("plain, ", "plain and were left as they are"),
        ("an MMCV", "MMCV EMA copies and were left as they are; --ema-underscore takes them"),
    ):
        names = [group.full_name for group, reason in result.skipped if reason.startswith(marker)]
        if names:
            result.concerns.append(f"{and_more(names)} are {what}.")
    uncounted = [group for group in result.chosen if not group.counted]
    if uncounted:
        result.notes.append(
            f"{len(uncounted)} of {len(result.chosen)} BatchNorms have no num_batches_tracked "
            f"(first {uncounted[0].full_name}); none was made up. FrozenBatchNorm has none "
            "either and stays plain in convert_model; exclude (--exclude) leaves such layers out."
        )


def _nothing(
    store: Store, path: Path, skipped: Sequence[tuple[Group, str]], concerns: Sequence[str]
) -> NothingToDoError:
    if not skipped:
        keys = [key for _, specs in store.mappings() for key in specs]
        count = sum(isinstance(key, str) and key.endswith("running_mean") for key in keys)
        more = f" {concerns[0]}" if concerns else f" Keys ending in running_mean: {count}."
        return NothingToDoError(
            f"no BatchNorm statistics found in {path} ({store.tensors} tensors).{more}"
        )
    group, reason = skipped[0]
    if reason.startswith("already virtual"):
        return NothingToDoError(f"{group.full_name} is {reason}. Revert it first.")
    if reason.startswith("plain"):
        return NothingToDoError(
            f"{path} has no virtual ranks: all of its {len(skipped)} BatchNorms are plain. "
            "Convert it first."
        )
    return NothingToDoError(
        f"none of the {len(skipped)} BatchNorms in {path} was taken; {group.full_name} is {reason}."
    )


def _report(
    store: Store, group: Group, action: str, reason: str | None, spread: bool
) -> GroupReport:
    report = GroupReport(
        path=tuple(map(key_name, group.path)),
        prefix=group.prefix,
        channels=group.channels,
        dtype=group.dtype,
        tracked=None,
        ranks=group.ranks,
        state="plain" if group.ranks is None else "virtual",
        action=action,
        reason=reason or group.problem,
    )
    if group.problem is not None or group.refusal is not None:
        return report
    mean, var, *count = (store.numbers(group.path, key) for key in group.keys)
    means, variances = _rows(mean, group), _rows(var, group)
    return replace(
        report,
        tracked=largest_count(count[0]) if count else None,
        nonfinite=count_nonfinite(means, variances),
        spread=measure_spread(means, variances) if spread and group.ranks is not None else None,
    )


def _rows(values: list[float], group: Group) -> list[list[float]]:
    """Divide the values of a statistic among its ranks."""
    width = group.channels
    return [values[row * width : (row + 1) * width] for row in range(group.ranks or 1)]
