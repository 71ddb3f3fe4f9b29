"""A traced home: its graph with the values of one run, and questions about its nodes."""

from __future__ import annotations

import enum
import operator
import types
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewire.errors import CannotTrace, NotRepeatable
from rewire.sides import structural_copy
from rewire.structure import Spec


class Made:
    """An object that the code makes in each run, as it is when the code hands it on.

    Raises:
        CannotTrace: It cannot be copied, or holds what the code has computed.
    """

    def __init__(self, value: Any) -> None:
        try:
            self._value = structural_copy(value, share=_known)
        except NotRepeatable as error:
            raise CannotTrace(str(error)) from error

    def anew(self) -> Any:
        """One for another run."""
        return structural_copy(self._value, share=_known)


def _known(tensor: Tensor) -> Tensor:
    if issubclass(type(tensor), fx.Proxy):
        raise CannotTrace("its forward makes an object that holds a tensor, and hands it on")
    return tensor


@dataclass
class Trace:
    """What tracing a home gave.

    Attributes:
        graph: Its torch calls, children as `call_module`.
        hints: The value of each node in the traced run.
        inputs: The placeholders, one for each leaf of the arguments.
        outputs: A node or constant for each leaf of the result and of what attributes are set to.
        result: Structure of (result, values of attributes).
        assigned: The attributes that the code sets: names of the module, and of the attribute.
        guards: Nodes whose values decided something, with the values.
        asked: Nodes that ask for the truth of a tensor, with the answers the code went on with.
        held: For each of them the nodes whose values the code's variables held then.
        met: For each of them the number of `constants` that the code had read by then.
        reads: The attributes that the code reads, in order: the name of the module (of one that is
            not below the home: itself) and that of the attribute.
        constants: Placeholders that stand for objects the code reads, with the objects.
        mutations: For each node, the tensors (storages) it changes in place.
        kept: Tensors (storages) that the home's modules hold after the run.
        adds: Nodes that add two floating tensors, in order.
        varying: Nodes that depend on an argument.
    """

    graph: fx.Graph
    hints: dict[fx.Node, Any] = field(default_factory=dict)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    result: Spec = None
    assigned: tuple[tuple[str, str], ...] = ()
    guards: list[tuple[fx.Node, Any]] = field(default_factory=list)
    asked: dict[fx.Node, bool] = field(default_factory=dict)
    held: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    met: dict[fx.Node, int] = field(default_factory=dict)
    reads: dict[tuple[str | nn.Module, str], None] = field(default_factory=dict)
    constants: dict[fx.Node, Any] = field(default_factory=dict)
    mutations: dict[fx.Node, set[int]] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    adds: list[fx.Node] = field(default_factory=list)
    varying: set[fx.Node] = field(default_factory=set)

    def storages(self, node: fx.Node) -> set[int]:
        """Storages of the tensors that a node reads."""
        hints = [self.hints[source] for source in node.all_input_nodes]
        return {storage_of(hint) for hint in hints if isinstance(hint, Tensor)}


def after_effect(value: Any, effect: Any) -> Any:
    """`value`, once `effect` has changed it in place."""
    return value


def tensor_operands(trace: Trace, node: fx.Node) -> list[fx.Node]:
    """The positional operands of a node that are floating tensors, in order."""
    operands = [*node.args, *node.kwargs.values()]
    nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
    hints = trace.hints
    return [n for n in nodes if isinstance(hints[n], Tensor) and hints[n].is_floating_point()]


def storage_of(tensor: Tensor) -> int:
    """Identity of a tensor's storage."""
    return int(tensor.untyped_storage()._cdata)


_UNCHANGEABLE: tuple[type, ...] = (bool, int, float, str, type(None), type, enum.Enum)
_UNCHANGEABLE += (torch.dtype, torch.device, types.FunctionType, types.MethodType)
_UNCHANGEABLE += (Tensor, tuple, list, dict, set)  # those have rules of their own
_PURE = (operator.getitem, getattr, len, bool, int, float, operator.index)


def needed_nodes(trace: Trace) -> set[fx.Node]:
    """Nodes that are read or do something: unread attributes, items and sizes are left out."""
    needed: set[fx.Node] = {output for output in trace.outputs if isinstance(output, fx.Node)}
    needed.update(trace.asked)
    for node in reversed(list(trace.graph.nodes)):
        pure = node.op in ("placeholder", "get_attr") or is_after_effect(node)
        pure = pure or (node.op == "call_function" and node.target in _PURE)
        pure = pure or not isinstance(trace.hints[node], (Tensor, type(None), tuple, list, dict))
        pure = pure and not objects_touched(trace, node)
        if node in needed or node in trace.mutations or not pure:
            needed.update((node, *node.all_input_nodes))
    return needed


