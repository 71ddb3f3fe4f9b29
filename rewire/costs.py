"""What operations cost in time: measured one by one on the device where that is here.

How much the elements of a normalisation cost beside the sums of a convolution differs between
devices by a factor of twenty. So nothing is assumed where it can be measured: an operation that
a step on tensors without values has met runs a few times, alone, on memory of the same form.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
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
            that it takes and gives.
        product: Which of these.
    """

    func: Any
    args: tuple[Hashable, ...]
    kwargs: tuple[tuple[str, Hashable], ...]
    amount: int
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
            touched = (leaf for leaf in tree_leaves((args, kwargs, result)))
            amount = sum(leaf.numel() for leaf in touched if isinstance(leaf, Tensor))
        else:
            amount = formula(*args, **kwargs, out_val=result)
        named = tuple((name, _form(value)) for name, value in kwargs.items())
        forms = tuple(map(_form, args))
        self._tell(Call(func, forms, named, amount, formula is not None))
        return result


def clock_of(device: torch.device) -> Clock:
    """The clock of a device: what one search has measured serves the next."""
    here = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
    return _clocks.setdefault(device, Clock(device, here))


@dataclass
class Clock:
    """Tells what operations cost on a device: seconds, or a measure of them where it is not here.

    Attributes:
        device: The device.
        here: Whether operations can run on it.
    """

    device: torch.device
    here: bool
    _measured: dict[tuple[Call, int], float | None] = field(default_factory=dict, repr=False)
    # Seconds and amounts of what was measured: by operation, and of products and all others.
    _paces: dict[Hashable, tuple[float, int]] = field(default_factory=dict, repr=False)

    def cost(self, calls: Mapping[Call, int]) -> float:
        """What so many of each call take."""
        return sum(number * self._of(call) for call, number in calls.items())

    def _of(self, call: Call) -> float:
        if not self.here:
            return float(call.amount * (1 if call.product else _PER_ELEMENT))
        key = call, torch.get_num_threads()
        if key not in self._measured:
            self._measured[key] = self._seconds(call)
        found = self._measured[key]
        return self._expected(call, call.func, call.product) if found is None else found

    def _seconds(self, call: Call) -> float | None:
        """Measured; None where that takes too much, or the operation alone does not run."""
        if self._expected(call, call.func) > _SECONDS or _bytes(call) > _BYTES:
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

    def _expected(self, call: Call, *paces: Hashable) -> float:
        """By the first of these paces that is known."""
        for pace in paces:
            seconds, amount = self._paces.get(pace, (0.0, 0))
            if amount:
                return seconds / amount * call.amount
        return 0.0


_clocks: dict[torch.device, Clock] = {}


def _timed(call: Call, device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    args = [_made(value, device) for value in call.args]
    kwargs = {name: _made(value, device) for name, value in call.kwargs}
    cache = _CACHE if call.amount >= _AMOUNT else 0
    elsewhere = torch.empty(cache, dtype=torch.uint8, device=device)
    runs = []
    for _ in range(1 + _RUNS):
        elsewhere.zero_()  # what a step comes to is no longer in the caches
        _settle(device)
        start = time.perf_counter()
        call.func(*args, **kwargs)
        _settle(device)
        runs.append(time.perf_counter() - start)
    return min(runs[1:])


def _settle(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _form(value: Any) -> Hashable:
    """A value as a part of a call."""
    if isinstance(value, Tensor):
        return Form(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
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
    return device if isinstance(value, torch.device) else value


def _bytes(call: Call) -> int:
    """Bytes of the tensors that a call is given."""
    forms = _forms((call.args, call.kwargs))
    return sum(torch.Size(form.size).numel() * form.dtype.itemsize for form in forms)


def _forms(value: Any) -> Iterator[Form]:
    if isinstance(value, Form):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _forms(item)


def _own_draws(device: torch.device) -> Any:
    """What is drawn inside leaves the generators as they were."""
    cards = [device] if device.type == "cuda" else []
    return torch.random.fork_rng(cards, device_type="cuda")
