"""The command line: which tasks, which couplings, how long, and where the numbers go."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import rewire
from examples.finetune.records import Row, append, environment
from examples.finetune.sweep import ORIGINAL, Way, measurements
from examples.finetune.tables import sheets
from examples.finetune.tasks import TASKS, MissingPackage, Task
from rewire.coupling import coupling_from

app = typer.Typer(add_completion=False)
log = Console(stderr=True, highlight=False)

COUPLINGS = (
    "re2 re2(sum) re2(last) consistent(1/2) consistent(1/4) consistent(1/8) "
    "dr2(0.9,0.1) dr2(1,0.1) dr2(0.5,0.5) bdia"
).split()
QUICK_COUPLINGS = ["re2", "consistent(1/4)"]

TaskName = StrEnum("TaskName", {name: name for name in TASKS})
Granularity = StrEnum("Granularity", {name: name for name in ("module", "block")})


@app.command()
def main(
    tasks: Annotated[list[TaskName], typer.Argument(help="What to finetune.")],
    couplings: Annotated[
        list[str] | None,
        typer.Option("--coupling", help=f"Repeat it; by default {', '.join(COUPLINGS)}."),
    ] = None,
    granularities: Annotated[
        list[Granularity] | None,
        typer.Option("--granularity", help="Repeat it; by default module."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds.", min=1)] = 3,
    steps: Annotated[str, typer.Option(help="Where to judge, with commas.")] = "20,100",
    quick: Annotated[bool, typer.Option(help="One seed, 2 and 10 steps, two couplings.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    record: Annotated[Path | None, typer.Option(help="Append rows to this CSV.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables here.")] = None,
) -> None:
    """Finetune pretrained networks rewired by each coupling, beside the original."""
    if quick:
        seeds, steps, couplings = 1, "2,10", couplings or QUICK_COUPLINGS
    stops = _stops(steps)
    _require(tasks)
    ways = _ways(couplings or COUPLINGS, granularities or [Granularity("module")])
    place = torch.device(device)
    command = _command(tasks, ways, seeds, steps, quick) + f" --device {place}"
    facts = environment(place, command)

    rows: list[Row] = []
    for task in tasks:
        for found in _rows(task.value, ways, seeds, stops, place, quick):
            rows += found
            if record and found:
                append(record, found, facts)
    tables = sheets(rows)
    for table in tables:
        Console().print(table.drawn())
    if markdown:
        text = "\n".join(table.markdown() for table in tables)
        markdown.write_text(f"`{facts['command']}`\n\n{text}", encoding="utf-8")


def _rows(
    name: str, ways: Sequence[Way], seeds: int, stops: list[int], device: torch.device, quick: bool
) -> Iterator[list[Row]]:
    """All rows of a way at a time, so that an interrupted sweep keeps what it has."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        log.print(f"{name}, seed {seed}: the original")
        task = TASKS[name](seed, device, quick=quick)
        for way in ways:
            yield _measured(name, task, way, stops)


def _measured(name: str, task: Task, way: Way, stops: list[int]) -> list[Row]:
    """What one way gives; nothing, and the reason on stderr, where rewire refuses it."""
    rows: list[Row] = []
    try:
        for measured in measurements(task, way, stops):
            values = ", ".join(f"{k} {v:.3f}" for k, v in measured.values.items())
            log.print(f"  {way}, {measured.stage}: {values}", soft_wrap=True)
            rows += measured.rows(name, way, task.seed)
    except rewire.RewireError as refusal:
        log.print(f"  [red]{way} refused[/red]: {refusal}", soft_wrap=True)
        return []
    return rows


def _require(tasks: Sequence[TaskName]) -> None:
    """Stop before hours of work, not after."""
    for task in tasks:
        try:
            TASKS[task.value].require()
        except MissingPackage as missing:
            log.print(f"[red]{task.value}[/red] {missing}", soft_wrap=True)
            raise typer.Exit(1) from None


def _ways(couplings: Sequence[str], granularities: Sequence[Granularity]) -> list[Way]:
    try:
        names = [str(coupling_from(coupling)) for coupling in couplings]
    except rewire.RewireError as unknown:
        raise typer.BadParameter(str(unknown)) from None
    return [Way(ORIGINAL), *(Way(name, g.value) for name in names for g in granularities)]


def _stops(steps: str) -> list[int]:
    try:
        stops = sorted({int(step) for step in steps.split(",")})
    except ValueError:
        stops = []
    if not stops or stops[0] < 1:
        raise typer.BadParameter(f"{steps!r}: give numbers of steps with commas, as in 20,100.")
    return stops


def _command(
    tasks: Sequence[TaskName], ways: Sequence[Way], seeds: int, steps: str, quick: bool
) -> str:
    """The command that gives these rows again; the default couplings need not be named."""
    couplings = list(dict.fromkeys(way.coupling for way in ways if way.granularity))
    granularities = list(dict.fromkeys(way.granularity for way in ways if way.granularity))
    words = ["python", "-m", "examples.finetune", *(task.value for task in tasks)]
    if couplings != [str(coupling_from(coupling)) for coupling in COUPLINGS]:
        words += [word for c in couplings for word in ("--coupling", c)]
    if granularities != ["module"]:
        words += [word for g in granularities for word in ("--granularity", g)]
    return shlex.join(
        [*words, *(["--quick"] if quick else ["--seeds", f"{seeds}", "--steps", steps])]
    )
