"""The README's table of rewire beside its rivals, made from the record.

uv run python benchmarks/tables.py      # writes it between the marks
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from benchmarks.recording import RECORDS

README = Path(__file__).parents[1] / "README.md"
MARKS = "<!-- rivals -->\n", "<!-- /rivals -->"
HEAD = "| {what}, {dtype}, {device} | peak MiB | × plain | time × plain |\n|---|---|---|---|\n"
Cell = dict[str, str]


def table() -> str:
    """Peak and time of every way, by workload: the newest rows of the record."""
    with (RECORDS / "rivals.csv").open(newline="") as file:
        newest = {_case(row): row for row in csv.DictReader(file)}
    cases: dict[tuple[str, ...], list[Cell]] = {}
    for row in newest.values():
        cases.setdefault(_case(row)[:-1], []).append(row)
    return "\n\n".join(_one(rows) for rows in cases.values()) + "\n"


def _case(row: Cell) -> tuple[str, ...]:
    return tuple(row[name] for name in ("what", "depth", "input", "dtype", "device", "way"))


def _one(rows: Iterable[Cell]) -> str:
    rows = sorted(rows, key=lambda row: -float(row["peak_mib"] or "inf"))
    first = rows[0]
    depth = f", {first['depth']} blocks" if first["depth"] else ""
    what = f"{first['what']}{depth} on {first['input'].replace('x', ' × ')}"
    lines = [HEAD.format(what=what, dtype=first["dtype"], device=first["device"]).rstrip()]
    for row in rows:
        name = f"**{row['way']}**" if row["way"].startswith(("rewire", "budget")) else row["way"]
        if not row["peak_mib"]:
            lines.append(f"| {name} | {row['note']} | | |")
            continue
        spread = f"{row['time_p50']} ({row['time_p20']}–{row['time_p80']})"
        note = f" ({row['note']})" if row["note"] else ""
        peak, ratio = float(row["peak_mib"]), float(row["peak_ratio"])
        lines.append(f"| {name}{note} | {peak:.1f} | {ratio:.3f} | {spread} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """A README with the table between its marks."""
    start, end = MARKS
    before, _, rest = text.partition(start)
    return f"{before}{start}{table()}{end}{rest.partition(end)[2]}"


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
