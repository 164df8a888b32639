"""Small plots of results, as PNG files beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot looks for a screen
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Points = Sequence[tuple[float, float]]
_FEW = 12  # points that are worth a mark each


def plot_distributions(
    path: Path, title: str, values_by_name: Mapping[str, Sequence[float]], unit: str
) -> Path:
    """How many of a hundred values are at most so large."""
    lines = {
        name: [(value, (rank + 1) / len(values) * 100) for rank, value in enumerate(sorted(values))]
        for name, values in values_by_name.items()
        if values
    }
    figure, axes = _axes(title, unit, "per cent of requests")
    for name, points in lines.items():
        axes.step(*zip(*points, strict=True), where="post", label=name)
    axes.axhline(50, color="grey", linewidth=0.5)
    axes.set_ylim(0, 101)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    return _save(figure, axes, path)


def plot_lines(
    path: Path,
    title: str,
    lines: Mapping[str, Points],
    labels: tuple[str, str],
    marks: Mapping[str, float] | None = None,
    *,
    log_y: bool = False,
) -> Path:
    """`labels`: of the two axes; `marks`: vertical lines with a name; `log_y`: values of several sizes, none
    of them 0."""
    figure, axes = _axes(title, *labels)
    for name, points in lines.items():
        if points:
            marker = "o" if len(points) <= _FEW else None
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1, marker=marker, markersize=3)
    for name, x in (marks or {}).items():
        axes.axvline(x, color="grey", linestyle="--", linewidth=0.8)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(name, (x, 0.03), (2, 0), fontsize=7, rotation=90, va="bottom", **place)
    if log_y:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
    else:
        highest = max((y for points in lines.values() for _, y in points), default=1.0)
        axes.set_ylim(0, highest * 1.08 or 1.0)
    return _save(figure, axes, path)


def _plain_numbers(axis: Any) -> None:
    """Of a logarithmic axis: 200, 500, 1000 and no powers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _axes(title: str, x_label: str, y_label: str) -> tuple[Any, Any]:
    figure, axes = pyplot.subplots(figsize=(5, 3), dpi=100)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path
