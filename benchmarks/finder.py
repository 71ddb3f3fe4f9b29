"""The residual adds that a network really has, found without rewire.

The network runs once on real tensors, and a dispatch mode below autograd notes every ATen
operation: what `rewire.watching` does above it, with fake tensors and torch functions. Nothing
of rewire is imported here, so that the two can be held against each other.

A sum is residual where one of its terms (the skip) leads back, through operations that keep
each element in its place, to a value from which another term is computed.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ADDS = frozenset(("add", "add_"))
_COPIES = frozenset(("clone", "_to_copy", "contiguous", "copy_", "alias", "lift_fresh"))
_ACTIVATIONS = frozenset(
    """relu gelu silu sigmoid tanh elu celu selu mish softplus hardtanh hardswish hardsigmoid
    leaky_relu prelu _prelu_kernel threshold clamp clamp_min clamp_max log_sigmoid
    log_sigmoid_forward neg""".split()
)
_WITH_CONSTANT = frozenset(("mul", "div", "add", "sub"))
_NORMS = frozenset(
    """native_layer_norm native_batch_norm _native_batch_norm_legit native_group_norm
    _native_batch_norm_legit_no_training _batch_norm_with_update _fused_rms_norm
    cudnn_batch_norm""".split()
)


@dataclass(slots=True)
class Op:
    """An ATen operation, or a tensor that none made.

    Attributes:
        name: Its name without overload and trailing underscore; "input" and "constant" for
            tensors that were there before.
        operands: Nodes of its tensors.
        shape: Of this result.
        bytes: Of this result; 0 for a view.
        floating: Whether the result is of a floating dtype.
        constant: Computed from parameters, buffers and new tensors alone.
        add: It adds two tensors, one to one.
        owner: Qualified name of the module whose code runs it.
        line: File and line of an add.
        turn: How many times the same line of the same call has added before.
        function: The torch function that it is part of.
    """

    name: str
    operands: tuple[int, ...]
    shape: tuple[int, ...]
    bytes: int
    floating: bool
    constant: bool
    add: bool = False
    owner: str = ""
    line: str = ""
    turn: int = 0
    function: str = ""


@dataclass(eq=False)
class ResidualAdd:
    """A residual add of a run.

    Attributes:
        node: The sum.
        owner: Qualified name of the module whose code adds.
        line: File and line.
        fork: The value from which the branch starts.
        skip: The term that is the skip.
        branch: Nodes of the branch, as bits.
        shape: Of the sum.
        turn: As of `Op`.
    """

    node: int
    owner: str
    line: str
    fork: int
    skip: int
    branch: int
    shape: tuple[int, ...]
    turn: int = 0
    following: list[ResidualAdd] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str, int]:
        """The same for each run of the same code."""
        return self.owner, self.line, self.turn


@dataclass(frozen=True)
class Findings:
    """What one run showed.

    Attributes:
        adds: The residual adds, in order.
        chains: Those of them in which each skip is the sum before it; two modules at least.
    """

    adds: list[ResidualAdd]
    chains: list[list[ResidualAdd]]

    @property
    def lengths(self) -> list[int]:
        """Number of residual modules in each chain, the longest first."""
        return sorted(map(len, self.chains), reverse=True)


def find(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Findings:
    """Run a model in eval mode and find its residual adds and the chains they could form."""
    ops = _watched(model, args, kwargs)
    adds = _residual_adds(ops)
    return Findings(adds, _chains(ops, adds))


# ---- one run -----------------------------------------------------------------------------


def _watched(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Op]:
    modes = {module: module.training for module in model.modules()}
    watcher = _Watcher(model, tree_leaves((args, dict(kwargs))))
    fast_paths = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        calls = _TorchCalls(watcher)
        with _owners(model, watcher), torch.enable_grad(), _nothing_saved(), watcher, calls:
            model(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_paths)
        for module, training in modes.items():
            module.training = training
    return watcher.ops


@contextmanager
def _nothing_saved() -> Iterator[None]:
    """The run is as with gradients, and keeps nothing for them."""
    with torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):
        yield


@contextmanager
def _owners(model: nn.Module, watcher: _Watcher) -> Iterator[None]:
    """Tell the watcher whose code runs."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter = module.register_forward_pre_hook(
                lambda *_, name=name: watcher.enter(name), prepend=True
            )
            leave = module.register_forward_hook(lambda *_: watcher.leave())
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        yield


