"""Cutting a home's traced graph into its residual branches and the code around them.

Each branch becomes a function (home, x, *sides) of the newest stream; what lies around
calls `run.step(number, x, *sides)` where a sum stood. Both are plain Python source that
reads modules and parameters from the home when it runs; a program holds none of them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rewire.errors import CannotTrace
from rewire.plans import Residual
from rewire.structure import Spec
from rewire.tracing import Trace, storage_of, tensor_operands


@dataclass(frozen=True)
class BranchCode:
    """A residual branch as code.

    Attributes:
        name: Name of the residual module.
        function: (home, x, *sides) -> (F, T or None, values that leave it sideways).
        modules: Names, relative to the home, of the modules it calls.
        source: The function's source, for people.
    """

    name: str
    function: Callable[..., Any]
    modules: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Program:
    """A home's forward in two-stream form, for inputs that decide alike.

    Attributes:
        outer: (home, run, *constants, *leaves) -> leaves of the result; calls `run.step` and
            `run.follow`.
        branches: By number of the residual module in the home.
        tails: By number: the activation behind the sum, (home, x) -> T(x), or None.
        result: Structure of the result.
        constants: Objects the code reads.
        decide: (home, *constants, *leaves) -> what Python decided from sizes; None: nothing.
        decided: The values in the traced run.
        shapes: Shapes of the tensor leaves where decisions hang on other values: the program
            is then good for these only.
    """

    outer: Callable[..., Any]
    branches: tuple[BranchCode, ...]
    tails: tuple[Callable[..., Any] | None, ...]
    result: Spec
    constants: tuple[Any, ...]
    decide: Callable[..., Any] | None
    decided: tuple[Any, ...]
    shapes: tuple[tuple[int, ...], ...] | None

    def suits(self, home: Any, leaves: Sequence[Any]) -> bool:
        """Whether the code's decisions are the same for these arguments."""
        if self.shapes is not None and self.shapes != tensor_shapes(leaves):
            return False
        if self.decide is None:
            return True
        return tuple(self.decide(home, *self.constants, *leaves)) == self.decided


