"""What a branch is handed beside the stream, kept so that a rerun finds it as it was."""

from __future__ import annotations

import enum
import io
import pickle
import types
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewire.errors import NotRepeatable, RewireError
from rewire.replay import version
from rewire.structure import tensors_of

# What a copy of a mutable object shares with it.
SHARED = (
    Tensor,
    nn.Module,
    type,
    enum.Enum,
    torch.Generator,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
)
_PLAIN = (int, float, complex, str, type(None), *SHARED)
Written = dict[int, frozenset[int]]
Share = Callable[[Tensor], Tensor]


class Sides:
    """The side inputs of one run of a branch.

    A branch may write into objects that it is handed (a decoder's cache), and into tensors: those
    are cloned before it runs. Which they are is learnt from the first run, before which all are
    cloned.

    Args:
        given: The side inputs.
        written: By the number of tensors among them, which of these the branch writes into, in
            the order in which they are met; is added to.

    Raises:
        NotRepeatable: An object cannot be copied.
    """

    __slots__ = ("_clones", "_found", "_read", "_values", "_versions", "_written")

    def __init__(self, given: Sequence[Any], written: Written) -> None:
        self._found: list[Tensor] = []  # other names of the tensors, with their version counters
        plain = {id(tensor) for tensor in tensors_of(tuple(given))}
        self._read: set[int] = set()  # those that are not inside an object, which others write too

        def find(tensor: Tensor) -> Tensor:
            if id(tensor) in plain:
                self._read.add(len(self._found))
            self._found.append(detached(tensor))
            return self._found[-1]

        self._values = _copies(given, find)
        self._versions = list(map(version, self._found))
        self._written = written.get(len(self._found))
        every = range(len(self._found))
        cloned: Container[int] = every if self._written is None else self._written
        self._clones = _copies(given, _cloning(cloned)) if cloned else None

    def ran(self, name: str, written: Written) -> None:
        """Learn which tensors the run wrote into, and keep these as they were before it.

        Raises:
            NotRepeatable: It was another one this time, or two that share their memory.
        """
        pairs = zip(self._found, self._versions, strict=True)
        changed = frozenset(n for n, (t, before) in enumerate(pairs) if version(t) != before)
        known = written.get(len(self._found), frozenset())
        written[len(self._found)] = known | changed
        if self._written is not None and changed - self._written:
            raise NotRepeatable(
                f"{name}: it wrote into another tensor that it is handed than in earlier runs, and "
                "what that held before was not kept: skip this step. From the next run on it is."
            )
        if len({self._found[n].untyped_storage()._cdata for n in changed}) < len(changed):
            raise NotRepeatable(
                f"{name}: it writes into two tensors that share their memory, so it cannot be run "
                "again in backward. Clone one of them, or keep the module out with `exclude=`."
            )
        self._written = known | changed
        if self._written and self._clones is not None:
            self._values = self._clones
        self._clones = None

    def again(self) -> list[Any]:
        """The side inputs as they were, for a rerun to write into."""
        return _copies(self._values, _cloning(self._written or ()))

    def changed(self) -> bool:
        """Whether somebody has changed one of them in place since."""
        shared = self._read.difference(self._written or ())
        return any(version(self._found[n]) != self._versions[n] for n in shared)


def _cloning(numbers: Container[int]) -> Share:
    """Share tensors without their graph, but for some, which are cloned."""
    met = 0

    def share(tensor: Tensor) -> Tensor:
        nonlocal met
        met += 1
        return cloned(tensor) if met - 1 in numbers else detached(tensor)

    return share


def detached(value: Tensor) -> Tensor:
    """The same values without the graph, asking for gradients as `value` does."""
    return value.detach().requires_grad_(value.requires_grad)


def cloned(value: Tensor) -> Tensor:
    """The same in memory of its own, no leaf of the graph: it may be written into."""
    with torch.enable_grad():
        return detached(value).clone()


def structural_copy(value: Any, share: Share = detached) -> Any:
    """A copy of a mutable object that shares its tensors, modules, functions and classes.

    Pickle's protocol says what an object consists of; its persistent ids say what is shared.

    Args:
        value: The object.
        share: What stands for a tensor in the copy.

    Raises:
        NotRepeatable: The object cannot be copied.
    """
    return _copies([value], share)[0]


def _copies(values: Sequence[Any], share: Share) -> list[Any]:
    """Copies that share tensors as `share` says, each once however often it is met."""
    met: dict[int, tuple[Any, Any]] = {}  # with the originals, so that no id is used twice

    def shared(item: Any) -> Any:
        if id(item) not in met:
            met[id(item)] = item, share(item) if isinstance(item, Tensor) else item
        return met[id(item)][1]

    if all(isinstance(value, _PLAIN) for value in values):
        return list(map(shared, values))
    try:
        file = io.BytesIO()
        _Writer(file, shared).dump(list(values))
        file.seek(0)
        copies: list[Any] = _Reader(file, met).load()
    except RewireError:
        raise
    except Exception as error:
        kinds = {type(value).__qualname__ for value in values if not isinstance(value, _PLAIN)}
        raise NotRepeatable(
            f"an object of class {' or '.join(sorted(kinds))} is handed to a reversible branch and "
            f"cannot be copied for its rerun in backward ({error}). Give the class a "
            "__getstate__, or leave the module out with `exclude=`."
        ) from error
    return copies


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, shared: Callable[[Any], Any]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._shared = shared

    def persistent_id(self, item: Any) -> int | None:
        """What is shared: tensors, modules, functions, classes."""
        if not isinstance(item, SHARED):
            return None
        self._shared(item)
        return id(item)


class _Reader(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, met: dict[int, tuple[Any, Any]]) -> None:
        super().__init__(file)
        self._met = met

    def persistent_load(self, key: Any) -> Any:
        return self._met[key][1]
