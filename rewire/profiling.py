"""What one training step costs: peak bytes of live tensors, and time.

On the CPU the bytes are counted exactly, storage by storage, as torch's operations make
them and Python and autograd let them go. What a kernel allocates for itself and frees
before it returns is not seen. On CUDA the allocator's own statistics are used.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from rewire.errors import RewireError
from rewire.isolation import isolated
from rewire.tape import watch_corrections

# This one wraps storage made outside of torch's operations (a constant) into a tensor.
_LIFT = torch.ops.aten.lift_fresh.default


@dataclass(frozen=True)
class Profile:
    """What one training step, forward and backward, of a model costs.

    Parameters, their gradients, buffers and inputs are not counted.

    Attributes:
        peak_bytes: Most bytes of tensors alive at once.
        saved_bytes: Bytes alive between forward and backward, outputs included.
        left_bytes: Bytes alive after the step, outputs dropped, no garbage collected.
        step_seconds: Time of one step, measured without the meter.
        device: Where it was measured.
        correction_bytes: Of the saved bytes, what makes the inverses of the chains exact.
        correction_bits: The same in bits per element of the stream and residual module.
    """

    peak_bytes: int
    saved_bytes: int
    left_bytes: int
    step_seconds: float
    device: str
    correction_bytes: int = 0
    correction_bits: float = 0.0

    def __str__(self) -> str:
        megabytes = [n / 1e6 for n in (self.peak_bytes, self.saved_bytes, self.left_bytes)]
        peak, saved, left = (f"{number:.1f} MB" for number in megabytes)
        bits = f"{self.correction_bits:.2f} bits of correction per element and module"
        return (
            f"peak {peak}, {saved} saved for backward, {left} left, "
            f"{self.step_seconds:.3f} s a step ({self.device})"
            + (f", {bits}" if self.correction_bytes else "")
        )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside it and are still alive.

    Views do not count twice, and what was there before does not count. A storage counts
    from the operation that made it until it is freed, also when that is after the exit.

    Example:
        >>> with LiveBytes() as meter:
        ...     x = torch.ones(1000)
        ...     y = (x + 1).view(10, 100)
        >>> meter.live, meter.peak
        (8000, 8000)
        >>> del y
        >>> meter.live
        4000
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        # By address of the storage, which is its own as long as it lives. None: not ours.
        self._sizes: dict[int, int | None] = {}
        self._watchers: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def reset_peak(self) -> None:
        """Forget the peak: start again from what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and note the storages that it made or resized."""
        given = list(_storages((args, kwargs)))
        for storage in given:
            self._note(storage, made=func is _LIFT)
        out = func(*args, **(kwargs or {}))
        for storage in (*given, *_storages(out)):
            self._note(storage, made=True)
        return out

    def _note(self, storage: torch.UntypedStorage, *, made: bool) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._watchers[key] = weakref.ref(storage, lambda _: self._freed(key))
            self._sizes[key] = 0 if made else None
        size = self._sizes[key]
        if size is not None and size != storage.nbytes():
            self._sizes[key] = storage.nbytes()
            self._count(storage.nbytes() - size)

    def _freed(self, key: int) -> None:
        del self._watchers[key]
        self._count(-(self._sizes.pop(key) or 0))

    def _count(self, change: int) -> None:
        self.live += change
        self.peak = max(self.peak, self.live)


class _AllocatedBytes:
    """The same on CUDA, by the allocator's statistics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> Self:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._start = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize(self._device)

    @property
    def live(self) -> int:
        return torch.cuda.memory_allocated(self._device) - self._start

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._start


def profile(model: nn.Module, *inputs: Any, **kwargs: Any) -> Profile:
    """Measure one training step of a model: forward, a scalar loss, backward.

    The loss is the sum of the means of squares of all floating-point outputs. The model
    runs in the mode it is in; its buffers, gradients and the generators are left as they
    were.

    Args:
        model: Any module.
        *inputs: What to call it with; found by `example_for` where nothing is given.
        **kwargs: Keyword arguments of the call.

    Raises:
        RewireError: No output depends on anything that requires a gradient.
    """
    if not inputs and not kwargs:
        from rewire.inputs import example_for

        example = example_for(model)
        inputs, kwargs = example.args, example.kwargs

    def step(meter: LiveBytes | _AllocatedBytes | None = None) -> int:
        loss = scalar_loss(model(*inputs, **kwargs))
        saved = meter.live if meter else 0
        loss.backward()  # type: ignore[no-untyped-call]
        return saved

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with isolated(model), _zero_gradients(model, (inputs, kwargs)):
        with watch_corrections() as kept:
            step()  # what is made once (tables, workspaces) is no cost of a step
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        seconds = time.perf_counter() - start
        with no_collection(), _meter(device) as meter:
            saved = step(meter)
            left, peak = meter.live, meter.peak
    corrections = sum(row.nbytes for row in kept)
    bits = 8 * corrections / max(1, sum(row.elements for row in kept))
    return Profile(peak, saved, left, seconds, str(device), corrections, bits)


def scalar_loss(output: Any) -> Tensor:
    """The sum of the means of squares of all floating-point tensors in an output.

    Args:
        output: A tensor, or mappings, sequences and dataclasses of tensors, nested.

    Raises:
        RewireError: Nothing in it requires a gradient.
    """
    loss = None
    for tensor in floating_tensors(output):
        # Squares of half precision overflow.
        wide = tensor.float() if tensor.dtype.itemsize < 4 else tensor
        term = wide.square().mean()
        loss = term if loss is None else loss + term
    if loss is None or not loss.requires_grad:
        raise RewireError(
            f"output ({type(output).__name__}): no floating-point tensor in it requires a "
            "gradient. Unfreeze a parameter, or give an input that requires a gradient."
        )
    return loss


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in mappings, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in fields(value)]
    for item in items:
        yield from floating_tensors(item)


@contextmanager
def saved_inside(running: Sequence[str]) -> Iterator[dict[str, int]]:
    """Count the bytes that autograd keeps for backward while something runs.

    What saved-tensor hooks inside it take (a reversible chain's, checkpoint's) does not
    count: autograd hands a tensor to the innermost hooks only.

    Args:
        running: Names of what runs just now, the innermost last; nothing: not counted.

    Yields:
        Bytes by name, filled while forward runs; nothing kept, no entry.
    """
    kept: dict[str, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if running:
            kept[running[-1]] = kept.get(running[-1], 0) + tensor.nbytes
        return tensor.detach()  # a result that its own operation saves would hold itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage once, then keep the collector off: what stays alive is held."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _zero_gradients(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Preallocate gradients, so that they do not count; the caller's come back after."""
    given = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
    leaves = [t for t in (*model.parameters(), *given) if t.requires_grad and t.is_leaf]
    kept = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        yield
    finally:
        for leaf, grad in kept:
            leaf.grad = grad


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Storages of all tensors in arguments or results, inside wrapper subclasses too."""
    for value in tree_leaves(values):
        if not isinstance(value, Tensor):
            continue
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in names])
        elif value.layout == torch.strided:
            yield value.untyped_storage()


def _meter(device: torch.device) -> LiveBytes | _AllocatedBytes:
    return _AllocatedBytes(device) if device.type == "cuda" else LiveBytes()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
