"""Finding residual adds in a dataflow graph, by dominance.

An add y = t + F(t) is residual where one operand leads back, through operations that
keep a value in its place (views, activations, scales), to a fork t from which every
other operand is computed. Nothing here looks at names or classes of modules.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import networkx as nx

from rewire.dataflow import ADDITIONS, Op, Watched
from rewire.plans import Skipped

_ACTIVATIONS = frozenset(
    """relu relu6 gelu silu sigmoid tanh elu celu selu mish softplus softsign hardtanh
    hardswish hardsigmoid hardshrink softshrink tanhshrink logsigmoid leaky_relu prelu rrelu
    threshold clamp clamp_min clamp_max""".split()
)
_SCALES = frozenset(("mul", "__mul__", "__rmul__", "div", "true_divide", "__truediv__", "neg"))
_SHIFTS = ADDITIONS | {"sub", "__sub__"}
_COPIES = frozenset(("contiguous", "clone"))
_CASTS = frozenset(("to", "float", "double", "half", "bfloat16", "type", "type_as"))
_NORMS = frozenset(("layer_norm", "batch_norm", "group_norm", "rms_norm", "instance_norm"))
T = TypeVar("T")
Terms = list[tuple[tuple[int, ...], int]]  # (operand at each level of a sum, node)


@dataclass
class Found:
    """A residual add.

    Attributes:
        add: Its node: the value of the sum.
        adds: Nodes of all adds of the sum (more than one where it has several terms).
        skip: Which operand is the skip, at each level of the sum.
        skip_node: The node of that operand.
        fork: The node from which the branch starts.
        branch: Nodes of the branch.
        lowest: Number of the lowest module call that holds fork, branch and add.
        home: That call, or one above it whose code is rewired with it.
        previous: The residual add whose sum is the skip, if any.
        trunk: Nodes between that sum (or the fork) and the skip operand, in order.
        stop: Node at which the way back along the trunk ended without a residual sum.
    """

    add: int
    adds: tuple[int, ...]
    skip: tuple[int, ...]
    skip_node: int
    fork: int
    branch: frozenset[int]
    lowest: int
    home: int
    previous: Found | None = None
    trunk: tuple[int, ...] = ()
    stop: int | None = None
    followers: list[Found] = field(default_factory=list)


def find_residuals(watched: Watched) -> tuple[list[Found], list[Skipped]]:
    """All residual adds of a run, in order, and every other add with the reason."""
    found: list[Found] = []
    skipped: list[Skipped] = []
    by_sum: dict[int, Found] = {}
    for node in range(len(watched.ops)):
        reason, detail = _out_of_question(watched.ops, node)
        if reason:
            skipped.append(_left(watched, node, reason, detail))
    tops, inner = _sums(watched)
    for add in tops:
        terms = list(_terms(watched, add, inner))
        result = _classify(watched, add, terms, found)
        if isinstance(result, Skipped):
            skipped.append(result)
            continue
        if watched.stale.intersection(result.adds):
            detail = "it is in place, and the caller goes on with the tensor that it handed in"
            skipped.append(_left(watched, add, "in place", detail))
            continue
        _follow_trunk(watched, result, by_sum)
        _share_home(watched, result)
        found.append(result)
        by_sum[add] = result
    return found, skipped


def _out_of_question(ops: list[Op], node: int) -> tuple[str, str]:
    """Why an addition cannot be one that is rewired, whatever it adds."""
    op = ops[node]
    operands = [ops[n] for n in op.operands if n is not None]
    if op.name in ADDITIONS and len(operands) == 2 and any(one.complex for one in operands):
        return "complex", "streams are of real numbers: rewire a view_as_real of them"
    if not _adds_tensors(op, ops):
        return "", ""
    if op.scaled:
        return "scaled add", "torch.add with alpha= or out= is not rewired; write x + a * F(x)"
    if op.interior:
        inside = "it is inside a custom autograd function, which has a backward of its own"
        return "own backward", inside
    return "", ""


# ---- sums --------------------------------------------------------------------------------


def is_addition(op: Op, ops: list[Op]) -> bool:
    """Whether an operation of the model's graph adds two floating tensors (and nothing more)."""
    return _adds_tensors(op, ops) and not op.scaled and not op.interior


def _adds_tensors(op: Op, ops: list[Op]) -> bool:
    operands = [node for node in op.operands if node is not None]
    pair = len(operands) == 2 and all(ops[node].floating for node in operands)
    return op.name in ADDITIONS and op.floating and pair


