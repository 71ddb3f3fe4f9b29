"""Comparison: how far rewiring moved a model, before any training."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from rewire.errors import RewireError
from rewire.isolation import isolated, training_mode
from rewire.plans import Chain
from rewire.rewriting import is_rewired, plan_of
from rewire.structure import tensors_of


@dataclass(frozen=True)
class Difference:
    """How far one result is from the original's.

    Attributes:
        name: Name of the chain, or "output".
        relative: ||rewired - original|| / ||original||, over all elements together.
        cosine: Cosine of the angle between both, one for each index of the first dimension
            (the batch), averaged.
    """

    name: str
    relative: float
    cosine: float


@dataclass(frozen=True, repr=False)
class Distance:
    """What `distance` found. Prints as a table.

    Attributes:
        output: Of the models' outputs.
        chains: Of the output of each chain, in the order of the plan.
    """

    output: Difference
    chains: tuple[Difference, ...]

    def __str__(self) -> str:
        rows = [("", "relative", "cosine")]
        rows += [
            (row.name or "(model)", f"{row.relative:.3g}", f"{row.cosine:.4f}")
            for row in (*self.chains, self.output)
        ]
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        lines = []
        for name, *numbers in rows:
            cells = (cell.rjust(width) for cell, width in zip(numbers, others, strict=True))
            lines.append("  ".join((name.ljust(first), *cells)))
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class _Seen:
    """What one run gave, in float64 on the CPU.

    Attributes:
        output: The floating-point tensors in the model's output.
        homes: By name of a home, the first floating-point tensor in its latest result.
    """

    output: list[Tensor]
    homes: dict[str, Tensor]


def distance(original: nn.Module, rewired: nn.Module, /, *inputs: Any, **kwargs: Any) -> Distance:
    """Compare a rewired model with the original on one input.

    Both run in eval mode, without gradients and from the same random state; both are left as
    found. Their forward hooks do not run. BatchNorm statistics are those the models share: if
    the rewired one was recalibrated, the original runs with its statistics too, so compare
    with a copy of the original made before (`copy.deepcopy`).

    Args:
        original: The model before rewiring.
        rewired: What `make_reversible` made of it.
        *inputs: What both are called with.
        **kwargs: Keyword arguments of the call.

    Returns:
        The differences of the outputs (of all floating-point tensors in them together), and of
        the output of each chain: what the home of its last residual module returns, the last
        time it runs. A chain's difference includes what comes from the chains before it.

    Raises:
        RewireError: `rewired` is not rewired or `original` is, the models are not the same, or
            an output holds nothing that can be compared.

    Example:
        Branches that give zero change nothing.

        >>> import rewire, torch
        >>> from rewire.comparison import distance
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        >>> for parameter in model.parameters():
        ...     _ = torch.nn.init.zeros_(parameter)
        >>> x = torch.arange(120.0).reshape(3, 5, 8)
        >>> print(distance(model, rewire.make_reversible(model, x), x))
                relative  cosine
        layers         0  1.0000
        output         0  1.0000
    """
    chains = plan_of(rewired).chains
    if is_rewired(original):
        raise RewireError(
            f"{type(original).__qualname__}: the first model is rewired as well. Pass the original "
            "first; `rewire.rewriting.restored` gives it back."
        )
    homes = {_home(chain): chain.name for chain in chains}
    theirs = _seen(original, "original", homes, inputs, kwargs)
    ours = _seen(rewired, "rewired", homes, inputs, kwargs)
    return Distance(
        _difference("output", theirs.output, ours.output),
        tuple(_chain_difference(chain, theirs, ours) for chain in chains),
    )


def _home(chain: Chain) -> str:
    """Name of the module that returns what a chain computed."""
    return chain.modules[-1].home


def _seen(
    model: nn.Module,
    role: str,
    homes: dict[str, str],
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> _Seen:
    """Run a model once, from the random state as found, leaving nothing behind."""
    modules = {home: _submodule(model, role, home, chain) for home, chain in homes.items()}
    found: dict[str, Tensor] = {}
    with isolated(model), training_mode(model, False), torch.no_grad():
        # `isolated` hides the model's own hooks, and takes these away.
        for home, module in modules.items():
            module.register_forward_hook(functools.partial(_take, found, home))
        args, keywords = tree_map(_fresh, (inputs, kwargs))
        output = _floating(model(*args, **keywords))
    if not output:
        raise RewireError(
            f"output: the {role} model gives no floating-point tensor. Call it so that it returns "
            "features, logits or a loss."
        )
    return _Seen([_kept(tensor) for tensor in output], found)


def _submodule(model: nn.Module, role: str, home: str, chain: str) -> nn.Module:
    try:
        return model.get_submodule(home)
    except AttributeError:
        raise RewireError(
            f"{home}: chain {chain!r} ends there, but the {role} {type(model).__qualname__} has no "
            "such module. Pass the very model that was rewired, before wrapping it."
        ) from None


def _take(found: dict[str, Tensor], home: str, _: nn.Module, __: Any, result: Any) -> None:
    """A forward hook that keeps the latest result: a copy, for it may be changed in place later."""
    tensors = _floating(result)
    if tensors:
        found[home] = _kept(tensors[0])


def _fresh(value: Any) -> Any:
    """A copy: a model may change its input in place, and a cache grows."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _floating(value: Any) -> list[Tensor]:
    """The floating-point tensors in a result, in order.

    One that stands in two places counts twice: in the other model they may be two tensors.
    """
    # The leaves first, since `tensors_of` takes each tensor once and no OrderedDict apart.
    tensors = (tensor for leaf in tree_leaves(value) for tensor in tensors_of(leaf))
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _chain_difference(chain: Chain, original: _Seen, rewired: _Seen) -> Difference:
    home = _home(chain)
    for role, seen in (("original", original), ("rewired", rewired)):
        if home not in seen.homes:
            raise RewireError(
                f"{home or '(model)'}: chain {chain.name!r} ends there, but in the {role} model it "
                "did not run or gave no floating-point tensor. Call the models so that it does."
            )
    return _difference(chain.name, [original.homes[home]], [rewired.homes[home]])


