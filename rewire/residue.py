"""What a run on fake tensors may leave behind in tables of a model, its classes and their files."""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rewire.attributes import CONTAINERS, INTERNAL
from rewire.marks import LIBRARIES, enclosed, package
from rewire.sides import SHARED

_HOLDERS = (*CONTAINERS, deque)
_MOST_ITEMS = 1000  # of a container of a class or file; larger ones are tables of another kind
_LEVELS = 4  # of containers and objects in what has come in
_LEAVES = frozenset({str, int, float, bool, type(None), type, types.ModuleType})
_LRU_CACHE = type(functools.lru_cache(lambda: None))


def remember_holders(model: nn.Module) -> Callable[[], None]:
    """Note what is in all that a model can reach; what is given back takes fake tensors out again.

    Containers and objects that modules hold, at any depth; of their classes and the files that
    define these the attributes, and containers, objects and functions among them. What is not
    looked into: other files, and tables of more than a thousand entries.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    classes = {cls for cls in classes if not _is_known(cls.__module__)}
    files = [sys.modules[name] for name in {c.__module__ for c in classes} if name in sys.modules]
    held = [v for m in model.modules() for n, v in m.__dict__.items() if n not in INTERNAL]
    shared = [value for place in (*classes, *files) for value in list(vars(place).values())]
    contents = _contents(held, most=sys.maxsize) | _contents(shared, most=_MOST_ITEMS)
    contents |= {id(vars(file)): vars(file) for file in files}
    before = [(content, content.copy()) for content in contents.values()]
    of_classes = [(cls, dict(vars(cls))) for cls in classes]

    def take_fakes_out() -> None:
        for content, then in before:
            _take_out(content, then)
        for cls, then in of_classes:
            for name in _came_in(vars(cls), then):
                setattr(cls, name, then[name]) if name in then else delattr(cls, name)

    return take_fakes_out


def _contents(roots: Iterable[Any], most: int) -> dict[int, Any]:
    """The containers, and attributes of objects and functions, that can be reached, by id."""
    found: dict[int, Any] = {}
    todo = list(roots)
    while todo:
        item = todo.pop()
        kind = type(item)
        if kind in _LEAVES:
            continue
        if kind is tuple:
            todo.extend(item)
            continue
        if kind is types.FunctionType:
            todo.extend((*(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()))
        content = item if kind in _HOLDERS else _attributes(item)
        if content is not None and id(content) not in found and len(content) <= most:
            found[id(content)] = content
            todo.extend(content.values() if isinstance(content, dict) else content)
    return found


def _attributes(item: Any) -> Any:
    """Those of an object of somebody's class, or of a function."""
    if type(item) is types.FunctionType and not _is_known(item.__module__ or ""):
        return item.__dict__
    if _is_known(type(item).__module__) or isinstance(item, SHARED):  # the latter takes longer
        return None
    inside = getattr(item, "__dict__", None)
    return inside if type(inside) is dict else None


def _is_known(module: str) -> bool:
    return package(module) in LIBRARIES


def _take_out(content: Any, then: Any) -> None:
    if isinstance(content, dict):
        for key in _came_in(content, then):
            if key in then:
                content[key] = then[key]
            else:
                del content[key]
        return
    known = {id(item) for item in then}
    if any(id(item) not in known and _has_fake(item, _LEVELS) for item in content):
        content.clear()
        content.update(then) if isinstance(content, set) else content.extend(then)


def _came_in(now: Any, then: dict[Any, Any]) -> list[Any]:
    """Keys of what is new, and holds a fake tensor."""
    new = ((key, value) for key, value in now.items() if then.get(key, then) is not value)
    return [key for key, value in new if _has_fake(value, _LEVELS)]


def _has_fake(value: Any, levels: int) -> bool:
    if type(value) is FakeTensor:
        return True
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple, set, deque)):
        inside = value
    elif not isinstance(value, SHARED):
        inside = getattr(value, "__dict__", {}).values()
    return levels > 0 and any(_has_fake(item, levels - 1) for item in inside)


# ---- caches of functions -----------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _caches_of(wanted: str, loaded: int) -> tuple[functools._lru_cache_wrapper[Any], ...]:
    """The caches that the modules of a package have at their top, with so many modules loaded."""
    sources = [m for name, m in list(sys.modules.items()) if package(name) == wanted]
    return tuple(cache for source in sources for cache in _caches_in(source))


def _caches_in(holder: Any) -> Iterator[functools._lru_cache_wrapper[Any]]:
    """The caches among the attributes of a module or class, also behind a decorator of its own."""
    for value in list(vars(holder).values()):
        if type(value) in (staticmethod, classmethod):
            value = value.__func__
        inside = enclosed(value) if type(value) is types.FunctionType else ()
        for item in (value, *inside):
            if type(item) is _LRU_CACHE:
                yield item


def lru_caches(model: nn.Module) -> list[functools._lru_cache_wrapper[Any]]:
    """The `functools.lru_cache`s in modules of the packages that define the model's classes."""
    packages = {package(type(module).__module__) for module in model.modules()}
    packages -= {"torch", "builtins"}
    found = {id(c): c for name in packages for c in _caches_of(name, len(sys.modules))}
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        found |= {id(cache): cache for cache in _caches_in(cls)}
    return list(found.values())
