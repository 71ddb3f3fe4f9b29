"""Normalisations on the trunk, undone from their mean and deviation.

x = T(z) = w (z - mean) / dev + bias is undone by z = (x - bias) / w dev + mean. Mean and deviation
are two numbers per normalised group and are kept; the rounding of x, magnified by dev / w, is
what a packed correction keeps. Whatever T really is, the correction makes its inverse exact: a
wrong guess costs bits, never bits of the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rewire.corrections import Columns
from rewire.grid import OnGrid, rounded


class Affine(NamedTuple):
    """z = (x - bias) scale dev + mean; tensors that broadcast to z, in its dtype."""

    mean: Tensor
    dev: Tensor
    scale: Tensor | None
    bias: Tensor | None
    channels: int  # the dimension of `scale` and `bias`


class Watching(TorchFunctionMode):
    """Run a normalisation in the precision of its input, and see how it can be undone."""

    def __init__(self) -> None:
        super().__init__()
        self._read: Callable[[dict[str, Any]], _Seen] | None = None
        self._call: dict[str, Any] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        read = _READERS.get(func)
        if read is None:
            return func(*args, **(kwargs or {}))
        bound = inspect.signature(func).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        call = bound.arguments
        self._read, self._call = read, call
        dtype = call["input"].dtype
        running = call.get("running_mean")
        if running is not None and running.dtype != dtype:  # they are updated in their own dtype
            return func(**{**call, "input": call["input"].to(running.dtype)}).to(dtype)
        wide = {n: call[n].to(dtype) for n in ("weight", "bias") if call.get(n) is not None}
        return func(**{**call, **wide})

    def affine(self, z: Tensor) -> Affine | None:
        """How to undo the last normalisation that ran, whose input is `z` or a view of it."""
        if self._read is None or z.numel() == 0 or z.dim() < 2:
            return None
        with torch.no_grad():
            return _as_seen(self._read(self._call), self._call["input"], z)


@dataclass(slots=True)
class Normed:
    """The arithmetic of one normalisation as it ran: x = T(z) on the grid.

    Attributes:
        grid: Where the streams stand.
        affine: How T is undone; None where that is not known.
        correction: What the inverse cannot know.
        kept: z itself, where that is cheaper.
    """

    grid: OnGrid
    affine: Affine | None
    correction: Columns | None = None
    kept: Tensor | None = None

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The value of the stream for T(z), in the layout of z: both streams stay in one."""
        value = rounded(x, self.grid)
        return value if value.stride() == z.stride() else torch.empty_like(z).copy_(value)

    def keep(self, x: Tensor, z: Tensor, *, unfit: bool = False) -> None:
        """Keep what the inverse will need of z.

        Args:
            x: T(z) on the grid.
            z: The stream before; `unfit` where it stands on another grid.
        """
        if self.affine is None or unfit:
            self.kept = z.detach()
            return
        digits = self._guess(x.detach()).neg_().add_(z.detach() * self.grid.inverse)
        self.correction = Columns.of(digits, z.detach(), self.affine.channels)
        if self.nbytes >= z.nbytes:
            self.correction, self.affine, self.kept = None, None, z.detach()

    @property
    def nbytes(self) -> int:
        """Bytes kept for the inverse."""
        if self.correction is None or self.affine is None:
            return 0 if self.kept is None else self.kept.nbytes
        return self.correction.nbytes + sum(t.nbytes for t in self.affine[:4] if t is not None)

    def inverse(self, x: Tensor) -> Tensor:
        """z from T(z), exactly."""
        if self.kept is not None or self.correction is None:
            assert self.kept is not None, "an inverse is asked for after `keep` only"
            return self.kept.detach()  # another tensor: whoever writes in place sees it is shared
        z = self.correction.add_(self._guess(x)).mul_(self.grid.step)
        return self.correction.restore_(z)

    def _guess(self, x: Tensor) -> Tensor:
        """z in steps of the grid from T(z), as far as the rounded T(z) tells; a new tensor."""
        assert self.affine is not None
        mean, dev, scale, bias, _ = self.affine
        z = x.clone() if bias is None else x - bias
        if scale is not None:
            z *= scale
        return z.mul_(dev).add_(mean).mul_(self.grid.inverse).round_()


# ---- reading normalisations ----------------------------------------------------------------


