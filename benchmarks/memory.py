"""Peak memory and time of one training step: rewire and its rivals, side by side.

    uv run python benchmarks/memory.py                      # the standard workloads
    uv run python benchmarks/memory.py --model timm/vit_small_patch16_224 --batch 8,32
    uv run python benchmarks/memory.py --model torchvision/swin3d_t --batch 1 \\
        --frames 32,64,128 --device cuda --dtype bfloat16 --against checkpoint,offload --record
    uv run python benchmarks/memory.py --workload vit --depths 6,12,24 --estimate --plot depth.png

All ways (see `rivals.py`) run in one process on the same parameters and the same input, turn by
turn, so that ratios compare like with like; gradients are allocated beforehand. A way that cannot
be run is a row too, with the reason as its note. The libraries: `uv sync --group rivals`. With
--estimate each peak stands beside its estimate, and alone where there is no such device.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks.costs import StepBytes, release, step, step_bytes, zero_gradients
from benchmarks.pictures import draw
from benchmarks.recording import MEBI, RECORDS, Row, keep_pages, record, show, step_seconds
from benchmarks.rivals import REMARKS, WAYS, Subject, applicable, make
from benchmarks.workloads import bottlenecks, gpt2, timm_vit, vit
from rewire.errors import RewireError
from rewire.estimation import estimate
from rewire.inputs import example_for
from rewire.meters import LiveBytes
from rewire.plotting import need_matplotlib
from rewire.sources import open_model

RECORD = RECORDS / "rivals.csv"
WARM_UP = 2

WORKLOADS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "vit": vit,
    "bottlenecks": bottlenecks,
    "timm-vit": timm_vit,
    "gpt2": gpt2,
}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

COLUMNS = {
    "what": "{what}",
    "input": "{input}",
    "depth": "{depth}",
    "way": "{way}",
    "peak MiB": "{peak_mib}",
    "× plain": "{peak_ratio}",
    "left": "{left_bytes}",
    "ms": "{ms_p50}",
    "time × plain": "{time_p50} ({time_p20}–{time_p80})",
    "note": "{note}",
}
ESTIMATED = "estimate MiB"


# ---- what is measured --------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and its input; None leaves a size as it is.

    Attributes:
        what: A workload, or a model as rewire opens it.
        depth: Blocks of a workload.
        batch: Samples.
        frames: T of an input [B, 3, T, H, W].
        size: H and W of an input [B, 3, (T,) H, W].
    """

    what: str
    depth: int | None = None
    batch: int | None = None
    frames: int | None = None
    size: int | None = None

    def subject(self, device: torch.device, dtype: torch.dtype) -> Subject:
        """Make the model, in train mode, and its input.

        Raises:
            typer.BadParameter: There is no such model, or its input has no such size.
        """
        torch.manual_seed(0)
        model, x = self._made()
        shape = self._shape(x)
        inputs = torch.randn(shape, device=device, requires_grad=x.requires_grad)
        return Subject(model.train().to(device), inputs, dtype)

    def _made(self) -> tuple[nn.Module, Tensor]:
        if self.what in WORKLOADS:
            return WORKLOADS[self.what](self.depth or 12)
        try:
            model = open_model(self.what).module
            inputs = example_for(model).args
        except RewireError as error:
            raise typer.BadParameter(str(error)) from error
        if len(inputs) != 1:
            raise typer.BadParameter(f"{self.what}: takes {len(inputs)} inputs, not one tensor.")
        return model, inputs[0]

    def _shape(self, x: Tensor) -> list[int]:
        shape = list(x.shape)
        if self.batch is not None:
            shape[0] = self.batch
        if self.size is not None:
            self._refuse("--size", x, x.dim() < 4)
            shape[-2:] = [self.size, self.size]
        if self.frames is not None:
            self._refuse("--frames", x, x.dim() != 5)
            shape[2] = self.frames
        return shape

    def _refuse(self, option: str, x: Tensor, wrong: bool) -> None:
        if wrong:
            shape = ",".join(map(str, x.shape))
            raise typer.BadParameter(f"{option} is not for {self.what}, which takes [{shape}].")

    def row(self, subject: Subject) -> Row:
        """What the rows of this case begin with."""
        return {
            "what": self.what,
            "depth": self.depth if self.depth is not None else "",
            "batch": subject.x.shape[0],
            "frames": subject.x.shape[2] if subject.x.dim() == 5 else "",
            "input": "x".join(map(str, subject.x.shape)),
            "dtype": str(subject.dtype).removeprefix("torch."),
        }


# ---- measuring ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all cases have in common.

    Attributes:
        device: Where they run.
        dtype: Of autocast; float32 is without.
        rounds: How often they are timed.
        compilers: Whether compiled ways run.
        estimate: Whether peaks are estimated too.
        traces: Whether the bytes alive over a step are kept.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int
    compilers: bool = False
    estimate: bool = False
    traces: bool = False

    @property
    def here(self) -> bool:
        """Whether there is the device: else all that can be done is to estimate."""
        return self.device.type != "cuda" or torch.cuda.is_available()


