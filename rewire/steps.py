"""What ran in a chain, step by step, with all that running it again needs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rewire.arithmetic import Coupled
from rewire.cuts import ALL, UNCUT, Cuts, Found, Place, at, joined
from rewire.errors import NotRepeatable
from rewire.holdings import Holdings
from rewire.norms import Normed
from rewire.products import Products
from rewire.replay import AutocastState, RngStates, version
from rewire.sides import Sides
from rewire.surroundings import Surroundings

# A step, and its part; None: the activation behind the step before.
Key = tuple[int, int | None]

Hooks = torch.autograd.graph.saved_tensors_hooks


class Cutting(Protocol):
    """How a branch is cut, as the runtime sees it."""

    last: Found | None

    def cuts(
        self,
        chunks: Any,
        branch: Branch,
        x: Tensor,
        sides: Sequence[Any],
        tail: Callable[[Tensor], Tensor] | None,
    ) -> Cuts:
        """The parts in which a branch is run on `x`, which `tail` has given."""


class Output(NamedTuple):
    """What a branch gives: F, T (None for an identity trunk), and other values that leave it."""

    branch: Tensor
    trunk: Tensor | None
    sideways: tuple[Any, ...]


class Branch(Protocol):
    """A residual branch as the tape sees it."""

    name: str
    holdings: Holdings

    @property
    def cutting(self) -> Cutting:
        """How it is cut."""

    @property
    def training(self) -> bool:
        """Whether its owner is in train mode."""

    def __call__(self, x: Tensor, sides: Sequence[Any]) -> Output:
        """Run on `x`, the newest stream, with the side inputs."""

    def refresh(self) -> None:
        """Have the holdings look at the modules again."""


class Recalling(Protocol):
    """A tape, as handles see it."""

    def recall(self, key: Key, number: int) -> Tensor:
        """The tensor that a handle stands for."""


class Complete(BaseException):
    """Everything that a run saved has been caught: the rest need not run again."""


class Record:
    """What autograd saved in one run of a function, by number; caught again in a rerun."""

    __slots__ = ("caught", "handed", "metas", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.metas: list[tuple[torch.Size, torch.dtype]] = []
        self.caught: dict[int, tuple[Tensor, int]] = {}  # with their version counters
        self.handed: dict[int, weakref.ref[Tensor]] = {}

    def dropping(self, tape: Recalling, key: Key, products: Products | None = None) -> Hooks:
        """Hooks that drop what is saved and leave handles.

        Args:
            tape: To which these lead.
            key: Of the part.
            products: Of its run, which are told.
        """
        metas = self.metas

        def pack(tensor: Tensor) -> tuple[Recalling, Key, int]:
            metas.append((tensor.shape, tensor.dtype))
            if products is not None:
                products.saved()
            return tape, key, len(metas) - 1

        return Hooks(pack, _unpack)

    def catching(self) -> Hooks:
        """Hooks that keep what is saved, for `take`."""
        caught, metas = self.caught, self.metas
        caught.clear()

        def pack(tensor: Tensor) -> None:
            number = len(caught)
            if number < len(metas) and (tensor.shape, tensor.dtype) != metas[number]:
                raise self._another(number, tensor)
            caught[number] = tensor.detach(), version(tensor)

        return Hooks(pack, never)

    def catching_until_complete(self) -> Hooks:
        """Hooks as of `catching`, which raise `Complete` at the last."""
        hooks = self.catching()

        def pack(tensor: Tensor) -> None:
            hooks.pack_hook(tensor)
            if len(self.caught) == len(self.metas):
                raise Complete

        return Hooks(pack, hooks.unpack_hook)

    def complete(self) -> None:
        """Raise unless the rerun saved as many tensors as the run."""
        if len(self.caught) != len(self.metas):
            raise NotRepeatable(self._changed(f"{len(self.caught)} tensors, not {len(self.metas)}"))

    def take(self, number: int) -> Tensor | None:
        """Give a caught tensor away; it lives on for as long as its taker holds it."""
        found = self.caught.pop(number, None)
        if found is None:
            handed = self.handed.get(number)
            return None if handed is None else handed()
        tensor, saved = found
        if version(tensor) != saved:
            raise NotRepeatable(
                f"{self.name}: a tensor {list(tensor.shape)} that backward needs was changed in "
                "place after autograd had saved it; the original's backward fails as well. Write "
                "the operation out of place."
            )
        self.handed[number] = weakref.ref(tensor)
        return tensor

    def _another(self, number: int, tensor: Tensor) -> NotRepeatable:
        shape, dtype = self.metas[number]
        was, now = f"{list(shape)} {dtype}", f"{list(tensor.shape)} {tensor.dtype}"
        return NotRepeatable(self._changed(f"{now} as tensor {number}, not {was}"))

    def _changed(self, what: str) -> str:
        return (
            f"{self.name}: run again in backward, it saved {what}. A branch must repeat itself: "
            "leave training flags, requires_grad and parameters alone between forward and "
            "backward, or keep the module out with `exclude=`."
        )


def _unpack(handle: tuple[Recalling, Key, int]) -> Tensor:
    tape, key, number = handle
    return tape.recall(key, number)


def never(_: None) -> Tensor:
    raise AssertionError("a rerun's graph is never run backward")


@dataclass(slots=True)
class Tail:
    """An activation on the trunk, after the sum of the step before."""

    call: Callable[[Tensor], Tensor]
    record: Record
    dtype: torch.dtype
    autocast: AutocastState
    rng: RngStates | None = None


Layout = tuple[torch.Size, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class Part:
    """What a branch ran on at once: a cut of the stream, or all of it.

    Attributes:
        place: Where in the stream; `ALL` where nothing is cut.
        record: What autograd saved.
        undo: The arithmetic of this part of the streams.
        sides: The side inputs, those cut that go along with the stream.
        products: What was kept of it, until it is needed.
    """

    place: Place
    record: Record
    undo: Coupled | Normed
    sides: Sides
    rng: RngStates | None = None
    generators: list[tuple[torch.Generator, Tensor]] = field(default_factory=list)
    products: Products | None = None


class Held(NamedTuple):
    """A stream that is kept.

    Attributes:
        stream: x_{i-1}; None where that is x_i, at the start of a chain.
        version: Its version counter.
        mark: Of x_i, where that is rebuilt: what it must be then, see `rewire.drift.mark`.
    """

    stream: Tensor | None
    version: int
    mark: Tensor | None


@dataclass(slots=True)
class Step:
    """One residual module, or normalisation on the trunk, as it ran.

    Attributes:
        undo: Its arithmetic.
        dtype: Of the branch's input (the streams are at least float32).
        relayout: Layouts of the streams before and in this step, where a view stands between.
        around: What its modules found around them.
        cuts: How the branch is run part by part.
        parts: Those that have run, in order.
        way: What backward does: "reverse", "checkpoint", ..., see `rewire.Chain`.
        held: x_{i-1} in this step's layout, where it is not to be rebuilt.
    """

    branch: Branch
    undo: Coupled | Normed
    dtype: torch.dtype
    requires_grad: bool
    tail: Tail | None
    relayout: tuple[Layout, Layout] | None
    around: Surroundings
    cuts: Cuts = UNCUT
    parts: list[Part] = field(default_factory=list)
    way: str = "reverse"
    held: Held | None = None

    def keep(self, undo: Coupled, older: Tensor) -> None:
        """Keep what the inverse of each part will need of x_{i-1}."""
        for part in self.parts:
            part.undo = undo if part.place == ALL else undo.at(part.place, older.dim())
            part.undo.keep(at(part.place, older))

    def output(self, outputs: Sequence[Output], stream: Tensor) -> Output:
        """What the branch gives, from what it gave for each part of `stream`."""
        if self.cuts is UNCUT:
            return outputs[0]
        branch = joined(self.cuts, [output.branch for output in outputs], stream)
        trunks = [output.trunk for output in outputs if output.trunk is not None]
        return Output(branch, joined(self.cuts, trunks, stream) if trunks else None, ())

    def enter(self, stream: Tensor) -> Tensor:
        """A stream as this step sees it."""
        return stream if self.relayout is None else _laid_out(stream, self.relayout[1])

    def leave(self, stream: Tensor) -> Tensor:
        """A stream as the step before sees it."""
        return stream if self.relayout is None else _laid_out(stream, self.relayout[0])


def _laid_out(stream: Tensor, layout: Layout) -> Tensor:
    return stream.as_strided(*layout, stream.storage_offset())