class _TorchCalls(TorchFunctionMode):
    """Tells the watcher which torch function runs: a GRU's own adds are none of the model's."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function and name it."""
        before = self._watcher.function
        self._watcher.function = getattr(func, "__name__", "")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._watcher.function = before


class _Watcher(TorchDispatchMode):
    """Notes every operation and which tensors it read; keeps them all, so that no id returns."""

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.function = ""  # the torch function that runs; none in scripted code
        self._owners: list[tuple[str, Counter[str]]] = [("", Counter())]
        self._nodes: dict[int, int] = {}
        self._sharing: dict[int, list[Tensor]] = {}
        self._inputs = {id(leaf) for leaf in inputs if isinstance(leaf, Tensor)}

    def enter(self, name: str) -> None:
        """A module is called."""
        self._owners.append((name, Counter()))

    def leave(self) -> None:
        """The call has ended."""
        self._owners.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note it, once for each of its results."""
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        name = func.overloadpacket.__name__
        form = name.endswith("_like") or name.startswith("new_")  # no value goes into the result
        operands = () if form else tuple(self._node(tensor) for tensor in given)
        result = func(*args, **kwargs)
        changed = _tensors(_written(func, args, kwargs))
        made = [t for t in _tensors(result) if not any(t is other for other in given)]
        for tensor in (*changed, *made):
            op = self._op(name, operands, tensor, args, kwargs)
            self.ops.append(op)
            if any(tensor is other for other in changed):
                self._changed(tensor, len(self.ops) - 1)
            else:
                self._own(tensor, len(self.ops) - 1)
        return result

    def _op(
        self,
        name: str,
        operands: tuple[int, ...],
        tensor: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Op:
        """The operation that made or changed a tensor."""
        view = next((t for t in _tensors(args) if _storage(t) == _storage(tensor)), None)
        pair = [t for t in args[:2] if isinstance(t, Tensor) and t.is_floating_point()]
        add = name in _ADDS and len(pair) == 2 and kwargs.get("alpha", 1) == 1
        add = add and (not self.function or "add" in self.function)
        if view is not None and view is not tensor and name not in (*_COPIES, "detach"):
            name = "view" if view.numel() == tensor.numel() else "part"
        owner, turns = self._owners[-1]
        line = _line() if add else ""
        turns[line] += 1
        return Op(
            name=name if name in _COPIES else name.rstrip("_"),
            operands=operands,
            shape=tuple(tensor.shape),
            bytes=0 if view is not None else tensor.numel() * tensor.element_size(),
            floating=tensor.is_floating_point(),
            constant=all(self.ops[node].constant for node in operands),
            add=add and tensor.is_floating_point(),
            owner=owner,
            line=line,
            turn=turns[line],
            function=self.function,
        )

    def _node(self, tensor: Tensor) -> int:
        """The operation that made a tensor; where none did, a source or another's alias."""
        if id(tensor) in self._nodes:
            return self._nodes[id(tensor)]
        others = self._sharing.get(_storage(tensor), [])
        others = [t for t in others if t.numel() == tensor.numel()] or others
        behind = (max(self._nodes[id(t)] for t in others),) if others else ()
        name = "constant"
        if behind:  # the result of a custom function may be another name of what is inside it
            name = "view" if others[0].numel() == tensor.numel() else "part"
        elif id(tensor) in self._inputs:
            name = "input"
        constant = self.ops[behind[0]].constant if behind else name == "constant"
        floating = tensor.is_floating_point()
        self.ops.append(Op(name, behind, tuple(tensor.shape), 0, floating, constant))
        self._own(tensor, len(self.ops) - 1)
        return len(self.ops) - 1

    def _own(self, tensor: Tensor, node: int) -> None:
        self._nodes[id(tensor)] = node
        self._sharing.setdefault(_storage(tensor), []).append(tensor)

    def _changed(self, tensor: Tensor, node: int) -> None:
        """Who shares the memory of a tensor changed in place sees the change."""
        for other in self._sharing.get(_storage(tensor), []):
            if other.numel() == tensor.numel():
                self._nodes[id(other)] = node
                continue
            before = self._nodes[id(other)]
            constant = self.ops[before].constant and self.ops[node].constant
            shape, floating = tuple(other.shape), other.is_floating_point()
            self.ops.append(Op("write", (before, node), shape, 0, floating, constant))
            self._nodes[id(other)] = len(self.ops) - 1
        self._nodes[id(tensor)] = node


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that an operation changes."""
    places = enumerate(func._schema.arguments)
    values = [(a, args[n] if n < len(args) else kwargs.get(a.name)) for n, a in places]
    return [v for a, v in values if a.alias_info is not None and a.alias_info.is_write]


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return -id(tensor)


def _line() -> str:
    """File and line of the innermost frame of a model's code; torch's own layers are such code."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        layer = module.startswith("torch.nn.modules.") and module != nn.Module.__module__
        if layer or (module.partition(".")[0] != "torch" and module != __name__):
            break
        frame = frame.f_back
    path = frame.f_code.co_filename.replace("\\", "/")
    return f"{'/'.join(path.rsplit('/', 3)[-3:])}:{frame.f_lineno}"


