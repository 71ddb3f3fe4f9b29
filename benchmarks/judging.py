"""Holding a plan against what the finder has seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import rewire
from benchmarks.finder import Findings, ResidualAdd

# Why an add that is known to be residual is left alone: that it is none is no excuse.
DECISIONS = {
    "excluded", "cannot trace", "own backward", "in place", "nested", "post-norm", "shared code",
    "too short"
}  # fmt: skip


def missed(findings: Findings, plan: rewire.Plan) -> list[ResidualAdd]:
    """Residual adds that are neither in a chain nor known as one and left alone for a reason.

    Each module of the plan, and each line of its list, is about one add of the code, however often
    the code runs.
    """
    modules = list(plan.modules)
    known = [row for row in plan.skipped if row.reason in DECISIONS]
    silent = []
    for add in {add.key: add for add in findings.adds}.values():
        module = next((module for module in modules if _is(module, add)), None)
        row = next((row for row in known if _names(row, add)), None)
        if module is not None:
            modules.remove(module)
        elif row is not None:
            known.remove(row)
        else:
            silent.append(add)
    return silent


def exists(module: rewire.Residual, findings: Findings) -> bool:
    """Whether a residual module that the plan speaks of was seen in the run."""
    return any(_is(module, add) for add in findings.adds)


def why_not(findings: Findings, plan: rewire.Plan) -> str:
    """The plan's reasons for the modules of chains that it leaves alone, with the first detail."""
    rows = [
        row
        for chain in findings.chains
        for add in chain
        for row in plan.skipped
        if not any(_is(module, add) for module in plan.modules) and _names(row, add)
    ]
    if not rows:
        heads = [chain[0] for chain in findings.chains]
        cuts = [c.start for c in plan.chains if not any(_is(c.modules[0], add) for add in heads)]
        return f"cut {len(cuts)}: {cuts[0] if cuts else 'chains of other modules'}"
    return f"{counted(row.reason for row in rows)}: {rows[0].detail}"


def _is(module: rewire.Residual, add: ResidualAdd) -> bool:
    owners = {module.home, *(f"{module.home}.{name}".lstrip(".") for name in module.inlined)}
    return module.where == add.line and add.owner in owners


def _names(row: rewire.Skipped, add: ResidualAdd) -> bool:
    """Whether a line of the plan's list is about an add: its module, or a branch of its module."""
    where = row.where.partition("#")[0]
    home = where.rpartition(".")[0]  # a residual module is called after the child that does it
    near = where == add.owner or f"{where}.".startswith(f"{add.owner}.") or not add.owner
    above = not home or f"{add.owner}.".startswith((f"{where}.", f"{home}."))
    return row.line == add.line and (near or above)


def counted(reasons: Iterator[str] | Sequence[str]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in Counter(reasons).most_common())
