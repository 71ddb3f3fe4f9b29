"""One run of a model: what it gives, changes, stores, and its gradients."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import rewire
from rewire.inputs import Example, mapped
from rewire.isolation import training_mode
from rewire.meters import LiveBytes
from rewire.profiling import floating_tensors
from rewire.recorder import watched_calls
from rewire.reversible import kept_grids


@dataclass(frozen=True)
class AsOriginal(rewire.Coupling):
    """x_{i+1} = x_i + F_i(x_i): the network before rewiring, run by the rewired one's code."""

    name: ClassVar[str] = "as the original"

    def coefficients(self, x: Tensor, training: bool) -> rewire.Coefficients:
        return rewire.Coefficients(1.0, 0.0, 1.0)


def as_original(model: nn.Module, plan: rewire.Plan) -> nn.Module:
    """A rewired model whose coupling is the original's and whose streams are plain floats."""
    plain = rewire.make_reversible(model, plan=plan, coupling=AsOriginal())
    for module in plain.modules():
        if isinstance(module, rewire.ReversibleSequential):
            module.course.precision = "fast"
    return plain


def same_as(
    model: nn.Module, plain: nn.Module, limit: float = 0.0
) -> Callable[[Example | None, bool], bool | None]:
    """Whether outputs and buffers are the same; None where the original refuses the call.

    Args:
        model: The original.
        plain: The rewired model.
        limit: Largest relative difference; 0: the same bits.
    """

    def same(example: Example | None, training: bool) -> bool | None:
        if example is None:
            return None
        try:
            wanted = outcome(model, example, training)
        except Exception:  # not an input of this model
            return None
        with rewire.store_activations(plain):
            found = outcome(plain, example, training)
        pairs = zip(found, wanted, strict=True)
        return len(found) == len(wanted) and all(_alike(a, b, limit) for a, b in pairs)

    return same


def _alike(a: Tensor, b: Tensor, limit: float) -> bool:
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    if limit == 0 or not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = torch.maximum(b.abs(), b.abs().median())  # not that of a mask's smallest number
    return bool(((a - b).abs() <= limit * scale).all())


def outcome(model: nn.Module, example: Example, training: bool) -> list[Tensor]:
    with unchanged(model), torch.set_grad_enabled(training):
        model.train(training)
        _seed()
        leaves = [t.detach().clone() for t in results_of(call(model, example))]
        return [*leaves, *(b.clone() for b in model.buffers())]


def results_of(output: Any) -> list[Tensor]:
    """The tensors in what a model gives.

    Raises:
        LookupError: There is none: what cannot be seen cannot be compared.
    """
    found = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    found = found or list(floating_tensors(output))
    if not found:
        raise LookupError(f"no tensor is found in a {type(output).__qualname__}")
    return found


def _seed() -> None:
    """Dropout is the same, and which layers are dropped."""
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(0)


def call(model: nn.Module, example: Example) -> Any:
    args, kwargs = fresh(example)
    return model(*args, **kwargs)


def fresh(example: Example) -> tuple[Any, Any]:
    """Arguments that a model may write into."""
    own = mapped(example, Tensor.clone)
    return own.args, own.kwargs


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and training flags afterwards are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with training_mode(model, model.training):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def other_size(example: Example) -> Example | None:
    """Larger pictures and volumes, shorter texts."""
    changed = False

    def other(leaf: Tensor) -> Tensor:
        nonlocal changed
        if leaf.dim() < 2:
            return leaf
        if leaf.is_floating_point() and leaf.dim() >= 4:
            sizes = [2 * n if leaf.dim() == 5 and n < 32 else n + 32 for n in leaf.shape[-2:]]
            changed = True
            return torch.randn(*leaf.shape[:-2], *sizes)
        if not leaf.is_floating_point() and leaf.shape[1] > 5:
            changed = True
            return leaf[:, :-3]
        return leaf

    resized = mapped(example, other)
    return resized if changed else None


def training_step(model: nn.Module, example: Example, half: bool) -> list[Tensor | None]:
    """Outputs, and gradients for all parameters, and without autocast for the inputs.

    Raises:
        LookupError: There are no gradients.
    """
    given = mapped(example, lambda leaf: leaf.clone().requires_grad_(_takes_gradients(leaf, half)))
    inputs = [t for t in tree_leaves((given.args, given.kwargs)) if isinstance(t, Tensor)]
    leaves = [t for t in (*model.parameters(), *inputs) if t.requires_grad]
    with unchanged(model), kept_grids(model):
        model.train()
        _seed()
        with torch.autocast("cpu", torch.bfloat16, half):
            output = results_of(call(model, given))
        ends = [tensor for tensor in output if tensor.requires_grad]
        toward = [torch.randn_like(end) for end in ends]
        gradients = torch.autograd.grad(ends, leaves, toward, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise LookupError("no parameter has a gradient")
    return [*(end.detach() for end in output), *gradients]


def _takes_gradients(leaf: Tensor, half: bool) -> bool:
    return leaf.is_floating_point() and not half


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two gradients are the same, or both missing."""
    return a is b if a is None or b is None else _alike(a, b, 0.0)


def live_bytes(model: nn.Module, example: Example) -> int:
    """Bytes of all that a training forward leaves alive for backward, its output not counted.

    Of the second one: in the first a rewired model is traced, on fake tensors.
    """
    with unchanged(model), torch.enable_grad():
        model.train()
        call(model, example)
        _seed()
        args, kwargs = fresh(example)
        with LiveBytes() as meter:
            output = model(*args, **kwargs)
        alive = meter.live
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in results_of(output)}
    return alive - sum(storage.nbytes() for storage in storages.values())


def stored_bytes(model: nn.Module, example: Example) -> Counter[str]:
    """Bytes that saved-tensor hooks see in one training forward, by the part of the model."""
    bytes_of: dict[int, tuple[str, int]] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    owners = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            part = ".".join(owners[-1].split(".")[:2])
            bytes_of.setdefault(storage.data_ptr(), (part, storage.nbytes()))
        return tensor.detach()  # a result that its own operation saves would hold itself alive

    with unchanged(model), _owners(model, owners), torch.enable_grad():
        model.train()
        _seed()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call(model, example)  # alive, so that no address is used twice
    del output
    counted: Counter[str] = Counter()
    for part, size in bytes_of.values():
        counted[part] += size
    return counted


@contextmanager
def _owners(model: nn.Module, owners: list[str]) -> Iterator[None]:
    """Note whose code runs. Hooks would be seen by rewired modules, which have their own rules."""
    names = {id(module): name for name, module in model.named_modules()}

    def noted(original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        owners.append(names.get(id(module), owners[-1]))
        try:
            return original(module, *args, **kwargs)
        finally:
            owners.pop()

    with watched_calls(noted):
        yield


def cast(example: Example, dtype: torch.dtype) -> Example:
    return mapped(example, lambda t: t.to(dtype) if t.is_floating_point() else t)


def runs_to_numbers(model: nn.Module, example: Example) -> bool:
    """Whether it does, in eval mode, to numbers."""
    try:
        leaves = outcome(model, example, False)
    except Exception:  # whatever it is, the network has no such dtype
        return False
    return not any(leaf.isnan().any() for leaf in leaves if leaf.is_floating_point())
