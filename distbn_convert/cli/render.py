"""Reports as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.report import CheckpointReport, FileInfo, GroupReport
from ..checkpoint.words import human_size

__all__ = ["checksums", "one_line", "summary", "table"]


def one_line(text: object) -> str:
    """Return a text as one line that cannot steer the terminal; names in a file can be anything."""
    words = " ".join(str(text).split())
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in words
    )


def checksums(*files: FileInfo | None) -> list[str]:
    """Return the lines that ``sha256sum`` prints for files whose SHA-256 was asked for."""
    known = [info for info in files if info is not None and info.sha256 is not None]
    return [f"{info.sha256}  {one_line(info.path)}" for info in known]


def summary(report: CheckpointReport, done: str) -> str:
    """Return the one line that says what a command did: ``converted 20 BatchNorms to ...``."""
    number = report.counts.get(done, 0)
    layers = f"{number} BatchNorm{'s' if number != 1 else ''}"
    what = {
        "converted": f"to {report.virtual_ranks} virtual ranks",
        "reverted": f"from {report.virtual_ranks or 'several numbers of'} virtual ranks "
        f"by {report.reduction}",
        "gathered": f"by {report.reduction}",
    }[done]
    if report.output is None:
        return f"would have {done} {layers} {what}: {_file(report.source)}"
    return f"{done} {layers} {what}: {one_line(report.source.path)} -> {_file(report.output)}"


def _file(info: FileInfo) -> str:
    return f"{one_line(info.path)} ({info.format}, {human_size(info.bytes)})"


def table(report: CheckpointReport) -> str:
    """Return what is in a file: one line about it, then a line for each BatchNorm."""
    groups = report.groups
    head = f"{_file(report.source)}: {report.tensors} tensors, {len(groups)} BatchNorms"
    if report.virtual_ranks is not None:
        head += f" with {report.virtual_ranks} virtual ranks"
    if not groups:
        return head
    virtual = any(group.ranks is not None for group in groups)
    rows = [["layer", "C", "dtype", "batches", *(["V", "means", "variances"] if virtual else [])]]
    rows += [_row(group, virtual) for group in groups]
    lines = [head, *_align(rows)]
    if virtual:
        lines.append(
            "means, variances: standard deviation over the ranks, at the median (worst) channel;"
        )
        lines.append("of means in standard deviations of the channel, of variances relative to it")
    return "\n".join(lines)


def _row(group: GroupReport, virtual: bool) -> list[str]:
    tracked = "-" if group.tracked is None else str(group.tracked)
    row = [one_line(group.name) or "(top level)", str(group.channels), group.dtype, tracked]
    if virtual:
        row += ["-" if group.ranks is None else str(group.ranks), *_spread(group)]
    if group.action == "skipped":
        row.append(f"skipped: {group.reason}")
    elif group.reason is not None:
        row.append(group.reason)
    if group.nonfinite:
        row.append(f"{group.nonfinite} not finite")
    return row


def _spread(group: GroupReport) -> list[str]:
    spread = group.spread
    if spread is None:
        return ["-", "-"]
    return [
        f"{spread.mean_median:.3f} ({spread.mean_max:.3f})",
        f"{spread.var_median:.1%} ({spread.var_max:.1%})",
    ]


def _align(rows: Sequence[list[str]]) -> list[str]:
    """Pad the columns: names to the left, numbers to the right."""
    columns = len(rows[0])
    widths = [max(len(row[index]) for row in rows) for index in range(columns)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:columns], widths[1:], strict=True)]
        lines.append("  ".join([*cells, *row[columns:]]).rstrip())
    return lines
