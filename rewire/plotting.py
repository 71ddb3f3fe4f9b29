"""Pictures of memory, with matplotlib where it is installed. Takes plain data; knows no torch."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewire.errors import RewireError

_OTHERS = ("#c0642b", "#4863a0", "#8b5a9f", "#b08d1e", "#3c9aa8", "#a23b4a", "#5f6f2e")
_KNOWN = {"original": "#8a8f98", "plain": "#8a8f98", "rewired": "#0b6e4f", "rewire": "#0b6e4f"}
_GIGA = 10**9


def need_matplotlib() -> Any:
    """The class of matplotlib's figures.

    Raises:
        RewireError: It is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RewireError(
            "plots need matplotlib, which is not installed: pip install matplotlib."
        ) from error
    return Figure


def plot_steps(steps: Mapping[str, Sequence[int]], path: Path, title: str = "") -> None:
    """Draw live bytes over one training step.

    Args:
        steps: By name, the bytes alive after each operation.
        path: A file to write, of a kind that matplotlib knows (png, svg, pdf).
        title: Above the picture.
    """
    axes, figure = _axes(title)
    scale, unit = _unit([max(trace, default=0) for trace in steps.values()])
    for (name, trace), colour in zip(steps.items(), _colours(steps), strict=True):
        # Each step from 0 to 1: a rewired one has more operations, not more to do.
        places = [number / max(1, len(trace) - 1) for number in range(len(trace))]
        heights = [size / scale for size in trace]
        axes.fill_between(places, heights, color=colour, alpha=0.25, linewidth=0)
        label = f"{name}: {max(heights, default=0):.3g} {unit} at its peak"
        axes.plot(places, heights, color=colour, linewidth=1.2, label=label)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 1], ["begin of forward", "end of backward"])
    _finish(figure, axes, unit, path)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], path: Path, over: str, title: str = ""
) -> None:
    """Draw peak bytes against something: depth, frames.

    Args:
        curves: By name, (what it is drawn against, bytes).
        path: As of `plot_steps`.
        over: What it is drawn against, in words.
        title: Above the picture.
    """
    axes, figure = _axes(title)
    scale, unit = _unit([size for points in curves.values() for _, size in points])
    for (name, points), colour in zip(curves.items(), _colours(curves), strict=True):
        places, sizes = zip(*sorted(points), strict=True)
        heights = [size / scale for size in sizes]
        axes.plot(places, heights, color=colour, linewidth=1.6, marker="o", label=name)
    axes.set_xticks(sorted({place for points in curves.values() for place, _ in points}))
    axes.set_xlabel(over)
    _finish(figure, axes, unit, path)


def _axes(title: str) -> tuple[Any, Any]:
    figure = need_matplotlib()(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(textwrap.fill(title, 100), loc="left", fontsize=9)
    return axes, figure


def _finish(figure: Any, axes: Any, unit: str, path: Path) -> None:
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no such kind of file is a ValueError
        raise RewireError(f"{path}: cannot be written ({error}).") from error


def _colours(names: Iterable[str]) -> list[str]:
    """Grey for what is as it was, green for what is rewired."""
    others = itertools.cycle(_OTHERS)
    return [_KNOWN.get(name) or next(others) for name in names]


def _unit(sizes: Sequence[float]) -> tuple[int, str]:
    """What to divide bytes by, and its name."""
    return (_GIGA, "GB") if max(sizes, default=0) >= _GIGA else (10**6, "MB")
