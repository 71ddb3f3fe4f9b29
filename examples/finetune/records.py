"""The measurements, one row each, with what they depend on."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import rewire

RUNS_ON = ("torch", "timm", "transformers", "scikit-learn", "scikit-image")


@dataclass(frozen=True)
class Row:
    """One measurement: `stage` is start, recalibrated, cost, or the steps done."""

    task: str
    coupling: str
    granularity: str
    seed: int
    stage: str
    metric: str
    value: float


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """Machine, date, versions and command."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "rewire": rewire.__version__,
        **{name: _version(name) for name in RUNS_ON},
        "command": command,
    }


def append(path: Path, rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Add rows to a CSV; a new file gets a header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        written = [{**asdict(row), **facts} for row in rows]
        writer = csv.DictWriter(file, fieldnames=list(written[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(written)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