# ---- residual adds -----------------------------------------------------------------------


def _sets(ops: Sequence[Op]) -> tuple[list[int], list[int], int]:
    """Sets of nodes as bits: what each depends on, what depends on each, and what moves elements.

    Each is in its own first set and not in its second.
    """
    before: list[int] = []
    for node, op in enumerate(ops):
        bits = 1 << node
        for operand in op.operands:
            bits |= before[operand]
        before.append(bits)
    behind = [0] * len(ops)
    for node in reversed(range(len(ops))):
        for operand in ops[node].operands:
            behind[operand] |= behind[node] | 1 << node
    moving = sum(1 << n for n in range(len(ops)) if _carried(ops, n, norms=False) is None)
    return before, behind, moving


def _residual_adds(ops: Sequence[Op]) -> list[ResidualAdd]:
    readers: dict[int, list[int]] = {}
    for node, op in enumerate(ops):
        for operand in set(op.operands):
            readers.setdefault(operand, []).append(node)
    partial = {
        node
        for node, op in enumerate(ops)
        if op.add
        and len(readers.get(node, [])) == 1
        and ops[reader := readers[node][0]].add
        and (ops[reader].owner, ops[reader].shape) == (op.owner, op.shape)
    }
    sets = _sets(ops)
    found: list[ResidualAdd] = []
    for node, op in enumerate(ops):
        if op.add and node not in partial:
            one = _residual(ops, sets, node, list(_terms(ops, node, partial)), found)
            if one is not None:
                found.append(one)
    return found


def _terms(ops: Sequence[Op], node: int, partial: set[int]) -> Iterator[int]:
    for operand in ops[node].operands[:2]:
        if operand in partial:
            yield from _terms(ops, operand, partial)
        else:
            yield operand


def _residual(
    ops: Sequence[Op],
    sets: tuple[list[int], list[int], int],
    node: int,
    terms: Sequence[int],
    found: Sequence[ResidualAdd],
) -> ResidualAdd | None:
    """A sum as x + F(x), where it is one."""
    op = ops[node]
    before, behind, moving = sets
    if len(set(terms)) < len(terms):
        return None
    for skip in terms:
        if ops[skip].constant or ops[skip].shape != op.shape:
            continue
        others = functools.reduce(operator.or_, (before[term] for term in terms if term != skip))
        for fork in (skip, *_carriers(ops, skip, norms=False)):
            branch = behind[fork] & others
            if branch & moving:
                if any(_crosses(one, fork, branch) for one in found):
                    return None
                return ResidualAdd(node, op.owner, op.line, fork, skip, branch, op.shape, op.turn)
            if branch:
                break
    return None


def _crosses(one: ResidualAdd, fork: int, branch: int) -> bool:
    """Whether a residual add in a branch has its own skip from elsewhere."""
    return bool(branch >> one.node & 1) and one.fork != fork and not branch >> one.fork & 1


