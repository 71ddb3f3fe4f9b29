"""What surrounds a branch when it runs, kept so that a rerun finds the same.

Random generators, autocast, buffers the branch changes, and mutable objects handed to it.
"""

from __future__ import annotations

import enum
import io
import operator
import pickle
import types
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewire.errors import NotRepeatable

AutocastState = tuple[tuple[str, bool, torch.dtype], ...]
RngStates = dict[int, Tensor]  # by CUDA device; -1 is the CPU


# ---- random generators -------------------------------------------------------------------


def rng_states(devices: Iterable[int] = ()) -> RngStates:
    """States of the CPU generator and of the given CUDA devices' generators."""
    states: RngStates = {-1: torch.get_rng_state()}
    states.update((index, torch.cuda.get_rng_state(index)) for index in devices)
    return states


def all_rng_states() -> RngStates:
    """States of the CPU generator and, where CUDA is up, of every CUDA device's."""
    up = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return rng_states(range(torch.cuda.device_count() if up else 0))


def set_rng_states(states: RngStates) -> None:
    """The inverse of `rng_states`."""
    for index, state in states.items():
        torch.set_rng_state(state) if index < 0 else torch.cuda.set_rng_state(state, index)


def same_rng_states(a: RngStates, b: RngStates) -> bool:
    """Whether nothing was drawn between two snapshots."""
    return a.keys() == b.keys() and all(torch.equal(a[index], b[index]) for index in a)


@contextmanager
def replayed_rng(states: RngStates | None) -> Iterator[None]:
    """Run with the generators at `states`; afterwards they are as if nothing had run."""
    if states is None:
        yield
        return
    current = rng_states(index for index in states if index >= 0)
    set_rng_states(states)
    try:
        yield
    finally:
        set_rng_states(current)


# ---- autocast ----------------------------------------------------------------------------


