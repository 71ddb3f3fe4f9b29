"""Plans and verdicts on a terminal, with rich. Takes plain data; knows no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import IO, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rewire.plans import Budget, Chain, Checkpointed, Parts, Plan, Residual, Skipped
from rewire.sizes import human_bytes

_WIDTH = 100
_SHOWN = 3
TOTAL = "all together"
_DONE = {
    "reverse": "reversed",
    "checkpoint": "checkpointed",
    "select": "selective",
    "store": "stored",
}
_TRUNKS = {
    "identity": "",
    "view": "a view on the trunk",
    "activation": "an activation on the trunk, kept in the branch's form",
}


class CheckRow(Protocol):
    """What a row of a verdict's table needs; `verification.Check` has it."""

    @property
    def name(self) -> str:
        """What was checked."""

    @property
    def measured(self) -> float:
        """The number found."""

    @property
    def limit(self) -> float:
        """The largest that passes."""

    @property
    def unit(self) -> str:
        """Of both numbers."""

    @property
    def detail(self) -> str:
        """Where the worst was found."""

    @property
    def passed(self) -> bool:
        """Whether the number is within the limit."""


def console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or 100 columns where there is none."""
    found = Console(file=file, stderr=stderr, highlight=False, soft_wrap=False)
    return (
        found
        if found.is_terminal
        else Console(file=file, stderr=stderr, highlight=False, width=_WIDTH)
    )


@contextmanager
def progress(words: str) -> Iterator[None]:
    """Show on stderr that something is under way."""
    with console(stderr=True).status(f"{words} ..."):
        yield


def plan_tree(plan: Plan) -> Tree:
    """Chains with their residual modules, then the adds left alone, grouped by reason."""
    title = f"{plan.model}: {_counted(len(plan.chains), 'chain')}, "
    title += _counted(len(plan.modules), "residual module")
    if plan.parameters:
        title += f", {plan.parameters:,} parameters"
    tree = Tree(Text(title, style="bold"))
    if plan.inputs:
        tree.add(Text(f"inputs: {plan.inputs}", style="dim"))
    for chain in plan.chains:
        _add_chain(tree, chain)
    if plan.outside:
        _add_outside(tree, plan.outside)
    if plan.budget:
        tree.add(_budget_line(plan.budget))
    if plan.skipped:
        _add_skipped(tree, plan.skipped)
    return tree


def plan_summary(plan: Plan) -> Tree:
    """The chains, one line each, and how many adds stay."""
    title = f"{plan.model}: {_counted(len(plan.modules), 'residual module')} made reversible"
    tree = Tree(Text(title, style="bold"))
    for chain in plan.chains:
        tree.add(_chain_title(chain))
    if plan.outside:
        title = f"{_counted(len(plan.outside), 'stretch', 'stretches')} outside checkpointed"
        tree.add(Text(title, style="dim"))
    if plan.budget:
        tree.add(_budget_line(plan.budget))
    if plan.skipped:
        tree.add(Text(f"{_counted(len(plan.skipped), 'add')} left alone", style="dim"))
    return tree


def verdict_table(checks: Iterable[CheckRow], title: str) -> Table:
    """One row for each check: measured value, limit, unit, and where."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading in ("", "check"):
        table.add_column(heading, no_wrap=True)
    for heading in ("measured", "limit"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("where", overflow="fold")
    for check in checks:
        in_bytes = check.unit == "bytes"
        numbers = [
            human_bytes(value) if in_bytes else f"{value:.3g}"
            for value in (check.measured, check.limit)
        ]
        mark = Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")
        unit = "" if in_bytes else check.unit
        table.add_row(mark, check.name, numbers[0], f"<= {numbers[1]}", unit, Text(check.detail))
    return table


class BalanceRow(Protocol):
    """What a row of a balance's table needs; `balance.Row` has it."""

    @property
    def group(self) -> str:
        """Under which heading it stands."""

    @property
    def name(self) -> str:
        """What it is."""

    @property
    def original(self) -> float | None:
        """Bytes or seconds; None: it does not apply."""

    @property
    def rewired(self) -> float | None:
        """The same."""


_GROUPS = {
    "standing": "there all the time",
    "together": "at the peak",
    "saved": "saved for backward",
    "time": "time",
}


def balance_table(rows: Iterable[BalanceRow], budget: int | None = None) -> Table:
    """Where memory goes, original and rewired side by side, and whether both fit a budget."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("original", justify="right", no_wrap=True)
    table.add_column("rewired", justify="right", no_wrap=True)
    group = ""
    for row in rows:
        if row.group != group:
            table.add_row(Text(_GROUPS[row.group], style="dim"))
        group = row.group
        amounts = [_amount(value, row.group) for value in (row.original, row.rewired)]
        table.add_row(Text(f"  {row.name}"), *amounts, style="bold" if row.name == TOTAL else "")
        if budget is not None and row.name == TOTAL:
            fits = [_fits(value, budget) for value in (row.original, row.rewired)]
            table.add_row(f"  of {human_bytes(budget)}", *fits)
    return table


def _amount(value: float | None, group: str) -> str:
    if value is None:
        return "–"
    return f"{value:.3f} s" if group == "time" else human_bytes(value)


def _fits(value: float | None, budget: int) -> Text:
    """Whether bytes fit, and how many are left or missing."""
    if value is None:
        return Text("–")
    if value <= budget:
        return Text(f"fits, {human_bytes(budget - value)} left", style="green")
    return Text(f"{human_bytes(value - budget)} missing", style="bold red")


def _counted(count: int, noun: str, plural: str = "") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {plural or f'{noun}s'}"


def _chain_title(chain: Chain) -> Text:
    shape = f"  {list(chain.shape)}" if chain.shape else ""
    text = Text(chain.name or "(model)", style="bold green")
    text.append(f"  {_counted(len(chain), 'module')}{shape}", style="not bold default")
    if chain.coupling != "re2":
        text.append(f"  {chain.coupling}", style="not bold cyan")
    text.append(f"  {_bits(chain)}", style="not bold dim")
    if chain.precision != "exact":
        text.append(f"  precision={chain.precision}", style="not bold yellow")
    if chain.chunks != 1:
        text.append(f"  chunks={chain.chunks}", style="not bold yellow")
    for way, count in Counter(chain.ways).items():
        text.append(f"  {count} {_DONE[way]}", style="not bold yellow")
    if chain.trunk != "identity":
        text.append(f"  trunk={chain.trunk}", style="not bold yellow")
    return text


def parts_lines(rows: Sequence[Parts]) -> list[str]:
    """Branches that run in parts, those that are run alike on one line."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(str(row).removeprefix(f"{row.name}: "), []).append(row.name)
    lines = []
    for how, names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"{names[0]}{more}: {how}")
    return lines


