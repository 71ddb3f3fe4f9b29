"""The tape of one chain's run: the last two values of the streams and what ran.

While a branch runs, saved-tensor hooks drop what autograd saves and leave a handle
(tape, record, number). When backward asks for a handle's tensor, the tape walks the two
streams back to that branch, runs it once more, catches what it saves, and hands it out.
The tape holds values only, never a graph, so nothing outlives backward.

States: after n steps the tape holds x_n (newest) and x_{n-1} (older). Step i leads from
state i to state i + 1: x_{i+1} = x_{i-1} + G_i(x_i).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rewire import drift
from rewire.coupling import Coupling
from rewire.errors import NotRepeatable, StreamMismatch
from rewire.replay import (
    AutocastState,
    Held,
    Holdings,
    RngStates,
    changed_parameter,
    replayed_autocast,
    replayed_buffers,
    replayed_generators,
    replayed_parameters,
    replayed_rng,
    rng_states,
    same_rng_states,
    structural_copy,
    uncached_autocast,
)
from rewire.structure import tensors_of

Hooks = torch.autograd.graph.saved_tensors_hooks


class Output(NamedTuple):
    """What a branch gives: F, T (None for an identity trunk), and other values that leave it."""

    branch: Tensor
    trunk: Tensor | None
    sideways: tuple[Any, ...]


class Branch(Protocol):
    """A residual branch as the tape sees it."""

    name: str
    holdings: Holdings

    def __call__(self, x: Tensor, sides: Sequence[Any]) -> Output:
        """Run on `x`, the newest stream, with the side inputs."""

    def refresh(self) -> None:
        """Have the holdings look at the modules again."""


class Record:
    """What autograd saved in one run of a function, by number; caught again in a rerun."""

    __slots__ = ("caught", "handed", "metas", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.metas: list[tuple[torch.Size, torch.dtype]] = []
        self.caught: dict[int, Tensor] = {}
        self.handed: dict[int, weakref.ref[Tensor]] = {}

    def dropping(self, tape: Tape, key: tuple[str, int]) -> Hooks:
        """Hooks that drop what is saved and leave handles."""
        metas = self.metas

        def pack(tensor: Tensor) -> tuple[Tape, tuple[str, int], int]:
            metas.append((tensor.shape, tensor.dtype))
            return tape, key, len(metas) - 1

        return Hooks(pack, _unpack)

    def catching(self) -> Hooks:
        """Hooks that keep what is saved, for `take`."""
        caught = self.caught
        caught.clear()

        def pack(tensor: Tensor) -> None:
            number = len(caught)
            self._compare(number, tensor)
            caught[number] = tensor.detach()

        return Hooks(pack, _never)

    def complete(self) -> None:
        """Raise unless the rerun saved as many tensors as the run."""
        if len(self.caught) != len(self.metas):
            raise NotRepeatable(self._changed(f"{len(self.caught)} tensors, not {len(self.metas)}"))

    def take(self, number: int) -> Tensor | None:
        """Give a caught tensor away; it lives on for as long as its taker holds it."""
        tensor = self.caught.pop(number, None)
        if tensor is not None:
            self.handed[number] = weakref.ref(tensor)
            return tensor
        handed = self.handed.get(number)
        return None if handed is None else handed()

    def _compare(self, number: int, tensor: Tensor) -> None:
        found = (tensor.shape, tensor.dtype)
        if number < len(self.metas) and found != self.metas[number]:
            shape, dtype = self.metas[number]
            was, now = f"{list(shape)} {dtype}", f"{list(tensor.shape)} {tensor.dtype}"
            raise NotRepeatable(self._changed(f"{now} as tensor {number}, not {was}"))

    def _changed(self, what: str) -> str:
        return (
            f"{self.name}: run again in backward, it saved {what}. A branch must repeat itself: "
            "leave training flags, requires_grad and parameters alone between forward and "
            "backward, or keep the module out with `exclude=`."
        )


def _unpack(handle: tuple[Tape, tuple[str, int], int]) -> Tensor:
    tape, key, number = handle
    return tape.recall(key, number)


def _never(_: None) -> Tensor:
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


@dataclass(slots=True)
class Step:
    """One residual module as it ran, with all that its rerun needs.

    Attributes:
        dtype: Of the branch's input (the streams are at least float32).
        relayout: Layouts of the streams before and in this step, where a view stands between.
    """

    branch: Branch
    record: Record
    dtype: torch.dtype
    requires_grad: bool
    tail: Tail | None
    relayout: tuple[Layout, Layout] | None
    autocast: AutocastState
    sides: list[Any] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    parameters: list[Held] = field(default_factory=list)
    rng: RngStates | None = None
    generators: list[tuple[torch.Generator, Tensor]] = field(default_factory=list)
    buffers: list[Any] = field(default_factory=list)

    def enter(self, stream: Tensor) -> Tensor:
        """A stream as this step sees it."""
        return stream if self.relayout is None else _laid_out(stream, self.relayout[1])

    def leave(self, stream: Tensor) -> Tensor:
        """A stream as the step before sees it."""
        return stream if self.relayout is None else _laid_out(stream, self.relayout[0])


class Tape:
    """One run of a chain. See the module's docstring."""

    def __init__(
        self, chain: drift.Chain, coupling: Coupling, newest: Tensor, older: Tensor
    ) -> None:
        self.chain = chain
        self.coupling = coupling
        self.newest, self.older = newest.detach(), older.detach()
        self.begins_equal = newest is older
        self.steps: list[Step] = []
        self.tails: dict[int, Tail] = {}
        self.at = 0
        self._caught: list[Record] = []
        self._made: list[tuple[str, Tensor, int]] = []  # the streams as forward left them
        self._rng: RngStates | None = None

    # ---- forward -------------------------------------------------------------------------

    def run(self, step: Step, x: Tensor, sides: Sequence[Any]) -> Output:
        """Run a branch for the first time, dropping what autograd saves."""
        step.sides = [structural_copy(side) for side in sides]
        step.versions = _versions(step.sides)
        rng = self._current_rng(x.device)
        holdings = step.branch.holdings
        step.parameters = holdings.parameters()
        step.generators = holdings.generators(sides)
        before = holdings.before()
        version = _version(x)
        with uncached_autocast(), step.record.dropping(self, ("step", len(self.steps))):
            output = step.branch(x, sides)
        step.buffers = holdings.after(before)
        if not same_rng_states(rng, self._current_rng(x.device)):
            step.rng = rng
        if _version(x) != version or _versions(step.sides) != step.versions:
            raise NotRepeatable(
                f"{step.branch.name}: it changes one of its inputs in place, so it cannot be run "
                "again in backward. Clone the tensor first, or keep the module out with "
                "`exclude=`."
            )
        return output

    def follow(self, tail: Tail, x: Tensor) -> Tensor:
        """Run an activation on the trunk, dropping what autograd saves."""
        position = len(self.steps)
        rng = self._current_rng(x.device)
        with uncached_autocast(), tail.record.dropping(self, ("tail", position)):
            result = tail.call(x)
        if not same_rng_states(rng, self._current_rng(x.device)):
            tail.rng = rng
        self.tails[position] = tail
        return result

    def commit(self, step: Step, newest: Tensor, older: Tensor) -> None:
        """Note a step that has run, and the streams after it: x_{i+1} and x_i."""
        before = f"the result of {self.steps[-1].branch.name}" if self.steps else "the input"
        after = f"the result of {step.branch.name}"
        self.steps.append(step)
        self.newest, self.older = newest.detach(), older.detach()
        self._made = [
            (f"chain {self.chain.name or '(model)'}: {name}", stream, _version(stream))
            for name, stream in ((before, self.older), (after, self.newest))
        ]
        self.at = len(self.steps)

    def _current_rng(self, device: torch.device) -> RngStates:
        """The generators' states, one object while nothing is drawn (5 KB each)."""
        states = rng_states([device.index] if device.type == "cuda" else [])
        if self._rng is None or not same_rng_states(states, self._rng):
            self._rng = states
        return self._rng

    # ---- backward ------------------------------------------------------------------------

    def recall(self, key: tuple[str, int], number: int) -> Tensor:
        """The tensor that a handle stands for."""
        kind, index = key
        record = self.steps[index].record if kind == "step" else self.tails[index].record
        tensor = record.take(number)
        if tensor is None:
            self._rerun_step(index) if kind == "step" else self._rerun_tail(index)
            tensor = record.take(number)
        if tensor is None:
            raise NotRepeatable(f"{record.name}: saved tensor {number} did not come again.")
        return tensor

    def _rerun_step(self, index: int) -> None:
        if self.at > index:
            self._move(index + 1)
            self._back(catch=True)
        else:
            self._move(index)
            step = self.steps[index]
            self._run(step, step.enter(self.newest), catch=True)

    def _rerun_tail(self, index: int) -> None:
        if self.at == index + 1:
            self._back(catch=True)  # the branch behind needs T too: one run catches both
        if self.tails[index].record.caught:
            return
        self._move(index)
        tail = self.tails[index]
        self._forget()
        x = self.newest.detach().requires_grad_().to(tail.dtype)
        with torch.enable_grad(), replayed_autocast(tail.autocast), replayed_rng(tail.rng):
            with self._catch(tail.record):
                tail.call(x)
            tail.record.complete()

    def _move(self, state: int) -> None:
        """Walk to a state without catching anything."""
        while self.at > state:
            self._back(catch=False)
        while self.at < state:
            self._forth()

    def _back(self, *, catch: bool) -> None:
        """From state i + 1 to state i."""
        step = self.steps[self.at - 1]
        newer, newest = self.newest, self.older
        output = self._run(step, newest, catch=catch)
        out = newer if _is_alone(newer) else None
        older = self.coupling.inverse(newer, newest, output.branch, output.trunk, out=out)
        self.newest, self.older = step.leave(newest), step.leave(older)
        self.at -= 1
        if self.at == 0 and self.begins_equal:
            drift.compare(self.chain, self.newest, self.older, self._coarsest())

    def _coarsest(self) -> torch.dtype:
        """The dtype of lowest precision that a branch ran in."""
        dtypes = {step.dtype for step in self.steps}
        dtypes |= {dtype for step in self.steps for _, on, dtype in step.autocast[-1:] if on}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def _forth(self) -> None:
        """From state i to state i + 1, by recomputation."""
        step = self.steps[self.at]
        newest, older = step.enter(self.newest), step.enter(self.older)
        output = self._run(step, newest, catch=False)
        following = self.coupling.forward(newest, older, output.branch, output.trunk)
        self.newest, self.older = following, newest
        self.at += 1

    def _run(self, step: Step, newest: Tensor, *, catch: bool) -> Output:
        """Run a branch again on x_i, in the surroundings of its first run.

        Always with gradients enabled: some modules compute something else without.
        """
        self._check(step)
        self._forget()
        sides = [structural_copy(side) for side in step.sides]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(replayed_autocast(step.autocast))
            stack.enter_context(replayed_rng(step.rng))
            stack.enter_context(replayed_generators(step.generators))
            stack.enter_context(replayed_buffers(step.buffers))
            stack.enter_context(replayed_parameters(step.parameters))
            x, trunk = self._input(step, newest, catch=catch)
            with self._catch(step.record) if catch else Hooks(_drop, _never):
                output = step.branch(x, sides)
            if catch:
                step.record.complete()
        trunk = trunk if output.trunk is None else output.trunk
        return Output(output.branch.detach(), None if trunk is None else trunk.detach(), ())

    def _check(self, step: Step) -> None:
        """Raise where something that a rerun needs is no longer what it was."""
        made, self._made = self._made, []
        for name, stream, version in made:
            if _version(stream) != version:
                raise StreamMismatch(
                    f"{name} was changed in place after forward; backward needs it. Clone it "
                    "before changing it."
                )
        if _versions(step.sides) != step.versions:
            raise NotRepeatable(
                f"{step.branch.name}: one of its side inputs was changed in place after forward. "
                "Clone the tensor before changing it."
            )
        parameter = changed_parameter(step.parameters)
        if parameter is not None:
            raise NotRepeatable(
                f"{step.branch.name}: its parameter {parameter!r} was changed in place after "
                "forward. Step the optimizer after backward."
            )

    def _input(self, step: Step, newest: Tensor, *, catch: bool) -> tuple[Tensor, Tensor | None]:
        """The branch's input from the stream x_i, and T(x_i) where an activation precedes."""
        x = step.leave(newest).detach().requires_grad_(step.requires_grad).to(step.dtype)
        if step.tail is None:
            return step.enter(x), None
        catch = catch and step.tail in self.tails.values()
        hooks = self._catch(step.tail.record) if catch else Hooks(_drop, _never)
        with replayed_rng(step.tail.rng), hooks:
            x = step.enter(step.tail.call(x))
        return x, x

    def _catch(self, record: Record) -> Hooks:
        """Hooks that catch for a record, which is noted to be forgotten with the others."""
        self._caught.append(record)
        return record.catching()

    def _forget(self) -> None:
        """Let go of what is caught and was not asked for: streams are about to change."""
        for record in self._caught:
            record.caught.clear()
        self._caught.clear()


def _is_alone(stream: Tensor) -> bool:
    """Whether nobody else sees a stream's storage, so that it may be written to.

    Hidden states that the user keeps, side inputs, and what double backward saves do see it.
    """
    storage = stream.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= 2


def _laid_out(stream: Tensor, layout: Layout) -> Tensor:
    return stream.as_strided(*layout, stream.storage_offset())


def _drop(_: Tensor) -> None:
    return None


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version


def _versions(sides: Sequence[Any]) -> list[int]:
    """Version counters of the tensors among the side inputs, in plain containers too."""
    found = []
    for side in sides:
        if isinstance(side, Tensor):
            found.append(_version(side))
        elif isinstance(side, (tuple, list, dict)):
            found += map(_version, tensors_of(side))
    return found
