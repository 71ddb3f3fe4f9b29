"""The zoo: real models of many libraries, each examined in a process of its own.

python benchmarks/zoo.py run              # goes on where it stopped
python benchmarks/zoo.py run --only 'timm/*' --fresh
python benchmarks/zoo.py one timm/resnet50
python benchmarks/zoo.py table            # Markdown, from the record
"""

from __future__ import annotations

import csv
import fnmatch
import multiprocessing
import os
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes share the cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import recording, zoo_tables
from benchmarks.examination import COLUMNS, examine
from benchmarks.menagerie import Specimen, specimens
from benchmarks.recording import RECORDS, Row, environment
from rewire.places import line_of

RECORD = RECORDS / "zoo.csv"
FIELDS = ["library", "model", "family", *COLUMNS, "verdict"]
_MEMORY = 9 * 2**30  # of one process; two of them, and their files in memory, fit into 24 GB
_LARGE = (
    "gemma4_vit",
    "mvit_",
    "swin3d_b",
    "vit_h_14",
    "vit_l_",
    "regnet_y_128gf",
    "regnet_y_32gf",
    "regnet_x_32gf",
    "vgg",
    "convnext_large",
    "aimv2_large",
    "deepseek_vit",
    "mobilenetv5",
    "sam2_hiera",
    "qwen3_vit",
    "SwinUNETR",
)

app = typer.Typer(add_completion=False, help=__doc__)


def examined(specimen: Specimen) -> Row:
    """A line of the record; what goes wrong is a verdict too."""
    quiet()
    try:
        row = examine(specimen)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        row = lost(specimen, f"FAILED: {type(error).__name__}: {lines[0][:300]}")
        *_, (frame, number) = traceback.walk_tb(error.__traceback__)
        row["left"] = line_of(frame, number)
    return {name: row.get(name, "") for name in FIELDS}


def lost(specimen: Specimen, verdict: str) -> Row:
    """A line for a model that was not examined to the end."""
    known = {"library": specimen.library, "model": specimen.name, "family": specimen.family}
    return {**dict.fromkeys(FIELDS, ""), **known, "verdict": verdict}


def quiet() -> None:
    """Libraries' advice is not ours to pass on."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


# ---- many of them ------------------------------------------------------------------------


@dataclass
class _Job:
    """A model under examination in another process."""

    specimen: Specimen
    process: Any
    pipe: Connection
    deadline: float

    def result(self) -> Row | None:
        """Its line, once there is one; too long or too large is one too."""
        if self.pipe.poll():
            try:
                row: Row = self.pipe.recv()
            except EOFError:
                row = lost(self.specimen, f"FAILED: its process ended ({self.process.exitcode})")
        elif not self.process.is_alive():
            row = lost(self.specimen, f"FAILED: its process ended ({self.process.exitcode})")
        elif time.monotonic() > self.deadline:
            self.process.kill()
            row = lost(self.specimen, "FAILED: out of time")
        else:
            return None
        self.process.join()
        return row


def examine_all(wanted: Sequence[Specimen], jobs: int, timeout: float) -> Iterator[Row]:
    """Examine models in `jobs` processes at once, large ones alone; yields lines as they come."""
    quiet()
    waiting = sorted(wanted, key=is_large)
    running: list[_Job] = []
    while waiting or running:
        while waiting and len(running) < (1 if is_large(waiting[0]) else jobs):
            running.append(_started(waiting.pop(0), timeout))
        wait([job.pipe for job in running], timeout=1)
        for job in list(running):
            row = job.result()
            if row is not None:
                running.remove(job)
                yield row


def _started(specimen: Specimen, timeout: float) -> _Job:
    context = multiprocessing.get_context("fork")  # the libraries are imported once
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(specimen, there), daemon=True)
    process.start()
    there.close()
    return _Job(specimen, process, here, time.monotonic() + timeout)


def _work(specimen: Specimen, pipe: Connection) -> None:
    memory = _MEMORY * (2 if is_large(specimen) else 1)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    pipe.send(examined(specimen))


def is_large(specimen: Specimen) -> bool:
    """Whether it gets the machine for itself."""
    return specimen.name.startswith(_LARGE)


# ---- commands ----------------------------------------------------------------------------


def read(record: Path) -> list[Row]:
    """The lines of a record; of several for one model the latest."""
    if not record.exists():
        return []
    with record.open() as stream:
        rows = {(row["library"], row["model"]): row for row in csv.DictReader(stream)}
    return list(rows.values())


def select(patterns: Sequence[str]) -> list[Specimen]:
    """The models that a glob names."""
    every = specimens()
    return [one for one in every if any(fnmatch.fnmatch(one.id, glob) for glob in patterns)]


def _some(patterns: Sequence[str]) -> list[Specimen]:
    found = select(patterns)
    if not found:
        raise typer.BadParameter(f"no model is called {' or '.join(patterns)}")
    return found


@app.command()
def run(
    only: Annotated[list[str], typer.Option(help="Globs of library/model.")] = ["*"],  # noqa: B006
    jobs: Annotated[int, typer.Option(help="Processes at once.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds for a model.")] = 900,
    record: Annotated[Path, typer.Option(help="Where lines are added.")] = RECORD,
    fresh: Annotated[bool, typer.Option(help="Examine again what the record has.")] = False,
    failed: Annotated[bool, typer.Option(help="Examine again what failed.")] = False,
) -> None:
    """Examine models; those that the record has are left out."""
    before = read(record)
    done = {
        (row["library"], row["model"])
        for row in before
        if not fresh and not (failed and row["verdict"].startswith("FAILED"))
    }
    chosen = {(one.library, one.name): one for one in _some(only)}
    wanted = [one for name, one in chosen.items() if name not in done]
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(wanted), last="")
        for row in examine_all(wanted, jobs, timeout):
            recording.record([row], record)
            said = f"{row['library']}/{row['model']}: {row['verdict']}"
            progress.update(task, advance=1, last=said[:100])
            if row["verdict"].startswith("FAILED"):
                progress.console.print(said)
    rows = (row for row in read(record) if (row["library"], row["model"]) in chosen)
    bad = [row for row in rows if row["verdict"].startswith("FAILED")]
    raise typer.Exit(1 if bad else 0)


@app.command()
def one(name: str) -> None:
    """Examine one model and print what is found."""
    console = Console()
    failed = False
    for specimen in _some([name]):
        row = examined(specimen)
        failed = failed or row["verdict"].startswith("FAILED")
        for key, value in {**row, **environment()}.items():
            console.print(f"{key:>16}  {value}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def table(
    record: Path = RECORD,
    summary: Annotated[bool, typer.Option(help="Only what the README shows.")] = False,
) -> None:
    """Print the record as Markdown: totals, families, and what is left alone."""
    tables = zoo_tables.summary if summary else zoo_tables.markdown
    print(tables(read(record)))


if __name__ == "__main__":
    app()
