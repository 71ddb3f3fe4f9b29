"""Stretches: modules outside the chains whose activations are dropped, and computed again.

The modules of a stretch run one after the other, each handed the result of the one before, by
the user's own code. What autograd saves in them is dropped; the values that the stretch began with
are kept. When backward asks for the first of what was saved, the modules run once more, from the
first up to that one, and what they save is caught and handed out. Autograd sees an ordinary graph.

A module whose input is not the very result of the one before it begins anew, from its input. So
the user's code may do between them what it likes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from rewire.errors import NotRepeatable
from rewire.holdings import Holdings
from rewire.observers import running_again, tell
from rewire.plans import Checkpointed
from rewire.replay import (
    RngStates,
    autocast_state,
    hooks_apply,
    replayed_generators,
    replayed_rng,
    rng_states,
    same_rng_states,
    transformed,
    version,
)
from rewire.sides import Sides
from rewire.steps import Complete, Key, Record
from rewire.structure import Spec, flatten, unflatten
from rewire.surroundings import Surroundings


@dataclass(eq=False)
class Stretch:
    """A stretch at run time: shared by its modules.

    Attributes:
        row: The plan's.
        stored: Run by ordinary autograd, with activations stored.
    """

    row: Checkpointed
    stored: bool = False


@dataclass(eq=False)
class Place:
    """What a module of a stretch knows: the stretch, its place, and what its modules hold."""

    stretch: Stretch
    number: int
    holdings: Holdings = field(default_factory=Holdings, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"stretch": self.stretch, "number": self.number, "holdings": Holdings()}

    @property
    def last(self) -> bool:
        """Whether no module of the stretch follows."""
        return self.number == len(self.stretch.row.modules) - 1


@dataclass(slots=True)
class _Link:
    """Hangs on the result of a module of a stretch, for the next to find."""

    ran: Ran
    place: Place
    version: int


_links: MutableMapping[Tensor, _Link] = WeakTensorKeyDictionary()


class Ran:
    """One run of a module of a stretch, with all that running it again needs; never a graph.

    Args:
        module: The module.
        place: Its place.
        forward: Its own forward.
        leaves: Those of its arguments.
        spec: Their structure.
        before: The run whose result it is handed, and which of the leaves that is.
    """

    def __init__(
        self,
        module: nn.Module,
        place: Place,
        forward: Callable[..., Any],
        leaves: Sequence[Any],
        spec: Spec,
        before: tuple[Ran, int] | None,
    ) -> None:
        self._module, self._forward, self._spec = module, forward, spec
        self._before = before
        self._name = place.stretch.row.modules[place.number]
        self._record = Record(self._name)
        device = next(leaf for leaf in leaves if isinstance(leaf, Tensor)).device.type
        self._around = Surroundings(autocast_state(device))
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._rng: RngStates | None = None
        own = [None if before and n == before[1] else leaf for n, leaf in enumerate(leaves)]
        self._sides = Sides(own, place.holdings.written)

    def first(self, holdings: Holdings, leaves: Sequence[Any], call: Callable[[], Any]) -> Any:
        """Run for the first time, dropping what autograd saves."""
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = given[0].device
        cards = [device.index] if device.type == "cuda" else []
        rng = rng_states(cards)
        self._generators = holdings.generators(leaves)
        around = self._around.noted(holdings, given[0].nbytes)
        with around, self._record.dropping(self, (0, 0)):
            result = call()
        if not same_rng_states(rng, rng_states(cards)):
            self._rng = rng
        self._sides.ran(self._name, holdings.written)
        return result

    def recall(self, key: Key, number: int) -> Tensor:
        """The tensor that a handle stands for."""
        tensor = self._record.take(number)
        if tensor is None:
            self._rerun()
            tensor = self._record.take(number)
        if tensor is None:
            raise NotRepeatable(f"{self._name}: saved tensor {number} did not come again.")
        return tensor

    def _rerun(self) -> None:
        """Run the stretch again up to here, and catch what all of its modules save."""
        runs: list[Ran] = [self]
        while before := runs[-1]._before:
            runs.append(before[0])
        result = None
        with running_again(runs[-1]._name):
            for ran in reversed(runs):
                result = ran._again(result, last=ran is self)

    def _again(self, result: Any, *, last: bool) -> Any:
        """Run the module again, in the surroundings of its first run.

        Args:
            result: Of the module before.
            last: Its own result is not needed.
        """
        if not last:
            _gather(self._module)
        self._check()
        leaves = self._sides.again()
        if self._before:
            leaves[self._before[1]] = result
        args, kwargs = unflatten(self._spec, leaves)
        record = self._record
        with ExitStack() as stack:
            stack.enter_context(self._around.replayed())
            stack.enter_context(replayed_rng(self._rng))
            stack.enter_context(replayed_generators(self._generators))
            stack.enter_context(record.catching_until_complete() if last else record.catching())
            try:
                result = self._forward(self._module, *args, **kwargs)
            except Complete:
                return None
        record.complete()
        return result

    def _check(self) -> None:
        """Raise where something that a rerun needs is no longer what it was."""
        what = self._around.changed()
        if self._sides.changed():
            what = "one of its inputs was changed in place after it ran. Clone the tensor first."
        if what is not None:
            raise NotRepeatable(
                f'{self._name}: its activations are not stored (outside="checkpoint"), and {what}'
            )


def _gather(module: nn.Module) -> None:
    """Have FSDP2 gather the parameters of a module: backward has not come to it yet."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FSDPModule):
        module.unshard()