class _Seen(NamedTuple):
    """Statistics and parameters in the layout of a normalisation's input."""

    mean: Tensor
    dev: Tensor
    weight: Tensor | None
    bias: Tensor | None
    channels: int


def _statistics(x: Tensor, dims: Iterable[int], eps: float | None) -> tuple[Tensor, Tensor]:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    var, mean = torch.var_mean(x, list(dims), correction=0, keepdim=True)
    return mean, (var + eps).sqrt()


def _trailing(values: Tensor | None, dims: int) -> Tensor | None:
    return None if values is None else values.view(*(1,) * (dims - values.dim()), *values.shape)


def _second(values: Tensor | None, dims: int) -> Tensor | None:
    return None if values is None else values.view(1, -1, *(1,) * (dims - 2))


def _layer_norm(call: dict[str, Any]) -> _Seen:
    x = call["input"]
    # On the CPU ten times as fast as `var_mean`; the third is 1 / deviation.
    _, mean, inverse = torch.native_layer_norm(x, call["normalized_shape"], None, None, call["eps"])
    dev = inverse.to(x.dtype).reciprocal()
    mean = mean.to(x.dtype)
    weight, bias = (_trailing(call[name], x.dim()) for name in ("weight", "bias"))
    return _Seen(mean, dev, weight, bias, x.dim() - 1)


def _rms_norm(call: dict[str, Any]) -> _Seen:
    x = call["input"]
    dims = list(range(x.dim() - len(call["normalized_shape"]), x.dim()))
    eps = torch.finfo(x.dtype).eps if call["eps"] is None else call["eps"]
    dev = (x.square().mean(dims, keepdim=True) + eps).sqrt()
    return _Seen(torch.zeros_like(dev), dev, _trailing(call["weight"], x.dim()), None, x.dim() - 1)


def _batch_norm(call: dict[str, Any]) -> _Seen:
    x = call["input"]
    weight, bias = (_second(call[name], x.dim()) for name in ("weight", "bias"))
    if call["training"] or call["running_mean"] is None:
        mean, dev = _statistics(x, [d for d in range(x.dim()) if d != 1], call["eps"])
    else:
        running = [_second(call[name], x.dim()) for name in ("running_mean", "running_var")]
        mean, var = (value.to(x.dtype, copy=True) for value in running if value is not None)
        dev = (var + call["eps"]).sqrt()
    return _Seen(mean, dev, weight, bias, 1)


def _group_norm(call: dict[str, Any]) -> _Seen:
    x, groups = call["input"], call["num_groups"]
    grouped = x.reshape(x.shape[0], groups, -1)
    mean, dev = _statistics(grouped, [2], call["eps"])
    each = x.shape[1] // groups
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    mean, dev = (s.expand(-1, -1, each).reshape(shape) for s in (mean, dev))
    weight, bias = (_second(call[name], x.dim()) for name in ("weight", "bias"))
    return _Seen(mean, dev, weight, bias, 1)


def _instance_norm(call: dict[str, Any]) -> _Seen:
    if not call["use_input_stats"]:
        return _batch_norm({**call, "training": False})
    return _group_norm({**call, "num_groups": call["input"].shape[1]})


_READERS: dict[Callable[..., Any], Callable[[dict[str, Any]], _Seen]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}


def _as_seen(seen: _Seen, x: Tensor, z: Tensor) -> Affine | None:
    """A normalisation's numbers in the layout of z, of which its input is a view."""
    order = _order(x, z)
    if order is None:
        return None
    small = [None if t is None else t.to(z.dtype).permute(order) for t in seen[:4]]
    mean, dev, weight, bias = small
    assert mean is not None
    assert dev is not None
    scale = None if weight is None else weight.reciprocal()
    bias = None if bias is None else bias.clone()
    return Affine(mean, dev, scale, bias, order.index(seen.channels))


def _order(x: Tensor, z: Tensor) -> list[int] | None:
    """For each dimension of z the dimension of x that it is."""
    if x.shape == z.shape and (x.stride() == z.stride() or x.data_ptr() != z.data_ptr()):
        return list(range(z.dim()))
    if x.dim() != z.dim() or x.data_ptr() != z.data_ptr():
        return None
    left = list(range(x.dim()))
    order = []
    for form in zip(z.shape, z.stride(), strict=True):
        same = [d for d in left if (x.shape[d], x.stride(d)) == form]
        if not same:
            return None
        order.append(same[0])
        left.remove(same[0])
    return order