def _carried(ops: Sequence[Op], node: int, *, norms: bool) -> int | None:
    """The operand whose elements an operation keeps in their places; None if it does not."""
    op = ops[node]
    values = [operand for operand in op.operands if not ops[operand].constant]
    if op.name in _NORMS or (op.function == "rms_norm" and values):  # which ATen spells out
        whole = [value for value in values if ops[value].shape == op.shape]
        return whole[0] if norms and whole else None
    if len(values) != 1:
        return None
    if op.name == "view":
        return values[0]
    same = op.floating and ops[values[0]].shape == op.shape
    place = op.name in _COPIES or op.name in _ACTIVATIONS or op.name in _WITH_CONSTANT
    return values[0] if same and place else None


def _carriers(ops: Sequence[Op], node: int, *, norms: bool) -> Iterator[int]:
    """The way back along a trunk."""
    while (carried := _carried(ops, node, norms=norms)) is not None:
        node = carried
        yield node


# ---- chains ------------------------------------------------------------------------------


def _chains(ops: Sequence[Op], adds: Sequence[ResidualAdd]) -> list[list[ResidualAdd]]:
    by_sum = {one.node: one for one in adds}
    for one in adds:
        way = (one.skip, *_carriers(ops, one.skip, norms=True))
        before = next((by_sum[node] for node in way if node in by_sum), None)
        if before is not None:
            before.following.append(one)
    longest: dict[ResidualAdd, int] = {}
    for one in reversed(adds):
        inside = _branches(one.following)
        one.following = [other for other in one.following if not inside >> other.node & 1]
        longest[one] = 1 + max((longest[other] for other in one.following), default=0)
    done: set[ResidualAdd] = set()
    chains = []
    for start in adds:
        chain: list[ResidualAdd] = []
        one: ResidualAdd | None = start
        while one is not None and one not in done:
            done.add(one)
            chain.append(one)
            one = max(one.following, key=longest.__getitem__, default=None)
        if len(chain) > 1:
            chains.append(chain)
    return _outermost(ops, _once(chains))


def _once(chains: list[list[ResidualAdd]]) -> list[list[ResidualAdd]]:
    """A model that runs the same modules again repeats their chains; two chains may share one."""
    seen: set[tuple[str, str, int]] = set()
    kept = []
    for chain in sorted(chains, key=len, reverse=True):
        shared = [one for one in chain if one.key in seen]
        kept += [part for part in _parts(chain, shared) if len(part) > 1]
        seen |= {one.key for one in chain}
    return kept


def _outermost(ops: Sequence[Op], chains: list[list[ResidualAdd]]) -> list[list[ResidualAdd]]:
    """Chains none of which is inside a branch of another.

    Where a module's branch holds chains, these are taken instead of the module if the bytes of
    the branch that are in none of them are fewer than those of one such branch.
    """

    def held(region: int) -> int:
        return sum(op.bytes for node, op in enumerate(ops) if region >> node & 1)

    todo, kept = list(chains), []
    while todo:
        outer = max(todo, key=lambda chain: _branches(chain).bit_count())
        todo.remove(outer)
        inner = {one: [c for c in todo if one.branch >> c[0].node & 1] for one in outer}
        holders = {one: cs for one, cs in inner.items() if cs}
        whole = [held(one.branch) for one in holders]
        within = sum(held(_branches(o for c in cs for o in c)) for cs in holders.values())
        if holders and sum(whole) - within < max(whole):
            todo += [part for part in _parts(outer, holders) if len(part) > 1]
            continue
        kept.append(outer)
        todo = [c for c in todo if not any(c in cs for cs in inner.values())]
    return sorted(kept, key=lambda chain: chain[0].node)


def _parts(chain: Sequence[ResidualAdd], without: Container[Any]) -> list[list[ResidualAdd]]:
    parts: list[list[ResidualAdd]] = [[]]
    for one in chain:
        if one in without:
            parts.append([])
        else:
            parts[-1].append(one)
    return parts


def _branches(adds: Iterable[ResidualAdd]) -> int:
    return functools.reduce(operator.or_, (one.branch for one in adds), 0)