def place_of(module: nn.Module) -> Place | None:
    """A module's place in a stretch, if it is in one."""
    found: Place | None = module.__dict__.get("_stretch")
    return found


def stretches_in(model: nn.Module) -> list[Stretch]:
    """The stretches of a model, each once."""
    places = filter(None, map(place_of, model.modules()))
    return list(dict.fromkeys(place.stretch for place in places))


def unfit(module: nn.Module) -> str:
    """Why a module cannot be in a stretch, whatever it does; empty if it can."""
    if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
        return "its code is not its class's"
    if "forward" in vars(module) or "_orig_mod" in module._modules:
        return "its forward is replaced"
    if "parametrizations" in module._modules:
        return "it is parametrized, and its class is its own"
    return ""


def recording(stretch: Stretch) -> bool:
    """Whether activations are to be dropped: as for a chain, see `rewire.running.recording`."""
    return not stretch.stored and not transformed() and hooks_apply()


def run(
    module: nn.Module,
    place: Place,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a module of a stretch, as it is where nothing is to be dropped.

    Args:
        module: The module.
        place: Its place.
        forward: Its own forward, which takes the module first.
        args: What it is called with.
        kwargs: Keyword arguments of the call.
    """
    if place.number == 0:
        tell("begins", place.stretch.row.modules[0])
    if not recording(place.stretch):
        return forward(module, *args, **kwargs)
    leaves, spec = flatten((args, kwargs))
    if not _is_plain(leaves):  # an object of somebody's own, a module, a proxy
        return forward(module, *args, **kwargs)
    before = _linked(place, leaves)
    place.holdings.refresh([module])
    ran = Ran(module, place, forward, leaves, spec, before)
    result = ran.first(place.holdings, leaves, lambda: forward(module, *args, **kwargs))
    if isinstance(result, Tensor):
        _links.pop(result, None)  # it may be the input itself
        if not place.last:
            _links[result] = _Link(ran, place, version(result))
    return result


def _is_plain(leaves: Sequence[Any]) -> bool:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = (leaf for leaf in leaves if not isinstance(leaf, Tensor))
    plain = all(isinstance(leaf, (int, float, complex)) for leaf in others)
    return plain and bool(tensors) and not any(tensor.is_inference() for tensor in tensors)


def _linked(place: Place, leaves: Sequence[Any]) -> tuple[Ran, int] | None:
    """The run of the module before, where its result is among the leaves, and which it is."""
    for number, leaf in enumerate(leaves):
        link = _links.get(leaf) if isinstance(leaf, Tensor) else None
        if link is None or link.place.stretch is not place.stretch:
            continue
        follows = link.place.number == place.number - 1
        if follows and version(leaf) == link.version:
            return link.ran, number
    return None
