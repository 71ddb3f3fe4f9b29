"""Cutting a home's traced graph into its residual branches and the code around them.

Each branch becomes a function (home, x, *sides) of the newest stream; what lies around
calls `run.step(number, x, *sides)` where a sum stood. Both are plain Python source that
reads modules and parameters from the home when it runs; a program holds none of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewire.codegen import compiled
from rewire.errors import CannotLink, CannotTrace
from rewire.outer import Outer, Stretch
from rewire.pieces import BranchCode, Piece
from rewire.plans import Residual
from rewire.presence import present
from rewire.structure import Spec
from rewire.traces import (
    Trace,
    ancestors,
    is_after_effect,
    is_whole_view,
    needed_nodes,
    only_operand,
    same_value,
    spelled,
    tensor_operands,
    values_read,
)


@dataclass(frozen=True, eq=False)
class Program:
    """A home's forward in two-stream form, for inputs that decide alike.

    Attributes:
        numbers: Of the home's residual modules those that it runs.
        outer: The code around the branches; calls `run.step`, `run.normalise`, `run.enter`,
            `run.follow`.
        branches: By number of the residual module in the home.
        norms: By number: the normalisation of the sum, or None.
        head_norms: By number: that of the sum before, where this home's code runs it, or None.
        tails: By number: the activation behind the sum, (home, x) -> T(x), or None.
        result: Structure of (result, values of `assigned`).
        assigned: The attributes that the code sets: names of the module, and of the attribute.
        reads: The attributes that the code reads, as in `Trace`.
        constants: Objects the code reads.
        decide: (home, *constants, *leaves) -> what Python decided from sizes; None: nothing.
        decided: The values in the traced run.
        dims: Of each leaf that is a tensor the number of dimensions.
        forms: What the leaves are like but for the values of tensors, where something hangs on
            it that is not known before the code runs; else None.
    """

    numbers: tuple[int, ...]
    outer: tuple[Stretch, ...]
    branches: tuple[BranchCode, ...]
    norms: tuple[BranchCode | None, ...]
    head_norms: tuple[BranchCode | None, ...]
    tails: tuple[Callable[..., Any] | None, ...]
    result: Spec
    assigned: tuple[tuple[str, str], ...]
    reads: tuple[tuple[str | nn.Module, str], ...]
    constants: tuple[Any, ...]
    decide: Callable[..., Any] | None
    decided: tuple[Any, ...]
    dims: tuple[int | None, ...]
    forms: tuple[Any, ...] | None

    def suits(self, home: Any, leaves: Sequence[Any], answers: Sequence[bool]) -> bool:
        """Whether the code's decisions are the same for these arguments and first answers."""
        assumed = [stretch.answer for stretch in self.outer[: len(answers)]]
        if assumed != list(answers) or self.dims != dims_of(leaves):
            return False
        if self.forms is not None and self.forms != forms_of(leaves):
            return False
        if self.decide is None:
            return True
        try:
            return tuple(self.decide(home, *self.constants, *leaves)) == self.decided
        except Exception:  # what the code would not have asked: `n > 0 and 10 % n == 0`
            return False

    def left(self, number: int) -> set[str]:
        """Names of the values that the stretches from `number` on take from those before."""
        gives = {name for stretch in self.outer[number:] for name in stretch.gives}
        return {name for stretch in self.outer[number:] for name in stretch.takes} - gives

    def others(self) -> Iterator[tuple[bool, ...]]:
        """For each question the answers up to it with another answer to that one."""
        answers = [stretch.answer for stretch in self.outer if stretch.answer is not None]
        for number, answer in enumerate(answers):
            yield (*answers[:number], not answer)

    def lacks(self, other: Program, number: int) -> set[str]:
        """What `other` takes where it goes on behind a question and this program does not have."""
        had = self.left(number) | set(self.outer[number - 1].gives)
        return other.left(number) - had


def dims_of(leaves: Iterable[Any]) -> tuple[int | None, ...]:
    """For each leaf its number of dimensions, None for what is no tensor."""
    return tuple(leaf.dim() if isinstance(leaf, Tensor) else None for leaf in leaves)


