"""What one run of a model showed: its operations, and which module call each is in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch._subclasses.fake_tensor import FakeTensorMode

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
