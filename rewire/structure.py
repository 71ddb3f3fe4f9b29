"""Arguments and results of modules, taken apart and put together again.

`flatten` separates a nest of containers into its leaves and a hashable description of
everything else, quickly: it runs at every call of a rewired module. Tensors, numbers
and opaque objects are leaves; None, booleans, strings, dtypes, devices and enum members
belong to the description. A tensor that occurs twice is one leaf.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Spec = Hashable
_CONSTANTS = (type(None), bool, str, bytes, torch.dtype, torch.device, enum.Enum, torch.layout)


@dataclasses.dataclass(frozen=True, slots=True)
class Leaf:
    """The place of a leaf: its number and whether it is a tensor, a number or neither."""

    index: int
    kind: str


@dataclasses.dataclass(frozen=True, slots=True)
class Container:
    """A container's type with the names and descriptions of its items."""

    type: type
    names: tuple[Hashable, ...]
    items: tuple[Spec, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """The place of a list or dict of the caller's own: the keys that lead to it."""

    path: tuple[Hashable, ...]

    def of(self, source: Any) -> Any:
        """What is at that place of a nest of containers."""
        return functools.reduce(operator.getitem, self.path, source)


def given_in(value: Any, path: tuple[Hashable, ...] = ()) -> dict[int, Given]:
    """Where the lists and dicts in a nest of containers are, by the id of each."""
    kind = type(value)
    if kind not in (list, tuple, dict, OrderedDict):
        return {}
    found = {} if kind is tuple else {id(value): Given(path)}
    for key, item in enumerate(value) if kind in (list, tuple) else value.items():
        found |= given_in(item, (*path, key))
    return found


def flatten(
    value: Any, *, made: bool = False, given: Mapping[int, Given] | None = None
) -> tuple[list[Any], Spec]:
    """Leaves of `value`, in order, and the description of the rest.

    Args:
        value: What is taken apart.
        made: It was made just now, as the result of a call: a dataclass that can be changed is
            taken apart too. Of an argument somebody else may hold the very object.
        given: Containers that are the caller's own, as `given_in` has them: each stays one.
    """
    leaves: list[Any] = []
    return leaves, _Flattening(leaves, made, given or {}).spec(value)


def unflatten(spec: Spec, leaves: Sequence[Any], source: Any = None) -> Any:
    """The inverse of `flatten`: fresh containers around `leaves`, `given` ones out of `source`."""
    if isinstance(spec, Leaf):
        return leaves[spec.index]
    if isinstance(spec, Given):
        return spec.of(source)
    if not isinstance(spec, Container):
        return spec
    items = [unflatten(item, leaves, source) for item in spec.items]
    return _rebuild(spec, items)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a nest of containers, each once."""
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor)]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `function` applied to every leaf."""
    leaves, spec = flatten(value)
    return unflatten(spec, [function(leaf) for leaf in leaves])


class _Flattening:
    """One call of `flatten`."""

    __slots__ = ("_given", "_leaves", "_made", "_seen")

    def __init__(self, leaves: list[Any], made: bool, given: Mapping[int, Given]) -> None:
        self._leaves, self._made, self._given = leaves, made, given
        self._seen: dict[int, Leaf] = {}

    def spec(self, value: Any) -> Spec:
        """The description of a value, whose leaves are noted."""
        if isinstance(value, Tensor):
            leaf = self._seen.get(id(value))
            if leaf is None:
                leaf = self._seen[id(value)] = self._leaf(value, "tensor")
            return leaf
        if isinstance(value, _CONSTANTS):
            return value
        if id(value) in self._given:
            return self._given[id(value)]
        kind = type(value)
        named = isinstance(value, tuple) and hasattr(kind, "_fields")
        if kind in (tuple, list, torch.Size) or named:
            return Container(kind, (), tuple(map(self.spec, value)))
        if kind in (dict, OrderedDict) or _is_record(value, self._made):
            fields = value if kind in (dict, OrderedDict) else _fields(value)
            return Container(kind, tuple(fields), tuple(map(self.spec, fields.values())))
        return self._leaf(value, "number" if isinstance(value, (int, float)) else "object")

    def _leaf(self, value: Any, kind: str) -> Leaf:
        self._leaves.append(value)
        return Leaf(len(self._leaves) - 1, kind)


def _is_record(value: Any, made: bool) -> bool:
    """Whether `value` is a dataclass instance that its fields describe fully (ModelOutput)."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    if isinstance(value, dict) or _is_frozen(type(value)):
        return True
    return made and _is_whole(value)


def _is_whole(value: Any) -> bool:
    """Whether its class can make an instance anew from what its fields hold."""
    fields = dataclasses.fields(value)
    own = type(value).__dataclass_params__.init and not hasattr(value, "__post_init__")
    names = {field.name for field in fields if field.init}
    return own and len(names) == len(fields) and names >= {*getattr(value, "__dict__", {})}


def _is_frozen(cls: Any) -> bool:
    return bool(cls.__dataclass_params__.frozen)


def _fields(value: Any) -> dict[str, Any]:
    return {
        field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init
    }


def _rebuild(spec: Container, items: list[Any]) -> Any:
    if spec.type is list:
        return items
    if spec.type in (tuple, torch.Size):
        return spec.type(items)
    if spec.type in (dict, OrderedDict):
        return spec.type(zip(spec.names, items, strict=True))
    if spec.names:
        return spec.type(**dict(zip(map(str, spec.names), items, strict=True)))
    return spec.type(*items)
