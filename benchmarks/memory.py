"""Peak memory and time of one training step: plain, checkpointed, and rewired.

    uv run python benchmarks/memory.py                      # the standard workloads
    uv run python benchmarks/memory.py --model timm/vit_small_patch16_224 --batch 8
    uv run python benchmarks/memory.py --record             # append to records/memory.csv

All ways run in one process, turn by turn, so that ratios compare like with like. Bytes are
those of live tensors (`rewire.profiling`), gradients of parameters preallocated.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rewire
from benchmarks.recording import MEBI, RECORDS, record
from benchmarks.workloads import Stack, bottlenecks, timm_vit, vit
from rewire.inputs import example_for
from rewire.profiling import profile
from rewire.sources import open_model

RECORD = RECORDS / "memory.csv"


WORKLOADS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "vit": vit,
    "bottlenecks": bottlenecks,
    "timm-vit": timm_vit,
}


def ways_of(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, nn.Module]:
    """The rivals, sharing their parameters."""
    ways = {"plain": model}
    if isinstance(model, Stack):
        ways["checkpoint"] = Stack(model.blocks, checkpointed=True)
    elif hasattr(model, "set_grad_checkpointing"):
        ways["checkpoint"] = copy.deepcopy(model)
        ways["checkpoint"].set_grad_checkpointing()
    ways["rewire"] = rewire.make_reversible(model, inputs)
    return ways


def step_seconds(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Time of one forward and backward."""
    start = time.perf_counter()
    model(*inputs).float().square().mean().backward()
    return time.perf_counter() - start


def measure(workload: str, depth: int, model: nn.Module, inputs: Any, rounds: int) -> list[Any]:
    """One row for each way: bytes, and seconds over `rounds` paired rounds."""
    ways = ways_of(model, inputs)
    profiles = {name: profile(way, *inputs) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(step_seconds(way, inputs))
    rows = []
    for name in ways:
        pairs = zip(seconds[name], seconds["plain"], strict=True)
        ratios = sorted(own / plain for own, plain in pairs)
        rows.append(
            {
                "workload": workload,
                "depth": depth,
                "way": name,
                "peak_mib": round(profiles[name].peak_bytes / MEBI, 2),
                "left_bytes": profiles[name].left_bytes,
                "peak_ratio": round(profiles[name].peak_bytes / profiles["plain"].peak_bytes, 4),
                "time_ratio_median": round(statistics.median(ratios), 3),
                "time_ratio_min": round(ratios[0], 3),
                "time_ratio_max": round(ratios[-1], 3),
                "rounds": rounds,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table("workload", "depth", "way", "peak MiB", "x plain", "left", "time x plain (range)")
    for row in rows:
        spread = f"{row['time_ratio_min']}-{row['time_ratio_max']}"
        table.add_row(
            row["workload"],
            str(row["depth"]),
            row["way"],
            f"{row['peak_mib']:.1f}",
            f"{row['peak_ratio']:.3f}",
            str(row["left_bytes"]),
            f"{row['time_ratio_median']} ({spread})",
        )
    Console().print(table)


def main(
    workload: Annotated[str, typer.Option(help="vit, bottlenecks, timm-vit or all")] = "all",
    depths: Annotated[str, typer.Option(help="Depths, with commas.")] = "6,12,24,48",
    model: Annotated[str, typer.Option(help="Measure this model (see rewire --help).")] = "",
    batch: Annotated[int, typer.Option(help="Batch size for --model.")] = 8,
    rounds: Annotated[int, typer.Option(help="Paired rounds for the times.")] = 5,
    save: Annotated[bool, typer.Option("--record", help=f"Append to {RECORD.name}.")] = False,
) -> None:
    """Measure peak memory and time of one training step, side by side."""
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    if model:
        module = open_model(model).module.train()
        (example,) = example_for(module).args
        inputs = torch.cat([example[:1]] * batch)
        rows += measure(model, 0, module, (inputs,), rounds)
    else:
        names = list(WORKLOADS) if workload == "all" else [workload]
        for name in names:
            for depth in map(int, depths.split(",")):
                Console(stderr=True).print(f"{name}, depth {depth}")
                module, x = WORKLOADS[name](depth)
                rows += measure(name, depth, module, (x,), rounds)
    show(rows)
    if save:
        record(rows, RECORD)


if __name__ == "__main__":
    typer.run(main)
