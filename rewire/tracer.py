"""The tracer: notes what the code of one module does, on proxies that carry values.

Every proxy knows the value it had in one run on fake tensors (its hint). Python decisions
are taken from the hint and recorded as guards, so a trace is good for every input that
would decide alike. Whether a tensor is true is not known then: the answer is assumed, and asked
for again where the code runs. Children are leaves: called, never looked into.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import pickle
import random
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.overrides import is_tensor_method_or_property

from rewire.codegen import handed
from rewire.dataflow import ADDITIONS
from rewire.errors import CannotTrace
from rewire.isolation import (
    Snapshot,
    changed_attributes,
    restore,
    snapshot,
)
from rewire.places import current_line
from rewire.proxies import HintProxy
from rewire.replay import autocast_state
from rewire.structure import Container, Spec, flatten, given_in, tensors_of, unflatten
from rewire.traces import (
    Made,
    Trace,
    after_effect,
    ancestors,
    storage_of,
    tensor_operands,
    values_read,
)

_LASTING: tuple[type, ...] = (type, enum.Enum, types.ModuleType, functools.partial)
_LASTING += (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_MOST_ANSWERS = 8
# Results that have as many parts as a size says.
_PARTING = """unbind split hsplit vsplit dsplit unsafe_split""".split()


class Tracer(fx.proxy.TracerBase):
    """Builds a `Trace`."""

    def __init__(
        self, home: nn.Module, inlined: set[nn.Module], answers: Sequence[bool], made: set[type]
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.trace = Trace(self.graph)
        self.home = home
        self.evaluating = False
        self.strangers = False  # whether it hands on objects that nobody else seems to hold
        self.numbers: dict[tuple[str, str], Any] = {}  # plain values that attributes are set to
        self._answers = answers
        self._made = made
        self._modules: list[nn.Module] = []  # that the code makes
        self._inlined = {id(module) for module in inlined}
        self._names = {id(module): name for name, module in home.named_modules()}
        self._attributes = dict(_tensor_attributes(home))
        self._attribute_proxies: dict[int, HintProxy] = {}
        self._writers: dict[int, fx.Node] = {}  # of buffers (storages): the calls of children
        self._proxies: list[weakref.ref[HintProxy]] = []
        self._objects: dict[int, fx.Node] = {}
        self._handed: dict[int, Any] = {}  # lists and dicts of the code, by their copies
        self._surroundings = self._state()

    # ---- the run -------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], leaves: list[Any], spec: Spec) -> None:
        """Call `forward` with proxies and collect what it does."""
        with self.plainly():
            attributes = {module: snapshot(module) for module in self._inlined_modules()}
        try:
            self._run(forward, leaves, spec, attributes)
        finally:
            with self.plainly():
                for module, before in attributes.items():
                    restore(module, before)

    def _run(
        self,
        forward: Callable[..., Any],
        leaves: list[Any],
        spec: Spec,
        attributes: Mapping[nn.Module, Snapshot],
    ) -> None:
        trace = self.trace
        for number, leaf in enumerate(leaves):
            node = self.graph.placeholder(f"input_{number}")
            trace.hints[node] = leaf
            trace.inputs.append(node)
        given = [HintProxy(node, self) for node in trace.inputs]
        args, kwargs = unflatten(spec, given)
        drawn = self._random_states()
        result = forward(self.home, *args, **kwargs)
        with self.plainly():
            if self._random_states() != drawn:
                raise CannotTrace("its forward draws random numbers in Python")
            assigned = self._assigned(attributes)
            now, found = flatten((args, kwargs))
            if found != spec or not self._same_values(given, now):
                raise CannotTrace("its forward changes a list or dict among its arguments")
            own = given_in((args, kwargs))
            whole = result, tuple(assigned.values())
            outputs, trace.result = flatten(whole, made=self._is_new(result), given=own)
            trace.assigned = tuple(assigned)
            _refuse_proxies(trace.result)
            trace.outputs = [self.create_arg(output) for output in outputs]
            trace.adds = [node for node in self.graph.nodes if self._is_addition(node)]
            trace.kept = {storage_of(t) for t in self._kept()} if trace.mutations else set()
            trace.varying = set(trace.inputs)
            for node in self.graph.nodes:
                if any(source in trace.varying for source in node.all_input_nodes):
                    trace.varying.add(node)

    def _random_states(self) -> list[Any]:
        """Of Python's and NumPy's random generators, the code's own among them."""
        with self.plainly():
            held = [item for module in self._inlined_modules() for item in vars(module).values()]
        own: list[Any] = [item.getstate() for item in held if isinstance(item, random.Random)]
        numpys = [item for item in held if isinstance(item, numpy.random.Generator)]
        own += [pickle.dumps(item.bit_generator.state) for item in numpys]
        return [random.getstate(), pickle.dumps(numpy.random.get_state()), *own]

    def _kept(self) -> Iterator[Tensor]:
        """Tensors that children hold by now, other than parameters and buffers."""
        for module in self.home.modules():
            for value in vars(module).values():
                inside = value.values() if isinstance(value, dict) else value
                items = [*inside] if isinstance(value, (dict, list, tuple)) else [value]
                yield from (
                    t for t in items if isinstance(t, Tensor) and type(t) is not nn.Parameter
                )

    def _inlined_modules(self) -> list[nn.Module]:
        return [module for module in self.home.modules() if id(module) in self._inlined]

    def _assigned(self, attributes: Mapping[nn.Module, Snapshot]) -> dict[tuple[str, str], Any]:
        """What the code has set attributes and buffers to; all else done to a module is lost."""
        found: dict[tuple[str, str], Any] = {}
        for module, before in attributes.items():
            path = self._names[id(module)]
            set_, other = changed_attributes(module, before)
            if other:
                raise CannotTrace(f"its forward changes the attribute {other[0]!r}")
            found |= {(path, name): value for name, value in set_.items()}
            for name, value in set_.items():
                plain = self.trace.hints[value.node] if type(value) is HintProxy else value
                then = before.get(name, (None,))[0]
                if type(plain) in (bool, int, float, str) and plain != then:
                    self.numbers[path, name] = plain
        return found

    def _same_values(self, given: Sequence[HintProxy], now: Sequence[Any]) -> bool:
        """Whether each leaf is the object that it was, be it changed in place, or that number."""
        hints = self.trace.hints
        values = [hints[leaf.node] if type(leaf) is HintProxy else leaf for leaf in now]
        pairs = zip((hints[leaf.node] for leaf in given), values, strict=True)
        return all(a is b or (isinstance(a, (int, float)) and a == b) for a, b in pairs)

    def _is_addition(self, node: fx.Node) -> bool:
        function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
        method = node.op == "call_method" and node.target in ADDITIONS
        if not (function or method) or {"alpha", "out"} & set(node.kwargs):
            return False
        return len(tensor_operands(self.trace, node)) == 2

    # ---- fx's hooks ----------------------------------------------------------------------

    def create_arg(self, a: Any) -> Any:
        """An argument as the graph holds it: nodes for proxies, tensors, modules, objects."""
        if isinstance(a, fx.Proxy) and type(a) is HintProxy:
            return a.node
        if isinstance(a, Tensor):
            known = self.attribute(a)
            if known is None:
                raise CannotTrace(
                    f"its forward uses a tensor {list(a.shape)} that is neither an argument nor an "
                    "attribute of it or its children"
                )
            return known.node
        if isinstance(a, nn.Module) or not _is_plain(a):
            return self._constant(a)
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> HintProxy:
        """A proxy that knows its node's value."""
        return HintProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> Any:
        """Note a call, run it on the hints, and wrap what it gives."""
        if self._state() != self._surroundings:
            raise CannotTrace("its forward switches gradients or autocast in its own code")
        arguments = self.create_arg(args), self.create_arg(kwargs)
        node = self.graph.create_node(kind, target, *arguments)
        node.meta["line"] = current_line()
        with self.plainly():
            values = [self.trace.hints[source] for source in node.all_input_nodes]
            before = _versions(tensors_of(values))
            own = _versions(self._buffers_of(node))
            self.trace.hints[node] = hint = self._evaluate(node, (args, kwargs))
            changed, written = _changed(before), _changed(own)
            wrapped = self._wrap(node, hint, top=True)
            self._writers |= dict.fromkeys(written, node)
            if changed or any(storage_of(t) in written for t in self._read_tensors()):
                self._redirect(node, changed | written)
        return wrapped

    def _buffers_of(self, node: fx.Node) -> list[Tensor]:
        """What a child may write into besides its arguments."""
        if node.op != "call_module":
            return []
        child = self.home.get_submodule(str(node.target))
        held = (value for module in child.modules() for value in vars(module).values())
        return [*child.buffers(), *(value for value in held if isinstance(value, Tensor))]

    def _read_tensors(self) -> Iterator[Tensor]:
        """The parameters, buffers and other tensors of modules that the code has read."""
        return (self.trace.hints[proxy.node] for proxy in self._attribute_proxies.values())

    def _evaluate(self, node: fx.Node, written: tuple[Any, Any]) -> Any:
        """What a call gives; `written` are its arguments as the code has them."""
        hints = self.trace.hints
        args = _thawed(fx.node.map_arg(node.args, hints.__getitem__))
        kwargs = _thawed(fx.node.map_arg(node.kwargs, hints.__getitem__))
        places = given_in((args, kwargs))
        self._handed = {key: place.of(written) for key, place in places.items()}
        if node.op == "call_module":
            child = self.home.get_submodule(str(node.target))
            return handed(child, str(node.target), args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """What runs in here is not the traced code."""
        before, self.evaluating = self.evaluating, True
        try:
            yield
        finally:
            self.evaluating = before

    def _wrap(self, node: fx.Node, hint: Any, *, top: bool) -> Any:
        """A result as the code sees it: real containers, with proxies for the leaves."""
        if hint is None or (not top and isinstance(hint, (bool, str))):
            return hint
        if id(hint) in self._handed:
            return self._handed[id(hint)]  # given back as it is: the code goes on with its own
        made = self._is_new(hint)
        spec = flatten(hint, made=made)[1] if type(hint) is not torch.Size else None
        if not isinstance(spec, Container) or _is_structseq(hint):
            return HintProxy(node, self)
        if top:
            node = self._as_traced(node, hint, spec, made)
        if spec.names:
            get: Callable[[Any, Any], Any] = getattr
            if isinstance(hint, dict):
                get = operator.getitem
            names = [n for n in spec.names if not isinstance(hint, dict) or n in hint]
            items = {str(n): self._item(get, node, get(hint, n), n) for n in names}
            return hint.__class__(**items) if spec.type is not dict else items
        parts = [self._item(operator.getitem, node, item, i) for i, item in enumerate(hint)]
        return spec.type(*parts) if hasattr(spec.type, "_fields") else spec.type(parts)

    def _is_new(self, value: Any) -> bool:
        """Whether nobody else holds the dataclasses in a result, which may be written into."""
        records = [leaf for leaf in flatten(value)[0] if dataclasses.is_dataclass(leaf)]
        if not records:
            return True
        attributes = [item for module in self.home.modules() for item in vars(module).values()]
        nested = [item for value in attributes if type(value) in (list, tuple) for item in value]
        nested += [item for value in attributes if type(value) is dict for item in value.values()]
        inputs = [self.trace.hints[node] for node in self.trace.inputs]
        held = {id(item) for item in (*attributes, *nested, *inputs)}
        return not any(id(record) in held for record in records)

    def _as_traced(self, node: fx.Node, hint: Any, spec: Container, made: bool) -> fx.Node:
        """A node that refuses a result of another structure than the traced one."""
        if node.op != "call_module" and _name_of(node) in _PARTING:
            parts = self.graph.call_function(len, (node,))
            self.trace.hints[parts] = len(hint)
            self.guard(parts, len(hint))
            return node
        checked = self.graph.call_function(_check_of(spec, _name_of(node), made), (node,))
        self.trace.hints[checked] = hint
        return checked

    def _item(self, get: Any, node: fx.Node, hint: Any, key: Any) -> Any:
        if hint is None or isinstance(hint, (bool, str)):
            return hint
        item = self.graph.call_function(get, (node, key))
        self.trace.hints[item] = hint
        return self._wrap(item, hint, top=False)

    def _redirect(self, node: fx.Node, changed: set[int]) -> None:
        """After an operation in place, whoever holds the tensor sees the result."""
        self.trace.mutations[node] = changed
        for proxy in self._held():
            hint = self.trace.hints[proxy.node]
            if hint is self.trace.hints[node] and hint is not None:
                proxy.node = node
            elif isinstance(hint, Tensor) and storage_of(hint) in changed:
                after = self.graph.call_function(after_effect, (proxy.node, node))
                self.trace.hints[after] = hint
                proxy.node = after

    # ---- values that are no proxies -------------------------------------------------------

    def attribute(self, tensor: Tensor) -> HintProxy | None:
        """The proxy of a parameter, buffer or other tensor that a module of the home holds."""
        if id(tensor) not in self._attributes:
            return None
        if id(tensor) not in self._attribute_proxies:
            node = self.graph.get_attr(self._attributes[id(tensor)])
            self.trace.hints[node] = tensor
            self._attribute_proxies[id(tensor)] = HintProxy(self._as_written(node), self)
        return self._attribute_proxies[id(tensor)]

    def _as_written(self, node: fx.Node) -> fx.Node:
        """A buffer that is read behind a child's call that has written into it."""
        tensor = self.trace.hints[node]
        with self.plainly():
            storage = storage_of(tensor) if self._writers else 0
        writer = self._writers.get(storage)
        if writer is None:
            return node
        self.trace.mutations.setdefault(writer, set()).add(storage)
        after = self.graph.call_function(after_effect, (node, writer))
        self.trace.hints[after] = tensor
        return after

    def is_foreign(self, module: nn.Module) -> bool:
        """Whether a module's code is not part of the home's, nor made by it."""
        return id(module) not in self._inlined and not any(module is own for own in self._modules)

    def makes(self, module: nn.Module) -> None:
        """Note a module that the code makes: it looks into it when it calls it."""
        self._modules.append(module)

    def _constant(self, value: Any) -> fx.Node:
        """The node of an object that the code reads: a child by its name, or a placeholder."""
        if id(value) in self._objects:
            return self._objects[id(value)]
        name = self._names.get(id(value))
        if name:  # the home itself has none
            node = self.graph.get_attr(name)
            node.meta["module"] = True
        else:
            first = next(iter(self.graph.nodes))
            with self.graph.inserting_before(first):
                node = self.graph.placeholder(f"constant_{len(self._objects)}")
            self.trace.constants[node] = Made(value) if type(value) in self._made else value
            with self.plainly():
                self.strangers = self.strangers or not self._is_held(value)
        self.trace.hints[node] = value
        self._objects[id(value)] = node
        return node

    def read(self, module: nn.Module, name: str) -> None:
        """Note what the code reads of a module that it has not made."""
        special = name.startswith("__") and name.endswith("__")
        if not special and not any(module is own for own in self._modules):
            self.trace.reads[self._names.get(id(module), module), name] = None

    def has_handed(self, value: Any) -> bool:
        """Whether the code has handed an object on."""
        return id(value) in self._objects

    def _is_held(self, value: Any) -> bool:
        """Whether a constant was there before the code ran: it is somebody's attribute, or code."""
        if isinstance(value, _LASTING):
            return True
        held = (item for module in self._inlined_modules() for item in vars(module).values())
        return any(item is value or _holds(item, value) for item in held)

    def register(self, proxy: HintProxy) -> None:
        """Note a proxy that the code may hold."""
        self._proxies.append(weakref.ref(proxy))

    def _held(self) -> list[HintProxy]:
        """Proxies that somebody still holds."""
        proxies = [reference() for reference in self._proxies]
        return [proxy for proxy in proxies if proxy is not None]

    def guard(self, node: fx.Node, value: Any) -> Any:
        """Note a decision; one by the values of a tensor (`x.max().item() > 1`) is a question."""
        decides = isinstance(value, bool) and values_read(self.trace, {node, *ancestors([node])})
        if decides:
            return self._asked(node, value)
        self.trace.guards.append((node, value))
        return value

    def ask(self, node: fx.Node) -> bool:
        """Assume whether a tensor is true; the code around the branches will ask."""
        return self._asked(self.graph.call_function(bool, (node,)), True)

    def _asked(self, question: fx.Node, likely: bool) -> bool:
        asked = self.trace.asked
        if len(asked) == _MOST_ANSWERS:
            raise CannotTrace(f"its forward decides by values of tensors over {len(asked)} times")
        answer = self._answers[len(asked)] if len(asked) < len(self._answers) else likely
        self.trace.hints[question] = asked[question] = answer
        self.trace.held[question] = {proxy.node for proxy in self._held()}
        self.trace.met[question] = len(self.trace.constants)
        return answer

    @staticmethod
    def _state() -> Any:
        return torch.is_grad_enabled(), autocast_state("cpu"), torch.is_autocast_enabled("cuda")

    # ---- calls ---------------------------------------------------------------------------

    def module_call(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note a call of a child, or look into it."""
        if self.evaluating or not self.is_foreign(module):
            return original(module, *args, **kwargs)
        if id(module) not in self._names:
            raise CannotTrace(
                f"its forward calls a {type(module).__qualname__} that is not among its children"
            )
        return self.create_proxy("call_module", self._names[id(module)], args, kwargs)

    def torch_call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note a torch call from Python."""
        if not is_tensor_method_or_property(function):
            return self.create_proxy("call_function", function, args, kwargs)
        if function.__name__ == "__get__":
            return function(*args, **kwargs)
        return self.create_proxy("call_method", function.__name__, args, kwargs)


# ---- values and graphs -------------------------------------------------------------------

_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)


def _versions(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    return [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]


def _changed(before: Iterable[tuple[Tensor, int]]) -> set[int]:
    """Storages of the tensors that were changed in place since."""
    return {storage_of(tensor) for tensor, version in before if tensor._version != version}


def _tensor_attributes(home: nn.Module) -> Iterator[tuple[int, str]]:
    for prefix, module in home.named_modules():
        named = {**vars(module), **module._parameters, **module._buffers}
        for name, value in named.items():
            if isinstance(value, Tensor):
                yield id(value), f"{prefix}.{name}".lstrip(".")


def _holds(item: Any, value: Any) -> bool:
    """Whether an object is in a container or an attribute of another."""
    inside = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return any(one is value for one in (*inside, *getattr(item, "__dict__", {}).values()))


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else node.target.__name__


@functools.lru_cache(maxsize=1024)
def _check_of(spec: Container, name: str, made: bool) -> Callable[[Any], Any]:
    """A function that gives a result back if it has the structure that the trace relies on.

    The lengths of containers in it, and what is None, a truth value or a string there.
    """

    def as_traced(result: Any) -> Any:
        plain = tuple(result) if isinstance(result, torch.Size) else result
        leaves, found = flatten(plain, made=made)
        fake = any(isinstance(leaf, FakeTensor) for leaf in leaves)  # kernels' fakes give too much
        if found != spec and not fake:
            raise CannotTrace(
                f"{name}: its result is built otherwise than when its caller was traced (another "
                "length, or None, a truth value or a string is another). Keep the caller out with "
                "`exclude=`."
            )
        return result

    return as_traced


def _is_plain(value: Any) -> bool:
    """Whether generated code can spell a value out."""
    plain = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type(...))
    nested = (tuple, list, dict, slice, torch.layout, torch.memory_format, fx.Node, range)
    return isinstance(value, plain + nested)


def _refuse_proxies(spec: Spec) -> None:
    if type(spec) is HintProxy:
        raise CannotTrace("its forward returns a computed truth value")
    if isinstance(spec, Container):
        for item in spec.items:
            _refuse_proxies(item)


def _is_structseq(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "n_fields")


def _thawed(value: Any) -> Any:
    """fx's immutable containers as plain ones: some functions insist. Values stay as they are."""
    if isinstance(value, immutable_list):
        return [_thawed(item) for item in value]
    if type(value) is tuple:
        return tuple(_thawed(item) for item in value)
    if isinstance(value, immutable_dict):
        return {key: _thawed(item) for key, item in value.items()}
    return value
