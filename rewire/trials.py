"""One training step, run on tensors without values in several ways, to learn what each costs.

Residual modules and stretches outside of the chains are the pieces of a step. A run tells the bytes
that forward leaves in each, and the most that are alive while backward is in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rewire.estimation import step_on_fakes
from rewire.inputs import Example
from rewire.isolation import as_it_is, training_mode
from rewire.meters import LiveBytes, Operations
from rewire.observers import watching_runs
from rewire.profiling import TrainingStep, no_collection
from rewire.reversible import courses, store_activations
from rewire.running import watch_branches
from rewire.stretches import stretches_in
from rewire.tape import watch_corrections


@dataclass
class Heights:
    """Bytes of tensors in one step.

    Attributes:
        forward: By residual module, what more is alive behind its branch than before it. Other
            pieces are named in their place.
        backward: By piece, the most while backward is in it, and in what lies before it.
        end: The most before backward comes to the first of them.
    """

    forward: Counter[str] = field(default_factory=Counter)
    backward: dict[str, int] = field(default_factory=dict)
    end: int = 0

    @property
    def peak(self) -> int:
        """The most of the step."""
        return max(self.end, *self.backward.values(), 0)


@dataclass(frozen=True)
class Work:
    """Operations of one forward.

    Attributes:
        all: Of the whole.
        pieces: By piece.
        cheap: By residual module, those that are no products.
        behind: By residual module, behind the last tensor that it saves for backward.
        inner: Residual modules that run inside of a branch of another chain.
    """

    all: int
    pieces: Mapping[str, int]
    cheap: Mapping[str, int]
    behind: Mapping[str, int]
    inner: Collection[str]


@contextmanager
def on_trial(model: nn.Module, example: Example, device: torch.device) -> Iterator[Trial]:
    """A model on tensors without values, in train mode unless it is in that in part.

    Raises:
        RewireError: Its code looks at values.
    """
    advice = (
        ", and a budget is kept by estimates. Rewire it without budget=, and measure: "
        "rewire.profile(model, ...)."
    )
    mode = training_mode(model, True) if not model.training else nullcontext()
    with mode, step_on_fakes(model, example.args, example.kwargs, device, advice) as step:
        trial = Trial(step)
        trial.run()  # what is made once (tables, masks) is no cost of a step
        yield trial


@dataclass(frozen=True)
class Trial:
    """A step that can be run in several ways."""

    step: TrainingStep

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
            course.ways = tuple(ways.get(site, "reverse") for site in course.sites)
            course.chunks = chunks.get(course.name, 1)
        for stretch in stretches_in(self.step.model):
            stretch.stored = stretch.row.modules[0] in stored

    def run(self) -> Heights:
        """One step."""
        heights, meter = Heights(), LiveBytes()
        now = ""

        def leave() -> None:
            if now:
                heights.backward[now] = max(meter.peak, heights.backward.get(now, 0))
            else:
                heights.end = meter.peak
            meter.reset_peak()

        def watch(event: str, name: str) -> None:
            nonlocal now
            if event == "begins":
                heights.forward[name] -= meter.live
            elif event == "ends":
                heights.forward[name] += meter.live
            elif name != now:
                leave()
                now = name

        with no_collection(), meter, watching_runs(watch):
            loss = self.step.forward()[1]
            loss.backward()  # type: ignore[no-untyped-call]
            leave()
        return heights

    def work(self) -> Work:
        """Operations of a forward that stores everything."""
        pieces: Counter[str] = Counter()
        behind: Counter[str] = Counter()
        cheap: Counter[str] = Counter()
        counts: Counter[str] = Counter()
        inner: set[str] = set()
        stretch = ""

        def watch(event: str, name: str) -> None:
            nonlocal stretch
            if event == "begins":
                counts[name] += 1
                stretch = "" if name in sites else name
            if event == "begins" and branches:
                inner.add(name)

        def count(operations: int, product: bool) -> None:
            pieces[""] += operations
            for name in branches or ([stretch] if stretch else ()):  # an inner one is in the outer
                pieces[name] += operations
                behind[name] += operations
                cheap[name] += 0 if product else operations

        def save(tensor: Tensor) -> Tensor:
            for name in branches:
                behind[name] = 0
            return tensor.detach()

        sites = {site for course in courses(self.step.model) for site in course.sites}
        hooks = torch.autograd.graph.saved_tensors_hooks(save, as_it_is)
        with (
            store_activations(self.step.model),
            watch_branches() as branches,
            watching_runs(watch),
            hooks,
            Operations(count),
        ):
            self.step.forward()
        total = pieces.pop("")
        shorter = {name: count * counts[name] for name, count in behind.items()}
        return Work(total, dict(pieces), dict(cheap), shorter, inner)

    def streams(self) -> dict[str, int]:
        """Bytes of the stream at each residual module."""
        with watch_corrections() as kept:
            self.step.forward()
        found: Counter[str] = Counter()
        for row in kept:
            found[row.name] += row.elements * row.width
        return dict(found)
