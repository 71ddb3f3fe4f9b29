"""Measuring ways side by side, and keeping the numbers with what they depend on."""

from __future__ import annotations

import csv
import ctypes
import datetime
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rewire
from rewire.profiling import scalar_loss

RECORDS = Path(__file__).parent / "records"
MEBI = 2**20

Row = dict[str, Any]


def environment() -> Row:
    """What the numbers depend on."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rewire": rewire.__version__,
    }


def command() -> str:
    """How this program was called."""
    return " ".join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])


def record(rows: Sequence[Row], file: Path, **more: Any) -> None:
    """Append rows to a record."""
    rows = [{**row, **environment(), **more} for row in rows]
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print rows as a table, which is Markdown.

    Args:
        rows: To print.
        columns: Heading of each, and how it is made from a row: a format string.
    """
    table = Table(*columns, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*[text.format(**row) for text in columns.values()])
    Console(width=200).print(table)


# ---- time --------------------------------------------------------------------------------


def keep_pages() -> None:
    """Have malloc keep what is freed, where it is glibc's.

    Otherwise large tensors come and go with their pages, and which way of several pays for the
    page faults is luck: up to 8 % of a step, in either direction.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its maximum


def step_seconds(model: nn.Module, x: Tensor) -> float:
    """Time of one forward and backward; on the CPU the process's own, whoever else is there."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        scalar_loss(model(x)).backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    scalar_loss(model(x)).backward()
    return time.process_time() - start


def paired_seconds(ways: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, step by step in turns, every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            seconds[name].append(step_seconds(ways[name], x))
    return seconds


def ratios(own: Sequence[float], other: Sequence[float]) -> Row:
    """Median, and 20 and 80 per cent, of paired ratios; NaN where nothing was timed."""
    values = sorted(a / b for a, b in zip(own, other, strict=True)) or [float("nan")]
    places = {"p20": values[len(values) // 5], "p80": values[-1 - len(values) // 5]}
    spread = {"median": statistics.median(values), **places}
    return {f"time_{name}": round(value, 4) for name, value in spread.items()}


# ---- gradients ---------------------------------------------------------------------------


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of the input (where it asks for one) and all parameters, in one order."""
    leaves = [t for t in (x, *model.parameters()) if t.requires_grad]
    return list(torch.autograd.grad(model(x).float().square().mean(), leaves))


def largest_error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """The largest relative error of any gradient."""
    pairs = zip(found, true, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def equal_bits(found: Sequence[Tensor], true: Sequence[Tensor]) -> int:
    """How many gradients are the same bit for bit."""
    return sum(torch.equal(a, b) for a, b in zip(found, true, strict=True))