@dataclass
class Entry:
    """One way in the race.

    Attributes:
        name: Of the way.
        model: What runs; None before it is made, and after it has failed.
        cost: Its bytes.
        estimate: Its peak bytes as estimated, where that is asked for and can be done.
        trace: Bytes alive after each operation of a step, where they are asked for.
        seconds: Of each round.
        note: A remark, or why it failed.
    """

    name: str
    model: nn.Module | None = None
    cost: StepBytes | None = None
    estimate: int | None = None
    trace: tuple[int, ...] = ()
    seconds: list[float] = field(default_factory=list)
    note: str = ""

    def enter(self, subject: Subject, setting: Setting) -> None:
        """Make it, estimate its bytes if asked, warm it up, and measure them."""
        try:
            model = make(self.name, subject)
            self.note = REMARKS.get(self.name, "")
            if setting.estimate:
                self._guess(model, subject, setting.device)
            if setting.here:
                self.cost = self._measured(model, subject)
                self.model = model
            if setting.traces:
                self.trace = self._traced(model, subject, setting)
        except Exception as error:  # any rival's code may run here
            self.note = reason(error, subject.x.device)
        release(subject.x.device)  # not while an error holds what its frames do

    def _guess(self, model: nn.Module, subject: Subject, device: torch.device) -> None:
        """The estimate; a way that has none (compiled, other libraries' backward) has a blank."""
        with suppress(Exception):
            self.estimate = estimate(model, subject.x, device=device, optimizer=None).peak_bytes

    def _traced(self, model: nn.Module, subject: Subject, setting: Setting) -> tuple[int, ...]:
        """Bytes alive after each operation of a step, which is estimated where there is no device.

        Gradients are there.
        """
        if not setting.here:
            return estimate(model, subject.x, device=setting.device, optimizer=None).trace
        with LiveBytes() as meter:
            step(model, subject.x)
        return tuple(meter.trace)

    def _measured(self, model: nn.Module, subject: Subject) -> StepBytes:
        for _ in range(WARM_UP):
            zero_gradients(subject.leaves)
            step(model, subject.x)
        release(subject.x.device)
        zero_gradients(subject.leaves)
        return step_bytes(model, subject.x)

    def turn(self, subject: Subject) -> None:
        """Time one step, where it still runs.

        On CUDA after one that is not timed: it finds the allocator as other ways have left it.
        """
        if self.model is None:
            return
        zero_gradients(subject.leaves)
        try:
            if subject.x.is_cuda:
                step(self.model, subject.x)
            self.seconds.append(step_seconds(self.model, subject.x))
        except Exception as error:  # memory may be out in one turn and not in another
            self.model, self.seconds = None, []
            self.note = f"while timed: {reason(error, subject.x.device)}"
        if self.model is None:
            release(subject.x.device)


def reason(error: Exception, device: torch.device) -> str:
    """A failure in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        total = torch.cuda.get_device_properties(device).total_memory
        return f"out of memory ({total / 2**30:.0f} GiB)"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def race(subject: Subject, names: Sequence[str], setting: Setting) -> list[Entry]:
    """Measure ways: their bytes one after the other, then their times in turns."""
    entries = [Entry(name) for name in names]
    torch.compiler.reset()
    for entry in entries:
        entry.enter(subject, setting)
        Console(stderr=True).print(f"  {entry.name} {entry.note}", highlight=False)
    for number in range(setting.rounds):
        for entry in entries[:: 1 if number % 2 else -1]:
            entry.turn(subject)
    return entries


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20, 50 and 80 per cent of some values, NaN of none."""
    if not values:
        return (math.nan, math.nan, math.nan)
    ordered, fifth = sorted(values), len(values) // 5
    return ordered[fifth], statistics.median(ordered), ordered[-1 - fifth]


def rows_of(entries: Sequence[Entry], rounds: int) -> list[Row]:
    """One row for each way; blank where there is no number, ratios where plain has none."""
    plain = next(entry for entry in entries if entry.name == "plain")
    return [
        {
            "way": entry.name,
            "peak_mib": round(entry.cost.peak / MEBI, 2) if entry.cost else "",
            "estimate_mib": round(entry.estimate / MEBI, 2) if entry.estimate else "",
            "left_bytes": entry.cost.left if entry.cost else "",
            "peak_ratio": _ratio(entry.cost, plain.cost),
            **_spread("ms", [1000 * seconds for seconds in entry.seconds]),
            **_spread("time", [a / b for a, b in zip(entry.seconds, plain.seconds, strict=False)]),
            "rounds": rounds,
            "note": entry.note,
        }
        for entry in entries
    ]


def _ratio(own: StepBytes | None, plain: StepBytes | None) -> float | str:
    return round(own.peak / plain.peak, 4) if own and plain else ""


def _spread(name: str, values: Sequence[float]) -> Row:
    """Columns of a quantity's percentiles, blank where there is nothing."""
    found = zip(("p20", "p50", "p80"), percentiles(values), strict=True)
    return {f"{name}_{key}": "" if math.isnan(v) else round(v, 3) for key, v in found}


