"""What a training step would cost, estimated on tensors that have shapes and no memory.

The step runs operation by operation, as it would, and the meter counts what it would allocate.
Nothing is computed, so that a laptop tells what a step of a large network takes on a large GPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from rewire.accounting import Optimizer, standing
from rewire.errors import RewireError
from rewire.fused import kernels_on_fakes
from rewire.isolation import NEEDS_VALUES, isolated, replace_tensors
from rewire.meters import LIFT, LiveBytes
from rewire.profiling import Profile, TrainingStep, given_or_found


def estimate(
    model: nn.Module,
    *inputs: Any,
    device: str | torch.device | None = None,
    optimizer: Optimizer | None = torch.optim.Adam,
    **kwargs: Any,
) -> Profile:
    """Estimate one training step of a model, on tensors without values: `profile` without memory.

    It runs a copy of the model that has fake tensors in the place of all parameters, buffers and
    inputs; the model is left as it is. What the step allocates is counted operation by operation,
    as `profile` does on the CPU. Not counted, there and here, is what a kernel allocates for
    itself and frees before it returns.

    For CUDA no GPU is needed and none is used: the operations are those of the CPU, but for
    dropout (a mask of one byte), attention (never the matrix of weights) and the streams'
    kernels, which are as on a GPU. Workspaces of cuDNN and cuBLAS and the allocator's
    fragmentation come on top.

    Normalisations on the trunk keep as many bits as their values need; taken are 3 for each
    element.

    Args:
        model: Any module; on the meta device, too.
        *inputs: What to call it with; tensors on the meta device do. Found by `example_for`
            where nothing is given.
        device: "cpu" or "cuda"; that of the parameters where none is given.
        optimizer: As of `profile`.
        **kwargs: Keyword arguments of the call.

    Raises:
        RewireError: The model's code looks at values, or nothing requires a gradient.
    """
    inputs, kwargs = given_or_found(model, inputs, kwargs)
    place = place_of_estimate(model, device)
    there = standing(model, TrainingStep(model, inputs, kwargs).tensors, optimizer)
    advice = ". Measure it: rewire.profile(model, ...)."
    with step_on_fakes(model, inputs, kwargs, place, advice) as step:
        return step.profiled(there, place, LiveBytes(), timed=False)


@contextmanager
def step_on_fakes(
    model: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    place: torch.device,
    advice: str,
) -> Iterator[TrainingStep]:
    """A training step of a copy of a model on fake tensors, as on a device.

    Args:
        model: The model.
        inputs: What to call it with.
        kwargs: Keyword arguments of the call.
        place: The device.
        advice: How the message goes on where the model's code looks at values.

    Raises:
        RewireError: It does.
    """
    operations = _as_on_cuda() if place.type == "cuda" else nullcontext()
    with on_fakes(model, inputs, kwargs) as (twin, args, named), operations:
        step = TrainingStep(twin, args, named)
        try:
            with step.zero_gradients():
                yield step
        except NEEDS_VALUES as error:
            raise RewireError(
                f"{type(model).__name__}: its code looks at the values of tensors "
                f"({error}), which an estimate has not{advice}"
            ) from error


@contextmanager
def on_fakes(
    model: nn.Module, inputs: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """A copy of a model, and inputs, with fake tensors for all that they hold."""
    twin, faked = _own_copy(model), _Fakes()
    with isolated(twin):
        replace_tensors(twin, faked.twin)
        args, named = tree_map(faked.twin, (tuple(inputs), dict(kwargs)))
        with faked.mode, _RealStaysReal():
            yield twin, args, named


def place_of_estimate(model: nn.Module, device: str | torch.device | None) -> torch.device:
    """The device that the estimate is for."""
    if device is None:
        found = next((p.device for p in model.parameters()), torch.device("cpu"))
        return torch.device("cpu") if found.type == "meta" else found
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise RewireError(f"{device}: estimates are for cpu or cuda.") from error
    if place.type not in ("cpu", "cuda"):
        raise RewireError(f"{device}: estimates are for cpu or cuda.")
    return place


def _own_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules with the same tensors in them: what it learns in a run is its own."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # copying asks any object in the model
        raise RewireError(
            f"{type(model).__name__}: an estimate runs a copy, and it cannot be copied "
            f"({type(error).__name__}: {error}). Measure it: rewire.profile(model, ...)."
        ) from error


class _Fakes:
    """Fake twins of tensors, on the CPU wherever those are; one twin for each."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._twins: dict[int, tuple[Tensor, Tensor]] = {}

    def twin(self, value: Any) -> Any:
        """The twin of a tensor; anything else as it is."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in self._twins:
            self._twins[id(value)] = value, self._made(value)
        return self._twins[id(value)][1]

    def _made(self, tensor: Tensor) -> Tensor:
        with self.mode:
            form = tensor.shape, tensor.stride()
            fake = torch.empty_strided(*form, dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)


class _RealStaysReal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations on real tensors alone are run on them: on random states, constants of the code."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        fake = any(isinstance(t, FakeTensor) for t in tensors)
        if fake or not tensors or func is LIFT:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            return func(*args, **(kwargs or {}))


# ---- as on CUDA --------------------------------------------------------------------------


@contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Have what runs on fake tensors keep what it would keep on a GPU."""
    with kernels_on_fakes(), _CudasOperations():
        yield


class _CudasOperations(TorchFunctionMode):
    """Dropout and attention as CUDA does them, on fake tensors."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward and not any(kwargs.values()):
            with self:  # it is off inside of what it lets through, reruns of branches too
                return _backward(args[0])
        replaced = _AS_ON_CUDA.get(func)
        first = args[0] if args else kwargs.get("input", kwargs.get("query"))
        if replaced is None or not isinstance(first, FakeTensor):
            return func(*args, **kwargs)
        return replaced(*args, **kwargs)


def _backward(loss: Tensor) -> None:
    """What `loss.backward()` does, past all modes that would take it for an operation."""
    first = (torch.ones_like(loss),)
    engine = torch.autograd.graph._engine_run_backward
    engine((loss,), first, False, False, (), allow_unreachable=True, accumulate_grad=True)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Keeps a mask of one byte for each element; on the CPU it is as wide as they are."""
    if inplace or not training or p in (0.0, 1.0):
        return _DROPOUT(input, p, training, inplace)
    result: Tensor = torch.native_dropout(input, p, True)[0]
    return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Keeps its operands, its result and one number for each query, dropout or not."""
    if query.dim() != 4 or query.dtype == torch.float64 or enable_gqa:
        rest = attn_mask, dropout_p, is_causal
        return _ATTENTION(query, key, value, *rest, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None:
        mask = attn_mask.to(query.dtype)  # of booleans it makes numbers
        attn_mask = mask.expand(*query.shape[:3], key.shape[2])
    result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]
    return result


def _heads(*args: Any, **kwargs: Any) -> Any:
    """Calls dropout and attention where no mode sees it."""
    with (
        mock.patch.object(F, "dropout", _dropout),
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
    ):
        return F.multi_head_attention_forward(*args, **kwargs)


_DROPOUT, _ATTENTION = F.dropout, F.scaled_dot_product_attention
_AS_ON_CUDA: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _heads,
}
