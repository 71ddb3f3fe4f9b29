"""The zoo's record as Markdown: totals, families, what is left alone, and every model."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.recording import Row

CONVERTED = ("verified", "verified in part")


def markdown(rows: Sequence[Row]) -> str:
    """All tables, the shortest first."""
    return "\n\n".join(
        [
            "## Totals\n\n" + totals(rows),
            "## Families\n\n" + families(rows),
            "## Chains that are not rewired, or in part\n\n" + declined(rows),
            "## Modes that are refused\n\n" + refusals(rows),
            "## Adds left alone\n\n" + reasons(rows),
            "## Models\n\n" + models(rows),
        ]
    )


def summary(rows: Sequence[Row]) -> str:
    """What the README shows: totals, and why models with chains are not rewired at all."""
    none = [row for row in rows if row["chains"] and not int(row["modules"] or 0)]
    return f"{totals(rows)}\n\n{declined(none)}"


def totals(rows: Sequence[Row]) -> str:
    """One line for each library, and one for all; shares and seconds are medians."""
    by_library = _grouped(rows, lambda row: str(row["library"]))
    lines = [_total(name, own) for name, own in by_library.items()]
    return _table(
        "library | models | with chains | rewired | of these in part | verified | failed | "
        "modules in chains | share of bytes | s to rewire | slowest",
        [*lines, _total("**all**", rows)],
    )


def _total(name: str, rows: Sequence[Row]) -> list[Any]:
    chained = [row for row in rows if row["chains"] or row["planned"]]
    rewired = [row for row in rows if int(row["modules"] or 0)]
    seconds = [float(row["convert_seconds"]) for row in rewired] or [0.0]
    shares = [float(row["share"]) for row in rewired if row["share"]] or [0.0]
    return [
        name,
        len(rows),
        len(chained),
        len(rewired),
        sum(row["verdict"] == "verified in part" for row in rows),
        sum(row["verdict"] in CONVERTED for row in rows),
        sum(row["verdict"].startswith("FAILED") for row in rows),
        f"{sum(int(row['modules']) for row in rewired)} of {sum(map(_possible, rewired))}",
        f"{statistics.median(shares):.0%}",
        f"{statistics.median(seconds):.1f}",
        f"{max(seconds):.1f}",
    ]


def _possible(row: Row) -> int:
    """Modules that chains could hold: what the finder says, or the plan where it has more."""
    return max(int(row["of_modules"] or 0), int(row["modules"] or 0))


def families(rows: Sequence[Row]) -> str:
    """The share of a step's stored activations that the chains hold, by family."""
    lines = []
    for name, own in _grouped(rows, lambda row: f"{row['library']}: {row['family']}").items():
        shares = sorted(float(row["share"]) for row in own if row["share"])
        if not shares:
            lines.append([name, len(own), 0, "–", "–", "–"])
            continue
        middle = min(
            (row for row in own if row["share"]),
            key=lambda row: abs(float(row["share"]) - statistics.median(shares)),
        )
        spread = f"{shares[0]:.0%}–{shares[-1]:.0%}"
        median = f"{statistics.median(shares):.0%}"
        lines.append([name, len(own), len(shares), median, spread, middle["outside"]])
    heading = "family | models | rewired | share in chains, median | range | outside, e.g."
    return _table(heading, lines)


def declined(rows: Iterable[Row]) -> str:
    """Every model with chains of which some are not rewired, with the reason."""
    lines = [
        [f"{row['library']}/{row['model']}", row["chains"], row["planned"] or "–", row["reason"]]
        for row in rows
        if row["reason"]
    ]
    return _table("model | chains there are | rewired | why", lines)


def refusals(rows: Iterable[Row]) -> str:
    """Models that raise in exact mode or under autocast, with what is said."""
    lines = [
        [f"{row['library']}/{row['model']}", mode, row["refusal"]]
        for row in rows
        for mode in ("exact", "autocast")
        if row[mode] == "refused"
    ]
    return _table("model | mode | why", lines)


def reasons(rows: Iterable[Row]) -> str:
    """How often each reason was given for an add that is left alone."""
    counted: Counter[str] = Counter()
    for row in rows:
        if row["verdict"].startswith("FAILED") or not row["left"]:
            continue
        for part in row["left"].split(", "):
            reason, _, number = part.rpartition(" ")
            counted[reason] += int(number)
    return _table("reason | adds", [[*pair] for pair in counted.most_common()])


def models(rows: Iterable[Row]) -> str:
    """A line for each model."""
    names = """chains planned share gradient_error exact autocast plain_train convert_seconds
        verdict""".split()
    ordered = sorted(rows, key=lambda row: (row["library"], row["family"], row["model"]))
    lines = [
        [f"{row['library']}/{row['model']}", *(row[name] or "–" for name in names)]
        for row in ordered
    ]
    heading = (
        "model | chains there are | rewired | share | gradient error | exact | under autocast | "
        "plain form | s | verdict"
    )
    return _table(heading, lines)


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(sorted(groups.items()))


def _table(heading: str, lines: Iterable[Sequence[Any]]) -> str:
    columns = heading.count("|") + 1
    rows = [f"| {heading} |", "|" + "---|" * columns]
    rows += ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join(rows)
