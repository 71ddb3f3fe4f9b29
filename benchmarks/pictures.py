"""Pictures of what `memory.py` measures: peaks over depth or size, or one step over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.recording import MEBI, Row
from rewire.plotting import plot_curves, plot_steps

SWEPT = {"depth": "blocks", "frames": "frames", "batch": "batch size", "size": "height and width"}


def draw(rows: Sequence[Row], steps: Mapping[str, Sequence[int]], path: Path) -> None:
    """Draw peaks against what was swept; where nothing was, the bytes alive over a step.

    Args:
        rows: Of the table.
        steps: Of each way of the last case, the bytes alive after each operation.
        path: The file to write.
    """
    over = swept(rows)
    title = ", ".join(dict.fromkeys(f"{row['what']}, {row['dtype']}" for row in rows))
    if over is None:
        plot_steps(steps, path, f"One training step of {title}, {rows[0]['input']}")
    else:
        plot_curves(curves(rows, over), path, SWEPT[over], f"Peak of a training step of {title}")


def swept(rows: Sequence[Row]) -> str | None:
    """The first of the sizes that has several values."""
    return next((name for name in SWEPT if len({value_of(row, name) for row in rows}) > 1), None)


def value_of(row: Row, name: str) -> Any:
    """A size of a row; blank where it has none."""
    if name != "size":
        return row[name]
    shape = row["input"].split("x")
    return int(shape[-1]) if len(shape) > 3 else ""


def curves(rows: Sequence[Row], over: str) -> dict[str, list[tuple[float, float]]]:
    """For each way, (what is swept, peak bytes) where there is a number; estimates where not."""
    several = len({row["what"] for row in rows}) > 1
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        place, mebibytes = value_of(row, over), row["peak_mib"] or row["estimate_mib"]
        if place != "" and mebibytes:
            name = f"{row['what']}, {row['way']}" if several else row["way"]
            found.setdefault(name, []).append((place, mebibytes * MEBI))
    return found