def objects_touched(trace: Trace, node: fx.Node) -> frozenset[int]:
    """Objects of classes of the user's that a method or child is handed, and may change."""
    if node.op not in ("call_method", "call_module"):
        return frozenset()
    hints = [trace.hints[source] for source in node.all_input_nodes]
    return frozenset(id(hint) for hint in hints if not isinstance(hint, _UNCHANGEABLE))


def ancestors(nodes: Iterable[fx.Node], until: Collection[fx.Node] = ()) -> frozenset[fx.Node]:
    """All nodes that `nodes` depend on, stopping at `until`."""
    found: set[fx.Node] = set()
    todo = [source for node in nodes for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in found and node not in until:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return frozenset(found)


_FORMS = frozenset(
    """shape ndim dtype device layout requires_grad is_cuda size dim ndimension numel stride
    element_size is_floating_point is_complex is_contiguous get_device __len__""".split()
)


def values_read(trace: Trace, nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The first of some nodes that makes a number of the values of a tensor, not of its form."""
    for node in nodes:
        hint = trace.hints[node]
        if hint is None or _is_tensors(hint) or node.op == "call_module":
            continue
        reads = any(isinstance(trace.hints[n], Tensor) for n in node.all_input_nodes)
        what = node.args[1] if node.target is getattr else node.target
        if reads and what not in _FORMS:
            return node
    return None


def _is_tensors(hint: Any) -> bool:
    """Whether a value is a tensor, or several: parts of one."""
    parts = hint if type(hint) in (tuple, list) and hint else (hint,)
    return all(isinstance(part, Tensor) for part in parts)


def readers(trace: Trace, node: fx.Node) -> list[fx.Node]:
    """Users of a tensor but for those that only ask what it is like or whether it is true."""
    asking: set[fx.Node] = set(trace.asked)
    for user in reversed(list(trace.graph.nodes)):
        idle = user not in trace.mutations and user not in trace.outputs
        if user.users and idle and asking.issuperset(user.users):
            asking.add(user)
    forms = {
        user
        for user in node.users
        if user.target is getattr and not isinstance(trace.hints[user], Tensor)
    }
    return [u for u in node.users if not is_after_effect(u) and u not in asking | forms]


def is_after_effect(node: fx.Node) -> bool:
    """Whether a node only says that another's value was changed in place."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "after_effect"


def is_activation(trace: Trace, node: fx.Node) -> bool:
    """Whether a node keeps shape and place of its only tensor operand, in a new tensor."""
    values = [n for n in tensor_operands(trace, node) if n in trace.varying]
    hint = trace.hints.get(node)
    if node.op not in ("call_function", "call_method", "call_module") or len(values) != 1:
        return False
    source = trace.hints[values[0]]
    if not isinstance(hint, Tensor) or hint.shape != source.shape:
        return False
    in_place = node in trace.mutations
    return in_place or hint is source or storage_of(hint) != storage_of(source)


def is_whole_view(trace: Trace, node: fx.Node) -> bool:
    """Whether a node is all of its first operand's storage under another shape."""
    if node.op not in ("call_function", "call_method") or node in trace.mutations:
        return False
    hint, values = trace.hints.get(node), tensor_operands(trace, node)
    if not isinstance(hint, Tensor) or not values:
        return False
    source = trace.hints[values[0]]
    same = storage_of(hint) == storage_of(source) and hint.numel() == source.numel()
    return same and hint.dtype == source.dtype


def same_value(trace: Trace, node: fx.Node) -> fx.Node:
    """The node behind calls that gave their operand itself (`nn.Identity`)."""
    while node.op.startswith("call") and node not in trace.mutations:
        inputs = node.all_input_nodes[-1:] if is_after_effect(node) else node.all_input_nodes
        sources = [n for n in inputs if trace.hints[n] is trace.hints[node]]
        if not sources:
            break
        node = sources[0]
    return node


def spelled(node: fx.Node) -> str:
    """An operation as a person would find it: its name, file and line."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"{name} at {node.meta['line']}" if "line" in node.meta else name


def only_operand(trace: Trace, node: fx.Node) -> fx.Node:
    """The tensor operand that depends on an argument, where there is one only.

    Raises:
        CannotTrace: There are several, or none.
    """
    values = [n for n in tensor_operands(trace, node) if n in trace.varying]
    if len(values) != 1:
        raise CannotTrace(f"the trunk cannot be followed through {spelled(node)}")
    return values[0]
