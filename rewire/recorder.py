"""Building the dataflow graph of a run while the model runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rewire.dataflow import ADDITIONS, Call, Op, Watched
from rewire.isolation import ONE_AT_A_TIME
from rewire.places import current_line
from rewire.sides import structural_copy
from rewire.structure import map_leaves, tensors_of

# Functions whose result takes only shape, dtype and device from their tensor argument.
_NO_DATAFLOW = frozenset(
    """zeros_like ones_like empty_like full_like rand_like randn_like randint_like
    new_zeros new_ones new_empty new_full""".split()
)

# Functions that take values from their first argument and only a form from the others.
_FORM_OF_OTHERS = frozenset(("type_as", "expand_as", "view_as", "reshape_as", "to"))


@contextmanager
def watched_calls(around: Callable[..., Any]) -> Iterator[None]:
    """Have this thread's module calls go through `around(original, module, args, kwargs)`."""
    ONE_AT_A_TIME.acquire()
    original = nn.Module.__call__
    thread = threading.get_ident()

    def watched_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(self, *args, **kwargs)
        return around(original, self, args, kwargs)

    nn.Module.__call__ = watched_call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
        ONE_AT_A_TIME.release()


class Recorder(TorchFunctionMode):
    """Builds the dataflow graph while the model runs."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.watched = Watched()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._nodes: dict[int, int] = {}
        self._versions: dict[int, int] = {}
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._storages: dict[int, list[Tensor]] = {}
        self._added_to: dict[int, int] = {}  # tensors that additions have changed in place
        self._stale: dict[int, set[int]] = {}  # those of them that a caller handed to a module
        self._scope: list[int] = []
        self._interior = False
        constants = [*model.parameters(), *model.buffers()]
        self._constants = {id(tensor) for tensor in constants}
        self._known_inputs = {id(tensor) for tensor in _all_tensors(inputs)}

    # ---- module calls --------------------------------------------------------------------

    def call(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note a module call around its run."""
        calls = self.watched.calls
        number = len(calls)
        path = (*(calls[self._scope[-1]].path if self._scope else ()), number)
        name = self._names.get(id(module), type(module).__qualname__)
        arguments = map_leaves(structural_or_same, (args, kwargs))
        calls.append(Call(name, path, arguments))
        self._scope.append(number)
        before = len(self.watched.ops)
        try:
            result = original(module, *args, **kwargs)
        finally:
            self._scope.pop()
        self._adopt(result, (args, kwargs), number)
        result = self._apart(result, (args, kwargs), before)
        if not self._scope:
            self.watched.results = {self._node(tensor) for tensor in tensors_of(result)}
        return result

    def applied(self, descriptor: Any) -> Callable[..., Any]:
        """`apply` of custom autograd functions: one operation each, with what is inside apart."""
        thread = threading.get_ident()

        def watched_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            original = descriptor.__get__(None, cls)
            if threading.get_ident() != thread or self._interior:
                return original(*args, **kwargs)

            def inside(*args: Any, **kwargs: Any) -> Any:
                self._interior = True
                try:
                    return original(*args, **kwargs)
                finally:
                    self._interior = False

            return self._noted("opaque", inside, args, kwargs)

        return watched_apply

    def _adopt(self, result: Any, arguments: Any, scope: int) -> None:
        """Results nobody saw being made (script modules, custom functions) depend on all inputs."""
        unknown = [t for t in tensors_of(result) if self._is_unknown(t)]
        if not unknown:
            return
        operands = tuple(self._node(tensor) for tensor in tensors_of(arguments))
        for tensor in unknown:
            self._add("opaque", scope, operands, (), tensor)

    def _apart(self, result: Any, arguments: Any, before: int) -> Any:
        """A module's result, told from the tensors that it was handed and has added to in place.

        The first operation of its was number `before`.
        """
        handed = {id(tensor) for tensor in tensors_of(arguments)}
        given = {key for key in handed if self._added_to.get(key, -1) >= before}
        if not given:
            return result
        for key in given:
            self._stale.setdefault(key, set()).add(self._added_to[key])

        def apart(leaf: Any) -> Any:
            if id(leaf) not in given:
                return leaf
            with torch._C.DisableTorchFunction():
                alias = leaf.view_as(leaf)
            self._nodes[id(alias)] = self._nodes[id(leaf)]
            self._alive.append(alias)
            self._storages[_storage(alias)].append(alias)
            return alias

        return map_leaves(apart, result)

    def _is_unknown(self, tensor: Tensor) -> bool:
        key = id(tensor)
        known = self._nodes, self._constants, self._known_inputs
        return not any(key in place for place in known)

    # ---- torch calls ---------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        return self._noted(getattr(func, "__name__", str(func)), func, args, kwargs)

    def _noted(
        self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function and note what it makes and changes."""
        before = [(t, t._version) for t in tensors_of((args, kwargs)) if not t.is_inference()]
        result = func(*args, **kwargs)
        made = result if isinstance(result, (tuple, list)) else (result,)
        made = [item for item in made if isinstance(item, Tensor)]
        changed = [tensor for tensor, version in before if tensor._version != version]
        if made or changed:
            self._note(name, args, kwargs, made, changed)
        return result

    def _note(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: list[Tensor],
        changed: list[Tensor],
    ) -> None:
        inputs = tensors_of((args, kwargs))
        if not changed and all(any(t is source for source in inputs) for t in made):
            return  # an identity: `x.to(x.dtype)`, dropout in eval mode
        scope = self._scope[-1] if self._scope else 0
        positional = [*args, *(kwargs[key] for key in kwargs)]
        operands = tuple(self._node(a) if isinstance(a, Tensor) else None for a in positional)
        operands += tuple(self._node(t) for t in inputs if not any(t is a for a in positional))
        if name in _NO_DATAFLOW:
            operands = ()
        if name in _FORM_OF_OTHERS:
            operands = operands[:1]
        if name == "new_tensor":
            operands = operands[1:]
        others = tuple(None if isinstance(a, Tensor) else a for a in positional)
        for tensor in made or changed[:1]:
            node = self._add(name, scope, operands, others, tensor)
            self._describe(node, name, kwargs, tensor, args)
        for tensor in changed:
            self._change(tensor, node, added=name in ADDITIONS and not self._interior)

    def _change(self, tensor: Tensor, node: int, *, added: bool) -> None:
        """An operation in place: all names of a tensor are for its result now."""
        for alias in self._storages.get(_storage(tensor), [tensor]):
            self._nodes[id(alias)] = node
            if added:
                self._added_to[id(alias)] = node
                self._stale.get(id(alias), set()).add(node)

    def _describe(
        self, node: int, name: str, kwargs: Any, tensor: Tensor, args: tuple[Any, ...]
    ) -> None:
        op = self.watched.ops[node]
        if name in ADDITIONS:
            op.line = current_line()
            if not self._interior:
                self.watched.adds.setdefault(op.scope, []).append(node)
            op.scaled = "alpha" in kwargs or "out" in kwargs
        source = args[0] if args and isinstance(args[0], Tensor) else None
        op.view = bool(
            name not in ("detach", "__get__", "opaque")
            and source is not None
            and source.numel() == tensor.numel()
            and source is not tensor
            and source.dtype == tensor.dtype
            and _storage(source) == _storage(tensor)
        )

    def _node(self, tensor: Tensor) -> int:
        """The op that made a tensor; a new source where none did."""
        if id(tensor) in self._stale:
            self.watched.stale |= self._stale[id(tensor)]
        node = self._nodes.get(id(tensor))
        if node is None:
            scope = self._scope[-1] if self._scope else 0
            node = self._add("input", scope, (), (), tensor)
            self.watched.ops[node].constant = id(tensor) not in self._known_inputs
        return node

    def _add(
        self,
        name: str,
        scope: int,
        operands: tuple[int | None, ...],
        arguments: tuple[Any, ...],
        tensor: Tensor,
    ) -> int:
        watched = self.watched
        node = len(watched.ops)
        shape, floating = tuple(tensor.shape), tensor.is_floating_point()
        constant = all(watched.ops[n].constant for n in operands if n is not None)
        op = Op(name, scope, operands, arguments, shape, floating, constant=constant)
        op.interior, op.complex = self._interior, tensor.is_complex()
        watched.ops.append(op)
        watched.graph.add_node(node)
        watched.graph.add_edges_from((source, node) for source in operands if source is not None)
        self._nodes[id(tensor)] = node
        self._alive.append(tensor)
        self._storages.setdefault(_storage(tensor), []).append(tensor)
        return node


def _all_tensors(value: Any) -> list[Tensor]:
    """The tensors in a value, also those inside objects of the user's classes."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_leaves(lambda leaf: structural_copy(leaf, share=note), value)
    return found


def structural_or_same(leaf: Any) -> Any:
    """Tensors as they are; copies of mutable objects, which share them."""
    return structural_copy(leaf, share=lambda tensor: tensor)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)
