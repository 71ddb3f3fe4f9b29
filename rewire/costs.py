"""What operations cost in time: measured one by one on the device where that is here.

How much the elements of a normalisation cost beside the sums of a convolution differs between
devices by a factor of twenty. So nothing is assumed where it can be measured: an operation that
a step on tensors without values has met runs a few times, alone, on memory of the same form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rewire.meters import formula_of

# Not measured is what takes more memory than this, or, as far as is known, more time.
_BYTES = 2**30
_SECONDS = 0.25
_RUNS = 3
_CACHE = 2**26  # more bytes than caches hold
# Calls of less than this take what calling takes, and say nothing of larger ones.
_AMOUNT = 2**16
# Operations that an element takes where it is only read and written, on a device that is not here:
# what a GPU computes in fp32 in the time of eight bytes.
_PER_ELEMENT = 160
# Namespaces of operations that compute and do nothing else.
_OWN = ("aten", "rewire", "torchvision")


class Form(NamedTuple):
    """What a tensor is, but for its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """An operation with what it is called with, in tensors' forms.

    Attributes:
        func: The operation.
        args: Its arguments; lists are tuples.
        kwargs: Names and values.
        amount: Sums and products, where it is a matrix product or the like; otherwise elements
            that it gives.
        nbytes: Of the tensors that it takes and gives.
        product: Whether it is a matrix product or the like.
    """

    func: Any
    args: tuple[Hashable, ...]
    kwargs: tuple[tuple[str, Hashable], ...]
    amount: int
    nbytes: int
    product: bool


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every operation that runs inside of it and does more than give a view.

    Args:
        tell: Called with each.
    """

    def __init__(self, tell: Callable[[Call], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and tell of it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if getattr(func, "namespace", "") == "prim" or func.is_view:
            return result
        formula = formula_of(func)
        if formula is None:
            amount = sum(tensor.numel() for tensor in _tensors(result))
        else:
            amount = formula(*args, **kwargs, out_val=result)
        nbytes = sum(t.numel() * t.itemsize for t in _tensors((args, kwargs, result)))
        named = tuple((name, _form(value)) for name, value in kwargs.items())
        forms = tuple(map(_form, args))
        self._tell(Call(func, forms, named, amount, nbytes, formula is not None))
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device, with so many threads: what one search has measured serves the next."""
    here = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    return _clocks.setdefault((device, torch.get_num_threads()), Clock(device, here))


@dataclass
class Clock:
    """Tells what operations cost on a device: seconds, or a measure of them where it is not here.

    Only torch's own operations are measured, and those that come with it: one of somebody else
    may do more than compute.

    Attributes:
        device: The device.
        here: Whether operations can run on it.
    """

    device: torch.device
    here: bool
    _measured: dict[Call, float | None] = field(default_factory=dict, repr=False)
    # Seconds and amounts of what was measured: by operation, and of products and all others.
    _paces: dict[Hashable, tuple[float, int]] = field(default_factory=dict, repr=False)

    def measure(self, calls: Iterable[Call]) -> None:
        """Measure what was not yet, the smaller before the larger: they tell what is too large."""
        if self.here:
            for call in sorted({*calls} - self._measured.keys(), key=lambda call: call.nbytes):
                self._measured[call] = self._seconds(call)

    def cost(self, calls: Mapping[Call, int]) -> float:
        """What so many of each call take."""
        self.measure(calls)
        return sum(number * self._of(call) for call, number in calls.items())

    def _of(self, call: Call) -> float:
        if not self.here:
            return float(call.amount * (1 if call.product else _PER_ELEMENT))
        found = self._measured[call]
        return self._expected(call) if found is None else found

    def _seconds(self, call: Call) -> float | None:
        """Measured; None where that takes too much, or the operation alone does not run."""
        large = call.nbytes > _BYTES or self._expected(call) > _SECONDS
        if large or not _only_computes(call.func):
            return None
        try:
            with _disable_current_modes(), torch.no_grad(), _own_draws(self.device):
                seconds = _timed(call, self.device)
        except Exception:  # it wants values that it can do with, or more memory than there is
            return None
        for pace in (call.func, call.product) if call.amount >= _AMOUNT else ():
            before = self._paces.get(pace, (0.0, 0))
            self._paces[pace] = before[0] + seconds, before[1] + call.amount
        return seconds

    def _expected(self, call: Call) -> float:
        """By the pace of its operation, or of its kind; 0 where none is known."""
        for pace in (call.func, call.product):
            seconds, amount = self._paces.get(pace, (0.0, 0))
            if amount:
                return seconds / amount * call.amount
        return 0.0


_clocks: dict[tuple[torch.device, int], Clock] = {}


def _only_computes(func: Any) -> bool:
    """Whether running an operation on anything changes nothing but what it is given."""
    return func.namespace in _OWN and "assert" not in func.name()


def _timed(call: Call, device: torch.device) -> float:
    """Seconds of the fastest of a few runs; of one, where that takes long."""
    args = [_made(value, device) for value in call.args]
    kwargs = {name: _made(value, device) for name, value in call.kwargs}
    cache = _CACHE if call.amount >= _AMOUNT else 0
    elsewhere = torch.empty(cache, dtype=torch.uint8, device=device)
    runs: list[float] = []
    while len(runs) <= _RUNS and sum(runs) < _SECONDS:
        elsewhere.zero_()  # what a step comes to is no longer in the caches
        runs.append(_stopped(lambda: call.func(*args, **kwargs), device))
    return min(runs[1:] or runs)


def _stopped(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a run takes; on a GPU what it takes there, and not what launching takes."""
    if device.type == "cuda":
        start, end = (_event() for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _form(value: Any) -> Hashable:
    """A value as a part of a call."""
    if isinstance(value, Tensor):
        return Form(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, torch.Generator):
        return torch.Generator  # another one draws when it is measured
    return value if isinstance(value, Hashable) else None


def _made(value: Any, device: torch.device) -> Any:
    """A value to call an operation with: tensors of one half everywhere, integers of zeros."""
    if isinstance(value, Form):
        reach = 1 + sum((n - 1) * step for n, step in zip(value.size, value.stride, strict=True))
        fill = 0.5 if value.dtype.is_floating_point or value.dtype.is_complex else 0
        whole = torch.full((max(reach, 0),), fill, dtype=value.dtype, device=device)
        return whole.as_strided(value.size, value.stride)
    if isinstance(value, tuple):
        return [_made(item, device) for item in value]
    if value is torch.Generator:
        return torch.Generator(device)
    return device if isinstance(value, torch.device) else value


def _own_draws(device: torch.device) -> Any:
    """What is drawn inside leaves the generators as they were."""
    cards = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(cards, device_type="cuda")