def _difference(name: str, original: Sequence[Tensor], rewired: Sequence[Tensor]) -> Difference:
    theirs, ours = ([list(tensor.shape) for tensor in side] for side in (original, rewired))
    if theirs != ours:
        raise RewireError(
            f"{name or '(model)'}: the original gives floating-point tensors of shapes {theirs}, "
            f"the rewired model of {ours}. Pass the model that was rewired; "
            "`rewire.rewriting.restored` gives it back."
        )
    return Difference(name, _relative(original, rewired), _cosine(original, rewired))


def _relative(original: Sequence[Tensor], rewired: Sequence[Tensor]) -> float:
    """||b - a|| / ||a|| over all elements; infinite where only a is zero."""
    pairs = zip(original, rewired, strict=True)
    difference = math.sqrt(sum(float((b - a).square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(a.square().sum()) for a in original))
    if size == 0:
        return math.inf if difference > 0 else difference
    return difference / size


def _cosine(original: Sequence[Tensor], rewired: Sequence[Tensor]) -> float:
    """Mean over the batch of a·b / (||a|| ||b||): 1 for two zeros, 0 where one of both is."""
    a, b = _samples(original), _samples(rewired)
    lengths, others = a.norm(dim=1), b.norm(dim=1)
    products = lengths * others
    zero = (lengths == others).double()
    cosines = torch.where(products == 0, zero, (a * b).sum(1) / products)
    return float(cosines.clamp(-1, 1).mean())


def _samples(tensors: Sequence[Tensor]) -> Tensor:
    """[batch, elements]: everything that has the batch as its first dimension.

    Others (a loss beside the logits) have no part in a sample.
    """
    batched = [tensor for tensor in tensors if tensor.dim()]
    if not batched:
        return torch.stack(list(tensors)).reshape(1, -1)
    batch = len(batched[0])
    return torch.cat([t.reshape(batch, -1) for t in batched if len(t) == batch], 1)
