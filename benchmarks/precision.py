"""What exactness costs: streams on the grid, in float64, and in plain floats, side by side.

    uv run python benchmarks/precision.py                      # the standard workloads
    uv run python benchmarks/precision.py --quick              # shallow, once
    uv run python benchmarks/precision.py --record             # append to records/precision.csv

Times and bytes are against `precision="fast"`, step by step in turns. A gradient's error is that
of a way against its own twin, the same forward by ordinary autograd: the largest of any tensor,
and in how many tensors all bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import rewire
from benchmarks.recording import (
    RECORDS,
    Row,
    command,
    equal_bits,
    gradients,
    keep_pages,
    largest_error,
    paired_seconds,
    ratios,
    record,
    show,
)
from benchmarks.workloads import Autocast, bottlenecks, convs, vit
from rewire.profiling import Profile, profile
from rewire.reversible import kept_grids

RECORD = RECORDS / "precision.csv"
PRECISIONS = ("fast", "exact", "float64")

# Each with its depth in blocks.
WORKLOADS: dict[str, tuple[Callable[[int], tuple[nn.Module, Tensor]], int]] = {
    "vit": (vit, 12),
    "convs": (convs, 16),
    "bottlenecks": (bottlenecks, 16),
}

COLUMNS = {
    "workload": "{workload} x {depth}",
    "dtype": "{dtype}",
    "precision": "{precision}",
    "peak MiB": "{peak_mib:.2f}",
    "more bytes": "{extra_bytes}",
    "time x fast (p20-p80)": "{time_median:.3f} ({time_p20:.3f}-{time_p80:.3f})",
    "output moves": "{forward_deviation:.1e}",
    "gradient error": "{gradient_error:.1e}",
    "same bits": "{same_bits}/{gradients}",
}


def errors(rev: nn.Module, x: Tensor) -> Row:
    """The gradients of a rewired model against those of its twin, from one grid."""
    with kept_grids(rev):
        found = gradients(rev, x)
    with kept_grids(rev), rewire.store_activations(rev):
        true = gradients(rev, x)
    return {
        "gradient_error": largest_error(found, true),
        "same_bits": equal_bits(found, true),
        "gradients": len(true),
    }


@torch.no_grad()
def deviation(rev: nn.Module, fast: nn.Module, x: Tensor) -> float:
    """How far the output is from that of plain float streams, relative."""
    with kept_grids(rev):
        moved, output = rev(x), fast(x)
    return float((moved - output).norm() / output.norm())


def row_of(found: Profile, fast: Profile) -> Row:
    """Bytes of a way."""
    return {
        "peak_mib": round(found.peak_bytes / 2**20, 2),
        "extra_bytes": found.peak_bytes - fast.peak_bytes,
    }


def measure(workload: str, depth: int, dtype: torch.dtype, rounds: int) -> list[Row]:
    """One row for each precision."""
    model, x = WORKLOADS[workload][0](depth)
    ways: dict[str, nn.Module] = {}
    for precision in PRECISIONS:
        rev = rewire.make_reversible(model, x, precision=precision, check="off")
        ways[precision] = Autocast(rev, dtype)
    profiles = {name: profile(way, x) for name, way in ways.items()}  # a grid is chosen, too
    seconds = paired_seconds(ways, x, rounds)
    return [
        {
            "workload": workload,
            "depth": depth,
            "dtype": str(dtype).removeprefix("torch."),
            "precision": name,
            **row_of(profiles[name], profiles["fast"]),
            **ratios(seconds[name], seconds["fast"]),
            "rounds": rounds,
            "forward_deviation": deviation(way, ways["fast"], x),
            **errors(way, x),
        }
        for name, way in ways.items()
    ]


def main(
    workload: Annotated[str, typer.Option(help="vit, convs, bottlenecks or all")] = "all",
    depth: Annotated[int, typer.Option(help="Blocks; 0: each workload's own.")] = 0,
    dtypes: Annotated[str, typer.Option(help="Dtypes, with commas.")] = "float32,bfloat16",
    rounds: Annotated[int, typer.Option(help="Paired rounds for the times.")] = 9,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option(help="Two blocks, one round.")] = False,
    save: Annotated[bool, typer.Option("--record", help=f"Append to {RECORD.name}.")] = False,
) -> None:
    """Measure what exact gradients cost in time and bytes, and what they are without."""
    torch.set_num_threads(threads)
    keep_pages()
    rows: list[Row] = []
    for name in WORKLOADS if workload == "all" else [workload]:
        for dtype in dtypes.split(","):
            torch.manual_seed(0)
            blocks = 2 if quick else depth or WORKLOADS[name][1]
            Console(stderr=True).print(f"{name}, {blocks} blocks, {dtype}")
            rows += measure(name, blocks, getattr(torch, dtype), 1 if quick else rounds)
    show(rows, COLUMNS)
    if save:
        record(rows, RECORD, command=command())


if __name__ == "__main__":
    typer.run(main)