# ---- the program -------------------------------------------------------------------------


def measure(case: Case, against: Sequence[str], setting: Setting) -> tuple[list[Row], list[Entry]]:
    """All rows of one case, and what they are made from."""
    place = setting.device if setting.here else torch.device("cpu")
    release(place)  # the case before
    subject = case.subject(place, setting.dtype)
    names = against or applicable(subject, compilers=setting.compilers)
    names = [name for name in WAYS if name in {"plain", *names, "rewire"}]
    begin = case.row(subject)
    entries = race(subject, names, setting)
    return [{**begin, **row} for row in rows_of(entries, setting.rounds)], entries


def cases(models: Sequence[str], workload: str, depths: str, sizes: Sequence[str]) -> list[Case]:
    """Every combination of what was asked for.

    Args:
        models: Models by name; where there are none, workloads by depth.
        workload: Its name, or "all".
        depths: With commas.
        sizes: Of the batch, the frames and the picture: each with commas, or empty.
    """
    grid = list(itertools.product(*map(_numbers, sizes)))
    if models:
        return [Case(model, None, *row) for model in models for row in grid]
    names = list(WORKLOADS) if workload == "all" else [workload]
    known = [name for name in names if name in WORKLOADS]
    if known != names:
        raise typer.BadParameter(f"{workload}: no workload. There are {', '.join(WORKLOADS)}, all.")
    blocks = _numbers(depths)
    return [Case(name, depth, *row) for name in names for depth in blocks for row in grid]


def _numbers(text: str) -> list[int | None]:
    """Numbers with commas; one None where there are none."""
    return [int(number) for number in text.split(",")] if text else [None]


def _known(text: str) -> list[str]:
    """Names of ways with commas."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in WAYS:
            raise typer.BadParameter(f"{name}: no way. There are {', '.join(WAYS)}.")
    return names


def _check(setting: Setting, save: bool) -> None:
    """Say what cannot be done before the work."""
    if not setting.here and (save or not setting.estimate):
        raise typer.BadParameter("there is no GPU here: --estimate, without --record, needs none.")
    if setting.traces:
        try:
            need_matplotlib()
        except RewireError as error:
            raise typer.BadParameter(str(error)) from error


def columns_of(setting: Setting) -> dict[str, str]:
    """The table's; the estimate stands beside the peak."""
    if not setting.estimate:
        return COLUMNS
    place = list(COLUMNS).index("peak MiB") + 1
    pairs = list(COLUMNS.items())
    return dict([*pairs[:place], (ESTIMATED, "{estimate_mib}"), *pairs[place:]])


def _recorded(row: Row) -> Row:
    """What of a row is measured: the record is of that alone."""
    return {name: value for name, value in row.items() if name != "estimate_mib"}


def origin(device: torch.device) -> Row:
    """Where numbers come from, beside what `recording.environment` says."""
    git = ["git", "-C", str(RECORDS), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name if device.type == "cuda" else f"CPU {name}", "commit": commit}


def main(
    workload: Annotated[str, typer.Option(help="vit, bottlenecks, timm-vit or all")] = "all",
    depths: Annotated[str, typer.Option(help="Depths of it, with commas.")] = "6,12,24,48",
    model: Annotated[list[str] | None, typer.Option(help="A model (see rewire --help).")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "",
    frames: Annotated[str, typer.Option(help="Frames of a video, with commas.")] = "",
    size: Annotated[str, typer.Option(help="Height and width, with commas.")] = "",
    against: Annotated[str, typer.Option(help=f"Ways, with commas: {', '.join(WAYS)}.")] = "",
    compilers: Annotated[bool, typer.Option("--compile", help="The compiled ways too.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 by autocast")] = "float32",
    rounds: Annotated[int, typer.Option(help="Paired rounds for the times.")] = 5,
    estimated: Annotated[
        bool, typer.Option("--estimate", help="Estimate the peaks too; alone without the device.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw peaks over what is swept, or else one step.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    save: Annotated[bool, typer.Option("--record", help="Append to the record.")] = False,
    to: Annotated[Path, typer.Option(help="The record.", show_default=RECORD.name)] = RECORD,
) -> None:
    """Measure peak memory and time of one training step, side by side."""
    keep_pages()
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype}: no dtype. There are {', '.join(DTYPES)}.")
    place, traces = torch.device(device), plot is not None
    setting = Setting(place, DTYPES[dtype], rounds, compilers, estimated, traces)
    ways = _known(against)
    _check(setting, save)
    rows: list[Row] = []
    steps: dict[str, tuple[int, ...]] = {}
    for case in cases(model or [], workload, depths, (batch, frames, size)):
        Console(stderr=True).print(str(case), soft_wrap=True)
        found, entries = measure(case, ways, setting)
        if save:  # each by itself: a run that is stopped keeps what it has
            record([_recorded(row) for row in found], to, **origin(setting.device))
        rows += found
        steps = {entry.name: entry.trace for entry in entries if entry.trace}
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows, columns_of(setting))
    if plot is not None:
        draw(rows, steps, plot)


if __name__ == "__main__":
    typer.run(main)
