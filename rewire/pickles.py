"""What a pickle would do, read from its program without running it."""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from typing import Any, NamedTuple

from rewire.errors import BadFile

REBUILDS = "torch._utils._rebuild_"
_TYPED_REBUILD = "torch._tensor._rebuild_from_type_v2"
_LIST = object()
_PUSHED: dict[str, Any] = {
    **dict.fromkeys(("EMPTY_DICT", "EMPTY_SET", "NONE", "NEWTRUE", "NEWFALSE")),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING")),
    "EMPTY_LIST": _LIST,
    "EMPTY_TUPLE": (),
}
_POPPED = {"BUILD": 1, "APPEND": 1, "SETITEM": 2}


class Name(NamedTuple):
    """A global that a pickle refers to, under its Python 3 name."""

    module: str
    qualname: str

    def __str__(self) -> str:
        return f"{self.module}.{self.qualname}"


class Follower:
    """Follows a pickle's program without running it: which globals, which calls.

    Mirrors the stack of `torch._weights_only_unpickler` for names, tuples and empty lists;
    everything else is None. An operation that the mirror doesn't know is refused.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.names: set[Name] = set()
        self.called: set[Name] = set()
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def follow(self, program: bytes) -> None:
        """Read the program to its end; fills `names` and `called`."""
        for operation, argument, _ in pickletools.genops(program):
            name = operation.name
            if name in _PUSHED:
                self._stack.append(_PUSHED[name])
            elif name in _POPPED:
                self._pop(_POPPED[name])
            elif name.startswith("TUPLE"):
                self._make_tuple(name)
            elif (handler := getattr(self, f"_on_{name.lower()}", None)) is not None:
                handler(argument)
            elif name not in ("PROTO", "STOP"):
                raise BadFile(
                    f"{self.where}: a pickle with {name}, of another protocol than torch.save's. "
                    "Write it again with torch.save(model, path), no pickle_protocol."
                )

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise BadFile(f"{self.where}: a damaged pickle (its stack runs empty).")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _make_tuple(self, name: str) -> None:
        if name == "TUPLE":
            items, self._stack = self._stack, self._outer.pop()
        else:
            items = self._pop(int(name.removeprefix("TUPLE")))
        self._stack.append(tuple(items))

    def _on_global(self, argument: str) -> None:
        module, _, qualname = argument.partition(" ")
        if (module, qualname) in NAME_MAPPING:
            module, qualname = NAME_MAPPING[(module, qualname)]
        name = Name(IMPORT_MAPPING.get(module, module), qualname)
        self.names.add(name)
        self._stack.append(name)

    def _on_reduce(self, argument: None) -> None:
        function, args = self._pop(2)
        if not isinstance(function, Name):
            raise BadFile(f"{self.where}: calls a computed value while loading. Refused.")
        if not _is_plain_call(str(function), args):
            self.called.add(function)
        self._stack.append(None)

    def _on_mark(self, argument: None) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def _on_newobj(self, argument: None) -> None:
        self._pop(2)
        self._stack.append(None)

    def _on_appends(self, argument: None) -> None:
        self._stack = self._outer.pop()

    _on_setitems = _on_appends

    def _on_binpersid(self, argument: None) -> None:
        self._pop(1)
        self._stack.append(None)

    def _on_binget(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    _on_long_binget = _on_binget

    def _on_binput(self, argument: int) -> None:
        self._memo[argument] = self._stack[-1]

    _on_long_binput = _on_binput


def _is_plain_call(function: str, args: Any) -> bool:
    """A call whose safety depends on its arguments, with safe ones.

    Given a module, dict and set constructors would call its `keys`, and the typed rebuild
    calls its first argument.
    """
    if function == "collections.OrderedDict":
        return bool(args == ())
    if function == "builtins.set":
        return bool(args == (_LIST,) or args == ())
    if function == _TYPED_REBUILD:
        return isinstance(args, tuple) and bool(args) and str(args[0]).startswith(REBUILDS)
    return False
