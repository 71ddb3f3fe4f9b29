"""One training step, run on tensors without values in several ways, to learn what each costs.

Residual modules and stretches outside of the chains are the pieces of a step. A run tells the bytes
that forward leaves in each, and the most that are alive while backward is in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewire.errors import RewireError
from rewire.estimation import as_on_cuda, on_fakes
from rewire.inputs import Example
from rewire.isolation import NEEDS_VALUES, training_mode
from rewire.links import Course
from rewire.meters import LiveBytes, Operations
from rewire.observers import watching_runs
from rewire.profiling import TrainingStep, no_collection
from rewire.reversible import courses, store_activations
from rewire.running import watch_branches
from rewire.stretches import Stretch, place_of
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
    operations = as_on_cuda() if device.type == "cuda" else nullcontext()
    mode = training_mode(model, True) if not model.training else nullcontext()
    fakes = on_fakes(model, example.args, example.kwargs)
    with mode, fakes as (twin, args, kwargs), operations:
        trial = Trial(TrainingStep(twin, args, kwargs))
        try:
            with trial.step.zero_gradients():
                yield trial
        except NEEDS_VALUES as error:
            raise RewireError(
                f"{type(model).__name__}: its code looks at the values of tensors ({error}), which "
                "an estimate has not, and a budget is kept by estimates. Rewire it without "
                "budget=, and measure: rewire.profile(model, ...)."
            ) from error


@dataclass(frozen=True)
class Trial:
    """A step that can be run in several ways."""

    step: TrainingStep

    @property
    def courses(self) -> list[Course]:
        """The chains, each once."""
        return list({id(course): course for course in courses(self.step.model)}.values())

    def choose(
        self, ways: Mapping[str, str], chunks: Mapping[str, int], stored: Collection[str] = ()
    ) -> None:
        """Have the next runs go otherwise.

        Args:
            ways: For each residual module what backward does; those left out are reversed.
            chunks: For each chain into how many parts its branches are cut.
            stored: Names of the first modules of stretches whose activations are stored.
        """
        for course in self.courses:
            course.ways = tuple(ways.get(site, "reverse") for site in course.sites)
            course.chunks = chunks.get(course.name, 1)
        for stretch in self._stretches():
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

        sites = {site for course in self.courses for site in course.sites}
        hooks = torch.autograd.graph.saved_tensors_hooks(save, _same)
        with (
            store_activations(self.step.model),
            watch_branches() as branches,
            watching_runs(watch),
            hooks,
            Operations(count),
        ):
            self.step.forward()
        total = pieces.pop("")
        many: defaultdict[str, int] = defaultdict(lambda: 1, counts)
        shorter = {name: count * many[name] for name, count in behind.items()}
        return Work(total, dict(pieces), dict(cheap), shorter, inner)

    def streams(self) -> dict[str, int]:
        """Bytes of the stream at each residual module."""
        widths = {site: _width(course) for course in self.courses for site in course.sites}
        with watch_corrections() as kept:
            self.step.forward()
        found: Counter[str] = Counter()
        for row in kept:
            found[row.name] += row.elements * widths.get(row.name, 0)
        return dict(found)

    def _stretches(self) -> list[Stretch]:
        places = filter(None, map(place_of, self.step.model.modules()))
        return list({id(place.stretch): place.stretch for place in places}.values())


def _width(course: Course) -> int:
    """Bytes of an element of a chain's streams, in a model of float32 or less."""
    return course.stream_dtype(torch.float32).itemsize


def _same(value: Any) -> Any:
    return value
