"""One dimension of a branch's input, followed through every operation that the branch runs.

A branch may be cut along a dimension where what it gives at one index depends on nothing at
another. That is read off the operations: each either keeps the indices apart (a product of
matrices its rows, a softmax all dimensions but its own) or mixes them, and an operation that is
not known is taken to mix them. Views may split the dimension; where it is split inside, as into
windows, it can be cut between windows only. All runs are on fake tensors: nothing is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from rewire.mixing import UNIFORM, Call, Coarser, Label, Labels, Mixed, name_of, rule_for

_METADATA = {torch.ops.prim.device.default}  # asked of fake tensors when code reads `x.device`


class Seen(NamedTuple):
    """An operation of a run: its name, the shapes it gave, the numbers it was given."""

    name: str
    shapes: list[torch.Size]
    numbers: list[Any]


# Numbers that say how large something is: what comes of them is seen in the shapes.
_SIZES = frozenset(
    """size shape sizes split_size split_sizes sym_size start end length chunks sections
    output_size N HxW normalized_shape stride memory_format""".split()
)


def _numbers(given: dict[str, Any]) -> list[Any]:
    """The numbers among arguments that something is computed with."""
    values = [value for name, value in given.items() if name not in _SIZES]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, (int, float, complex))]


# Which of them run depends on how tensors lie in memory, which may differ on a part.
_LAYOUT = frozenset("view _unsafe_view clone reshape _reshape_alias contiguous".split())


class Shapes(TorchDispatchMode):
    """The names of the operations that run inside, with the shapes that they give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note it."""
        result = func(*args, **(kwargs or {}))
        if func in _METADATA or name_of(func) in _LAYOUT:
            return result
        shapes = [r.shape for r in tree_leaves(result) if isinstance(r, Tensor)]
        self.seen.append(Seen(name_of(func), shapes, _numbers(_bound(func, args, kwargs or {}))))
        return result


class Following(TorchDispatchMode):
    """Follow indices through the operations that run inside.

    Args:
        length: How many indices there are.
        shorter: How many there were in the run that `seen` is of.
        seen: The operations of a run on fewer indices; None where there is none yet, to learn
            only into which blocks views split the dimension.
    """

    def __init__(self, length: int, shorter: int, seen: Sequence[Seen] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self._shorter, self._seen = shorter, None if seen is None else iter(seen)
        self._labels: Any = WeakTensorKeyDictionary()
        self._own: set[int] = set()
        self._failure: Mixed | Coarser | None = None

    def mark(self, tensor: Tensor, label: Label) -> None:
        """Begin to follow."""
        self._labels[tensor] = label

    def label(self, tensor: Any) -> Label | None:
        """Where the indices are in a tensor; None: nowhere."""
        found: Label | None = self._labels.get(tensor) if isinstance(tensor, Tensor) else None
        return found

    def finish(self) -> None:
        """Raise what was met on the way.

        Raises:
            Mixed: An operation mixes the indices.
            Coarser: One splits them.
        """
        if self._failure is not None:
            raise self._failure

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and say where the indices are in what it gives."""
        if self._failure is not None or func in _METADATA:
            return func(*args, **(kwargs or {}))
        try:
            return self._followed(func, args, kwargs or {})
        except (Mixed, Coarser) as failure:  # kernels in C++ do not let every exception through
            self._failure = failure
            return func(*args, **(kwargs or {}))

    def _followed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        given = _bound(func, args, kwargs)
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        storages = {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided}
        result = func(*args, **kwargs)
        made = [r for r in tree_leaves(result) if isinstance(r, Tensor)]
        self._own |= {t.untyped_storage()._cdata for t in made} - storages
        call = Call(name_of(func), given, self.label, result, self.length)
        shapes = self._other_shapes(call, made)
        uniform = call.name in UNIFORM
        if any(map(self.label, tensors)) and not (uniform and "expand" not in call.name):
            labels = _labels_of(rule_for(func)(call), result)
        else:
            labels = tuple(_uniform(call, r, s, self) for r, s in zip(made, shapes, strict=True))
        self._refuse_changes(func, call)
        if torch.Tag.nondeterministic_seeded in func.tags and None in labels:
            raise Mixed(f"{call.name} draws what all parts share")
        for tensor, label, shape in zip(made, labels, shapes, strict=True):
            self._compare(call, tensor, label, shape)
            if label is not None:
                self._labels[tensor] = label
        return result

    def _other_shapes(self, call: Call, made: Sequence[Tensor]) -> list[torch.Size]:
        """The shapes in the run on a part, which is the same but for sizes."""
        if self._seen is None or call.name in _LAYOUT:
            return [tensor.shape for tensor in made]
        other = next(self._seen, Seen("nothing", [], []))
        if other.name != call.name or len(other.shapes) != len(made):
            raise Mixed(f"its code runs {other.name} on a part where it runs {call.name}")
        if other.numbers != _numbers(call.given):
            raise Mixed(f"{call.name} is handed another number on a part: it counts")
        return other.shapes

    def _compare(self, call: Call, tensor: Tensor, label: Label | None, shape: torch.Size) -> None:
        """The shapes of both runs say the same as the rules."""
        if self._seen is None or call.name in _LAYOUT:
            return
        expected = list(tensor.shape)
        if label is not None:
            expected[label.dim] = label.outer * self._shorter * label.inner
        if list(shape) != expected:
            raise Mixed(f"{call.name} gives {list(tensor.shape)}, and {list(shape)} of a part")

    def _refuse_changes(self, func: Any, call: Call) -> None:
        """What is changed in place has to be the branch's own."""
        for argument in func._schema.arguments:
            changed = call.given.get(argument.name)
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tree_leaves(changed):
                if isinstance(tensor, Tensor) and (
                    tensor.untyped_storage()._cdata not in self._own
                ):
                    raise Mixed(f"{call.name} changes a tensor that is not the branch's own")


def _labels_of(found: Labels, result: Any) -> tuple[Label | None, ...]:
    """The labels of the tensors in a result."""
    if isinstance(result, Tensor):
        return (found,) if found is None or isinstance(found, Label) else found
    labels: Any = found or (None,) * len(result)
    pairs = zip(labels, result, strict=True)
    return tuple(label for label, one in pairs if isinstance(one, Tensor))


def _uniform(call: Call, made: Tensor, shape: torch.Size, run: Following) -> Label | None:
    """Of a tensor that hangs on nothing followed but, perhaps, on how many indices there are."""
    other = [dim for dim, (a, b) in enumerate(zip(made.shape, shape, strict=True)) if a != b]
    if not other:
        return None
    if len(other) > 1 or call.name not in UNIFORM:
        raise call.mixed("counts")
    return Label(other[0], 1, made.shape[other[0]] // run.length)


def _bound(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, with the defaults."""
    schema = func._schema.arguments
    given = {a.name: a.default_value for a in schema if a.has_default_value()}
    given |= {a.name: value for a, value in zip(schema, args, strict=False)}
    return given | kwargs
