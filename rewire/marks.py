"""What the code of a home sees of its modules: where that changes, it has to be traced again."""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

# Packages whose objects and tables are no user's: code that reads them does not depend on them.
LIBRARIES = sys.stdlib_module_names | {"torch", "numpy"}

# Compared by value, and by type: 1 is not True.
_PLAIN: tuple[type, ...] = (bool, int, float, complex, str, bytes, type(None), range, slice)
_PLAIN += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, enum.Enum)
_CODE = (types.BuiltinFunctionType, types.ModuleType, type)
_FUNCTIONS: tuple[type, ...] = (types.FunctionType, types.MethodType, property)
_FUNCTIONS += (classmethod, staticmethod, functools.partial, functools.partialmethod)
_KNOWN = LIBRARIES - {"argparse", "builtins", "collections", "types"}
_LEVELS = 4  # of containers and objects in each other
_MOST_ITEMS = 1000  # of a container; of larger ones the length counts


def package(module: str) -> str:
    """The package of a module, by their names."""
    return module.partition(".")[0]


class _Same:
    """Equal to nothing but the same object, which it keeps alive: no other gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def child_of(home: nn.Module, name: str) -> nn.Module | None:
    """A module below a home (`get_submodule` takes five times as long)."""
    module: nn.Module | None = home
    for part in name.split(".") if name else ():
        module = None if module is None else module._modules.get(part)
    return module


def marks_of(
    home: nn.Module, reads: Iterable[tuple[str | nn.Module, str]], constants: Sequence[Any]
) -> list[Any]:
    """What code would see now of what it read.

    Args:
        home: The module.
        reads: Names of modules below it, or modules elsewhere, with names of their attributes.
        constants: Objects that are part of the code: another one is another code.
    """
    known = {id(value): number for number, value in enumerate(constants)}
    found = ((child_of(home, at) if isinstance(at, str) else at, name) for at, name in reads)
    return [None if module is None else _mark(module, name, known) for module, name in found]


def class_mark(module: nn.Module | None) -> Any:
    """Whose code a module runs."""
    return None if module is None else (type(module), "forward" in module.__dict__)


def function_marks(functions: Iterable[Any]) -> list[Any]:
    """What functions read besides their arguments: of their files, and of functions around them."""
    return [_seen(function, {}, _LEVELS) for function in functions]


def _callable_mark(value: Any, known: dict[int, int], levels: int) -> Any:
    """A function, however it is wrapped, and what it carries with it."""
    if isinstance(value, types.FunctionType):
        return _function_mark(value, known, levels)
    if not levels:
        return _Same(value)
    if isinstance(value, property):
        parts: tuple[Any, ...] = value.fget, value.fset
    elif isinstance(value, (functools.partial, functools.partialmethod)):
        parts = value.func, value.args, value.keywords
    else:
        own = getattr(value, "__self__", None)
        parts = () if isinstance(own, nn.Module) else (own,)
        return _Same(own), [_seen(part, known, levels - 1) for part in (value.__func__, *parts)]
    return type(value), [_seen(part, known, levels - 1) for part in parts]


def _function_mark(function: types.FunctionType, known: dict[int, int], levels: int) -> Any:
    """A function, with what it reads of its file and of the functions around it."""
    if not levels or package(function.__module__ or "") in _KNOWN:
        return _Same(function)
    file = function.__globals__
    names = _names_read(function.__code__)
    found = [file[name] for name in names if name in file]
    found += enclosed(function)
    read = [function.__defaults__, function.__kwdefaults__]
    for value in found:
        read += _read_of(value, names) if isinstance(value, (type, types.ModuleType)) else [value]
    return _Same(function), [_seen(value, known, levels - 1) for value in read]


def enclosed(function: types.FunctionType) -> list[Any]:
    """The values that a function holds of the functions around it."""
    found = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it is empty
            found.append(cell.cell_contents)
    return found


def _read_of(holder: Any, names: Sequence[str]) -> list[Any]:
    """What code with such names may read of a file, of a class or, by `super()`, of its bases."""
    holders = holder.__mro__ if isinstance(holder, type) else (holder,)
    own = [h for h in holders if package(getattr(h, "__module__", h.__name__)) not in _KNOWN]
    return [holder, *(vars(h)[name] for h in own for name in names if name in vars(h))]


@functools.lru_cache(maxsize=4096)
def _names_read(code: types.CodeType) -> tuple[str, ...]:
    """Names that code, and code inside it, may look up in its file."""
    inside = (part for part in code.co_consts if isinstance(part, types.CodeType))
    found = dict.fromkeys((*code.co_names, *(n for part in inside for n in _names_read(part))))
    return tuple(found)


def _mark(module: nn.Module, name: str, known: dict[int, int]) -> Any:
    """What code sees of an attribute, parameter, buffer or child; registries are read by name."""
    own = module.__dict__
    if name == "_modules":
        return [(child, class_mark(module)) for child, module in own[name].items()]
    if name in ("_parameters", "_buffers"):
        return [(key, tensor is None) for key, tensor in own[name].items()]
    if name in own:
        return _seen(own[name], known, _LEVELS)
    if name in module._modules:
        return class_mark(module._modules[name])
    for registry in (module._parameters, module._buffers):
        if name in registry:
            return registry[name] is None
    return _seen(inspect.getattr_static(type(module), name, "absent"), known, _LEVELS)


def _seen(value: Any, known: dict[int, int], levels: int) -> Any:
    """What plain code may see of a value: numbers and the like at any depth, functions, lengths."""
    kind = type(value)
    if isinstance(value, _PLAIN):
        return kind, value
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, _FUNCTIONS):
        return _callable_mark(value, known, levels)
    if isinstance(value, (*_CODE, nn.Module)) or package(kind.__module__) in _KNOWN:
        return _Same(value)
    if isinstance(value, dict):
        return kind, _entries(value, known, levels)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        if not levels or len(value) > _MOST_ITEMS:
            return kind, len(value)
        return kind, [_seen(item, known, levels - 1) for item in value]
    return _object_mark(value, known, levels)


def _object_mark(value: Any, known: dict[int, int], levels: int) -> Any:
    """An object by what it holds, or by itself where that cannot be looked into."""
    inside = _attributes(value)
    if inside is None:
        return _Same(value)
    return type(value), known.get(id(value)), _entries(inside, known, levels)


def _attributes(value: Any) -> dict[str, Any] | None:
    """An object's own attributes, in its dict or its slots; None where it has neither."""
    inside = getattr(value, "__dict__", None)
    found = dict(inside) if type(inside) is dict else {}
    slots = [vars(cls).get("__slots__", ()) for cls in type(value).__mro__]
    if type(inside) is not dict and not any(slots):
        return None
    for name in (n for own in slots for n in ([own] if isinstance(own, str) else own)):
        with suppress(AttributeError):  # it is not set
            found[name] = getattr(value, name)
    return found


def _entries(value: dict[Any, Any], known: dict[int, int], levels: int) -> Any:
    if not levels or len(value) > _MOST_ITEMS:
        return len(value)
    return [(key, _seen(item, known, levels - 1)) for key, item in value.items()]
