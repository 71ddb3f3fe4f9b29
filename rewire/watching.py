"""Watching one run of a model: its dataflow graph, and which module call each operation is in.

The run is on fake tensors, so it costs neither memory nor arithmetic, and nothing is
traced: the model's own Python runs as always, whatever it does.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import networkx as nx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from rewire.errors import CannotTrace
from rewire.isolation import isolated, lend_fakes, training_mode
from rewire.sides import cloned, structural_copy
from rewire.structure import map_leaves, tensors_of

# Functions whose result takes only shape, dtype and device from their tensor argument.
_NO_DATAFLOW = frozenset(
    f"{kind}{suffix}"
    for kind in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")
    for suffix in ("_like",)
) | frozenset(f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "tensor"))

# Functions that take values from their first argument and only a form from the others.
_FORM_OF_OTHERS = frozenset(("type_as", "expand_as", "view_as", "reshape_as", "to"))

# One thread at a time: patches must be taken off in the order in which they were put on.
_PATCHING = threading.RLock()

ADDITIONS = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__"))


@dataclass(slots=True)
class Op:
    """A torch call (or a source of tensors) in the dataflow graph.

    Attributes:
        name: Name of the torch function; "input" for tensors that no watched call made and
            "opaque" for results of code that does not call torch from Python.
        scope: Number of the module call it runs in.
        operands: For each positional argument, the node of a tensor or None.
        arguments: The other arguments, as given.
        shape: Of the (first) result.
        floating: Whether the result is of a floating dtype.
        complex: Whether it is of a complex one.
        view: The result is a view of all of the first operand.
        constant: Does not come from the inputs: parameters, buffers, what is computed from
            them alone, and tensors made from nothing.
        line: File and line of an addition.
        scaled: An addition with `alpha=` or `out=`.
        interior: Runs inside a custom autograd function, which has its own backward.
    """

    name: str
    scope: int
    operands: tuple[int | None, ...]
    arguments: tuple[Any, ...]
    shape: tuple[int, ...]
    floating: bool
    view: bool = False
    constant: bool = False
    line: str = ""
    scaled: bool = False
    interior: bool = False
    complex: bool = False


@dataclass(slots=True)
class Call:
    """One call of a module.

    Attributes:
        name: Qualified name of the module.
        path: Numbers of the calls it is inside of, outermost first, itself last.
        arguments: (args, kwargs); mutable objects are copies made before the call.
    """

    name: str
    path: tuple[int, ...]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Watched:
    """One run of a model.

    Attributes:
        ops: In the order in which they ran; the graph's nodes are their numbers.
        calls: Module calls, the model's own first.
        graph: Edges lead from operand to result.
        results: Nodes of the tensors that the model returned.
        stale: Additions in place to a tensor that a module was handed, whose caller goes on with
            that tensor and not with the module's result.
        adds: The additions in the code of each call, interiors of autograd functions left out.
        fake_mode: The mode of the fake tensors, None where the run was real.
    """

    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    graph: nx.DiGraph = field(default_factory=nx.DiGraph)
    results: set[int] = field(default_factory=set)
    stale: set[int] = field(default_factory=set)
    adds: dict[int, list[int]] = field(default_factory=dict)
    fake_mode: FakeTensorMode | None = None

    def module(self, op: int) -> str:
        """Name of the module whose code runs an operation."""
        return self.calls[self.ops[op].scope].name

    def path(self, op: int) -> tuple[int, ...]:
        """Calls around an operation, outermost first."""
        return self.calls[self.ops[op].scope].path


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Watched:
    """Watch one run of `model` in eval mode; nothing of the model or its inputs changes.

    On fake tensors, or on the real ones without gradients where the model needs values
    (data-dependent shapes).

    Raises:
        CannotTrace: The model does not run on these inputs.
    """
    try:
        return _on_fakes(model, args, kwargs, training=False)
    except Exception as fake_error:
        copies = map_leaves(own_copy, (args, dict(kwargs)))
        try:
            own = isolated(model, model.parameters())
            with own, training_mode(model, False), torch.no_grad():
                return _record(model, *copies)
        except Exception as error:
            raise CannotTrace(
                f"{type(model).__qualname__} does not run on the example inputs: "
                f"{_first_line(error)}. Give `example_inputs=` that its forward accepts."
            ) from fake_error


def watch_training(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Watched | None:
    """The same in train mode, on fake tensors; None where that does not run.

    It may want targets, a larger batch, or the value of a random number.
    """
    try:
        return _on_fakes(model, args, kwargs, training=True)
    except Exception:  # whatever it is: eval mode has said what there is
        return None


def _on_fakes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool
) -> Watched:
    try:
        return _watched(model, args, kwargs, training, lend=True)
    except Exception:  # the value of a parameter may be wanted, which a fake one does not have
        return _watched(model, args, kwargs, training, lend=False)


def _watched(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    training: bool,
    *,
    lend: bool,
) -> Watched:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    faked = map_leaves(lambda leaf: as_fake(mode, leaf), (args, dict(kwargs)))
    with isolated(model), training_mode(model, training), mode, torch.enable_grad():
        if lend:
            lend_fakes(model, mode)
        watched = _record(model, *faked)
    watched.fake_mode = mode
    return watched


def as_fake(mode: FakeTensorMode, leaf: Any) -> Any:
    """A fake twin of a tensor; copies of mutable objects, with fake tensors inside."""

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        made = mode.from_tensor(tensor.detach(), static_shapes=True)
        return made.requires_grad_(tensor.requires_grad)

    return structural_copy(leaf, share=fake)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Watched:
    recorder = _Recorder(model, (args, kwargs))
    apply = inspect.getattr_static(torch.autograd.Function, "apply")
    applied = classmethod(recorder.applied(apply))
    opaque = mock.patch.object(torch.autograd.Function, "apply", applied)
    eager = torch.compiler.set_stance("force_eager")
    with watched_calls(recorder.call), opaque, eager, recorder:
        model(*args, **kwargs)
    return recorder.watched


@contextmanager
def watched_calls(around: Callable[..., Any]) -> Iterator[None]:
    """Have this thread's module calls go through `around(original, module, args, kwargs)`."""
    _PATCHING.acquire()
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
        _PATCHING.release()


class _Recorder(TorchFunctionMode):
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
        same_values = name not in ("detach", "__get__", "opaque") and source is not None
        op.view = bool(
            same_values
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


def own_copy(leaf: Any) -> Any:
    """A copy that may be written into, tensors included."""
    return structural_copy(leaf, share=cloned)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def current_line() -> str:
    """File and line of the innermost frame of a model's code (torch's own modules have some)."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_model_code(frame):
        frame = frame.f_back
    return line_of(frame, frame.f_lineno)


def is_model_code(frame: FrameType) -> bool:
    """Whether a frame runs a model's code: neither ours nor torch's, but for torch's layers."""
    module = frame.f_globals.get("__name__", "")
    layer = module.startswith("torch.nn.modules.") and module != nn.Module.__module__
    return layer or module.partition(".")[0] not in ("torch", __package__)


def line_of(frame: FrameType, number: int) -> str:
    """File, with the two folders above it, and line."""
    path = frame.f_code.co_filename.replace("\\", "/")
    return f"{'/'.join(path.rsplit('/', 3)[-3:])}:{number}"
