"""One residual module in a traced graph, and the code of its branch."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from rewire.codegen import compiled
from rewire.errors import CannotLink, CannotTrace
from rewire.plans import Residual
from rewire.traces import (
    Trace,
    ancestors,
    is_activation,
    is_after_effect,
    is_whole_view,
    needed_nodes,
    only_operand,
    readers,
    same_value,
    spelled,
    storage_of,
    tensor_operands,
)


@dataclass(frozen=True)
class BranchCode:
    """A residual branch as code.

    Attributes:
        name: Name of the residual module.
        function: (home, x, *sides) -> (F, T or None, values that leave it sideways).
        modules: Names, relative to the home, of the modules it calls.
        attributes: (module, name) of the parameters and buffers it reads itself.
        source: The function's source, for people.
    """

    name: str
    function: Callable[..., Any]
    modules: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    source: str


class Piece:
    """One residual module in the traced graph.

    Attributes:
        sum: The node of the sum; `adds` all adds of the sum.
        entry: The node that carries the newest stream in.
        skip: The skip operand; `head` where activations stand between `entry` and it.
        region: Nodes of the branch.
        norm: The node of the normalisation of the sum.
        head_norm: The node of that of the previous sum, where it is this home that normalises it.
        tail: Nodes of the activation behind the sum.
    """

    def __init__(
        self,
        trace: Trace,
        residual: Residual,
        before: list[Piece],
        homes: Collection[str],
        trunk: str,
        following: Residual | None = None,
    ) -> None:
        self.trace = trace
        self.residual = residual
        self.sum = trace.adds[residual.add]
        if residual.block:
            self.entry, self.sum = self._find_block()
            self.skip, self.terms = self.entry, [self.sum]
            self.adds: list[fx.Node] = []
        else:
            self.skip, self.adds, self.terms = self._take_sum()
            sums = {piece.sum for piece in before}
            self.entry = self._find_head_norm() if residual.head_norm else self._find_entry(sums)
        self.head_norm = self.entry if residual.head_norm else None
        self.region = self._find_region()
        self._check(before, homes)
        self._check_entry(before, homes)
        inside = trunk == "inside"
        self.norm = self._find_norm() if residual.norm else None
        leads = residual.leads or (following is not None and not following.head)
        decided = bool(trace.asked) and leads
        self.tail = self._find_tail() if residual.tail or inside or decided else []
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
        node = same_value(self.trace, self.skip)
        if not self.residual.head:
            return node
        starts = self.residual.entry == "fork"
        behind = ancestors(self.terms) if starts else frozenset()
        while node not in sums and node.op != "placeholder" and node not in behind:
            if not starts and not is_activation(self.trace, node):
                break
            node = same_value(self.trace, only_operand(self.trace, node))
        return node

    def _find_head_norm(self) -> fx.Node:
        """The first operation on the way from the home's argument to the skip."""
        norm, node = None, same_value(self.trace, self.skip)
        while node.op != "placeholder":
            if is_activation(self.trace, node):
                norm = node
            node = same_value(self.trace, only_operand(self.trace, node))
        if norm is None:
            raise CannotTrace(f"no normalisation stands before {self.residual.name}")
        return norm

    def _find_block(self) -> tuple[fx.Node, fx.Node]:
        """The argument that a block takes the newest stream from, and its sum in that shape."""
        hints = self.trace.hints
        entry = end = self.sum
        while entry.op != "placeholder":
            entry = self._back(entry)
        while hints[end].shape != hints[entry].shape:
            users = list(end.users)
            if len(users) != 1 or not is_whole_view(self.trace, users[0]):
                raise CannotTrace(f"the sum of {self.residual.name} is not of its input's shape")
            end = users[0]
        return entry, end

    def _back(self, node: fx.Node) -> fx.Node:
        """Where the trunk leads to a node from: the operand that all others come from."""
        size = self.trace.hints[self.sum].numel()
        operands = [n for n in tensor_operands(self.trace, node) if n in self.trace.varying]
        operands = [n for n in operands if self.trace.hints[n].numel() == size]
        operands = operands or node.all_input_nodes[:1]  # an item of what a child gave
        for operand in operands:
            if all(n is operand or operand in ancestors([n]) for n in operands):
                return operand
        if not operands:
            raise CannotTrace(f"the trunk of {self.residual.name} does not begin at an argument")
        return operands[0]

    def _find_region(self) -> set[fx.Node]:
        ahead = {self.entry}
        for node in self.trace.graph.nodes:
            if any(source in ahead for source in node.all_input_nodes):
                ahead.add(node)
        ends = [*self.terms, self.skip] if self.residual.head else self.terms
        return (ahead & (ancestors(ends) | set(ends))) - {self.entry, *self.adds}

    def _check(self, before: list[Piece], homes: Collection[str]) -> None:
        name = self.residual.name
        if not self.region:
            raise CannotTrace(f"the branch of {name} does not start at its skip")
        if any(piece.sum in self.region for piece in before):
            raise CannotTrace(f"the branch of {name} holds another residual module")
        called = {str(node.target) for node in self.region if node.op == "call_module"}
        nested = sorted(called & set(homes))
        if nested:
            raise CannotTrace(f"the branch of {name} calls {nested[0]}, which is rewired itself")

    def _check_entry(self, before: list[Piece], homes: Collection[str]) -> None:
        """A link must lead to the entry: dropout, say, may stand there in train mode only."""
        if self.residual.entry == "fork":
            return
        node = self.entry
        if self.head_norm is not None:
            node = only_operand(self.trace, self.head_norm)
        while is_whole_view(self.trace, node):
            node = only_operand(self.trace, node)
        sums = {piece.result for piece in before} | {piece.sum for piece in before}
        item = node.op == "call_function" and node.target in (operator.getitem, getattr)
        source = same_value(self.trace, node.all_input_nodes[0]) if item else node
        child = source.op == "call_module" and str(source.target) in homes
        outside = self.residual.entry == "outside" and (node.op == "placeholder" or child)
        if not outside and node not in sums:
            said = f"{spelled(node)} stands on the trunk before {self.residual.name}"
            raise CannotLink(said, self.residual.name, onwards=False)

    def _find_norm(self) -> fx.Node:
        """The call that normalises the sum, or a view of it, and alone reads it."""
        node = self.sum
        while node is self.sum or is_whole_view(self.trace, node):
            users = [user for user in node.users if not is_after_effect(user)]
            if len(users) != 1:
                raise CannotTrace(
                    f"the sum of {self.residual.name} is read by {len(users)} operations, not by "
                    "its normalisation alone"
                )
            node = users[0]
        if not is_activation(self.trace, node):
            raise CannotTrace(f"{spelled(node)} stands before the norm of {self.residual.name}")
        return node

    def _find_tail(self) -> list[fx.Node]:
        tail: list[fx.Node] = []
        node = self.norm or self.sum
        while True:
            users = readers(self.trace, node)
            if len(users) != 1 or not is_activation(self.trace, users[0]):
                break
            if tail and self._asks_between(node, users[0]):
                break  # what follows runs only if the answer is the traced one
            node = users[0]
            tail.append(node)
        return tail

    def _asks_between(self, first: fx.Node, last: fx.Node) -> bool:
        nodes = list(self.trace.graph.nodes)
        return any(n in self.trace.asked for n in nodes[nodes.index(first) : nodes.index(last)])

    @property
    def result(self) -> fx.Node:
        """The node whose value later code sees."""
        return self.tail[-1] if self.tail else self.norm or self.sum

    @property
    def hidden(self) -> set[fx.Node]:
        """Nodes that do not appear in the code around the branch."""
        return {*self.region, *self.adds, *self.tail}

    def sides(self) -> list[fx.Node]:
        """Values from outside the branch that it reads."""
        return [node for node in self._read_outside() if node.op != "get_attr"]

    def _read_outside(self) -> list[fx.Node]:
        inputs = {source for node in self.region for source in node.all_input_nodes}
        inputs |= {*self.terms, self.skip} if self.residual.head else set(self.terms)
        outside = inputs - self.region - {self.entry}
        return [node for node in self.trace.graph.nodes if node in outside]

    def sideways(self) -> list[fx.Node]:
        """Nodes of the branch that are read outside of it, where that comes to something."""
        inside = self.region | set(self.adds)
        reading = needed_nodes(self.trace) - inside
        leaving = {n for n in self.region if not reading.isdisjoint(n.users)}
        leaving |= {n for n in self.trace.outputs if isinstance(n, fx.Node)} & self.region
        leaving.discard(self.sum)
        return [node for node in self.trace.graph.nodes if node in leaving]

    # ---- code ----------------------------------------------------------------------------

    def branch_code(self) -> BranchCode:
        """The branch as a function of (home, x, *sides)."""
        graph = fx.Graph()
        x = graph.placeholder("x")
        copies = {self.entry: x}
        for number, node in enumerate(self.sides()):
            copies[node] = graph.placeholder(f"side_{number}")
        if self._changes_entry():
            copies[self.entry] = graph.call_function(torch.clone, (x,))
        for node in self._read_outside():
            if node.op == "get_attr":  # read where it is used: FSDP swaps parameters
                copies[node] = graph.node_copy(node)
        for node in self.trace.graph.nodes:
            if node in self.region:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        branch = self._sum_code(graph, copies, x)
        trunk = copies[self.skip] if self.residual.head else None
        graph.output((branch, trunk, tuple(copies[node] for node in self.sideways())))
        return _as_code(self.residual.name, graph)

    def _sum_code(self, graph: fx.Graph, copies: dict[fx.Node, fx.Node], x: fx.Node) -> fx.Node:
        """F: the sum of all terms but the skip; of a block, the whole sum less its input."""
        branch = functools.reduce(
            lambda a, b: graph.call_function(torch.add, (a, b)),
            [copies[term] for term in reversed(self.terms)],
        )
        if self.residual.block:
            branch = graph.call_function(torch.sub, (branch, x))
        if self.tail_inside:
            branch = _copy_tail(self.trace, graph, self.tail, branch, fresh=True)
        return branch

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
        return compiled(graph)[0]

    def norm_code(self, norm: fx.Node | None) -> BranchCode | None:
        """The normalisation of a sum as a function (home, x) -> (T(x), None, ())."""
        if norm is None:
            return None
        graph = fx.Graph()
        x = graph.placeholder("x")
        given = storage_of(self.trace.hints[only_operand(self.trace, norm)])
        fresh = given in self.trace.mutations.get(norm, ())
        graph.output((_copy_tail(self.trace, graph, [norm], x, fresh=fresh), None, ()))
        return _as_code(self.residual.name, graph)

    def _tail_changes_sum(self) -> bool:
        changed = {s for node in self.tail for s in self.trace.mutations.get(node, ())}
        return storage_of(self.trace.hints[self.sum]) in changed


