"""Which residual modules of a home one call of it comes to: others may be left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import fx

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
    sums = _sums(trace, {name for residual in residuals for name in residual.branch})
    complete = len(sums) == residuals[0].adds
    if complete and all(sums[one.add].may_be(one) for one in residuals):
        return tuple(range(len(residuals))), tuple(residuals)
    ranks = _by_line(one.line for one in sums)
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
        for pair in _told(sums, residuals, planned[line], ranks.get(line, ()))
    )
    rows = [replace(residuals[n], add=rank, adds=len(sums)) for n, rank in found]
    if rows and sum(residual.entry != "home" for residual in residuals) == 1:  # all are one chain
        rows[0] = replace(rows[0], entry=residuals[0].entry)
        rows[-1] = replace(rows[-1], leads=residuals[-1].leads, tail=residuals[-1].tail)
    return tuple(number for number, _ in found), tuple(rows)


class _Sum(NamedTuple):
    """An add in a trace.

    Attributes:
        line: Its file and line.
        known: Of the modules called since the adds before it, those that residual modules name.
            Inlined code calls others: these tell nothing.
    """

    line: str
    known: set[str]

    def may_be(self, residual: Residual) -> bool:
        """Whether it is the sum of a residual module: by modules, or else by line.

        With the same modules another line is another way to say the same, say with a checkpoint.
        """
        if self.known:
            return bool(self.known & {*residual.branch})
        return self.line == residual.where


def _sums(trace: Trace, named: set[str]) -> list[_Sum]:
    """The adds of a trace, in order."""
    behind = [ancestors([add]) for add in trace.adds]
    found = []
    for rank, add in enumerate(trace.adds):
        before: set[fx.Node] = set()
        for other in reversed(range(rank)):  # the last one has most of the others behind it
            sum_before = trace.adds[other]
            if sum_before in behind[rank] and sum_before not in before:
                before |= {sum_before, *behind[other]}
        own = behind[rank] - before
        modules = (n for n in own if n.op == "call_module" or n.meta.get("module"))  # or handed on
        known = named & {str(node.target) for node in modules}
        found.append(_Sum(str(add.meta["line"]), known))
    return found


def _told(
    sums: Sequence[_Sum],
    residuals: Sequence[Residual],
    numbers: Sequence[int],
    ranks: Sequence[int],
) -> Iterator[tuple[int, int]]:
    """Of the sums of one line: which residual module each of them is."""
    left = list(numbers)
    for rank in ranks:
        number = next((n for n in left if sums[rank].may_be(residuals[n])), None)
        if number is None:
            line = sums[rank].line
            raise CannotTrace(f"it cannot be told which residual module it adds at {line}")
        left.remove(number)
        yield number, rank


def _by_line(lines: Iterable[str]) -> dict[str, list[int]]:
    """For each line the positions at which it stands."""
    found: dict[str, list[int]] = {}
    for position, line in enumerate(lines):
        found.setdefault(line, []).append(position)
    return found
