"""What the modules that a branch calls hold, kept so that a rerun finds it as it was.

Parameters, buffers, training flags, and plain attributes that forward sets.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from rewire.attributes import Attributes, Place
from rewire.errors import NotRepeatable
from rewire.replay import version
from rewire.sides import Written

Flags = tuple[tuple[nn.Module, bool], ...]
Changed = list[tuple[nn.Module, str, Tensor]]


class Before(NamedTuple):
    """Buffers before a run: training flags, where, values, and version counters of all."""

    flags: tuple[bool, ...]
    places: list[Place]
    values: list[Tensor]
    versions: list[int]


class Held(NamedTuple):
    """A parameter or buffer as a run used it; `version` is -1 where it may change since."""

    registry: dict[str, Any]  # a module's parameters or buffers
    name: str
    tensor: Tensor
    version: int


class Holdings:
    """What the modules that a branch calls hold, and what is learnt of what it changes.

    Attributes:
        attributes: Plain attributes of the modules.
        written: Which side inputs the branch writes into; see `rewire.sides`.

    Buffers may change when the branch runs, e.g. BatchNorm's running mean. Which modules do
    that is learnt by comparing values around the first run with the same training flags
    (BatchNorm's kernel does not bump version counters), later also by version counters. For
    each run the values before it are kept, so that a rerun starts from them, on clones; those of
    small buffers always, for they may begin to change in any run.
    """

    def __init__(self) -> None:
        self.attributes = Attributes()
        self.written: Written = {}
        self._modules: list[nn.Module] = []
        self._read: list[Place] = []
        self._owners: list[nn.Module] = []
        self._buffers: list[Place] = []
        self._parameters: list[Place] = []
        self._generators: list[torch.Generator] = []
        self._learnt: dict[tuple[bool, ...], set[Place]] = {}

    def refresh(self, roots: Iterable[nn.Module | None], read: Iterable[Place] = ()) -> None:
        """Look at the modules again: children may have been replaced or parametrized.

        Args:
            roots: Modules that are called.
            read: Parameters, buffers and tensors that are read from modules that are not.
        """
        modules, read = _tree(roots), list(read)
        same = len(modules) == len(self._modules)
        if same and all(map(operator.is_, modules, self._modules)) and read == self._read:
            return
        self._modules, self._read = modules, read
        self._owners = [m for m in modules if m._buffers]
        self._buffers = [(m, name) for m in self._owners for name in m._buffers]
        self._parameters = [(m, name) for m in modules for name in m._parameters]
        self._parameters += [(m, name) for m, name in read if name in m._parameters]
        self._buffers += [(m, name) for m, name in read if name in m._buffers]
        values = [value for m in modules for value in m.__dict__.values()]
        self._generators = [value for value in values if isinstance(value, torch.Generator)]
        self._learnt = {}
        self.written = {}
        self.attributes.refresh(modules, [(m, name) for m, name in read if name in m.__dict__])

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The modules that the branch calls, and those below them."""
        return self._modules

    def generators(self, sides: Sequence[Any]) -> list[tuple[torch.Generator, Tensor]]:
        """The modules' own generators, and those among the side inputs, with their states."""
        given = [side for side in sides if isinstance(side, torch.Generator)]
        return [(generator, generator.get_state()) for generator in (*self._generators, *given)]

    def before(self, small: int) -> Before | None:
        """The buffers that the coming run may change, with copies of their values.

        Args:
            small: Up to this many bytes a buffer is kept though it has never changed.
        """
        if not self._buffers:
            return None
        flags = tuple(m.training for m in self._owners)
        learnt = self._learnt.get(flags)
        places = [
            place
            for place in self._buffers
            if learnt is None or place in learnt or _is_small(place, small)
        ]
        values = [_clone(m._buffers[name]) for m, name in places]
        versions = [version(m._buffers[name]) for m, name in self._buffers]
        return Before(flags, places, values, versions)

    def after(self, before: Before | None) -> Changed:
        """The buffers the run may have changed, with the values before it.

        Raises:
            NotRepeatable: One changed whose value before is not known.
        """
        if before is None:
            return []
        kept = list(zip(before.places, before.values, strict=True))
        # Fake tensors have no values; that a version counter moves is all they tell.
        fake = any(isinstance(value, FakeTensor) for value in before.values)
        first = before.flags not in self._learnt and not fake
        new: set[Place] = set()
        if first:
            busy = {m for (m, n), old in kept if not _same(m._buffers[n], old)}
        else:
            now = zip(self._buffers, before.versions, strict=True)
            new = {(m, n) for (m, n), old in now if version(m._buffers[n]) != old}
            busy = {m for m, _ in (*new, *self._learnt.get(before.flags, ()))}
        self._learnt[before.flags] = {(m, n) for m, n in self._buffers if m in busy}
        self._refuse(new.difference(before.places))
        return [(m, n, old) for (m, n), old in kept if m in busy or not first]

    @staticmethod
    def _refuse(unkept: Collection[Place]) -> None:
        for module, name in unkept:
            raise NotRepeatable(
                f"{type(module).__qualname__}: its buffer {name!r} changed for the first time in "
                "this run, and its value before was not kept: skip this step. From the next run on "
                "it is."
            )

    def flags(self) -> Flags:
        """The modules' training flags."""
        return tuple((m, m.training) for m in self._modules)

    def held(self) -> list[Held]:
        """The parameters in use, with their version counters, and the buffers."""
        places: list[tuple[dict[str, Any], str]]
        places = [(m._parameters, name) for m, name in self._parameters]
        places += [(m._buffers, name) for m, name in self._buffers]
        found = ((registry, name, registry.get(name)) for registry, name in places)
        count = len(self._parameters)
        return [
            Held(registry, name, tensor, version(tensor) if number < count else -1)
            for number, (registry, name, tensor) in enumerate(found)
            if tensor is not None
        ]


def _is_small(place: Place, limit: int) -> bool:
    """Whether a buffer may be one of statistics or a counter, which are cheap to keep."""
    module, name = place
    buffer = module._buffers[name]
    if buffer is None or buffer.nbytes > limit:
        return False
    return buffer.is_floating_point() or buffer.numel() == 1


def _tree(roots: Iterable[nn.Module | None]) -> list[nn.Module]:
    """The modules below `roots`, each once."""
    found: dict[int, nn.Module] = {}
    todo = list(roots)
    while todo:
        module = todo.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            todo.extend(module._modules.values())
    return list(found.values())


@contextmanager
def replayed_tensors(held: Sequence[Held]) -> Iterator[None]:
    """Run with the parameters and buffers of an earlier run, where others stand in their place now.

    `torch.func.functional_call` lends tensors to a module for one call, and code may set a buffer
    anew. FSDP2 swaps shards and gathered parameters itself, so those are left to it.
    """
    places = [(h, h.registry.get(h.name)) for h in held]
    lent = [(h, now) for h, now in places if now is not h.tensor and _both_plain(h, now)]
    try:
        for h, _ in lent:
            h.registry[h.name] = h.tensor
        yield
    finally:
        for h, now in lent:
            h.registry[h.name] = now


@contextmanager
def replayed_flags(flags: Flags) -> Iterator[None]:
    """Run in the training modes of an earlier run."""
    other = [module for module, training in flags if module.training != training]
    try:
        for module in other:
            module.training = not module.training
        yield
    finally:
        for module in other:
            module.training = not module.training


def changed_flag(flags: Flags) -> str | None:
    """What was switched between train and eval mode since a run: a class, and the mode it had."""
    for module, training in flags:
        if module.training != training:
            return f"{type(module).__name__} was in {'train' if training else 'eval'} mode"
    return None


def changed_parameter(held: Sequence[Held]) -> str | None:
    """Name of a parameter that was changed in place since it was used."""
    return next((h.name for h in held if h.version >= 0 and version(h.tensor) != h.version), None)


def _both_plain(held: Held, now: Tensor | None) -> bool:
    return not hasattr(held.tensor, "full_tensor") and not hasattr(now, "full_tensor")


@contextmanager
def replayed_buffers(changed: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Run on copies of the buffers' earlier values; the buffers themselves stay untouched."""
    current = [(module, name, module._buffers[name]) for module, name, _ in changed]
    try:
        for module, name, old in changed:
            module._buffers[name] = old.clone()
        yield
    finally:
        for module, name, buffer in current:
            module._buffers[name] = buffer


def _clone(buffer: Tensor | None) -> Tensor:
    return torch.empty(0) if buffer is None else buffer.detach().clone()


def _same(buffer: Tensor | None, old: Tensor) -> bool:
    if buffer is None or buffer.shape != old.shape:
        return buffer is None and old.numel() == 0
    return torch.equal(buffer.nan_to_num(), old.nan_to_num())
