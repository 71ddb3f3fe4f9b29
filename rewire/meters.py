"""Meters of bytes: of live tensors, and of the CUDA allocator.

The first counts exactly, storage by storage, as torch's operations make them and Python and
autograd let them go. What a kernel allocates for itself and frees before it returns is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# This one wraps storage made outside of torch's operations (a constant) into a tensor.
LIFT = torch.ops.aten.lift_fresh.default


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made inside it and are still alive.

    Views do not count twice, and what was there before does not count. A storage counts
    from the operation that made it until it is freed, also when that is after the exit.

    Attributes:
        live: Bytes alive now.
        peak: Most at once.
        trace: Bytes alive after each operation.

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
        self.trace: list[int] = []
        # By address of the storage, which is its own as long as it lives. None: not ours.
        self._sizes: dict[int, int | None] = {}
        self._watchers: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sum: list[weakref.ref[torch.UntypedStorage]] = []

    def __exit__(self, *error: Any) -> None:
        self._note_sum()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def reset_peak(self) -> None:
        """Forget the peak: start again from what is alive now."""
        self.peak = self.live

    def sizes_of(self, values: Any) -> dict[int, int]:
        """Bytes of the storages of all tensors in `values`, by address; those not ours are 0."""
        return {storage._cdata: self.size(storage._cdata) for storage in _storages(values)}

    def size(self, address: int) -> int:
        """Bytes of the storage at an address; 0 where it is not ours, or freed."""
        return self._sizes.get(address) or 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and note the storages that it made or resized."""
        if getattr(func, "namespace", "") == "prim":  # where a fake tensor is, and the like
            return func(*args, **(kwargs or {}))
        self._note_sum()
        given = list(_storages((args, kwargs)))
        for storage in given:
            self._note(storage, made=func is LIFT)
        out = func(*args, **(kwargs or {}))
        if _adds_gradients(func, args):
            self._sum = [weakref.ref(storage) for storage in _storages(out)]
            return out
        for storage in (*given, *_storages(out)):
            self._note(storage, made=True)
        self.trace.append(self.live)
        return out

    def _note_sum(self) -> None:
        """Count the last sum of two gradients, when its summands may have been let go.

        Without a mode like this one autograd adds to one of them in place.
        """
        found, self._sum = self._sum, []
        for storage in (reference() for reference in found):
            if storage is not None:
                self._note(storage, made=True)

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


def formula_of(func: Any) -> Callable[..., int] | None:
    """How many operations a matrix product, convolution or attention takes; of all else None."""
    found: Callable[..., int] | None = flop_registry.get(getattr(func, "_overloadpacket", None))
    return found


class AllocatedBytes:
    """The same on CUDA, by the allocator's statistics.

    Args:
        device: Which.
    """

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
        """Bytes allocated since the start and not freed."""
        return torch.cuda.memory_allocated(self._device) - self._start

    @property
    def peak(self) -> int:
        """Most of them at once."""
        return torch.cuda.max_memory_allocated(self._device) - self._start


Meter = LiveBytes | AllocatedBytes


def meter_for(device: torch.device) -> Meter:
    """The meter of a device."""
    return AllocatedBytes(device) if device.type == "cuda" else LiveBytes()


def _adds_gradients(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operation may be autograd's own, adding up gradients of one value in place.

    It does not where the first of them is a view, whose base is there as well: a weight's gradient
    is the transpose of a product.
    """
    inside = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()
    return inside and func is torch.ops.aten.add.Tensor and not args[0]._is_view()


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Storages of all tensors in arguments or results, inside wrapper subclasses too."""
    for value in tree_leaves(values):
        if not isinstance(value, Tensor):
            continue
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            yield from _storages([getattr(value, name) for name in names])
        elif value.layout == torch.strided and value.device.type != "meta":  # that has no memory
            yield value.untyped_storage()