def tensor_shapes(leaves: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors among `leaves`."""
    return tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor))


def extract(
    trace: Trace, residuals: Sequence[Residual], homes: Collection[str], trunk: str
) -> Program:
    """Cut a trace at its residual adds.

    Args:
        trace: Of the home.
        residuals: The residual modules of the home, in order.
        homes: Names, relative to this home, of other homes among its children.
        trunk: "identity", or "inside": activations behind a sum move into its branch.

    Raises:
        CannotTrace: The graph is not what was watched.
    """
    if any(len(trace.adds) != residual.adds for residual in residuals):
        raise CannotTrace(
            f"its trace has {len(trace.adds)} tensor adds, {residuals[0].adds} were watched"
        )
    pieces: list[_Piece] = []
    for residual in residuals:
        pieces.append(_Piece(trace, residual, pieces, homes, trunk))
    _sink(trace, pieces)
    branches = tuple(piece.branch_code() for piece in pieces)
    tails = tuple(piece.tail_code() for piece in pieces)
    outer = _Outer(trace, pieces).code()
    decide, decided, shapes = _decisions(trace)
    constants = tuple(trace.constants.values())
    return Program(outer, branches, tails, trace.result, constants, decide, decided, shapes)


class _Piece:
    """One residual module in the traced graph.

    Attributes:
        sum: The node of the sum; `adds` all adds of the sum.
        entry: The node that carries the newest stream in.
        skip: The skip operand; `head` where activations stand between `entry` and it.
        region: Nodes of the branch.
        tail: Nodes of the activation behind the sum.
    """

    def __init__(
        self,
        trace: Trace,
        residual: Residual,
        before: list[_Piece],
        homes: Collection[str],
        trunk: str,
    ) -> None:
        self.trace = trace
        self.residual = residual
        self.sum = trace.adds[residual.add]
        self.skip, self.adds, self.terms = self._take_sum()
        self.entry = self._find_entry({piece.sum for piece in before})
        self.region = self._find_region()
        self._check(before, homes)
        self._check_entry(before, homes)
        inside = trunk == "inside"
        self.tail = self._find_tail() if residual.tail or inside else []
        self.tail_inside = inside

    def _take_sum(self) -> tuple[fx.Node, list[fx.Node], list[fx.Node]]:
        """The skip operand, the adds on the way to it, and all other terms."""
        node, adds, terms = self.sum, [self.sum], []
        for level, side in enumerate(self.residual.skip):
            operands = tensor_operands(self.trace, node)
            terms += [operand for number, operand in enumerate(operands) if number != side]
            node = operands[side]
            if level < len(self.residual.skip) - 1:
                if node not in self.trace.adds or len(node.users) != 1:
                    raise CannotTrace("a sum of several terms is not as it was watched")
                adds.append(node)
        return node, adds, terms

    def _find_entry(self, sums: set[fx.Node]) -> fx.Node:
        """Where the newest stream comes in: before the activations that lead to the skip."""
        node = _same_value(self.trace, self.skip)
        if not self.residual.head:
            return node
        starts = self.residual.entry == "fork"
        behind = _ancestors(self.terms) if starts else frozenset()
        while node not in sums and node.op != "placeholder" and node not in behind:
            if not starts and not _is_activation(self.trace, node):
                break
            node = _same_value(self.trace, _only_operand(self.trace, node))
        return node

    def _find_region(self) -> set[fx.Node]:
        ahead = {self.entry}
        for node in self.trace.graph.nodes:
            if any(source in ahead for source in node.all_input_nodes):
                ahead.add(node)
        ends = [*self.terms, self.skip] if self.residual.head else self.terms
        return (ahead & (_ancestors(ends) | set(ends))) - {self.entry, *self.adds}

    def _check(self, before: list[_Piece], homes: Collection[str]) -> None:
        name = self.residual.name
        if not self.region:
            raise CannotTrace(f"the branch of {name} does not start at its skip")
        if any(piece.sum in self.region for piece in before):
            raise CannotTrace(f"the branch of {name} holds another residual module")
        called = {str(node.target) for node in self.region if node.op == "call_module"}
        nested = sorted(called & set(homes))
        if nested:
            raise CannotTrace(f"the branch of {name} calls {nested[0]}, which is rewired itself")

    def _check_entry(self, before: list[_Piece], homes: Collection[str]) -> None:
        """A link must lead to the entry: dropout, say, may stand there in train mode only."""
        if self.residual.entry == "fork":
            return
        node = self.entry
        while _is_view(self.trace, node):
            node = _only_operand(self.trace, node)
        sums = {piece.result for piece in before} | {piece.sum for piece in before}
        item = node.op == "call_function" and node.target in (operator.getitem, getattr)
        source = node.all_input_nodes[0] if item else node
        child = source.op == "call_module" and str(source.target) in homes
        outside = self.residual.entry == "outside" and (node.op == "placeholder" or child)
        if not outside and node not in sums:
            raise CannotTrace(f"{node.target} stands on the trunk before {self.residual.name}")

    def _find_tail(self) -> list[fx.Node]:
        tail: list[fx.Node] = []
        node = self.sum
        while True:
            users = [user for user in node.users if not _is_after(user)]
            if len(users) != 1 or not _is_activation(self.trace, users[0]):
                break
            node = users[0]
            tail.append(node)
        if self.residual.tail and not tail:
            raise CannotTrace(f"no activation follows the sum of {self.residual.name}")
        return tail

    @property
    def result(self) -> fx.Node:
        """The node whose value later code sees."""
        return self.tail[-1] if self.tail else self.sum

    @property
    def hidden(self) -> set[fx.Node]:
        """Nodes that do not appear in the code around the branch."""
        return {*self.region, *self.adds, *self.tail}

    def sides(self) -> list[fx.Node]:
        """Nodes outside the branch that it reads."""
        inputs = {source for node in self.region for source in node.all_input_nodes}
        inputs |= {*self.terms, self.skip} if self.residual.head else set(self.terms)
        outside = inputs - self.region - {self.entry}
        return [node for node in self.trace.graph.nodes if node in outside]

    def sideways(self) -> list[fx.Node]:
        """Nodes of the branch that are read outside of it."""
        inside = self.region | set(self.adds)
        leaving = {n for n in self.region if any(user not in inside for user in n.users)}
        leaving |= {n for n in self.trace.outputs if isinstance(n, fx.Node)} & self.region
        return [node for node in self.trace.graph.nodes if node in leaving]

    # ---- code ----------------------------------------------------------------------------

    def branch_code(self) -> BranchCode:
        """The branch as a function of (home, x, *sides)."""
        graph = fx.Graph()
        copies = {self.entry: graph.placeholder("x")}
        for number, node in enumerate(self.sides()):
            copies[node] = graph.placeholder(f"side_{number}")
        if self._changes_entry():
            copies[self.entry] = graph.call_function(torch.clone, (copies[self.entry],))
        for node in self.trace.graph.nodes:
            if node in self.region:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        branch = functools.reduce(
            lambda a, b: graph.call_function(torch.add, (a, b)),
            [copies[term] for term in reversed(self.terms)],
        )
        if self.tail_inside:
            branch = _copy_tail(self.trace, graph, self.tail, branch, fresh=True)
        trunk = copies[self.skip] if self.residual.head else None
        graph.output((branch, trunk, tuple(copies[node] for node in self.sideways())))
        function, source = _compile(graph)
        called = [str(node.target) for node in self.region if node.op == "call_module"]
        return BranchCode(self.residual.name, function, tuple(dict.fromkeys(called)), source)

    def _changes_entry(self) -> bool:
        """Whether the branch writes into the storage of the stream it is given."""
        stream = storage_of(self.trace.hints[self.entry])
        changed = {s for node in self.region for s in self.trace.mutations.get(node, ())}
        return stream in changed

    def tail_code(self) -> Callable[..., Any] | None:
        """The activation behind the sum as a function of (home, x)."""
        if not self.tail or self.tail_inside:
            return None
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.output(_copy_tail(self.trace, graph, self.tail, x, fresh=self._tail_changes_sum()))
        return _compile(graph)[0]

    def _tail_changes_sum(self) -> bool:
        changed = {s for node in self.tail for s in self.trace.mutations.get(node, ())}
        return storage_of(self.trace.hints[self.sum]) in changed


def _copy_tail(
    trace: Trace, graph: fx.Graph, tail: list[fx.Node], x: fx.Node, *, fresh: bool
) -> fx.Node:
    """Copy the activation nodes behind a sum onto `x`; never in place on a stream."""
    if fresh and tail:
        x = graph.call_function(torch.clone, (x,))
    for node in tail:
        constants = [n for n in node.all_input_nodes if n not in trace.varying]
        copies = _copy_constants(graph, constants)
        copies.update(dict.fromkeys(set(node.all_input_nodes) - set(constants), x))
        x = graph.node_copy(node, copies.__getitem__)
    return x


def _copy_constants(graph: fx.Graph, nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Copy nodes that depend on no argument, with all they read."""
    copies: dict[fx.Node, fx.Node] = {}
    needed = _ancestors(nodes) | set(nodes)
    for node in nodes[0].graph.nodes if nodes else ():
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return copies


class _Outer:
    """The code around the branches."""

    def __init__(self, trace: Trace, pieces: list[_Piece]) -> None:
        self.trace = trace
        self.graph = fx.Graph()
        self.run = self.graph.placeholder("run")
        self.copies: dict[fx.Node, fx.Node] = {}
        self.hidden: dict[fx.Node, int] = {}
        self.pieces = pieces
        self.emitted: set[int] = set()
        for number, piece in enumerate(pieces):
            self.hidden.update(dict.fromkeys(piece.hidden, number))

    def code(self) -> Callable[..., Any]:
        """The function (home, run, *constants, *leaves)."""
        for node in (*self.trace.constants, *self.trace.inputs):
            self.copies[node] = self.graph.node_copy(node)
        needed = _needed(self.trace)
        for node in self.trace.graph.nodes:
            if node in needed and node not in self.hidden:
                self._emit(node)
        outputs = [
            self._emit(output) if isinstance(output, fx.Node) else output
            for output in self.trace.outputs
        ]
        self.graph.output(tuple(outputs))
        return _compile(self.graph)[0]

    def _emit(self, node: fx.Node) -> fx.Node:
        """The copy of a node, after whatever it reads: a branch's values come with its step."""
        if node not in self.copies:
            number = self.hidden.get(node)
            if number is not None:
                self._emit_step(number)
                if node not in self.copies:
                    raise CannotTrace(
                        f"{self.pieces[number].residual.name} and another residual module read "
                        "values of each other's branches"
                    )
                return self.copies[node]
            for source in node.all_input_nodes:
                self._emit(source)
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return self.copies[node]

    def _emit_step(self, number: int) -> None:
        if number in self.emitted:
            return
        self.emitted.add(number)
        piece = self.pieces[number]
        entry, *sides = [self._emit(node) for node in (piece.entry, *piece.sides())]
        step = self.graph.call_method("step", (self.run, number, entry, *sides))
        leaving = [piece.sum, *piece.sideways()]
        for position, node in enumerate(leaving):
            self.copies[node] = self.graph.call_function(operator.getitem, (step, position))
        for node in piece.adds[1:]:
            self.copies[node] = self.copies[piece.sum]
        result = self.copies[piece.sum]
        if piece.tail and not piece.tail_inside:
            result = self.graph.call_method("follow", (self.run, number, result))
        for node in piece.tail:
            self.copies[node] = result


def _sink(trace: Trace, pieces: list[_Piece]) -> None:
    """Move what only one branch reads into it: its activations are then recomputed too."""
    outputs = {output for output in trace.outputs if isinstance(output, fx.Node)}
    owner = {node: piece for piece in pieces for node in piece.region}
    fixed = {node for piece in pieces for node in (*piece.hidden, piece.entry)} | outputs
    for node in reversed(list(trace.graph.nodes)):
        if node.op == "placeholder" or node in fixed or node in trace.mutations:
            continue
        terms = {piece for piece in pieces if node in piece.terms}
        readers = {owner[user] for user in node.users if user in owner} | terms
        outside = any(
            user not in owner and not any(user in p.adds for p in terms) for user in node.users
        )
        if len(readers) == 1 and not outside:
            piece = readers.pop()
            piece.region.add(node)
            owner[node] = piece


def _decisions(
    trace: Trace,
) -> tuple[Callable[..., Any] | None, tuple[Any, ...], tuple[tuple[int, ...], ...] | None]:
    """The guards as a function of the arguments, or the shapes they are good for."""
    if not trace.guards:
        return None, (), None
    nodes = [node for node, _ in trace.guards]
    needed = _ancestors(nodes) | set(nodes)
    free = all(
        node.op == "placeholder" or not isinstance(trace.hints[node], Tensor) for node in needed
    ) and not any(node.op == "call_module" for node in needed)
    if not free:
        leaves = [trace.hints[node] for node in trace.inputs]
        return None, (), tensor_shapes(leaves)
    graph = fx.Graph()
    copies = {n: graph.node_copy(n) for n in (*trace.constants, *trace.inputs)}
    for node in trace.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in nodes))
    return _compile(graph)[0], tuple(value for _, value in trace.guards), None