def forms_of(leaves: Iterable[Any]) -> tuple[Any, ...]:
    """All of the tensors among `leaves` but their values, and the numbers."""
    return tuple(
        (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
        if isinstance(leaf, (Tensor, int, float))
    )


def extract(
    trace: Trace,
    residuals: Sequence[Residual],
    homes: Collection[str],
    trunk: str,
    *,
    in_part: bool = False,
) -> Program:
    """Cut a trace at its residual adds.

    Args:
        trace: Of the home.
        residuals: The residual modules of the home, in order.
        homes: Names, relative to this home, of other homes among its children.
        trunk: "identity", or "inside": activations behind a sum move into its branch.
        in_part: The code may leave some of the residual modules out.

    Raises:
        CannotTrace: The graph is not what was watched.
    """
    numbers = tuple(range(len(residuals)))
    if in_part:
        numbers, residuals = present(trace, residuals)
    elif any(len(trace.adds) != residual.adds for residual in residuals):
        raise CannotTrace(
            f"its trace has {len(trace.adds)} tensor adds, {residuals[0].adds} were watched"
        )
    pieces: list[Piece] = []
    for residual, following in zip_longest(residuals, residuals[1:]):
        pieces.append(Piece(trace, residual, pieces, homes, trunk, following))
    _untangle(trace, pieces)
    _sink(trace, pieces)
    _check_sums(trace, pieces)
    _check_mutations(trace, pieces)
    _check_exits(trace, pieces, homes)
    _check_questions(trace, pieces)
    branches = tuple(piece.branch_code() for piece in pieces)
    norms = tuple(piece.norm_code(piece.norm) for piece in pieces)
    heads = tuple(piece.norm_code(piece.head_norm) for piece in pieces)
    tails = tuple(piece.tail_code() for piece in pieces)
    outer = Outer(trace, pieces).stretches()
    decide, decided, forms = _decisions(trace)
    constants = tuple(trace.constants.values())
    code = branches, norms, heads, tails
    found = trace.result, trace.assigned, tuple(trace.reads)
    dims = dims_of(trace.hints[node] for node in trace.inputs)
    return Program(numbers, outer, *code, *found, constants, decide, decided, dims, forms)


def _untangle(trace: Trace, pieces: list[Piece]) -> None:
    """Leave what several branches share to the first of them, with all that it needs of the others.

    It is computed once: it may draw, or count. Branches of streams that attend to each other
    share the attention; what the other streams hand to it has to be there before.
    """
    for number, piece in enumerate(pieces):
        needed = {*piece.region, *piece.terms}
        needed |= ancestors(needed)
        for later in pieces[number + 1 :]:
            piece.region |= needed & later.region
            later.region -= needed
        before = {node for other in pieces[:number] for node in (*other.hidden, other.sum)}
        for node in trace.graph.nodes:  # what leads from there to the branch is its own as well
            own = any(source in piece.region for source in node.all_input_nodes)
            if own and node in needed - before:
                piece.region.add(node)


def _sink(trace: Trace, pieces: list[Piece]) -> None:
    """Move what only one branch reads into it: its activations are then recomputed too."""
    outputs = {output for output in trace.outputs if isinstance(output, fx.Node)}
    sums = {node for piece in pieces for node in piece.adds}
    changed = {s for node, own in trace.mutations.items() if node not in sums for s in own}
    owner = {node: piece for piece in pieces for node in piece.region}
    fixed = {node for piece in pieces for node in (*piece.hidden, piece.entry)} | outputs
    for node in reversed(list(trace.graph.nodes)):
        touched = trace.storages(node) & changed
        if node.op == "placeholder" or node in fixed or touched:
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


def _check_sums(trace: Trace, pieces: list[Piece]) -> None:
    """A sum is a new tensor: one made in place must not be seen through another's name for it."""
    needed = needed_nodes(trace)
    for piece in pieces:
        for node in (*piece.adds, *piece.tail):
            _check_dtype(trace, node)
            if trace.mutations.get(node, set()) & trace.kept:
                raise CannotTrace(
                    f"it adds in place ({spelled(node)}) to a tensor that a module keeps: write "
                    "x = x + F(x)"
                )
            if any(is_after_effect(user) and user in needed for user in node.users):
                raise CannotTrace(
                    f"it adds in place ({spelled(node)}) and reads the sum through a view taken "
                    "before: write x = x + F(x)"
                )


def _check_dtype(trace: Trace, node: fx.Node) -> None:
    """A sum in place keeps the dtype of what it adds to; a new one has that of both.

    Under autocast what comes next casts it anyway.
    """
    dtypes = [trace.hints[operand].dtype for operand in tensor_operands(trace, node)]
    cast = torch.is_autocast_enabled(trace.hints[node].device.type)
    if node in trace.mutations and dtypes and not cast:
        new = functools.reduce(torch.promote_types, dtypes)
        if new != trace.hints[node].dtype:
            raise CannotTrace(
                f"it adds {new} in place ({spelled(node)}) to {trace.hints[node].dtype}: write "
                "x = x + F(x).to(x.dtype)"
            )


def _check_mutations(trace: Trace, pieces: list[Piece]) -> None:
    """Whatever touches a tensor that is changed in place must keep its order.

    A branch runs as a whole, where its sum is first read. What reads a changed tensor
    later depends on the change; what comes before the branch's first operation stays so. A sum is
    a new tensor, though it is made in place: what it was before is another one.
    """
    order = {node: number for number, node in enumerate(trace.graph.nodes)}
    owner = {node: piece for piece in pieces for node in piece.hidden}
    sums = [node for piece in pieces for node in piece.adds if node in trace.mutations]
    first = {id(piece): min(order[node] for node in piece.hidden) for piece in pieces}
    for change, storages in trace.mutations.items():
        for node in trace.graph.nodes if change not in sums else ():
            mine, its = owner.get(node), owner.get(change)
            inert = node.op in ("placeholder", "get_attr") or is_after_effect(node)
            if inert or mine is its or not trace.storages(node) & storages:
                continue
            start, end = sorted((order[node], order[change]))
            if any(start <= order[s] < end and trace.mutations[s] & storages for s in sums):
                continue
            early, later = (node, mine), (change, its)
            if order[change] < order[node]:
                if mine is None or its is not None:
                    continue
                early, later = later, early
            if later[1] is None or order[early[0]] > first[id(later[1])]:
                raise CannotTrace(
                    f"{spelled(change)} changes a tensor in place that is read inside a residual "
                    "branch and outside of it"
                )


def _check_exits(trace: Trace, pieces: list[Piece], homes: Collection[str]) -> None:
    """A sum that the next home goes on from must leave this home as it is."""
    for piece in pieces:
        if not piece.residual.leads:
            continue
        ends = {node for node in trace.outputs if isinstance(node, fx.Node)}
        for node in trace.graph.nodes:
            if node.op == "call_module" and str(node.target) in homes:
                ends.update(node.all_input_nodes)
        found = {same_value(trace, end) for end in ends}
        goal = same_value(trace, piece.result)
        last = found
        while found and goal not in found:
            last = found
            found = {only_operand(trace, n) for n in found if is_whole_view(trace, n)}
            found = {same_value(trace, node) for node in found}
        if not found:
            name = piece.residual.name
            what = spelled(min(last, key=str)) if last else "something"
            said = f"{what} stands between the sum of {name} and the home's result"
            raise CannotLink(said, name, onwards=True)


def _check_questions(trace: Trace, pieces: list[Piece]) -> None:
    """A branch runs as a whole: no value inside one can decide how it goes on."""
    read = ancestors(trace.asked, until={piece.sum for piece in pieces})
    for piece in pieces:
        if read & piece.region:
            raise CannotTrace(
                f"its forward decides by the values of a tensor in the branch of "
                f"{piece.residual.name}"
            )


def _decisions(
    trace: Trace,
) -> tuple[Callable[..., Any] | None, tuple[Any, ...], tuple[Any, ...] | None]:
    """The guards as a function of the arguments, or the forms of arguments they are good for."""
    if not trace.guards:
        return None, (), None
    nodes = [node for node, _ in trace.guards]
    needed = ancestors(nodes) | set(nodes)
    free = all(
        node.op in ("placeholder", "get_attr") or not isinstance(trace.hints[node], Tensor)
        for node in needed
    ) and not any(node.op == "call_module" for node in needed)
    if not free:
        leaves = [trace.hints[node] for node in trace.inputs]
        if reads := values_read(trace, needed):
            raise CannotTrace(f"its forward decides by the values of a tensor: {spelled(reads)}")
        return None, (), forms_of(leaves)
    graph = fx.Graph()
    copies = {n: graph.node_copy(n) for n in (*trace.constants, *trace.inputs)}
    for node in trace.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in nodes))
    return compiled(graph)[0], tuple(value for _, value in trace.guards), None