def autocast_state(device_type: str) -> AutocastState:
    """Autocast's settings for the CPU and for `device_type`."""
    types_ = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
    return tuple(
        (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in types_
    )


@contextmanager
def replayed_autocast(state: AutocastState) -> Iterator[None]:
    """Re-enter autocast as it was: the engine runs backward with it off."""
    if state == autocast_state(state[-1][0]):
        with uncached_autocast():
            yield
        return
    with ExitStack() as stack:
        for name, enabled, dtype in state:
            stack.enter_context(torch.autocast(name, dtype, enabled, cache_enabled=False))
        yield


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Autocast's weight cache off: it keeps a cast copy of every weight until the context ends."""
    if not torch.is_autocast_cache_enabled():
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


# ---- buffers -----------------------------------------------------------------------------


Place = tuple[nn.Module, str]
Flags = tuple[tuple[nn.Module, bool], ...]
Changed = list[tuple[nn.Module, str, Tensor]]


class Before(NamedTuple):
    """Buffers before a run: training flags, where, values, and version counters of all."""

    flags: tuple[bool, ...]
    places: list[Place]
    values: list[Tensor]
    versions: list[int]


class Held(NamedTuple):
    """A parameter as a run used it."""

    module: nn.Module
    name: str
    parameter: Tensor
    version: int


class Holdings:
    """The parameters and buffers of the modules that a branch calls.

    Buffers may change when the branch runs, e.g. BatchNorm's running mean. Which modules do
    that is learnt by comparing values around the first run with the same training flags
    (BatchNorm's kernel does not bump version counters), later also by version counters. For
    each run the values before it are kept, so that a rerun starts from them, on clones; those of
    small buffers always, for they may begin to change in any run.
    """

    def __init__(self) -> None:
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
            read: Parameters and buffers that are read from modules that are not.
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
        first = before.flags not in self._learnt
        new: set[Place] = set()
        if first:
            busy = {m for (m, n), old in kept if not _same(m._buffers[n], old)}
        else:
            now = zip(self._buffers, before.versions, strict=True)
            new = {(m, n) for (m, n), old in now if version(m._buffers[n]) != old}
            busy = {m for m, _ in (*new, *self._learnt[before.flags])}
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

    def parameters(self) -> list[Held]:
        """The parameters in use, with their version counters."""
        held = ((m, name, m._parameters.get(name)) for m, name in self._parameters)
        return [Held(m, name, p, version(p)) for m, name, p in held if p is not None]


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
def replayed_generators(states: Sequence[tuple[torch.Generator, Tensor]]) -> Iterator[None]:
    """Run with a branch's own generators as they were; afterwards as if nothing had run."""
    current = [(generator, generator.get_state()) for generator, _ in states]
    try:
        for generator, state in states:
            generator.set_state(state)
        yield
    finally:
        for generator, state in current:
            generator.set_state(state)


@contextmanager
def replayed_parameters(held: Sequence[Held]) -> Iterator[None]:
    """Run with the parameters of an earlier run, where others stand in their place now.

    `torch.func.functional_call` lends tensors to a module for one call. FSDP2 swaps shards and
    gathered parameters itself, so those are left to it.
    """
    places = [(h, h.module._parameters.get(h.name)) for h in held]
    lent = [(h, now) for h, now in places if now is not h.parameter and _both_plain(h, now)]
    try:
        for h, _ in lent:
            h.module._parameters[h.name] = h.parameter  # type: ignore[assignment]
        yield
    finally:
        for h, now in lent:
            h.module._parameters[h.name] = now


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
    return next((h.name for h in held if version(h.parameter) != h.version), None)


def _both_plain(held: Held, now: Tensor | None) -> bool:
    return not hasattr(held.parameter, "full_tensor") and not hasattr(now, "full_tensor")


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


def version(tensor: Tensor | None) -> int:
    """The version counter; -1 for None and for inference tensors, which have none."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _same(buffer: Tensor | None, old: Tensor) -> bool:
    if buffer is None or buffer.shape != old.shape:
        return buffer is None and old.numel() == 0
    return torch.equal(buffer.nan_to_num(), old.nan_to_num())


# ---- mutable objects ---------------------------------------------------------------------

_SHARED = (
    Tensor,
    nn.Module,
    type,
    enum.Enum,
    torch.Generator,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
)
_NUMBERS = (int, float, complex)


def detached(value: Tensor) -> Tensor:
    """The same values without the graph, asking for gradients as `value` did."""
    return value.detach().requires_grad_(value.requires_grad)


def structural_copy(value: Any, *, attached: bool = False) -> Any:
    """A copy of a mutable object that shares its tensors, modules, functions and classes.

    A decoder's cache is written by the branch; a rerun must find it as it was before,
    and must not write the user's. Pickle's protocol says what an object consists of; its
    persistent ids say what is shared. Tensors are shared without their graph, unless `attached`.

    Raises:
        NotRepeatable: The object cannot be copied.
    """
    if isinstance(value, Tensor):
        return value if attached else detached(value)
    if isinstance(value, _NUMBERS + _SHARED):
        return value
    try:
        return _copied(value, attached)
    except Exception as error:
        raise NotRepeatable(
            f"an object of class {type(value).__qualname__} is handed to a reversible branch and "
            f"cannot be copied for its rerun in backward ({error}). Give the class a "
            "__getstate__, or leave the module out with `exclude=`."
        ) from error


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: dict[int, Any], attached: bool) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._shared = shared
        self._attached = attached

    def persistent_id(self, item: Any) -> int | None:
        """What is shared: tensors, modules, functions, classes."""
        if not isinstance(item, _SHARED):
            return None
        if id(item) not in self._shared:
            if isinstance(item, Tensor) and not self._attached:
                self._shared[id(item)] = detached(item)
            else:
                self._shared[id(item)] = item
        return id(item)


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, shared: dict[int, Any]) -> None:
        super().__init__(file)
        self._shared = shared

    def persistent_load(self, key: Any) -> Any:
        return self._shared[key]


def _copied(value: Any, attached: bool) -> Any:
    file, shared = io.BytesIO(), dict[int, Any]()
    _Writer(file, shared, attached).dump(value)
    file.seek(0)
    return _Reader(file, shared).load()
