"""A picture of how far the virtual ranks disagree, layer by layer. Needs matplotlib."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import astuple
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, NothingToDoError
from .atomic import atomic_output
from .places import StrPath, as_path
from .report import CheckpointReport, GroupReport, Spread

__all__ = ["plot_spread"]

_SUFFIXES = (".png", ".svg", ".html")
_ROW = 0.21  # inches for each layer
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#555555"  # told apart by everyone
_TALL = 25  # layers; with more, the axis is on top as well
_NAMED = 3  # the worst layers of each panel get their number
_LONGEST = 48  # characters of a layer's name; of a longer one both ends are shown


def plot_spread(report: CheckpointReport, path: StrPath) -> None:
    """Draw the spread of means and variances between the virtual ranks of each layer.

    A filled dot is the layer's median channel, a hollow one the channel where the ranks disagree
    most. Layers are in the order of the file, from top to bottom.

    Args:
        report: of :func:`inspect_checkpoint`.
        path: **path** ending in ``.png``, ``.svg`` or ``.html``; an existing file is replaced.

    Raises:
        ConfigurationError: another ending, or matplotlib is not installed.
        NothingToDoError: no layer has virtual ranks.
        FileAccessError: it cannot be written.

    Example::

        >>> plot_spread(inspect_checkpoint("virtual.pth"), "spread.png")
    """
    suffix = as_path(path).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ConfigurationError(
            f"expected a plot named *.png, *.svg or *.html, but got {path}; change its ending."
        )
    layers = [
        (group, group.spread)
        for group in report.groups
        if group.spread is not None and all(map(math.isfinite, astuple(group.spread)))
    ]
    if not layers:
        raise NothingToDoError(
            f"{report.source.path} has no virtual ranks to compare. Convert and train it first."
        )
    data = _draw(report, layers, "png" if suffix == ".png" else "svg")
    if suffix == ".html":
        data = _page(_title(report, len(layers)), data)
    with atomic_output(path, overwrite=True, fsync=False) as file:
        file.write(data)


def _draw(report: CheckpointReport, layers: list[tuple[GroupReport, Spread]], format: str) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "plotting needs matplotlib; install it with: pip install 'distbn_convert[plot]'"
        ) from error
    # Names are text: a dollar in one begins no formula.
    style: Any = {"svg.hashsalt": "distbn", "svg.fonttype": "none", "text.parse_math": False}
    with matplotlib.rc_context({**style, "font.size": 8}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a box stands for it in a PNG
        height = 1.7 + _ROW * len(layers)
        figure: Any = Figure(figsize=(11, height), layout="constrained")
        means, variances = figure.subplots(1, 2, sharey=True)
        _panel(
            means,
            [(spread.mean_median, spread.mean_max) for _, spread in layers],
            "running_mean",
            "standard deviation over the ranks\n(in standard deviations of the channel)",
            _BLUE,
            "",
        )
        _panel(
            variances,
            [(100 * spread.var_median, 100 * spread.var_max) for _, spread in layers],
            "running_var",
            "standard deviation over the ranks\n(in % of the channel's variance)",
            _ORANGE,
            " %",
        )
        _name_layers(means, [group for group, _ in layers])
        figure.suptitle(_title(report, len(layers)), fontsize=11)
        handles, labels = variances.get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside lower left", ncols=2)
        for handle in legend.legend_handles:
            handle.set_color(_GREY)
        file = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else {}
        figure.savefig(file, format=format, dpi=130, metadata=metadata)
    return file.getvalue()


def _panel(
    axes: Any, points: list[tuple[float, float]], title: str, label: str, colour: str, unit: str
) -> None:
    """Draw the layers of one statistic: (median, largest) for each."""
    rows = range(len(points))
    medians, largest = zip(*points, strict=True)
    marks = {"color": colour, "markersize": 4.5}
    for row in rows[::2]:
        axes.axhspan(row - 0.5, row + 0.5, color="#f3f3f3", linewidth=0, zorder=0)
    axes.hlines(rows, medians, largest, color=colour, linewidth=1, alpha=0.5)
    axes.plot(medians, rows, "o", label="median channel", **marks)
    axes.plot(largest, rows, "o", label="worst channel", markerfacecolor="white", **marks)
    top = max(largest) or 1.0
    for row in sorted(rows, key=lambda row: -largest[row])[:_NAMED]:
        if largest[row] > 0:
            text, place = f"{_number(largest[row])}{unit}", (largest[row], row)
            axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(-0.02 * top, 1.18 * top)
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_title(title, fontsize=10, color=colour, family="monospace", weight="bold")
    axes.set_xlabel(label)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    if len(points) > _TALL:
        axes.tick_params(axis="x", top=True, labeltop=True)


def _number(value: float) -> str:
    """Two digits, or all before the point: 0.14, 3.1, 136."""
    return f"{value:,.0f}" if 99.5 <= value < 1e6 else f"{value:.2g}"


def _name_layers(axes: Any, groups: list[GroupReport]) -> None:
    several = len({group.path for group in groups}) > 1
    names = [_shown(group.name if several else group.prefix[:-1]) for group in groups]
    labels = [
        f"{name or '(top level)'}  [{group.channels}]"
        for name, group in zip(names, groups, strict=True)
    ]
    axes.set_yticks(range(len(groups)), labels, fontsize=7.5)
    above = {"xycoords": "axes fraction", "textcoords": "offset points"}  # however few layers
    axes.annotate(
        "layer  [channels]", (0, 1), (-4, 4), ha="right", color=_GREY, fontsize=7.5, **above
    )


def _shown(name: str) -> str:
    """A name as it can be drawn: printable, in one line, not too long."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in name)
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]}…{text[-half:]}"


def _title(report: CheckpointReport, layers: int) -> str:
    ranks = f"{report.virtual_ranks} virtual ranks" if report.virtual_ranks else "virtual ranks"
    name = _shown(Path(report.source.path).name)
    plural = "s" if layers != 1 else ""
    return f"{name}: how far {ranks} disagree in {layers} BatchNorm layer{plural}"


def _page(title: str, svg: bytes) -> bytes:
    from html import escape

    text = svg.decode()
    drawing = text[text.index("<svg") :]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        "<style>body{margin:1em;font-family:sans-serif}svg{max-width:100%;height:auto}</style>"
        f"</head>\n<body>\n{drawing}\n</body></html>\n"
    ).encode()