def _sums(watched: Watched) -> tuple[list[int], set[int]]:
    """The adds that are whole sums, and those that are parts of a larger one."""
    ops, graph = watched.ops, watched.graph
    adds = [node for node, op in enumerate(ops) if is_addition(op, ops)]
    known = set(adds)
    inner = {
        node
        for node in adds
        if graph.out_degree(node) == 1
        and (user := next(iter(graph.successors(node)))) in known
        and ops[user].scope == ops[node].scope
        and ops[user].shape == ops[node].shape
    }
    return [node for node in adds if node not in inner], inner


def _terms(
    watched: Watched, add: int, inner: set[int], path: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], int]]:
    operands = [node for node in watched.ops[add].operands if node is not None]
    for side, node in enumerate(operands):
        here = (*path, side)
        if node in inner:
            yield from _terms(watched, node, inner, here)
        else:
            yield here, node


def _adds_of(watched: Watched, add: int, terms: Terms) -> tuple[int, ...]:
    """All adds of a sum: those on the way to any of its terms."""
    found = {add}
    for path, _ in terms:
        node = add
        for side in path[:-1]:
            node = [n for n in watched.ops[node].operands if n is not None][side]
            found.add(node)
    return tuple(sorted(found))


# ---- what is residual --------------------------------------------------------------------


def _classify(watched: Watched, add: int, terms: Terms, found: list[Found]) -> Found | Skipped:
    ops = watched.ops
    nodes = [node for _, node in terms]
    if len(set(nodes)) < len(nodes):
        return _left(watched, add, "x + x", "a value is added to itself")
    adds = _adds_of(watched, add, terms)
    for path, node in terms:
        if ops[node].constant:
            continue
        others = [other for other in nodes if other != node]
        fork, branch = _fork(watched, node, others)
        if fork is None:
            continue
        if ops[node].shape != ops[add].shape:
            detail = f"the sum is {list(ops[add].shape)}, the skip {list(ops[node].shape)}"
            return _left(watched, add, "shape", detail)
        inside = _foreign(branch, fork, found)
        if inside is not None:
            detail = f"its branch holds the trunk that ends at {watched.module(inside.add)}"
            return _left(watched, add, "spans a trunk", detail)
        between = _walk(watched, node, fork)
        home = _home(watched, {*branch, *between, *adds})
        return Found(add, adds, path, node, fork, branch, home, home, trunk=tuple(between))
    return _no_skip(watched, add, nodes)


def _fork(watched: Watched, node: int, others: list[int]) -> tuple[int | None, frozenset[int]]:
    """The nearest node behind `node` from which the other terms are computed, and how."""
    for fork in (node, *_trunk(watched, node, _IN_PLACE)):
        branch = _between(watched.graph, fork, others)
        if any(_kind(watched.ops, n) not in ("view", "elementwise") for n in branch):
            return fork, branch
        if branch:
            return None, frozenset()
    return None, frozenset()


def _between(graph: nx.DiGraph, fork: int, ends: list[int]) -> frozenset[int]:
    """Nodes on the ways from `fork` to `ends` (numbers are a topological order)."""
    behind: set[int] = set()
    todo = [end for end in ends if end > fork]
    while todo:
        node = todo.pop()
        if node not in behind:
            behind.add(node)
            todo.extend(p for p in graph.predecessors(node) if p > fork)
    ahead = {fork}
    for node in sorted(behind):
        if any(p in ahead for p in graph.predecessors(node)):
            ahead.add(node)
    return frozenset(ahead - {fork})


def _foreign(branch: frozenset[int], fork: int, found: list[Found]) -> Found | None:
    """A residual add inside the branch whose own skip comes from elsewhere."""
    for other in reversed(found):
        if other.add <= fork:
            return None
        if other.add in branch and other.fork != fork and other.fork not in branch:
            return other
    return None


def _home(watched: Watched, nodes: set[int]) -> int:
    """The lowest module call that all of the nodes are inside of."""
    return common_prefix([watched.path(node) for node in nodes])[-1]


def common_prefix(paths: Sequence[Sequence[T]]) -> list[T]:
    """What all sequences begin with."""
    prefix = []
    for level in zip(*paths, strict=False):
        if len(set(level)) > 1:
            break
        prefix.append(level[0])
    return prefix


