"""The tape of one chain's run: the last two values of the streams and what ran.

While a branch runs, saved-tensor hooks drop what autograd saves and leave a handle
(tape, part, number). When backward asks for a handle's tensor, the tape walks the two
streams back to that branch, runs it once more, catches what it saves, and hands it out.
The tape holds values only, never a graph, so nothing outlives backward.

States: the tape holds the newest stream and the one before it. A residual module leads from
(x_i, x_{i-1}) to (x_{i+1}, x_i), a normalisation on the trunk from (z, y) to (T(z), y).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewire import drift
from rewire.arithmetic import Coupled
from rewire.cuts import ALL, UNCUT, Place, add_up_in_place, at, dense, view_at
from rewire.errors import NotRepeatable, StreamMismatch
from rewire.holdings import changed_flag
from rewire.norms import Normed
from rewire.observers import observing, running_again
from rewire.products import Products
from rewire.replay import (
    RngStates,
    replayed_autocast,
    replayed_generators,
    replayed_rng,
    rng_states,
    same_rng_states,
    uncached_autocast,
    version,
)
from rewire.sides import Sides
from rewire.steps import Complete, Held, Hooks, Key, Output, Part, Record, Step, Tail, never


class Kept(NamedTuple):
    """What a step keeps so that its inverse is exact."""

    name: str
    elements: int  # of the stream; 0 for a normalisation, which belongs to its module
    width: int  # bytes of one
    nbytes: int


_listeners: list[list[tuple[str, bool]]] = []
_keepers: list[list[Kept]] = []


def watch_corrections() -> AbstractContextManager[list[Kept]]:
    """Collect what each step keeps for its inverse."""
    return observing(_keepers)


def watch_repeats() -> AbstractContextManager[list[tuple[str, bool]]]:
    """Run each branch a second time at once; collect its name and whether it gave the same bits."""
    return observing(_listeners)


class Tape:
    """One run of a chain. See the module's docstring."""

    def __init__(self, chain: drift.Chain, newest: Tensor, older: Tensor) -> None:
        self.chain = chain
        self.newest, self.older = newest.detach(), older.detach()
        self.begins_equal = newest is older
        self.steps: list[Step] = []
        self.tails: dict[int, Tail] = {}
        self.at = 0
        self._caught: list[Record] = []
        self._made: list[tuple[str, Tensor, int]] = []  # the streams as forward left them
        self._rng: RngStates | None = None
        self._undone: set[int] = set()  # parts of step `at` - 1 that are rebuilt already
        self._outputs: list[Tensor] = []  # of the last branch, while somebody watches repeats

    # ---- forward -------------------------------------------------------------------------

    def run(self, step: Step, x: Tensor, sides: Sequence[Any]) -> Output:
        """Run a branch for the first time, part by part, dropping what autograd saves."""
        before = version(x)
        selects = step.way == "select"  # by a mode, which compiled code would pass by
        with step.around.noted(step.branch.holdings, x.nbytes, plain=selects):
            outputs = [self._first(step, place, x, sides) for place in step.cuts.places]
        if version(x) != before:
            raise written_input(step.branch.name)
        if _listeners:
            self._outputs = [output.branch.detach().clone() for output in outputs]
        return step.output(outputs, x)

    def _first(self, step: Step, place: Place, x: Tensor, sides: Sequence[Any]) -> Output:
        """Run a branch for the first time on one part of its input."""
        holdings, name = step.branch.holdings, step.branch.name
        given = step.cuts.sides_at(place, sides)
        part = Part(place, Record(name), step.undo, Sides(given, holdings.written))
        step.parts.append(part)
        rng = self._current_rng(x.device)
        part.generators = holdings.generators(sides)
        key = len(self.steps), len(step.parts) - 1
        products = Products() if step.way == "select" else None
        dropping = part.record.dropping(self, key, products)
        stored = step.way == "store"
        with (
            nullcontext() if stored else dropping,
            nullcontext() if products is None else products.kept(),
        ):
            # The cut is made here: backward runs through the last cut first, and adds its
            # gradient to what is there before it begins with the next.
            stream = at(place, x)
            output = step.branch(stream, given)
        if products is not None:
            products.settle()
            part.products = products
        if place != ALL:
            add_up_in_place(output.branch, (stream, *given))
        if not same_rng_states(rng, self._current_rng(x.device)):
            part.rng = rng
        part.sides.ran(name, holdings.written)
        return output

    def follow(self, tail: Tail, x: Tensor) -> Tensor:
        """Run an activation on the trunk, dropping what autograd saves."""
        position = len(self.steps)
        rng = self._current_rng(x.device)
        with uncached_autocast(), tail.record.dropping(self, (position, None)):
            result = tail.call(x)
        if not same_rng_states(rng, self._current_rng(x.device)):
            tail.rng = rng
        self.tails[position] = tail
        return result

    def hold(self, step: Step, newest: Tensor, older: Tensor, *, marked: bool) -> None:
        """Keep x_{i-1}, so that it need not be rebuilt.

        Args:
            step: That leads from (x_i, x_{i-1}).
            newest: x_i.
            older: x_{i-1}.
            marked: x_i will be rebuilt: it is to be known again.
        """
        marked = marked and self.chain.check != "off"
        begins = self.begins_equal and not self.steps
        stream = None if begins else older.detach()
        step.held = Held(stream, version(stream), drift.mark(newest) if marked else None)

    def commit(self, step: Step, newest: Tensor, older: Tensor) -> None:
        """Note a step that has run, and the streams after it."""
        before = f"the result of {self.steps[-1].branch.name}" if self.steps else "the input"
        after = f"the result of {step.branch.name}"
        self.steps.append(step)
        self.newest, self.older = newest.detach(), older.detach()
        self._made = [
            (f"chain {self.chain.name or '(model)'}: {name}", stream, version(stream))
            for name, stream in ((before, self.older), (after, self.newest))
        ]
        self.at = len(self.steps)
        if _listeners:
            self._repeat(step)
        for keeper in _keepers:
            elements = 0 if isinstance(step.undo, Normed) else newest.numel()
            nbytes = sum(part.undo.nbytes for part in step.parts)
            keeper.append(Kept(step.branch.name, elements, newest.element_size(), nbytes))

    def _repeat(self, step: Step) -> None:
        """Run a step's branch again at once, and tell whether it gave the same bits."""
        made, outputs = self._made, self._outputs
        normed = step.undo if isinstance(step.undo, Normed) else None
        stream = self.older if normed is None else normed.inverse(self.newest)
        for part, first in zip(step.parts, outputs, strict=True):
            again = self._run(step, part, stream, catch=False).branch
            same = torch.equal(first.nan_to_num(), again.nan_to_num())
            for listener in _listeners:
                listener.append((step.branch.name, same))
        self._made, self._outputs = made, []

    def _current_rng(self, device: torch.device) -> RngStates:
        """The generators' states, one object while nothing is drawn (5 KB each)."""
        states = rng_states([device.index] if device.type == "cuda" else [])
        if self._rng is None or not same_rng_states(states, self._rng):
            self._rng = states
        return self._rng

    # ---- backward ------------------------------------------------------------------------

    def recall(self, key: Key, number: int) -> Tensor:
        """The tensor that a handle stands for."""
        index, part = key
        record = self.tails[index].record if part is None else self.steps[index].parts[part].record
        tensor = record.take(number)
        if tensor is None:
            self._rerun_tail(index) if part is None else self._rerun_part(index, part)
            tensor = record.take(number)
        if tensor is None:
            raise NotRepeatable(f"{record.name}: saved tensor {number} did not come again.")
        return tensor

    def _rerun_part(self, index: int, number: int) -> None:
        step = self.steps[index]
        part = step.parts[number]
        if self.at <= index or step.held is not None:
            self._move(index)
            self._catch_again(step, part, step.enter(self.newest))
            return
        if self.at > index + 1:
            self._move(index + 1)
        if number in self._undone:
            self._catch_again(step, part, self.older)
        else:
            self._undo(step, number, catch=True)

    def _rerun_tail(self, index: int) -> None:
        step = self.steps[index] if self.at == index + 1 else None
        if step is not None and step.cuts is UNCUT and step.held is None and step.way != "store":
            self._undo(step, 0, catch=True)  # it needs T too: one run catches both
        if self.tails[index].record.caught:
            return
        self._move(index)
        tail = self.tails[index]
        self._forget()
        with torch.enable_grad(), replayed_autocast(tail.autocast), replayed_rng(tail.rng):
            x = self.newest.detach().requires_grad_().to(tail.dtype)
            with self._catch(tail.record):
                tail.call(x)
            tail.record.complete()

    def _move(self, state: int) -> None:
        """Walk to a state without catching anything."""
        if self._undone:
            self._back()
        while self.at > state:
            self._back()
        while self.at < state:
            self._forth()

    def _back(self) -> None:
        """From state i + 1, or from wherever between them the tape stands, to state i."""
        step = self.steps[self.at - 1]
        if step.held is not None:
            self._take(step, step.held)
            return
        for number in reversed(range(len(step.parts))):
            if number not in self._undone:
                self._undo(step, number, catch=False)

    def _take(self, step: Step, held: Held) -> None:
        """To state i, where x_{i-1} was kept; once, so that it is free when backward is past it."""
        if version(held.stream) != held.version:
            raise _changed_stream(f"the input of {step.branch.name}")
        step.held = None
        older = self.older if held.stream is None else held.stream
        self.newest, self.older = step.leave(self.older), step.leave(older)
        self.at -= 1

    def _undo(self, step: Step, number: int, *, catch: bool) -> None:
        """Rebuild one part of the stream before a step; the last one leads to state i."""
        part = step.parts[number]
        if isinstance(part.undo, Normed):
            newest, older = part.undo.inverse(self.newest), self.older
            if catch:
                self._run(step, part, newest, catch=True)
        else:
            newest, older = self.older, self._uncoupled(step, part, part.undo, catch=catch)
            self._undone.add(number)
            if len(self._undone) < len(step.parts):
                return
            self._undone.clear()
        self.newest, self.older = step.leave(newest), step.leave(older)
        self.at -= 1
        self._compare(exact=step.undo.grid is not None)

    def _compare(self, *, exact: bool) -> None:
        """Compare what was rebuilt with what is known of it: where the chain begins, both streams
        are the same; where streams were kept, the next one has its mark.
        """
        if self.at == 0 and self.begins_equal:
            drift.compare(self.chain, self.newest, self.older, self._coarsest(), exact=exact)
        held = self.steps[self.at - 1].held if self.at else None
        if held is not None and held.mark is not None:
            now = drift.mark(self.older)
            drift.compare(self.chain, now, held.mark, self._coarsest(), exact=exact)

    def _uncoupled(self, step: Step, part: Part, undo: Coupled, *, catch: bool) -> Tensor:
        """x_{i-1}, or x_{i+1} in which one more part is that of x_{i-1}."""
        output = self._run(step, part, self.older, catch=catch)
        with running_again(step.branch.name):
            return self._inverse(step, part, undo, output)

    def _inverse(self, step: Step, part: Part, undo: Coupled, output: Output) -> Tensor:
        """The same, given what the branch gives."""
        whole, own = part.place == ALL, bool(self._undone) or _is_alone(self.newest)
        if not (whole or own):
            self.newest, own = self.newest.clone(), True
        here = view_at(part.place, self.newest)
        newer, newest = dense(here), at(part.place, self.older)
        if undo.kept is not None:  # no inverse tells whether the branch repeated itself
            again = undo.forward(newest, undo.kept, output.branch, output.trunk)
            drift.compare(self.chain, newer, again, self._coarsest(), exact=True)
        older = undo.inverse(
            newer,
            newest,
            output.branch,
            output.trunk,
            own_newer=own,
            own_branch=_is_alone(output.branch) and _is_plain(output.branch),
        )
        if whole:
            return older
        if older is not here:
            here.copy_(older)
        return self.newest

    def _coarsest(self) -> torch.dtype:
        """The dtype of lowest precision that a branch ran in."""
        dtypes = {step.dtype for step in self.steps}
        dtypes |= {dtype for step in self.steps for _, on, dtype in step.around.autocast[-1:] if on}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def _forth(self) -> None:
        """From state i to state i + 1, by recomputation."""
        step = self.steps[self.at]
        newest, older = step.enter(self.newest), step.enter(self.older)
        outputs = [self._run(step, part, newest, catch=False) for part in step.parts]
        output = step.output(outputs, newest)
        if isinstance(step.undo, Normed):
            self.newest, self.older = step.undo.forward(output.branch, newest), older
        else:
            following = step.undo.forward(newest, older, output.branch, output.trunk)
            self.newest, self.older = following, newest
        self.at += 1

    def _run(self, step: Step, part: Part, newest: Tensor, *, catch: bool) -> Output:
        """Run a branch again on its part of x_i, in the surroundings of its first run."""
        with self._again(step, part) as sides:
            x, trunk = self._input(step, part, newest, catch=catch)
            with self._catch(part.record) if catch else Hooks(_drop, never):
                output = step.branch(x, sides)
            if catch:
                part.record.complete()
        trunk = trunk if output.trunk is None else output.trunk
        return Output(output.branch.detach(), None if trunk is None else trunk.detach(), ())

    def _catch_again(self, step: Step, part: Part, newest: Tensor) -> None:
        """The same for what it saves alone: as far as the last of that."""
        with self._again(step, part) as sides:
            x, _ = self._input(step, part, newest, catch=True)
            given = nullcontext() if part.products is None else part.products.given()
            with suppress(Complete), self._catch(part.record, stop=True), given:
                step.branch(x, sides)
            part.record.complete()
        part.products = None  # what was caught lives as long as it is needed

    @contextmanager
    def _again(self, step: Step, part: Part) -> Iterator[list[Any]]:
        """The surroundings of a branch's first run on a part, and its side inputs."""
        self._check(step, part)
        self._forget()
        draws = replayed_rng(part.rng), replayed_generators(part.generators)
        with running_again(step.branch.name):
            sides = part.sides.again()
            with step.around.replayed(), draws[0], draws[1]:
                yield sides

    def _check(self, step: Step, part: Part) -> None:
        """Raise where something that a rerun needs is no longer what it was."""
        made, self._made = self._made, []
        for name, stream, made_at in made:
            if version(stream) != made_at:
                raise _changed_stream(name)
        if part.sides.changed():
            raise NotRepeatable(
                f"{step.branch.name}: one of its side inputs was changed in place after forward. "
                "Clone the tensor before changing it."
            )
        changed = step.around.changed()
        if changed is not None:
            raise NotRepeatable(f"{step.branch.name}: {changed}")
        flag = changed_flag(step.around.flags)
        if flag is not None:
            self.chain.report(
                f"{step.branch.name}: {flag} in forward and is not now. Backward ran it again as "
                "in forward; call train() and eval() after backward."
            )

    def _input(
        self, step: Step, part: Part, newest: Tensor, *, catch: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The branch's input from the stream x_i, and T(x_i) where an activation precedes."""
        if step.tail is None:
            x = at(part.place, newest).detach().requires_grad_(step.requires_grad)
            return x.to(step.dtype), None
        whole = part.place == ALL
        x = step.leave(newest) if whole else at(part.place, newest)
        x = x.detach().requires_grad_(step.requires_grad).to(step.dtype)
        catch = catch and whole and step.tail in self.tails.values()
        hooks = self._catch(step.tail.record) if catch else Hooks(_drop, never)
        with replayed_rng(step.tail.rng), hooks:
            x = step.tail.call(x)
        x = step.enter(x) if whole else x
        return x, x

    def _catch(self, record: Record, *, stop: bool = False) -> Hooks:
        """Hooks that catch for a record, which is noted to be forgotten with the others."""
        self._caught.append(record)
        return record.catching_until_complete() if stop else record.catching()

    def _forget(self) -> None:
        """Let go of what is caught and was not asked for: streams are about to change."""
        for record in self._caught:
            record.caught.clear()
        self._caught.clear()


def written_input(name: str) -> NotRepeatable:
    """The error for a branch that writes to the stream."""
    return NotRepeatable(
        f"{name}: it changes its input in place, so it cannot be run again in backward. Clone the "
        "tensor first, or keep the module out with `exclude=`."
    )


def _changed_stream(name: str) -> StreamMismatch:
    return StreamMismatch(
        f"{name} was changed in place after forward; backward needs it. Clone it before changing "
        "it."
    )


def _is_alone(stream: Tensor) -> bool:
    """Whether nobody else sees a stream's storage, so that it may be written to.

    Hidden states that the user keeps, side inputs, and what double backward saves do see it.
    """
    storage = stream.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) <= 2


def _is_plain(branch: Tensor) -> bool:
    """Whether every element of a branch has memory of its own (an expanded one has not)."""
    spread = all(step or size < 2 for size, step in zip(branch.shape, branch.stride(), strict=True))
    return spread and branch.nbytes <= branch.untyped_storage().nbytes()


def _drop(_: Tensor) -> None:
    return None
