"""One step of the two streams on the grid, operation by operation.

On the grid every value is an integer number of steps g, and the step is

    x_{i+1} = s floor(|b| x_{i-1}) + round(a x_i + c (F + T - x_i)),    s = sign(b),

so that x_{i-1} lies in ceil((x_{i+1} - round(...)) / b) + {0, 1, ..., 1/|b| - 1}; which of them it
is, is what the correction keeps. One order of operations everywhere and none of them fused:
backward must find the very bits of forward, whatever the layout. `rewire.kernels` has the same in
one kernel each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewire.corrections import Digits
from rewire.grid import OnGrid

Weight = float | Tensor

_SLICE = 1 << 18  # elements: temporaries stay in the cache, and no stream is made for them
_MOST_SLICES = {"cpu": 64}


class Coefficients(NamedTuple):
    """a, b and c of one step: numbers, or tensors that broadcast to the stream."""

    a: Weight
    b: Weight
    c: Weight


def couple(
    newest: Tensor,
    older: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: Coefficients,
    grid: OnGrid,
) -> Tensor:
    """x_{i+1} in the layout of x_{i-1}. All without graph; F and T may broadcast."""
    change = _change(newest, branch, trunk, k, grid)
    if is_(k.b, 1.0):
        out = change if alike(change, older) else torch.empty_like(older)
        return torch.addcmul(older, change, grid.step, out=out)
    return grown(change, older).add_(_share(older, k.b, grid)).mul_(grid.step)


def uncouple(
    newer: Tensor,
    newest: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: Coefficients,
    grid: OnGrid,
    digits: Digits | None,
    slack: int,
    out: Tensor,
    *,
    own_branch: bool = False,
) -> None:
    """x_{i-1} into `out`.

    Args:
        newer: x_{i+1}; may be `out`.
        newest: x_i.
        branch: F.
        trunk: T, or None.
        k: a, b, c.
        grid: Where the streams stand.
        digits: What `pack` kept; None where nothing is lost.
        slack: What it added.
        out: Receives the result; laid out as `newer`.
        own_branch: `branch` may be overwritten.
    """
    own_branch = own_branch and _has_room(branch, newer, trunk, k)
    whole = branch.dtype == newer.dtype and own_branch
    whole = whole or branch.shape != newer.shape
    whole = whole or any(isinstance(w, Tensor) and w.dim() for w in k)
    for part in [...] if whole else _slices(newer):
        t = None if trunk is None else trunk[part]
        own = branch[part] if own_branch else None
        change = _change(newest[part], branch[part], t, k, grid, own)
        if is_(k.b, 1.0):
            torch.addcmul(newer[part], change, grid.step, value=-1, out=out[part])
        else:
            _guess(torch.mul(newer[part], grid.inverse, out=out[part]).sub_(change), k.b)
    if is_(k.b, 1.0):
        return
    if digits is not None:
        digits.add_(out.sub_(slack))
    out.mul_(grid.step)


def pack(older: Tensor, b: Weight, grid: OnGrid, width: int, slack: int) -> Digits:
    """What the inverse cannot know of x_{i-1}, in `width` bits each; `slack` makes it positive."""
    return Digits.of(remainder(older, b, grid).add_(slack), width)


def remainder(older: Tensor, b: Weight, grid: OnGrid) -> Tensor:
    """How many steps x_{i-1} is above the smallest candidate that has its share; integral."""
    return _guess(_share(older, b, grid), b).neg_().add_(older * grid.inverse)


def merge(newest: Tensor, older: Tensor, first: Tensor | None) -> Tensor:
    """(x_n + x_{n-1}) / 2, or x_n + x_{n-1} - x_0 where x_0 is given."""
    total = torch.add(newest, older)  # changed in place: one stream less at the peak
    return total.mul_(0.5) if first is None else total.sub_(first)


def apart(newest: Tensor, older: Tensor) -> tuple[Tensor, Tensor]:
    """The largest absolute values of x_0 and of x_0 - x_{-1}, 0-dimensional; NaN where one is."""
    return newest.abs().amax(), torch.sub(newest, older).abs_().amax()


def _has_room(branch: Tensor, stream: Tensor, trunk: Tensor | None, k: Coefficients) -> bool:
    """Whether a branch can hold round((a x_i + c (F + T - x_i)) / g) of itself.

    bfloat16 has float32's range, and where it is coarser than one its values are integers.
    """
    narrow = branch.dtype == torch.bfloat16 and stream.dtype == torch.float32
    return branch.dtype == stream.dtype or (narrow and _is_alone(trunk, k))


def _change(
    newest: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: Coefficients,
    grid: OnGrid,
    out: Tensor | None = None,
) -> Tensor:
    """round((a x_i + c (F + T - x_i)) / g) as floats, of F's own shape where F is all.

    Args:
        out: The branch itself where it may be overwritten.
    """
    if _is_alone(trunk, k) and (out is not None or branch.dtype == newest.dtype):
        return torch.mul(branch, grid.inverse, out=out).round_()
    total = branch.to(newest.dtype, copy=True) if out is None else out.to(newest.dtype)
    if trunk is not None:
        total = grown(total, newest).add_(trunk - newest)
    if not is_(k.c, 1.0):
        total = grown(total, newest).mul_(k.c)
    if not is_(k.a, 0.0):
        total = grown(total, newest).add_(newest * k.a)
    return total.mul_(grid.inverse).round_()


def _is_alone(trunk: Tensor | None, k: Coefficients) -> bool:
    """Whether F is all that is added to the older stream."""
    return trunk is None and is_(k.c, 1.0) and is_(k.a, 0.0)


def _share(older: Tensor, b: Weight, grid: OnGrid) -> Tensor:
    """The part of x_{i-1} that goes on: s floor(|b| x_{i-1} / g)."""
    low = (older * grid.inverse).mul_(_size(b)).floor_()
    return low.mul_(_sign(b))


def _guess(share: Tensor, b: Weight) -> Tensor:
    """The smallest x_{i-1} / g that has this share, in its place."""
    return share.mul_(_sign(b)).div_(_size(b)).ceil_()


def _sign(b: Weight) -> Any:
    return b.sign() if isinstance(b, Tensor) else (-1.0 if b < 0 else 1.0)


def _size(b: Weight) -> Any:
    return b.abs() if isinstance(b, Tensor) else abs(b)


def is_(weight: Weight, value: float) -> bool:
    return not isinstance(weight, Tensor) and weight == value


def same(weight: Weight, other: Weight) -> bool:
    return weight is other or (not isinstance(other, Tensor) and is_(weight, other))


def grown(total: Tensor, stream: Tensor) -> Tensor:
    """`total` in the stream's shape and strides, so that it can be added to in place."""
    return total if alike(total, stream) else torch.empty_like(stream).copy_(total)


def alike(a: Tensor, b: Tensor) -> bool:
    """Streams stay in one layout, whatever that of the branch is."""
    return a.shape == b.shape and a.stride() == b.stride()


def _slices(stream: Tensor) -> Iterator[Any]:
    """Cut a stream along its first dimension that can be cut."""
    dim = next((d for d, size in enumerate(stream.shape) if size > 1), 0)
    size = stream.shape[dim] if stream.dim() else 1
    count = min(size, -(-stream.numel() // _SLICE), _MOST_SLICES.get(stream.device.type, 8))
    each = -(-size // max(count, 1))
    for start in range(0, size, max(each, 1)):
        yield (*(slice(None),) * dim, slice(start, start + each)) if stream.dim() else (...,)
