"""Bandwidth of the kernels of `rewire.kernels` beside a copy on the device, and torch's operations.

    python benchmarks/kernels.py                 # needs a GPU
    python benchmarks/kernels.py --record        # append to records/kernels.csv

Bytes are those that a step has to read and write once. The share is that of a device copy of as
many bytes, timed in turn with it; `operations` is the time of the same step by torch's own
operations (`rewire.integers`) over that of the kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.recording import MEBI, RECORDS, Row, record, show
from rewire import integers, launching
from rewire.corrections import Digits
from rewire.coupling import slack_of, width_of
from rewire.grid import OnGrid
from rewire.integers import Coefficients

RECORD = RECORDS / "kernels.csv"
_K = {"re2": (0.0, 1.0, 1.0), "consistent(1/2)": (0.5, 0.5, 1.5)}


class Case:
    """One step of streams of `elements`, ready to run by kernels and by operations."""

    def __init__(self, coupling: str, elements: int, stream: torch.dtype, branch: torch.dtype):
        self.k = _K[coupling]
        step = torch.tensor(2.0**-18, dtype=stream, device="cuda")
        self.grid = OnGrid(step, 1 / step)

        def on_grid() -> Tensor:
            x = torch.randn(elements, dtype=stream, device="cuda")
            return (x / step).round_() * step

        self.newest, self.older = on_grid(), on_grid()
        self.branch = torch.randn(elements, device="cuda").to(branch)
        self.slack = slack_of(abs(self.k[1]))
        self.width = width_of(abs(self.k[1]), self.slack)
        self.words = self.pack() if self.width else None
        self.newer, _ = self.couple()
        self.out = torch.empty_like(self.newer)
        reads = stream.itemsize * (2 if self.k[0] else 1) + branch.itemsize
        self.step_bytes = elements * (reads + stream.itemsize)
        self.lost_bytes = 0 if self.words is None else self.words.nbytes
        self.stream_bytes = self.older.nbytes

    def couple(self) -> tuple[Tensor, Tensor]:
        """x_{i+1} and its largest value."""
        terms = self.newest, self.older, self.branch, None, self.k
        return launching.couple(*terms, self.grid.step, self.grid.inverse)

    def uncouple(self) -> None:
        """x_{i-1}."""
        terms = self.newer, self.newest, self.branch, None, self.k
        lost = self.words, self.width, self.slack
        launching.uncouple(*terms, self.grid.step, self.grid.inverse, *lost, self.out)

    def pack(self) -> Tensor:
        """What the inverse cannot know."""
        return launching.pack(self.older, self.k[1], self.grid.inverse, self.width, self.slack)

    def kernels(self) -> dict[str, tuple[int, Callable[[], object], Callable[[], object]]]:
        """Bytes, the kernel, and the same by operations."""
        k = Coefficients(*self.k)
        terms = self.newest, self.branch, None, k, self.grid
        lost = None if self.words is None else Digits(self.words, self.width)

        def couple() -> object:
            value = integers.couple(self.newest, self.older, *terms[1:])
            return value, torch.linalg.vector_norm(value, float("inf"))

        def uncouple() -> object:
            return integers.uncouple(self.newer, *terms, lost, self.slack, self.out)

        def pack() -> object:
            return integers.pack(self.older, k.b, self.grid, self.width, self.slack)

        streams = self.newest, self.older
        cases: dict[str, tuple[int, Callable[[], object], Callable[[], object]]] = {
            "couple": (self.step_bytes, self.couple, couple),
            "uncouple": (self.step_bytes + self.lost_bytes, self.uncouple, uncouple),
        }
        if self.width:
            size = self.stream_bytes + self.lost_bytes
            cases["pack"] = (size, self.pack, pack)
        else:
            size = self.stream_bytes
            merges = (
                lambda: launching.merge(*streams, None),
                lambda: integers.merge(*streams, None),
            )
            checks = (lambda: launching.apart(*streams), lambda: integers.apart(*streams))
            cases["merge"] = (3 * size, *merges)
            cases["self-check"] = (2 * size, *checks)
        return cases


def milliseconds(run: Callable[[], object], times: int = 20) -> float:
    """Of one run, on the device's own clock; several between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def measure(case: Case, config: Row, rounds: int) -> list[Row]:
    """A row for each kernel."""
    rows = []
    for name, (size, kernel, operations) in case.kernels().items():
        source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = lambda: target.copy_(source)  # noqa: B023, E731
        ways = {"kernel": kernel, "copy": copy, "operations": operations}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            for way, run in ways.items():
                taken = milliseconds(run)
                if number:  # the first one compiles
                    times[way].append(taken)
        shares = sorted(c / k for c, k in zip(times["copy"], times["kernel"], strict=True))
        middle = {way: statistics.median(values) for way, values in times.items()}
        rows.append(
            {
                "kernel": name,
                **config,
                "bytes": size,
                "gb_per_s": round(size / middle["kernel"] / 1e6, 1),
                "copy_gb_per_s": round(size / middle["copy"] / 1e6, 1),
                "share_p20": round(shares[len(shares) // 5], 3),
                "share_p50": round(statistics.median(shares), 3),
                "share_p80": round(shares[-1 - len(shares) // 5], 3),
                "operations": round(middle["operations"] / middle["kernel"], 2),
                "rounds": rounds,
            }
        )
    return rows


def main(
    mebi: Annotated[str, typer.Option(help="Sizes of a stream in MiB, with commas.")] = "32,512",
    rounds: Annotated[int, typer.Option(help="Rounds of 20 runs.")] = 9,
    save: Annotated[bool, typer.Option("--record", help=f"Append to {RECORD.name}.")] = False,
) -> None:
    """Measure every kernel."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("needs a GPU: torch.cuda.is_available() is False")
    rows = []
    for coupling in _K:
        for stream, branch in (
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float64, torch.float64),
        ):
            for size in map(int, mebi.split(",")):
                config = {
                    "coupling": coupling,
                    "stream": str(stream).removeprefix("torch."),
                    "branch": str(branch).removeprefix("torch."),
                    "stream_mib": size,
                }
                elements = size * MEBI // stream.itemsize
                rows += measure(Case(coupling, elements, stream, branch), config, rounds)
    columns = {
        "kernel": "{kernel}",
        "coupling": "{coupling}",
        "stream, branch": "{stream}, {branch}",
        "stream": "{stream_mib} MiB",
        "GB/s": "{gb_per_s}",
        "share of a copy": "{share_p50} ({share_p20}–{share_p80})",
        "operations, × kernel": "{operations}",
    }
    show(rows, columns)
    if save:
        record(rows, RECORD)


if __name__ == "__main__":
    typer.run(main)
