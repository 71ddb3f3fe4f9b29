"""Where the time of a step goes, and what a residual module costs beside its arithmetic.

    python benchmarks/speed.py                       # ViT blocks from small to large
    python benchmarks/speed.py --dims 64 --depth 48  # where Python is what takes the time
    python benchmarks/speed.py --compile             # compiled branches, and torch.compile, too

Ways run in turns. A way's overhead is what is left of its step when the plain step and one forward
are taken off (which is what running every branch again takes at most), for each residual module.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import statistics

import torch
import typer
from timm.models.vision_transformer import Block
from torch import nn

import rewire
from benchmarks.costs import step, zero_gradients
from benchmarks.recording import (
    RECORDS,
    Row,
    keep_pages,
    paired_seconds,
    ratios,
    record,
    show,
)
from benchmarks.rivals import Subject, make
from benchmarks.workloads import Stack

RECORD = RECORDS / "speed.csv"
WAYS = ("plain", "checkpoint", "rewire")
STORED = "rewire, stored"
TOLD = ("rewire", STORED)
COMPILED = ("compile", "rewire-compile")
COLUMNS = {
    "dim": "{dim}",
    "tokens": "{tokens}",
    "depth": "{depth}",
    "way": "{way}",
    "ms": "{step_ms}",
    "time × plain": "{time_median} ({time_p20}–{time_p80})",
    "µs a module beside running it again": "{module_us}",
}


class Stored(nn.Module):
    """A rewired model whose activations are stored: what its two streams alone cost."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model."""
        with rewire.store_activations(self.model):
            result: torch.Tensor = self.model(x)
        return result


class Forward(nn.Module):
    """A model of which only forward takes time: its loss hangs on the input alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model, and forget it."""
        self.model(x)
        return x[:1, :1]


def measured(dim: int, tokens: int, depth: int, names: Sequence[str], rounds: int) -> list[Row]:
    """One row for each way."""
    torch.manual_seed(0)
    model = Stack([Block(dim, max(1, dim // 64), qkv_bias=True) for _ in range(depth)])
    x = torch.randn(8, tokens, dim, requires_grad=True)
    subject = Subject(model, x)
    ways = {name: make(name, subject) for name in names}
    ways[STORED] = Stored(ways["rewire"])
    ways["forward"] = Forward(model)
    zero_gradients(subject.leaves)
    for way in ways.values():
        for _ in range(3):
            step(way, x)
    seconds = paired_seconds(ways, x, rounds)
    again = statistics.median(seconds["forward"])
    plain = statistics.median(seconds["plain"])
    rows = []
    for name in ways:
        median = statistics.median(seconds[name])
        reruns = again if name == "rewire" else 0.0
        row: Row = {"dim": dim, "tokens": tokens, "depth": depth, "way": name}
        row |= {"step_ms": round(1e3 * median, 3), **ratios(seconds[name], seconds["plain"])}
        # Of these alone: compiled code is another, and checkpoint stops early.
        if name in TOLD:
            row["module_us"] = round(1e6 * (median - plain - reruns) / (2 * depth), 1)
        else:
            row["module_us"] = ""
        rows.append(row)
    return rows


def main(
    dims: Annotated[str, typer.Option(help="Widths, with commas.")] = "64,192,384",
    tokens: Annotated[int, typer.Option(help="Of each sample; there are 8.")] = 0,
    depth: Annotated[int, typer.Option(help="Blocks, of two residual modules each.")] = 12,
    rounds: Annotated[int, typer.Option(help="Paired rounds.")] = 9,
    compilers: Annotated[bool, typer.Option("--compile", help="The compiled ways too.")] = False,
    save: Annotated[bool, typer.Option("--record", help="Append to the record.")] = False,
) -> None:
    """Time the ways on ViT blocks."""
    keep_pages()
    names = [*WAYS, *(COMPILED if compilers else ())]
    rows = []
    for dim in map(int, dims.split(",")):
        count = tokens or (17 if dim <= 64 else 197)
        rows += measured(dim, count, depth, names, rounds)
    show(rows, COLUMNS)
    if save:
        record(rows, RECORD)


if __name__ == "__main__":
    typer.run(main)