def _no_skip(watched: Watched, add: int, nodes: list[int]) -> Skipped:
    """Why no operand of an add is a skip."""
    graph = watched.graph
    if any(watched.ops[node].constant for node in nodes):
        return _left(
            watched,
            add,
            "constant",
            "an operand does not come from the model's input (bias, position embedding, mask)",
        )
    common = set.intersection(*(nx.ancestors(graph, node) | {node} for node in nodes))
    common = {node for node in common if not watched.ops[node].constant}
    if not common:
        return _left(watched, add, "unrelated", "its operands have nothing in common")
    fork = max(common)
    home = watched.calls[_home(watched, {add, *_between(graph, fork, nodes)})].name
    where = f"both operands are computed, from {watched.module(fork) or 'the input'} on"
    kind = "projection" if home else "lateral"
    return _left(watched, add, kind, f"{where}: no operand is a skip")


def _left(watched: Watched, add: int, reason: str, detail: str) -> Skipped:
    return Skipped(watched.module(add), watched.ops[add].line, reason, detail)


# ---- the trunk ---------------------------------------------------------------------------


_IN_PLACE = ("view", "elementwise")  # kinds of operations that keep a value in its place
_ON_TRUNK = (*_IN_PLACE, "norm", "cast")


def _trunk(watched: Watched, node: int, kinds: Sequence[str] = _ON_TRUNK) -> Iterator[int]:
    """Walk back from a value through operations of certain kinds."""
    while _kind(watched.ops, node) in kinds:
        node = trunk_operand(watched.ops, node)
        yield node


def _walk(watched: Watched, node: int, end: int) -> list[int]:
    """The operations after `end` up to and with `node`, in order."""
    way: list[int] = []
    while node != end:
        way.append(node)
        node = trunk_operand(watched.ops, node)
    return way[::-1]


def _follow_trunk(watched: Watched, found: Found, by_sum: dict[int, Found]) -> None:
    """Find the residual sum that the skip is, and what stands between."""
    node = found.skip_node
    for node in (found.skip_node, *_trunk(watched, found.skip_node)):
        if node in by_sum:
            found.previous = by_sum[node]
            found.trunk = tuple(_walk(watched, found.skip_node, node))
            by_sum[node].followers.append(found)
            return
    found.stop = node


def _share_home(watched: Watched, found: Found) -> None:
    """A branch that begins in the code of the home before it needs that code: one home for both.

    A child that hands on both its sum and the normalised sum has the first layer of the next
    branch in it.
    """
    before = found.previous
    if before is None or before.home == found.home:
        return
    inside = found.home in watched.calls[before.home].path
    if inside and any(before.home in watched.path(node) for node in found.branch):
        before.home = before.lowest = found.home


def share_code(watched: Watched, found: Sequence[Found], apart: Container[str]) -> None:
    """Have one home where the code of one is part of another's, who looks into it for an add.

    Args:
        watched: The run.
        found: The residual adds, whose homes are set.
        apart: Names of homes that are to take no other in.
    """
    for one in found:
        one.home = one.lowest
    waiting = True
    while waiting:
        waiting = False
        for outer in found:
            call = watched.calls[outer.home]
            inside = {c for add in outer.adds for c in watched.path(add)[len(call.path) :]}
            for one in found if inside and call.name not in apart else ():
                if one.home in inside:
                    one.home, waiting = outer.home, True


def trunk_kind(watched: Watched, node: int) -> str:
    """What an operation does to a trunk: "view", "elementwise", "norm", "cast" or "other"."""
    return _kind(watched.ops, node)


def trunk_operand(ops: list[Op], node: int) -> int:
    """The operand that carries the trunk: the one that is no parameter."""
    operands = [n for n in ops[node].operands if n is not None]
    return next((n for n in operands if not ops[n].constant), operands[0])


def _kind(ops: list[Op], node: int) -> str:
    op = ops[node]
    operands = [n for n in op.operands if n is not None]
    values = [n for n in operands if not ops[n].constant]
    name = op.name if op.name.startswith("__") else op.name.rstrip("_")
    if name in _NORMS and op.shape == ops[trunk_operand(ops, node)].shape:
        return "norm"
    if len(values) != 1:
        return "other"
    if op.view:
        return "view"
    if ops[values[0]].shape != op.shape or not op.floating or not ops[values[0]].floating:
        return "other"
    if name in _CASTS:
        return "cast"
    return "elementwise" if name in _SCALES | _SHIFTS | _ACTIVATIONS | _COPIES else "other"
