"""One training step, run on tensors without values in several ways, to learn what each costs.

Residual modules and stretches outside of the chains are the pieces of a step. A run tells the bytes
that forward leaves in each, the most that are alive while backward is in it, and what runs again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from rewire.costs import Call, Calls
from rewire.estimation import step_on_fakes
from rewire.inputs import Example
from rewire.isolation import training_mode
from rewire.meters import LiveBytes
from rewire.observers import watching_runs
from rewire.profiling import TrainingStep, no_collection
from rewire.reversible import courses
from rewire.stretches import stretches_in
from rewire.tape import watch_corrections


@dataclass
class Heights:
    """Bytes of tensors in one step, and what it ran.

    Attributes:
        forward: By residual module, what more is alive behind its branch than before it. Other
            pieces are named in their place.
        backward: By piece, the most while backward is in it, and in what lies before it.
        end: The most before backward comes to the first of them.
        again: By piece, the operations that backward runs to have its activations again, where
            they were counted.
        all: Operations of the step, these too.
        inner: Residual modules that run inside of a branch of another chain.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: dict[str, int] = field(default_factory=dict)
    end: int = 0
    again: dict[str, Counter[Call]] = field(default_factory=lambda: defaultdict(Counter))
    all: Counter[Call] = field(default_factory=Counter)
    inner: set[str] = field(default_factory=set)

    @property
    def peak(self) -> int:
        """The most of the step."""
        return max(self.end, *self.backward.values(), 0)


@contextmanager
def on_trial(
    model: nn.Module, example: Example, device: torch.device, modules: Iterable[str] = ()
) -> Iterator[Trial]:
    """A model on tensors without values, in train mode unless it is in that in part.

    Args:
        model: The model.
        example: What it is called with.
        device: That it is to run on.
        modules: Names of residual modules that may be run in several ways.

    Raises:
        RewireError: Its code looks at values.
    """
    advice = (
        ", and a budget is kept by estimates. Rewire it without budget=, and measure: "
        "rewire.profile(model, ...)."
    )
    mode = training_mode(model, True) if not model.training else nullcontext()
    on_fakes = step_on_fakes(model, example.args, example.kwargs, device, advice)
    with mode, on_fakes as step, no_collection():
        trial = Trial(step, frozenset(modules))
        trial.inner = frozenset(trial.run().inner)  # what is made once is no cost of a later step
        yield trial


@dataclass
class Trial:
    """A step that can be run in several ways.

    Attributes:
        step: The step.
        modules: Residual modules that may be run in several ways; those of somebody else's chains
            stay as they are.
        inner: Residual modules that run inside of a branch of another chain.
    """

    step: TrainingStep
    modules: frozenset[str]
    inner: frozenset[str] = frozenset()

    def choose(
        self, ways: Mapping[str, str], chunks: Mapping[str, int], stored: Collection[str] = ()
    ) -> None:
        """Have the next runs go otherwise.

        Args:
            ways: For each residual module what backward does; those left out are reversed.
            chunks: For each chain into how many parts its branches are cut.
            stored: Names of the first modules of stretches whose activations are stored.
        """
        for course in courses(self.step.model):
            if not self.modules.issuperset(course.sites):
                continue
            course.ways = tuple(ways.get(site, "reverse") for site in course.sites)
            course.chunks = chunks.get(course.name, 1)
        for stretch in stretches_in(self.step.model):
            stretch.stored = stretch.row.modules[0] in stored

    def run(self, *, counted: bool = False) -> Heights:
        """One step.

        Args:
            counted: Its operations are counted, too.
        """
        watch = _Watch(self.modules, self.stretches)
        calls = Calls(watch.count) if counted else nullcontext()
        with calls, watch.meter, watching_runs(watch):
            loss = self.step.forward()[1]
            loss.backward()  # type: ignore[no-untyped-call]
            watch.leave()
        return watch.heights

    @cached_property
    def stretches(self) -> frozenset[str]:
        """The first modules of the stretches outside of the chains."""
        return frozenset(found.row.modules[0] for found in stretches_in(self.step.model))

    def streams(self) -> dict[str, int]:
        """Bytes of the stream at each residual module."""
        with watch_corrections() as kept:
            self.step.forward()
        found: Counter[str] = Counter()
        for row in kept:
            found[row.name] += row.elements * row.width
        return dict(found)


class _Watch:
    """Looks at one step as it runs.

    Args:
        modules: Names of the pieces that are residual modules.
        stretches: Names of the others.
    """

    def __init__(self, modules: Collection[str], stretches: Collection[str]) -> None:
        self.heights, self.meter = Heights(), LiveBytes()
        self._modules, self._stretches = modules, stretches
        self._now = ""  # the piece that backward has come to
        self._forth: list[str] = []  # residual modules that forward is in
        self._back: list[str] = []  # pieces that backward runs again

    def __call__(self, event: str, name: str) -> None:
        """What happens to a piece, see `rewire.observers`."""
        if name not in self._modules and name not in self._stretches:
            return
        if event in ("begins", "ends"):
            self._forward(event, name)
        elif event == "done":
            self._back.pop()
        else:
            self._back.append(name)
            if name != self._now:
                self.leave()
                self._now = name

    def _forward(self, event: str, name: str) -> None:
        self.heights.forward[name] += self.meter.live * (1 if event == "ends" else -1)
        if self._back or name in self._stretches:  # a rerun stops anywhere
            return
        if event == "ends":
            self._forth.pop()
            return
        if self._forth:
            self.heights.inner.add(name)
        self._forth.append(name)

    def leave(self) -> None:
        """Backward leaves a piece, or the step ends."""
        heights = self.heights
        if self._now:
            before = heights.backward.get(self._now, 0)
            heights.backward[self._now] = max(self.meter.peak, before)
        else:
            heights.end = self.meter.peak
        self.meter.reset_peak()

    def count(self, call: Call) -> None:
        """An operation runs."""
        self.heights.all[call] += 1
        for name in set(self._back):
            self.heights.again[name][call] += 1