def _bits(chain: Chain) -> str:
    """What exact inverses cost, per element of the stream and residual module."""
    bits = f"{chain.bits} bits/element"
    if chain.precision == "fast":
        return "plain floats"
    if not chain.norms:
        return bits
    return f"{bits} + those of {_counted(chain.norms, 'trunk norm')}, measured in each run"


def _add_chain(tree: Tree, chain: Chain) -> None:
    branch = tree.add(_chain_title(chain))
    for module, way in zip(chain, chain.ways or repeat("reverse"), strict=False):
        line = _module_line(module)
        if way != "reverse":
            line.append(f"  {_DONE[way]}", style="yellow")
        branch.add(line)
    if chain.taps:
        branch.add(Text(f"used elsewhere (newest stream): {', '.join(chain.taps)}", style="dim"))


def _module_line(module: Residual) -> Text:
    text = Text(module.name)
    if module.block:
        text.append("  a whole block", style="dim")
    if module.branch:
        text.append(f"  F = {', '.join(module.branch)}", style="cyan")
    if trunk := _TRUNKS.get(module.trunk, module.trunk):
        text.append(f"  ({trunk})", style="dim")
    if module.norm:
        text.append("  (its sum is normalised)", style="dim")
    return text


def _budget_line(budget: Budget) -> Text:
    """What a budget allowed, and what it was compared with."""
    text = Text(f"budget {budget.asked}", style="bold green")
    fits = budget.plain_bytes <= budget.limit_bytes
    text.append(
        f"  {human_bytes(budget.peak_bytes)} of {human_bytes(budget.limit_bytes)} in a step at its "
        f"peak ({human_bytes(budget.plain_bytes)} original, {human_bytes(budget.least_bytes)} all "
        f"reversed), beside {human_bytes(budget.standing_bytes)} that stand; "
        f"{budget.time:.2f} × the original's time "
        f"({budget.least_time:.2f} all reversed); estimated"
        f"{'. The original fits as well, and is faster' if fits else ''}",
        style="not bold default",
    )
    return text


def _add_outside(tree: Tree, outside: Sequence[Checkpointed]) -> None:
    count = _counted(len(outside), "stretch", "stretches")
    branch = tree.add(Text(f"outside of the chains, checkpointed: {count}", style="bold green"))
    for row in outside:
        line = Text(" → ".join(row.modules))
        sizes = f"{human_bytes(row.saved_bytes)} → {human_bytes(row.kept_bytes)}"
        line.append(f"  {sizes}, {row.reason}", style="dim")
        branch.add(line)


def _add_skipped(tree: Tree, skipped: Sequence[Skipped]) -> None:
    left = tree.add(Text(f"left alone: {_counted(len(skipped), 'add')}", style="yellow"))
    groups: dict[str, list[Skipped]] = {}
    for row in skipped:
        groups.setdefault(row.reason, []).append(row)
    for reason, rows in groups.items():
        group = left.add(Text(f"{reason}: {_counted(len(rows), 'add')}", style="yellow"))
        for row in rows[:_SHOWN]:
            line = Text(row.where or "(model)")
            line.append(f"  {row.detail}", style="dim")
            group.add(line)
        if len(rows) > _SHOWN:
            names = ", ".join(dict.fromkeys(row.where or "(model)" for row in rows[_SHOWN:]))
            group.add(Text(f"and {len(rows) - _SHOWN} more: {names}", style="dim"))