def _as_code(name: str, graph: fx.Graph) -> BranchCode:
    """A graph as code, with the modules, parameters and buffers that it reads."""
    handed = {n for n in graph.nodes if n.op == "get_attr" and n.meta.get("module")}
    called = [str(n.target) for n in graph.nodes if n.op == "call_module" or n in handed]
    read = [str(n.target).rpartition(".") for n in graph.nodes if n.op == "get_attr"]
    function, source = compiled(graph)
    attributes = tuple(dict.fromkeys((owner, attribute) for owner, _, attribute in read))
    return BranchCode(name, function, tuple(dict.fromkeys(called)), attributes, source)


def _copy_tail(
    trace: Trace, graph: fx.Graph, tail: list[fx.Node], x: fx.Node, *, fresh: bool
) -> fx.Node:
    """Copy the activation nodes behind a sum onto `x`; never in place on a stream."""
    if fresh and tail:
        x = graph.call_function(torch.clone, (x,))
    for node in tail:
        source = only_operand(trace, node)
        inner = ancestors([node], until=[source])
        if outside := [n for n in inner if n.op == "placeholder"]:
            raise CannotTrace(f"{spelled(node)}, behind a sum, reads {outside[0].name} too")
        copies = {source: x}
        for between in trace.graph.nodes:
            if between in inner:
                copies[between] = graph.node_copy(between, copies.__getitem__)
        x = graph.node_copy(node, copies.__getitem__)
    return x
