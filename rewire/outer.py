"""The code of a home around its branches, from decision to decision."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from rewire.codegen import compiled
from rewire.errors import CannotTrace
from rewire.pieces import Piece
from rewire.traces import (
    Trace,
    needed_nodes,
    objects_touched,
    only_operand,
    spelled,
)


@dataclass(frozen=True)
class Stretch:
    """The code around the branches up to a question whether a tensor is true, or to the end.

    Attributes:
        function: (home, run, *constants, *leaves, *values) -> values, or leaves of the result.
        takes: Names of the values that it reads from the stretches before.
        gives: Names of the values it adds to them; the last is the question.
        answer: What the code behind assumes; None at the end.
        constants: How many of the program's constants the code has read by then.
    """

    function: Callable[..., Any]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    answer: bool | None
    constants: int


class Outer:
    """The code around the branches."""

    def __init__(self, trace: Trace, pieces: list[Piece]) -> None:
        self.trace = trace
        self.needed = needed_nodes(trace)
        self.known: list[fx.Node] = []  # what the stretches before have computed
        self.hidden: dict[fx.Node, int] = {}  # a branch's nodes, with its number
        self.tails: dict[fx.Node, int] = {}
        self.pieces = pieces
        self.emitted: set[int] = set()
        self.touching: dict[int, list[fx.Node]] = {}  # who is handed an object, in order
        self.touched: dict[int, list[fx.Node]] = {}  # the same in the code that is written here
        handed = ((node, objects_touched(trace, node)) for node in trace.graph.nodes)
        self.objects = {node: keys for node, keys in handed if keys}
        for node, keys in self.objects.items():
            for key in keys:
                self.touching.setdefault(key, []).append(node)
        self.norms = {piece.norm: n for n, piece in enumerate(pieces) if piece.norm is not None}
        self.heads = {p.head_norm: n for n, p in enumerate(pieces) if p.head_norm is not None}
        for number, piece in enumerate(pieces):
            self.tails |= dict.fromkeys(piece.tail, number)
            self.hidden |= dict.fromkeys(piece.hidden.difference(piece.tail), number)
        self._begin()

    def _begin(self) -> None:
        """A new graph, which takes all that is known."""
        self.graph = fx.Graph()
        self.run = self.graph.placeholder("run")
        arguments = (*self.trace.constants, *self.trace.inputs)
        self.copies = {node: self.graph.node_copy(node) for node in arguments}
        self.taken = {node: self.graph.placeholder(f"known_{node.name}") for node in self.known}
        self.copies |= self.taken

    def stretches(self) -> tuple[Stretch, ...]:
        """The code from question to question."""
        found = []
        for node in self.trace.graph.nodes:
            if node in self.needed and node not in self.hidden:
                self._emit_branches_before(node)
                self._emit(node)
            if node in self.trace.asked:
                new = self._wanted(node)
                found.append(self._end([*new, node], node))
                self.known += new
                self._begin()
        outputs = [
            self._emit(output) if isinstance(output, fx.Node) else output
            for output in self.trace.outputs
        ]
        self.graph.output(tuple(outputs))
        self._check_turns()
        return (*found, self._compiled((), None))

    def _emit_branches_before(self, node: fx.Node) -> None:
        """Run the branches that are handed an object before a node is handed it."""
        for key in self.objects.get(node, ()):
            for before in self.touching[key]:
                if before is node:
                    break
                if before in self.hidden:
                    self._emit_step(self.hidden[before])

    def _check_turns(self) -> None:
        """An object is handed on in the order of the home's own code."""
        for key, nodes in self.touching.items():
            found = self.touched.get(key, [])
            for node, now in zip((node for node in nodes if node in found), found, strict=True):
                if node is not now:
                    raise CannotTrace(
                        f"{spelled(node)} and {spelled(now)} are handed the same object, and "
                        "one of them, in a residual branch, would not run in its turn"
                    )

    def _touch(self, node: fx.Node) -> None:
        for key in self.objects.get(node, ()):
            self.touched.setdefault(key, []).append(node)

    def _wanted(self, question: fx.Node) -> list[fx.Node]:
        """What this stretch has computed and the code behind a question may read.

        That is what it reads with the traced answer, and whatever the code's own variables held.
        """
        nodes = list(self.trace.graph.nodes)
        later = set(nodes[nodes.index(question) + 1 :])
        wanted = {n for n in nodes if n in self.trace.outputs or later.intersection(n.users)}
        wanted |= self.trace.held[question]
        known = {*self.trace.constants, *self.trace.inputs, *self.known, question}
        return [n for n in self.copies if n in wanted - known and n.op != "get_attr"]

    def _end(self, new: Sequence[fx.Node], question: fx.Node) -> Stretch:
        self.graph.output(tuple(self.copies[node] for node in new))
        return self._compiled(tuple(node.name for node in new), question)

    def _compiled(self, gives: tuple[str, ...], question: fx.Node | None) -> Stretch:
        for copied in self.taken.values():
            if not copied.users:
                self.graph.erase_node(copied)
        takes = tuple(node.name for node, copied in self.taken.items() if copied.users)
        answer = None if question is None else self.trace.asked[question]
        met = len(self.trace.constants) if question is None else self.trace.met[question]
        return Stretch(compiled(self.graph)[0], takes, gives, answer, met)

    def _emit(self, node: fx.Node) -> fx.Node:
        """The copy of a node, after whatever it reads: a branch's values come with its step."""
        if node in self.copies:
            return self.copies[node]
        if node in self.norms:
            self._emit_norm(node)
        elif node in self.heads:
            x = self._emit(only_operand(self.trace, node))
            self.copies[node] = self.graph.call_method("enter", (self.run, self.heads[node], x))
        elif node in self.tails:
            self._emit_tail(self.tails[node])
        elif node in self.hidden:
            self._emit_step(self.hidden[node])
        else:
            for source in node.all_input_nodes:
                self._emit(source)
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
            self._touch(node)
        if node not in self.copies:
            raise CannotTrace(
                f"{self.pieces[self.hidden[node]].residual.name} and another residual module read "
                "values of each other's branches"
            )
        return self.copies[node]

    def _emit_step(self, number: int) -> None:
        if number in self.emitted:
            return
        self.emitted.add(number)
        piece = self.pieces[number]
        entry, *sides = [self._emit(node) for node in (piece.entry, *piece.sides())]
        step = self.graph.call_method("step", (self.run, number, entry, *sides))
        for node in self.objects:
            if node in piece.region:
                self._touch(node)
        leaving = [piece.sum, *piece.sideways()]
        for position, node in enumerate(leaving):
            self.copies[node] = self.graph.call_function(operator.getitem, (step, position))
        self.copies |= dict.fromkeys(piece.adds[1:], self.copies[piece.sum])

    def _emit_norm(self, node: fx.Node) -> None:
        x = self._emit(only_operand(self.trace, node))
        if node not in self.copies:  # it came with its step
            number = self.norms[node]
            self.copies[node] = self.graph.call_method("normalise", (self.run, number, x))

    def _emit_tail(self, number: int) -> None:
        piece = self.pieces[number]
        x = self._emit(piece.norm or piece.sum)
        if not piece.tail_inside:
            x = self.graph.call_method("follow", (self.run, number, x))
        self.copies |= dict.fromkeys(piece.tail, x)
