"""Memory of one training step of a backbone, against frames, for the ways to train it.

A step is a forward of a `Backbone` on frames [1, 3, T, H, W], the mean of its features' squares,
and its backward: float32, train mode, norms frozen. What is counted are the bytes of all
tensors alive at its peak. Parameters, their gradients and the frames are there before it; they are
given beside. What an optimizer keeps, and a kernel takes for itself and gives back before it
returns, is not counted.

Every case is estimated, on tensors without values, and measured as well where there is the device
and memory for it.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

import rewire
from examples.tal.figures import new_figure, write_figure
from examples.tal.files import append_row
from examples.tal.models.backbones import NETWORKS, Backbone, freeze_norms, prepared

GIBI = 2**30

# By name: the way of `prepared`, and its options.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "checkpointed": ("checkpointed", {}),
    "rewired": ("rewired", {}),
    "rewired+chunks": ("rewired", {"chunks": "auto"}),
    "rewired+outside": ("rewired", {"outside": "checkpoint"}),
}

SWEPT = (
    "swin_t", "swin_s", "swin_b", "slowfast_r50", "slowfast_r101",
    "videomae_b", "videomae_l", "videomae_g",
)  # fmt: skip
FRAMES = (64, 256, 1024)

# Rewiring looks at a run on so many frames; nothing of them is burned in.
_EXAMPLE_FRAMES = 32
_CPU_BYTES = 8 * GIBI


@dataclass(frozen=True)
class Row:
    """What one training step takes.

    Attributes:
        network: By its name in `NETWORKS`.
        way: One of `WAYS`.
        frames: T.
        size: Height and width, in pixels.
        kind: "estimated" or "measured".
        device: "cpu" or "cuda", where it was measured or which it was estimated for.
        peak_bytes: Most bytes of a step at once, beside what is there before it; None where memory
            ran out.
        saved_bytes: Of these, what is there between forward and backward.
        parameter_bytes: All parameters.
        gradient_bytes: Gradients of those that are trained.
        input_bytes: The frames.
        seconds: Of a step; None in an estimate.
    """

    network: str
    way: str
    frames: int
    size: int
    kind: str
    device: str
    peak_bytes: int | None
    saved_bytes: int | None = None
    parameter_bytes: int | None = None
    gradient_bytes: int | None = None
    input_bytes: int | None = None
    seconds: float | None = None


# ---- networks --------------------------------------------------------------------------------


def backbone_for(network: str, way: str, size: int = 224, *, values: bool = True) -> Backbone:
    """A backbone made ready to be trained in a way, in train mode, with norms frozen, on the CPU.

    Args:
        network: One of `NETWORKS`.
        way: One of `WAYS`.
        size: Height and width that rewiring looks at, in pixels.
        values: Whether its weights have values. Without them large networks take no memory: pages
            that nobody writes to are not there.
    """
    kind, options = WAYS[way]
    if kind == "rewired":
        example = torch.empty(1, 3, _EXAMPLE_FRAMES, size, size, device="meta")
        options = {"example_inputs": example, **options}
    backbone = prepared(Backbone(_made(network, values)), kind, **options)
    freeze_norms(backbone.train())
    return backbone


def _made(network: str, values: bool) -> nn.Module:
    if values:
        return NETWORKS[network]()
    with torch.device("meta"):
        net = NETWORKS[network]()
    return net.to_empty(device="cpu")  # rewiring refuses parameters on the meta device


# ---- measuring -------------------------------------------------------------------------------


def estimate(backbone: Backbone, frames: int, size: int, device: str = "cpu") -> rewire.Profile:
    """Estimate a step; nothing is computed, and no GPU is needed.

    Args:
        backbone: Of `backbone_for`, with or without values.
        frames: T.
        size: Height and width, in pixels.
        device: "cpu" or "cuda".
    """
    inputs = torch.empty(1, 3, frames, size, size, device="meta")
    return rewire.estimate(backbone, inputs, device=device, optimizer=None)


def measure(backbone: Backbone, frames: int, size: int) -> rewire.Profile | None:
    """Measure a step where the backbone is; None: memory ran out.

    Args:
        backbone: Of `backbone_for`, with values.
        frames: T.
        size: Height and width, in pixels.
    """
    place = next(backbone.parameters()).device
    try:
        inputs = torch.rand(1, 3, frames, size, size, device=place)
        return rewire.profile(backbone, inputs, optimizer=None)
    except torch.OutOfMemoryError:
        return None


def run(
    networks: Sequence[str] = SWEPT,
    frames: Sequence[int] = FRAMES,
    ways: Sequence[str] = tuple(WAYS),
    device: str = "cpu",
    *,
    size: int = 224,
    measured_to: int | None = None,
    within: int | None = None,
) -> Iterator[Row]:
    """Estimate every case, and measure what there is the device, memory and patience for.

    Args:
        networks: Names in `NETWORKS`.
        frames: T of each step; multiples of 4 for SlowFast, of 16 for VideoMAE.
        ways: Names in `WAYS`.
        device: "cpu" or "cuda"; for the second, where there is none, estimates alone.
        size: Height and width, in pixels.
        measured_to: Most frames that are measured; None: all on a GPU, none on the CPU.
        within: Bytes that a step may take, parameters and all, to be measured; None: 90 % of what
            is free on a GPU, 8 GiB on the CPU.

    Yields:
        An estimate for each case, and behind it the measurement, where there is one.

    Raises:
        ValueError: There is no such network, way or device.
    """
    _refuse("network", networks, NETWORKS)
    _refuse("way", ways, WAYS)
    _refuse("device", [device], ("cpu", "cuda"))
    if measured_to is None:
        measured_to = max(frames, default=0) if device == "cuda" else 0
    here = device == "cpu" or torch.cuda.is_available()

    def fits(number: int, guess: rewire.Profile) -> bool:
        if not here or number > measured_to:
            return False
        return guess.total_bytes <= (_free(device) if within is None else within)

    for network in networks:
        for way in ways:
            yield from _rows(network, way, frames, device, size, fits)


def _rows(
    network: str,
    way: str,
    frames: Sequence[int],
    device: str,
    size: int,
    fits: Callable[[int, rewire.Profile], bool],
) -> Iterator[Row]:
    bare, backbone = backbone_for(network, way, size, values=False), None
    for number in frames:
        if device == "cuda" and torch.cuda.is_available():
            torch.cuda.empty_cache()  # or what earlier cases held would count as taken
        case = network, way, number, size
        guess = estimate(bare, number, size, device)
        yield Row(*case, "estimated", device, *_sizes(guess))
        if not fits(number, guess):
            continue
        backbone = backbone or backbone_for(network, way, size).to(device)
        found = measure(backbone, number, size)
        if found is None:
            yield Row(*case, "measured", device, None)
        else:
            seconds = round(found.step_seconds, 3)
            yield Row(*case, "measured", device, *_sizes(found), seconds)


def _sizes(found: rewire.Profile) -> tuple[int, ...]:
    standing = found.parameter_bytes, found.gradient_bytes, found.input_bytes
    return found.peak_bytes, found.saved_bytes, *standing


def _free(device: str) -> int:
    return int(0.9 * torch.cuda.mem_get_info()[0]) if device == "cuda" else _CPU_BYTES


def _refuse(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{name!r} is no {what}. There are {', '.join(known)}.")


# ---- rows ------------------------------------------------------------------------------------


def append(path: Path, row: Row) -> None:
    """Add a row to a CSV file, with what it depends on."""
    gpu = row.device == "cuda" and torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores"
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "machine": machine}
    append_row(path, {**asdict(row), **facts})


def read(path: Path) -> list[Row]:
    """The rows of a file that `append` wrote."""
    with path.open(newline="") as file:
        return [_row(line) for line in csv.DictReader(file)]


def _row(line: Mapping[str, str]) -> Row:
    values: dict[str, Any] = {field.name: line[field.name] for field in fields(Row)}
    for name, text in values.items():
        if name == "seconds":
            values[name] = float(text) if text else None
        elif name.endswith("_bytes") or name in ("frames", "size"):
            values[name] = int(text) if text else None
    return Row(**values)


def agreement(rows: Iterable[Row]) -> dict[Row, float]:
    """The measured rows that have an estimate, each with the share of it that was measured."""
    rows = list(rows)
    guesses = {_case(row): row.peak_bytes for row in rows if row.kind == "estimated"}
    return {
        row: row.peak_bytes / guess
        for row in rows
        if row.kind == "measured" and row.peak_bytes and (guess := guesses.get(_case(row)))
    }


def _case(row: Row) -> tuple[str, str, int, int, str]:
    return row.network, row.way, row.frames, row.size, row.device


def table(rows: Sequence[Row]) -> Table:
    """GiB of a step at its peak: a line for each network and way, a column for each T.

    Estimates; what was measured stands in brackets.
    """
    frames = sorted({row.frames for row in rows})
    found = Table("network", "way", *map(str, frames), title="GiB at the peak, by frames")
    for network, ways in _by_network(rows).items():
        for way, points in ways.items():
            found.add_row(network, way, *(_cell(points.get(number, {})) for number in frames))
        found.add_section()
    if ratios := agreement(rows).values():
        found.caption = f"measured / estimated: {min(ratios):.3f} to {max(ratios):.3f}"
    return found


def _cell(peaks: Mapping[str, int | None]) -> str:
    texts = {
        kind: "out of memory" if peak is None else f"{peak / GIBI:.2f}"
        for kind, peak in peaks.items()
    }
    measured = f"({texts['measured']})" if "measured" in texts else ""
    return " ".join(filter(None, (texts.get("estimated"), measured)))


# Peaks by kind, by frames, by way.
_Ways = dict[str, dict[int, dict[str, int | None]]]


def _by_network(rows: Iterable[Row]) -> dict[str, _Ways]:
    """Peaks in the order of the rows."""
    found: dict[str, _Ways] = {}
    for row in rows:
        points = found.setdefault(row.network, {}).setdefault(row.way, {})
        points.setdefault(row.frames, {})[row.kind] = row.peak_bytes
    return found


# ---- picture ---------------------------------------------------------------------------------

_COLOURS = {
    "plain": "#8a8f98",
    "checkpointed": "#c0642b",
    "rewired": "#0b6e4f",
    "rewired+chunks": "#4863a0",
    "rewired+outside": "#8b5a9f",
}
_CARDS = (24, 80)  # GiB of usual GPUs


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw peaks against frames, both in logarithms: a panel for each network, a line for each way.

    Lines are estimates, circles were measured; dotted are cards of 24 and 80 GiB.

    Args:
        rows: To draw.
        path: A file to write, of a kind that matplotlib knows (png, svg, pdf).

    Raises:
        ValueError: There are no rows, or matplotlib is not installed.
    """
    networks = _by_network(rows)
    if not networks:
        raise ValueError("there are no rows to draw.")
    across = min(4, len(networks))
    down = -(-len(networks) // across)
    figure = new_figure((3.4 * across, 0.7 + 3.1 * down), dpi=150)
    panels = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for axes, (network, ways) in zip(panels, networks.items(), strict=False):
        _panel(axes, network, ways)
    for axes in panels[len(networks) :]:
        axes.remove()
    _legend(figure)
    write_figure(path, figure)


def _panel(axes: Any, network: str, ways: _Ways) -> None:
    """One network's lines."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for number, (way, points) in enumerate(ways.items()):
        look = {
            "color": _COLOURS.get(way, "#3c9aa8"),
            "linewidth": 4.5 - 0.8 * number,  # those below show where lines are one
            "markerfacecolor": "none",
            "markeredgewidth": 1,
        }
        for kind, style in (("estimated", "-"), ("measured", "o")):
            sizes = [(n, peaks[kind] / GIBI) for n, peaks in points.items() if peaks.get(kind)]
            if sizes:
                columns = zip(*sorted(sizes), strict=True)
                label = way if kind == "estimated" else f"_{way}"  # matplotlib lists no such one
                axes.plot(*columns, style, label=label, **look)
    for card in _CARDS:
        axes.axhline(card, color="#aaaaaa", linewidth=0.8, linestyle=":", label="_card")
    frames = sorted({place for points in ways.values() for place in points})
    axes.set_xticks(frames, map(str, frames))
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title=network, xlabel="frames", ylabel="GiB")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any) -> None:
    """One for all panels."""
    lines = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        lines.update(zip(labels, handles, strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=6, frameon=False)
