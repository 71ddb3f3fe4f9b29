"""In how many tensors gradients are, bit for bit, those of plain autograd through the same forward.

    uv run python benchmarks/exactness.py                      # networks x dtypes x couplings
    uv run python benchmarks/exactness.py --quick              # shallow
    uv run python benchmarks/exactness.py --record             # append to records/exactness.csv

Small networks (see tests/networks.py) at depths of 2 to 96 modules, in train mode, two batches
each. Counted are the gradients of the input and of all parameters; "fast" is the same with plain
float streams, for re2, the only coupling whose inverse they can be trusted with at any depth
(and which rewire refuses where norms stand on the trunk).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from rich.console import Console

import rewire
from benchmarks.recording import RECORDS, Row, command, equal_bits, record, show
from tests.exactness import courses, plan_of, run, run_stored
from tests.networks import MODES, NETWORKS

RECORD = RECORDS / "exactness.csv"
COUPLINGS = (
    "re2",
    "consistent(1/2)",
    "consistent(1/4)",
    "consistent(1/8)",
    "dr2(0.9, 0.1)",
    "bdia",
)
BATCHES = 2


def measure(network: str, mode: str, depth: int, coupling: str, precision: str) -> Row:
    """Counts of one network, over its batches."""
    torch.manual_seed(depth)
    make, inputs = NETWORKS[network]
    plan = plan_of(network, depth)
    model = make(depth).to(MODES[mode].dtype)
    rev = rewire.make_reversible(
        model, plan=plan, coupling=coupling, precision=precision, check="off"
    )
    aside = 1 + sum(1 for _ in model.buffers())  # outputs and statistics come before gradients
    same = total = 0
    for _ in range(BATCHES):
        x = inputs()
        expected, found = (way(rev, x, MODES[mode])[aside:] for way in (run_stored, run))
        same += equal_bits(found, expected)
        total += len(expected)
    assert [len(course.sites) for course in courses(rev)] == [depth]
    names = {"network": network, "dtype": mode, "depth": depth, "coupling": coupling}
    return {**names, "precision": precision, "same_bits": same, "gradients": total}


def summed(rows: Sequence[Row], precision: str, network: str) -> Row:
    """For each dtype, equal and all gradients over depths and couplings."""
    found: Row = {"network": network, "precision": precision}
    for mode in MODES:
        own = [
            row
            for row in rows
            if (row["network"], row["precision"], row["dtype"]) == (network, precision, mode)
        ]
        counts = (sum(row[key] for row in own) for key in ("same_bits", "gradients"))
        found[mode] = "{} / {}".format(*counts) if own else "refused"
    return found


def main(
    depths: Annotated[str, typer.Option(help="Residual modules, with commas.")] = "2,12,48,96",
    quick: Annotated[bool, typer.Option(help="Two and four modules.")] = False,
    save: Annotated[bool, typer.Option("--record", help=f"Append to {RECORD.name}.")] = False,
) -> None:
    """Count gradients that are bit for bit those of plain autograd."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for network in NETWORKS:
        for depth in [2, 4] if quick else [int(depth) for depth in depths.split(",")]:
            Console(stderr=True).print(f"{network}, {depth} modules")
            for mode in MODES:
                rows += [measure(network, mode, depth, name, "exact") for name in COUPLINGS]
                if not any(chain.norms for chain in plan_of(network, depth).chains):
                    rows.append(measure(network, mode, depth, "re2", "fast"))
    ways = [(precision, network) for precision in ("exact", "fast") for network in NETWORKS]
    table = [summed(rows, *way) for way in ways]
    show(table, {name: f"{{{name}}}" for name in ("network", "precision", *MODES)})
    if save:
        record(rows, RECORD, command=command())


if __name__ == "__main__":
    typer.run(main)
