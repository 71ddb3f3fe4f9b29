"""What is known of a model of the zoo before it is built."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

TRUTH = Path(__file__).parents[1] / "records" / "zoo_truth.csv"

Inputs = Callable[[], dict[str, Any] | tuple[Any, ...]]


@dataclass(frozen=True)
class Specimen:
    """A model of a library.

    Attributes:
        library: Where it comes from.
        name: Its own name there.
        family: What it is counted with: for timm the file it stands in.
        build: Makes it.
        inputs: Makes what it is called with; None where rewire finds that by itself.
        size: Side of its pictures where others than its own do: smaller, for speed.
    """

    library: str
    name: str
    family: str
    build: Callable[[], nn.Module] = field(repr=False)
    inputs: Inputs | None = field(default=None, repr=False)
    size: int | None = None

    @property
    def id(self) -> str:
        """Unique in the zoo."""
        return f"{self.library}/{self.name}"


def network(module: str, name: str, keywords: dict[str, Any]) -> Callable[[], nn.Module]:
    """Makes an instance of a class; its module is imported no sooner."""

    def build() -> nn.Module:
        made: nn.Module = getattr(importlib.import_module(module), name)(**keywords)
        return made

    return build


def truth() -> dict[str, dict[str, str]]:
    """What is known of some of them, by id: see the README beside this file."""
    with TRUTH.open() as stream:
        return {f"{row['library']}/{row['model']}": row for row in csv.DictReader(stream)}