# ---- graphs ------------------------------------------------------------------------------

_PURE = (operator.getitem, getattr, len, bool, int, float, operator.index)


def _needed(trace: Trace) -> set[fx.Node]:
    """Nodes that are read or do something: unread attributes, items and sizes are left out."""
    needed: set[fx.Node] = {output for output in trace.outputs if isinstance(output, fx.Node)}
    for node in reversed(list(trace.graph.nodes)):
        pure = node.op in ("placeholder", "get_attr") or _is_after(node)
        pure = pure or (node.op == "call_function" and node.target in _PURE)
        pure = pure or not isinstance(trace.hints[node], (Tensor, type(None), tuple, list, dict))
        if node in needed or node in trace.mutations or not pure:
            needed.update((node, *node.all_input_nodes))
    return needed


def _ancestors(nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
    found: set[fx.Node] = set()
    todo = [source for node in nodes for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return frozenset(found)


def _is_after(node: fx.Node) -> bool:
    """Whether a node only says that another's value was changed in place."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "after_effect"


def _is_activation(trace: Trace, node: fx.Node) -> bool:
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


def _is_view(trace: Trace, node: fx.Node) -> bool:
    """Whether a node is all of its first operand's storage under another shape."""
    if node.op not in ("call_function", "call_method") or node in trace.mutations:
        return False
    hint, values = trace.hints.get(node), tensor_operands(trace, node)
    if not isinstance(hint, Tensor) or not values:
        return False
    source = trace.hints[values[0]]
    same = storage_of(hint) == storage_of(source) and hint.numel() == source.numel()
    return same and hint.dtype == source.dtype


def _same_value(trace: Trace, node: fx.Node) -> fx.Node:
    """The node behind calls that gave their operand itself (`nn.Identity`)."""
    while node.op.startswith("call") and node not in trace.mutations:
        inputs = node.all_input_nodes[-1:] if _is_after(node) else node.all_input_nodes
        sources = [n for n in inputs if trace.hints[n] is trace.hints[node]]
        if not sources:
            break
        node = sources[0]
    return node


def _only_operand(trace: Trace, node: fx.Node) -> fx.Node:
    values = [n for n in tensor_operands(trace, node) if n in trace.varying]
    if len(values) != 1:
        raise CannotTrace(f"the trunk cannot be followed through {node.target}")
    return values[0]


def _compile(graph: fx.Graph) -> tuple[Callable[..., Any], str]:
    """A function (home, *placeholders) from a graph."""
    code = graph.python_code(root_module="self")
    return _function(code.src, _Globals(code.globals)), code.src


class _Globals(dict[str, Any]):
    """A function's globals, hashable by content so that equal blocks share their code."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self)))


@functools.lru_cache(maxsize=1024)
def _function(source: str, names: _Globals) -> Callable[..., Any]:
    scope = dict(names)
    exec(compile(source, "<rewire>", "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]
