"""Which residual modules of a home one call of it comes to: others may be left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from rewire.errors import CannotTrace
from rewire.plans import Residual
from rewire.traces import Trace, ancestors


def present(
    trace: Trace, residuals: Sequence[Residual]
) -> tuple[tuple[int, ...], tuple[Residual, ...]]:
    """The residual modules that a trace comes to, with their numbers among the planned ones.

    They are known by the lines of their sums and the modules of their branches. Optional
    cross-attention may be left out, and a loop may go round fewer times than in the example: what
    is missing is as if its branch gave zero.

    Args:
        trace: Of the home's code.
        residuals: All residual modules of the home, in the order of its code.

    Raises:
        CannotTrace: It adds where it did not in the example, or more often, or what it adds cannot
            be told from others.
    """
    complete = len(trace.adds) == residuals[0].adds
    if complete and all(_may_be(trace, one.add, one, residuals) for one in residuals):
        return tuple(range(len(residuals))), tuple(residuals)
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
    found = sorted(
        pair
        for line in planned
        for pair in _told(trace, residuals, planned[line], ranks.get(line, ()))
    )
    rows = [replace(residuals[n], add=rank, adds=len(trace.adds)) for n, rank in found]
    if rows and sum(residual.entry != "home" for residual in residuals) == 1:  # all are one chain
        rows[0] = replace(rows[0], entry=residuals[0].entry)
        rows[-1] = replace(rows[-1], leads=residuals[-1].leads, tail=residuals[-1].tail)
    return tuple(number for number, _ in found), tuple(rows)


def _told(
    trace: Trace, residuals: Sequence[Residual], numbers: Sequence[int], ranks: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """Of the sums of one line: which residual module each of them is."""
    left = list(numbers)
    for rank in ranks:
        number = next((n for n in left if _may_be(trace, rank, residuals[n], residuals)), None)
        if number is None:
            line = trace.adds[rank].meta["line"]
            raise CannotTrace(f"it cannot be told which residual module it adds at {line}")
        left.remove(number)
        yield number, rank


def _may_be(trace: Trace, rank: int, one: Residual, residuals: Sequence[Residual]) -> bool:
    """Whether a sum is that of a residual module: by modules called since sums before, or by line.

    Inlined code calls modules that no residual module names: these tell nothing. With the same
    modules another line is another way to say the same, with a checkpoint perhaps.
    """
    add = trace.adds[rank]
    behind = ancestors([add])
    before = [other for other in trace.adds[:rank] if other in behind]
    own = behind - ancestors(before) - set(before)
    modules = (n for n in own if n.op == "call_module" or n.meta.get("module"))  # or handed on
    called = {str(node.target) for node in modules}
    known = called & {name for residual in residuals for name in residual.branch}
    return bool(known & {*one.branch}) if known else add.meta["line"] == one.where


def _by_line(lines: Iterable[str]) -> dict[str, list[int]]:
    """For each line the positions at which it stands."""
    found: dict[str, list[int]] = {}
    for position, line in enumerate(lines):
        found.setdefault(line, []).append(position)
    return found
