"""Tables of means and ranges over the seeds, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.table import Table

from examples.finetune.records import Row

T = TypeVar("T")

COST = "cost"


@dataclass(frozen=True)
class Sheet:
    """A table before it is drawn."""

    title: str
    header: list[str]
    lines: list[list[str]]

    def drawn(self) -> Table:
        """For the terminal."""
        table = Table(*self.header, title=self.title, title_justify="left")
        for line in self.lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """For a page."""
        rule = ["---"] * len(self.header)
        lines = ["| " + " | ".join(line) + " |" for line in (self.header, rule, *self.lines)]
        return "\n".join([f"**{self.title}**", "", *lines, ""])


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """For each task one sheet per measure of quality, by stage, and one of costs, by measure."""
    found = []
    for task in _unique(row.task for row in rows):
        own = [row for row in rows if row.task == task]
        seeds = len({row.seed for row in own})
        spread = f"mean (min–max) of {seeds} seeds" if seeds > 1 else "1 seed"
        judged = [row for row in own if row.stage != COST]
        for metric in _unique(row.metric for row in judged):
            chosen = [row for row in judged if row.metric == metric]
            found.append(_sheet(f"{task}: {metric}, {spread}", chosen, "stage"))
        costs = [row for row in own if row.stage == COST]
        found.append(_sheet(f"{task}: forward and backward, {spread}", costs, "metric"))
    return found


def _sheet(title: str, rows: list[Row], across: str) -> Sheet:
    """One line for each way, one column for each stage or metric."""
    columns = _unique(getattr(row, across) for row in rows)
    header = [f"{c} steps" if c.isdigit() else c for c in columns]
    lines = []
    for way in _unique((row.coupling, row.granularity) for row in rows):
        own = [row for row in rows if (row.coupling, row.granularity) == way]
        cells = [_spread([r.value for r in own if getattr(r, across) == c]) for c in columns]
        lines.append([_named(*way), *cells])
    return Sheet(title, ["coupling", *header], lines)


def _named(coupling: str, granularity: str) -> str:
    return f"{coupling}, by {granularity}" if granularity == "block" else coupling


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, *ends = map(_short, (sum(values) / len(values), min(values), max(values)))
    return mean if ends[0] == ends[1] else f"{mean} ({ends[0]}–{ends[1]})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _unique(values: Iterable[T]) -> list[T]:
    """In the order of their first appearance."""
    return list(dict.fromkeys(values))
