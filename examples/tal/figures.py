"""Pictures with matplotlib, which is loaded when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.tal.files import written_whole


def new_figure(size: tuple[float, float], dpi: int) -> Any:
    """An empty figure of inches and dots to an inch.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib.") from error
    return Figure(figsize=size, dpi=dpi, layout="constrained")


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure as its path's ending says, or as .png."""
    with written_whole(path) as beside:
        figure.savefig(beside, format=path.suffix.lstrip(".") or "png")
