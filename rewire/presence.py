"""Which residual modules of a home one call of it comes to: others may be left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rewire.errors import CannotTrace
from rewire.plans import Residual
from rewire.traces import Trace


def present(
    trace: Trace, residuals: Sequence[Residual]
) -> tuple[tuple[int, ...], tuple[Residual, ...]]:
    """The residual modules in a trace that has fewer adds than the planned one, with their numbers.

    They are known by the lines of their sums. Optional cross-attention may be left out, and a loop
    may go round fewer times than in the example: what is missing is as if its branch gave zero.

    Args:
        trace: Of the home's code.
        residuals: All residual modules of the home, in the order of its code.

    Raises:
        CannotTrace: It adds where it did not in the example, or more often.
    """
    ranks = _by_line(str(node.meta["line"]) for node in trace.adds)
    planned = _by_line(residual.where for residual in residuals)
    others = sum(len(found) for line, found in ranks.items() if line not in planned)
    more = [line for line in ranks if len(ranks[line]) > len(planned.get(line, ranks[line]))]
    if more or others > residuals[0].adds - len(residuals):
        where = more[0] if more else next(line for line in ranks if line not in planned)
        raise CannotTrace(
            f"it adds at {where} {len(ranks[where])} times, and in the example "
            f"{len(planned.get(where, ()))} times. Rewire the model with an example that takes the "
            "longest way, every optional argument given: modules may be left out later, not added"
        )
    if any(r.norm or r.head_norm or r.block or len(r.skip) > 1 for r in residuals):
        raise CannotTrace(
            f"it leaves out some of its {len(residuals)} residual modules, which are blocks, sums "
            "of several terms or beside a normalisation of the trunk"
        )
    pairs = (zip(numbers, ranks.get(line, ()), strict=False) for line, numbers in planned.items())
    found = sorted(pair for line_pairs in pairs for pair in line_pairs)
    rows = [replace(residuals[n], add=rank, adds=len(trace.adds)) for n, rank in found]
    if rows and rows[0].entry == "home":  # it goes on from where the first of all did
        rows[0] = replace(rows[0], entry=residuals[0].entry)
    if rows:
        rows[-1] = replace(rows[-1], leads=residuals[-1].leads, tail=residuals[-1].tail)
    return tuple(number for number, _ in found), tuple(rows)


def _by_line(lines: Iterable[str]) -> dict[str, list[int]]:
    """For each line the positions at which it stands."""
    found: dict[str, list[int]] = {}
    for position, line in enumerate(lines):
        found.setdefault(line, []).append(position)
    return found
