"""A grid for the streams: additions on it are exact, so what they made can be taken apart.

All values of a chain's streams are multiples of one power of two g. Sums of float32
multiples of g are exact up to 2^24 g (2^53 g in float64), so x' = P + round(F / g) g gives
back P bit for bit. The gradient is that of x' = P + F (straight-through).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_HEADROOM = 3  # streams may grow to 2^3 times their largest value before the grid is too fine
_CROWDED = 2.0  # coarsened for the next run where less than this factor is left
_SPARSE = 2.0**10  # refined for the next run where more than this factor is unused
_ORDINARY = 4.0  # the first grid expects streams to grow at least to this, times the headroom


class _Format(NamedTuple):
    """Bits of a floating dtype: its integer twin, explicit mantissa bits, largest exponent."""

    integer: torch.dtype
    mantissa: int
    top: int


_FORMATS = {
    torch.float32: _Format(torch.int32, 23, 254),
    torch.float64: _Format(torch.int64, 52, 2046),
}


class OnGrid(NamedTuple):
    """The grid that two streams stand on.

    Attributes:
        step: The spacing g, a power of two; 0-dimensional, in the dtype of the streams.
        inverse: 1 / g.
        behind: The older stream stands on a finer grid, from before the grid was coarsened.
    """

    step: Tensor
    inverse: Tensor
    behind: bool = False


def reach(dtype: torch.dtype) -> float:
    """How many steps from zero sums are exact: 2^24 in float32, 2^53 in float64."""
    return float(2 ** (_FORMATS[dtype].mantissa + 1))


def rounded(x: Tensor, grid: OnGrid) -> Tensor:
    """`x` on the grid, in the dtype of the streams; a new tensor without graph."""
    dtype = grid.step.dtype
    x = x.detach()
    units = x.mul(grid.inverse) if x.dtype == dtype else x.to(dtype).mul_(grid.inverse)
    # Not `mul_`: that leaves -0 where the inverse gives 0, and a branch may look at the sign.
    return torch.addcmul(torch.zeros_like(grid.step), units.round_(), grid.step, out=units)


class Grid:
    """The grid of one chain, from the largest value of its streams in the run before.

    It lives with the chain, on the device, and is read there: choosing it never waits for the
    device but in the chain's first run. It is no part of the `state_dict`: the first batch after
    loading builds it anew.
    """

    def __init__(self) -> None:
        self._last: _Last | None = None
        self._first = True

    def open(self, x: Tensor) -> OnGrid:
        """The grid for a run that begins with the stream `x`."""
        largest = largest_of(x)
        last = None if _valueless(x) else self._last
        self._first = last is None or (last.dtype, last.device) != (x.dtype, x.device)
        if self._first or last is None:
            sound = largest.nan_to_num(_ORDINARY, _ORDINARY).clamp_(min=_ORDINARY)
            step = _spacing(sound, torch.ones_like(largest))
        else:
            known = last.step
            seen = torch.maximum(last.largest, largest)
            room = known * reach(x.dtype)
            unfit = (seen * _CROWDED > room) | (seen * _SPARSE < room)
            step = torch.where(unfit, _spacing(seen, known), known)
        if not _valueless(x):
            self._last = _Last.of(step, largest)
        return OnGrid(step, _reciprocal(step))

    def current(self, dtype: torch.dtype) -> OnGrid | None:
        """The grid of the last run."""
        if self._last is None or self._last.dtype != dtype:
            return None
        return OnGrid(self._last.step, _reciprocal(self._last.step))

    def watch(self, stream: Tensor, grid: OnGrid, largest: Tensor | None = None) -> OnGrid | None:
        """Note the largest value of a new stream; a coarser grid where it does not fit.

        On an accelerator that is looked at in the chain's first run only, which waits for the
        device; later the grid is coarsened for the next run.
        """
        if _valueless(stream):
            return None
        largest, last = largest_of(stream) if largest is None else largest, self._last
        if last is None or (last.dtype, last.device) != (stream.dtype, stream.device):
            last = _Last.of(grid.step, largest)
        self._last = last = last.seeing(largest)
        if not (self._first or stream.device.type == "cpu"):
            return None
        value = float(largest)
        if not math.isfinite(value):  # the run is lost, its grid need not be
            self._last = None if self._first else self._last
            return None
        if value <= float(grid.step) * reach(stream.dtype) / 2:  # corrections need one bit more
            return None
        step = _spacing(largest, grid.step)
        self._last = _Last.of(step, last.largest)
        return OnGrid(step, _reciprocal(step))._replace(behind=True)


class _Last(NamedTuple):
    """The grid of the last run and the largest value in it; numbers where the host has them."""

    dtype: torch.dtype
    device: torch.device
    held: tuple[float | Tensor, float | Tensor]

    @classmethod
    def of(cls, step: Tensor, largest: Tensor) -> _Last:
        """From 0-dimensional tensors."""
        on_host = step.device.type == "cpu"
        held = (float(step), float(largest)) if on_host else (step, largest)
        return cls(step.dtype, step.device, held)

    def seeing(self, largest: Tensor) -> _Last:
        """The same grid, and the larger of two values; NaN is the largest of all."""
        step, before = self.held
        if isinstance(before, Tensor):
            return self._replace(held=(step, torch.maximum(before, largest)))
        value = float(largest)
        return self if value <= before or math.isnan(before) else self._replace(held=(step, value))

    @property
    def step(self) -> Tensor:
        return torch.as_tensor(self.held[0], dtype=self.dtype, device=self.device)

    @property
    def largest(self) -> Tensor:
        return torch.as_tensor(self.held[1], dtype=self.dtype, device=self.device)


def _valueless(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) or x.device.type == "meta"


def largest_of(x: Tensor) -> Tensor:
    """The largest absolute value, 0-dimensional; 0 of nothing, NaN where there is one."""
    x = x.detach()
    if x.numel() == 0:
        return x.new_zeros(())
    if x.device.type == "cpu":  # there the norm is not vectorised, and takes 30 times as long
        return torch.maximum(x.amin().abs(), x.amax().abs())
    largest: Tensor = torch.linalg.vector_norm(x, float("inf"))
    return largest


def _spacing(largest: Tensor, default: Tensor) -> Tensor:
    """2^(ceil(log2 largest) + headroom) over the reach; `default` where that is not finite.

    Computed on the bits of the exponent: exact on every device.
    """
    form = _FORMATS[largest.dtype]
    exponent = largest.view(form.integer) >> form.mantissa
    lowest = 1 + form.mantissa
    shifted = (exponent + 1 + _HEADROOM - (form.mantissa + 1)).clamp(lowest, form.top - lowest)
    step = (shifted << form.mantissa).view(largest.dtype)
    return torch.where(torch.isfinite(largest), step, default)


def _reciprocal(step: Tensor) -> Tensor:
    form = _FORMATS[step.dtype]
    bits = step.view(form.integer) >> form.mantissa
    return ((form.top - bits) << form.mantissa).view(step.dtype)


class _Straight(torch.autograd.Function):
    """A value, with the gradient of a weighted sum of tensors.

    Never run under torch.func transforms (there is no grid then), so without `setup_context`,
    whose binding of arguments takes longer than all the rest.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, weights: tuple[Any, ...], *terms: Tensor) -> Tensor:
        ctx.weights = weights
        ctx.forms = [(term.shape, term.dtype) for term in terms]
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows = zip(ctx.needs_input_grad[2:], ctx.weights, ctx.forms, strict=True)
        found = [weighted(gradient, w, *form) if needed else None for needed, w, form in rows]
        return None, None, *found


def weighted(gradient: Tensor, weight: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The gradient of one term: weighted, summed to the term's shape, in its dtype."""
    gradient = gradient if type(weight) is float and weight == 1.0 else gradient * weight
    return gradient.sum_to_size(shape).to(dtype)


def straight(value: Tensor, *terms: tuple[Any, Tensor]) -> Tensor:
    """`value`, with the gradient of the sum of weight * tensor over `terms`.

    Args:
        value: [*S], without graph.
        terms: (weight, tensor): weights are numbers or tensors that broadcast to [*S].
    """
    used = [(w, t) for w, t in terms if not (type(w) is float and w == 0.0)]
    if not (torch.is_grad_enabled() and any(t.requires_grad for _, t in used)):
        return value
    weights, tensors = zip(*used, strict=True)
    result: Tensor = _Straight.apply(value, weights, *tensors)
    return result
