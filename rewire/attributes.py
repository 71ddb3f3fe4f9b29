"""Plain attributes of modules: which of them a branch sets, and how they were before it ran.

Recurrent states, counters, the last attention map: what a module keeps from call to call without
telling torch. Parameters, buffers, children and hooks are none of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from rewire.errors import NotRepeatable
from rewire.replay import version
from rewire.sides import cloned, detached

Place = tuple[nn.Module, str]
Flags = tuple[bool, ...]
_ABSENT = object()
CONTAINERS = (list, dict, OrderedDict, set)
INTERNAL = frozenset(nn.Module().__dict__)  # a module's registries and flags


class Setting(NamedTuple):
    """An attribute before a run.

    Attributes:
        place: Its module and name.
        value: What it was.
        content: Of a list, dict or set a copy; of a tensor a clone, or None.
        version: Of a tensor, its version counter.
    """

    place: Place
    value: Any
    content: Any
    version: int


class Kept(NamedTuple):
    """An attribute as a rerun is to find it.

    Attributes:
        place: Its module and name.
        value: A tensor without its graph, a copy of a container, or anything else as it was.
        version: Of a tensor that is shared with the module, what its counter was; else -1.
    """

    place: Place
    value: Any
    version: int


class Attributes:
    """The plain attributes of the modules that a branch calls, and those that it reads itself.

    Which of them a run sets is learnt from the first run with the same training flags.
    """

    def __init__(self) -> None:
        self._modules: Sequence[nn.Module] = ()
        self._read: Sequence[Place] = ()
        self._learnt: dict[Flags, dict[Place, bool]] = {}  # whether a tensor is written in place

    def refresh(self, modules: Sequence[nn.Module], read: Sequence[Place]) -> None:
        """Begin anew, with other modules."""
        self._modules, self._read, self._learnt = modules, read, {}

    def before(self, flags: Flags) -> list[Setting]:
        """The attributes that the coming run may set, as they are."""
        learnt = self._learnt.get(flags)
        if learnt is None:
            names = [(m, n) for m in self._modules for n in m.__dict__ if n not in INTERNAL]
            return [_setting(place, clone=True) for place in dict.fromkeys((*names, *self._read))]
        return [_setting(place, clone=written) for place, written in learnt.items()]

    def after(self, flags: Flags, before: Sequence[Setting]) -> list[Kept]:
        """The attributes that the run has set, or read itself, as they were.

        Raises:
            NotRepeatable: A tensor was written into whose value before is not known.
        """
        if flags not in self._learnt:
            before = [*before, *self._new(before)]
            set_ = [s for s in before if _is_set(s) or s.place in self._read]
            self._learnt[flags] = {s.place: s.version < 0 or _is_written(s) for s in set_}
        learnt = self._learnt[flags]
        kept = [setting for setting in before if setting.place in learnt]
        for setting in kept:
            if not learnt[setting.place] and _is_written(setting):
                learnt[setting.place] = True
                raise _unkept(*setting.place)
        return [_kept(setting, written=learnt[setting.place]) for setting in kept]

    def _new(self, before: Sequence[Setting]) -> Iterator[Setting]:
        """Attributes that were not there before."""
        known = {setting.place for setting in before}
        for module in self._modules:
            for name in module.__dict__:
                if name not in INTERNAL and (module, name) not in known:
                    yield Setting((module, name), _ABSENT, None, -1)


def _setting(place: Place, *, clone: bool) -> Setting:
    value = _now(place)
    if isinstance(value, Tensor):
        content = cloned(value) if clone else None
        return Setting(place, value, content, version(value))
    return Setting(place, value, value.copy() if type(value) in CONTAINERS else None, -1)


def _now(place: Place) -> Any:
    module, name = place
    return module.__dict__.get(name, _ABSENT)


def _is_set(setting: Setting) -> bool:
    return _now(setting.place) is not setting.value or _is_written(setting)


def _is_written(setting: Setting) -> bool:
    value = setting.value
    if isinstance(value, Tensor):
        return version(value) != setting.version
    return type(value) in CONTAINERS and not same_content(value, setting.content)


def same_content(value: Any, content: Any) -> bool:
    """Whether a container still holds the very same objects in the same order."""
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        pairs = zip(value.items(), content.items(), strict=True)
        return all(a is c and b is d for (a, b), (c, d) in pairs)
    return all(a is b for a, b in zip(value, content, strict=True))


def _unkept(module: nn.Module, name: str) -> NotRepeatable:
    return NotRepeatable(
        f"{type(module).__qualname__}: its attribute {name!r} was written into for the first time "
        "in this run, and what it held before was not kept: skip this step. From the next run on "
        "it is."
    )


def _kept(setting: Setting, *, written: bool) -> Kept:
    if isinstance(setting.value, Tensor) and not written:
        return Kept(setting.place, detached(setting.value), setting.version)
    value = setting.value if setting.content is None else setting.content
    return Kept(setting.place, _copied(value), -1)


def _copied(value: Any) -> Any:
    """A copy of a tensor or container, with tensors in it without their graph."""
    if isinstance(value, Tensor):
        return cloned(value)
    if type(value) is list:
        return list(map(_leaf, value))
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _leaf(item)) for key, item in value.items())
    return value.copy() if type(value) is set else value


def _leaf(item: Any) -> Any:
    return detached(item) if isinstance(item, Tensor) else item


@contextmanager
def replayed_attributes(kept: Sequence[Kept]) -> Iterator[None]:
    """Run with attributes as they were before an earlier run; afterwards as if nothing had run."""
    current = [(k.place, _now(k.place)) for k in kept]
    try:
        for place, value, shared in kept:
            _set(place, value if shared >= 0 else _copied(value))
        yield
    finally:
        for place, value in current:
            _set(place, value)


@contextmanager
def restored_attributes(modules: Iterable[nn.Module]) -> Iterator[list[str]]:
    """Put back what a run sets of the modules' attributes; gives their names, once it has ended."""
    changed: list[str] = []
    places = [(m, n) for m in modules for n in m.__dict__ if n not in INTERNAL]
    before = [_setting(place, clone=False) for place in places]
    names = [(m, set(m.__dict__)) for m in {id(m): m for m, _ in places}.values()]
    try:
        yield changed
    finally:
        for setting in before:
            if _is_set(setting):
                changed.append(setting.place[1])
                _put_back(setting)
        for module, known in names:
            for name in set(module.__dict__) - known:
                changed.append(name)
                del module.__dict__[name]


def _put_back(setting: Setting) -> None:
    value, content = setting.value, setting.content
    if type(value) is list:
        value[:] = content
    elif content is not None and type(value) in CONTAINERS:
        value.clear()
        value.update(content)
    _set(setting.place, value)


def _set(place: Place, value: Any) -> None:
    module, name = place
    if value is _ABSENT:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


def changed_attribute(kept: Iterable[Kept]) -> str | None:
    """Name of a tensor that was changed in place since a run read it."""
    stale = (k.place[1] for k in kept if k.version >= 0 and version(k.value) != k.version)
    return next(stale, None)
