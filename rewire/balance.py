"""Where the memory of a training step goes, original and rewired side by side."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from rewire.accounting import Optimizer, optimizer_named
from rewire.conversion import Request, opened, planned
from rewire.errors import RewireError
from rewire.estimation import estimate
from rewire.inputs import Example, example_for, mapped
from rewire.making import make_reversible
from rewire.plans import Plan
from rewire.profiling import Profile, profile
from rewire.report import TOTAL, progress
from rewire.sizes import human_bytes

_SHOWN = 6  # parts of the model outside the chains
_DEPTH = 2  # names of parts are cut to: `layers.0`


class Row(NamedTuple):
    """A line of the table; None: it does not apply.

    Attributes:
        group: Under which heading it stands.
        name: What it is.
        original: Bytes, or seconds in the group "time".
        rewired: The same.
    """

    group: str
    name: str
    original: float | None
    rewired: float | None


@dataclass(frozen=True)
class Balance:
    """Profiles of a model and of its rewired twin.

    Attributes:
        source: Where the model came from.
        inputs: What it was called with, in words.
        how: Whether the numbers are measured or estimated, where, and why.
        optimizer: Whose state is counted.
        plan: What is rewired.
        original: Of the model as it is.
        rewired: Of the rewired one; None where there is nothing to rewire.
    """

    source: str
    inputs: str
    how: str
    optimizer: str
    plan: Plan
    original: Profile
    rewired: Profile | None

    @property
    def title(self) -> str:
        """What was profiled, and how, in a line."""
        return f"One training step of {self.source}, {self.inputs}: {self.how}"

    def rows(self) -> Iterator[Row]:
        """The lines of the table."""
        for name, field in _STANDING.items():
            yield self._row("standing", name.format(optimizer=self.optimizer), field)
        yield self._row("together", "one step, at its peak", "peak_bytes")
        yield self._row("together", TOTAL, "total_bytes")
        pair = self._pair(self._in_chains)
        yield Row("saved", f"chains ({len(self.plan.modules)} residual modules)", *pair)
        yield from self._outside()
        yield self._row("saved", "the output", "output_bytes")
        if not self.original.estimated:
            yield self._row("time", "seconds a step", "step_seconds")

    def _row(self, group: str, name: str, field: str) -> Row:
        return Row(group, name, *self._pair(lambda one: getattr(one, field)))

    def _pair(self, of: Callable[[Profile], float]) -> tuple[float, float | None]:
        return of(self.original), None if self.rewired is None else of(self.rewired)

    def _outside(self) -> Iterator[Row]:
        """What is saved outside the chains: the largest parts, and the rest of them."""
        parts = [self._parts(one) for one in (self.original, self.rewired) if one is not None]
        largest = Counter[str]()
        for part in parts:
            largest |= part
        shown = [name for name, _ in largest.most_common(_SHOWN)]
        for name in shown:
            yield Row("saved", f"outside: {name}", *_two(part[name] for part in parts))
        more = len(largest) - len(shown)
        if more > 0:
            rest = (sum(part.values()) - sum(part[name] for name in shown) for part in parts)
            yield Row("saved", f"outside: {more} more", *_two(rest))

    def _parts(self, one: Profile) -> Counter[str]:
        """Bytes by part of the model; without those of the chains."""
        counted = Counter[str]()
        for name, size in one.outside:
            if not self._is_inside(name):
                counted[".".join(name.split(".")[:_DEPTH]) or "(model)"] += size
        return counted

    def _in_chains(self, one: Profile) -> int:
        """What the chains hold, or would hold if they were none."""
        return one.chain_bytes + sum(size for name, size in one.outside if self._is_inside(name))

    def _is_inside(self, name: str) -> bool:
        """Whether the rewired model saves nothing of what a module of the original does."""
        if self.rewired is None or name in dict(self.rewired.outside):
            return False
        return any(name == place or name.startswith(f"{place}.") for place in self._places())

    def _places(self) -> set[str]:
        """Modules that are in chains: homes; of one that is the whole model its branches."""
        homes = {module.home for module in self.plan.modules} - {""}
        return homes | {name for m in self.plan.modules if not m.home for name in m.branch}

    def traces(self) -> dict[str, tuple[int, ...]]:
        """Bytes alive after each operation of the step, by name."""
        pair = {"original": self.original, "rewired": self.rewired}
        return {name: one.trace for name, one in pair.items() if one is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        rewired = None if self.rewired is None else self.rewired.to_dict()
        said = {"source": self.source, "inputs": self.inputs, "how": self.how}
        return {**said, "original": self.original.to_dict(), "rewired": rewired}


_STANDING = {
    "parameters": "parameter_bytes",
    "buffers": "buffer_bytes",
    "gradients": "gradient_bytes",
    "optimizer ({optimizer})": "optimizer_bytes",
    "the input": "input_bytes",
}


def _two(values: Iterator[int]) -> tuple[int, int | None]:
    first, *rest = values
    return first, rest[0] if rest else None


# ---- making one --------------------------------------------------------------------------


def balance(
    model: str, request: Request, device: str, optimizer: str, *, estimated: bool = False
) -> Balance:
    """Open a model, rewire it, and profile a training step of both.

    Measured where there is the device, and memory for it; else estimated.

    Args:
        model: As on the command line.
        request: How to open and rewire it.
        device: "cpu" or "cuda".
        optimizer: A class of `torch.optim`, in any case, or "none".
        estimated: Do not measure.
    """
    maker = optimizer_named(optimizer)
    source = opened(model, request)
    example = example_for(source.module, request.shape)
    plan = planned(source, request, example)
    models = [source.module.train()]
    if plan.chains:
        models.append(make_reversible(source.module, plan=plan).train())
    with progress("Estimating"):
        profiles, why = _estimated(models, example, device, maker)
    reason = "" if estimated else _reason(device, profiles, why)
    if why and (estimated or reason):
        raise why
    if not (estimated or reason):
        profiles = _measured(models, example, device, maker)
    how = f"estimated for {device}{reason}" if estimated or reason else f"measured on {device}"
    name = getattr(maker, "__name__", "none")
    pair = profiles[0], profiles[1] if plan.chains else None
    return Balance(source.description, example.description, how, name, plan, *pair)


def _estimated(
    models: list[nn.Module], example: Example, device: str, optimizer: Optimizer | None
) -> tuple[list[Profile], RewireError | None]:
    """The estimates, or why there are none."""

    def one(model: nn.Module) -> Profile:
        how: dict[str, Any] = {"device": device, "optimizer": optimizer}
        return estimate(model, *example.args, **how, **example.kwargs)

    try:
        return [one(model) for model in models], None
    except RewireError as error:
        return [], error


def _reason(device: str, estimates: list[Profile], why: RewireError | None) -> str:
    """Why nothing can be measured, in words to stand in brackets; empty where it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return " (no GPU is here)"
    free, needed = _free_bytes(device), max((one.total_bytes for one in estimates), default=0)
    if why is None and free is not None and needed > free:
        return f" (measuring takes {human_bytes(needed)}, {human_bytes(free)} are free)"
    return ""


def _free_bytes(device: str) -> int | None:
    """Memory that is free on a device; None where nobody says."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _measured(
    models: list[nn.Module], example: Example, device: str, optimizer: Optimizer | None
) -> list[Profile]:
    there = mapped(example, lambda tensor: tensor.to(device))
    profiles = []
    for name, model in zip(("the original", "the rewired model"), models, strict=False):
        with progress(f"Measuring {name}"):
            try:
                moved = model.to(device)
                profiles.append(profile(moved, *there.args, optimizer=optimizer, **there.kwargs))
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise RewireError(
                    f"{name} does not fit on {device}: --estimate says what it takes."
                ) from error
    return profiles
