"""One step of the two streams, forth and back, in floats or on the grid.

On the grid every value is an integer number of steps g, and the step is

    x_{i+1} = s floor(|b| x_{i-1}) + round(a x_i + c (F + T - x_i)),    s = sign(b),

so that x_{i-1} lies in ceil((x_{i+1} - round(...)) / b) + {0, 1, ..., 1/|b| - 1}; which of them it
is, is what the correction keeps. One order of operations everywhere and none of them fused:
backward must find the very bits of forward, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewire.corrections import Digits
from rewire.coupling import WHOLE, Coefficients, Coupling, Weight, slack_of, width_of
from rewire.grid import OnGrid, rounded, straight

_SLICE = 1 << 18  # elements: temporaries stay in the cache, and no stream is made for them
_MOST_SLICES = {"cpu": 64}


@dataclass(slots=True)
class Coupled:
    """The arithmetic of one residual module as it ran.

    Attributes:
        coupling: Whose equation.
        k: Its a, b, c in this step.
        grid: Where the streams stand; None for plain floats.
        correction: What the inverse cannot know.
        kept: The older stream itself, where no inverse leads back to it.
    """

    coupling: Coupling
    k: Coefficients
    grid: OnGrid | None
    correction: Digits | None = None
    kept: Tensor | None = None

    @property
    def _width(self) -> int:
        """Bits that this step loses; its b may be another one in eval mode."""
        b = self.k.b
        return self.coupling.bits if isinstance(b, Tensor) else width_of(abs(b), slack_of(abs(b)))

    @property
    def _slack(self) -> int:
        b = self.k.b
        return self.coupling.slack if isinstance(b, Tensor) else slack_of(abs(b))

    def forward(
        self, newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None
    ) -> Tensor:
        """x_{i+1}: with its graph in plain floats, its value on the grid."""
        k, grid = self.k, self.grid
        if grid is None:
            return _in_floats(newest, older, branch, trunk, k)
        newest, older, branch = newest.detach(), older.detach(), branch.detach()
        change = _change(newest, branch, None if trunk is None else trunk.detach(), k, grid)
        if _is(k.b, 1.0):
            out = change if _alike(change, older) else torch.empty_like(older)
            value = torch.addcmul(older, change, grid.step, out=out)
        else:
            value = _grown(change, older).add_(_share(older, k.b, grid)).mul_(grid.step)
        return rounded(value, grid) if grid.behind else value

    def attached(
        self, value: Tensor, newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None
    ) -> Tensor:
        """A value of `forward` with the gradient of the equation."""
        a, b, c = self.k
        if trunk is None:
            return straight(value, (b, older), (a, newest), (c, branch))
        return straight(value, (b, older), (a - c, newest), (c, branch), (c, trunk))

    def keep(self, older: Tensor) -> None:
        """Keep what the inverse will need of x_{i-1}."""
        grid, b = self.grid, self.k.b
        if grid is None:
            self.kept = older.detach() if _is(b, 0.0) else None
            return
        width = self._width
        if grid.behind or width == WHOLE:
            self.kept = older.detach()
        elif width:
            older = older.detach()
            rest = _guess(_share(older, b, grid), b).neg_().add_(older * grid.inverse)
            self.correction = Digits.of(rest.add_(self._slack), width)

    @property
    def nbytes(self) -> int:
        """Bytes kept for the inverse."""
        kept = 0 if self.kept is None else self.kept.nbytes
        return kept if self.correction is None else self.correction.nbytes

    def inverse(
        self,
        newer: Tensor,
        newest: Tensor,
        branch: Tensor,
        trunk: Tensor | None,
        *,
        own_newer: bool = False,
        own_branch: bool = False,
    ) -> Tensor:
        """x_{i-1}. Exact on the grid; in floats up to the rounding of each operation.

        Args:
            newer: x_{i+1}.
            newest: x_i.
            branch: F.
            trunk: T, or None.
            own_newer: `newer` may be overwritten.
            own_branch: `branch` may be overwritten.
        """
        if self.kept is not None:
            return self.kept.detach()  # another tensor: whoever writes in place sees it is shared
        if self.grid is None:
            return _back_in_floats(newer, newest, branch, trunk, self.k, own_newer)
        out = newer if own_newer else torch.empty_like(newer)
        own_branch = own_branch and self._has_room(branch, newer, trunk)
        whole = branch.dtype == newer.dtype and own_branch
        whole = whole or branch.shape != newer.shape
        whole = whole or any(isinstance(w, Tensor) and w.dim() for w in self.k)
        for part in [...] if whole else _slices(newer):
            t = None if trunk is None else trunk[part]
            self._inverse(out[part], newer[part], newest[part], branch[part], t, own_branch)
        if _is(self.k.b, 1.0):
            return out
        if self.correction is not None:
            self.correction.add_(out.sub_(self._slack))
        return out.mul_(self.grid.step)

    def _has_room(self, branch: Tensor, stream: Tensor, trunk: Tensor | None) -> bool:
        """Whether a branch can hold round((a x_i + c (F + T - x_i)) / g) of itself.

        bfloat16 has float32's range, and where it is coarser than one its values are integers.
        """
        narrow = branch.dtype == torch.bfloat16 and stream.dtype == torch.float32
        return branch.dtype == stream.dtype or (narrow and _is_alone(trunk, self.k))

    def _inverse(
        self,
        out: Tensor,
        newer: Tensor,
        newest: Tensor,
        branch: Tensor,
        trunk: Tensor | None,
        own_branch: bool,
    ) -> None:
        """x_{i-1} where b is 1; else its guess in steps of the grid."""
        grid, k = self.grid, self.k
        assert grid is not None, "floats have their own inverse"
        change = _change(newest, branch, trunk, k, grid, branch if own_branch else None)
        if _is(k.b, 1.0):
            torch.addcmul(newer, change, grid.step, value=-1, out=out)
        else:
            _guess(torch.mul(newer, grid.inverse, out=out).sub_(change), k.b)


# ---- plain floats ------------------------------------------------------------------------


def _in_floats(
    newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None, k: Coefficients
) -> Tensor:
    if trunk is not None and _same(k.a, k.c):  # as the network was: c (F + T), without x - x
        branch, k = branch + trunk, k._replace(a=0.0)
    elif trunk is not None:
        branch = branch + (trunk - newest)
    total = (older if _is(k.b, 1.0) else older * k.b) + (branch if _is(k.c, 1.0) else branch * k.c)
    return total if _is(k.a, 0.0) else total + newest * k.a


def _back_in_floats(
    newer: Tensor,
    newest: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: Coefficients,
    own: bool,
) -> Tensor:
    if trunk is not None:
        branch = branch + (trunk - newest)
    branch = branch if _is(k.c, 1.0) else branch * k.c
    older = torch.sub(newer, branch, out=newer if own else None)
    if not _is(k.a, 0.0):
        older -= newest * k.a
    return older if _is(k.b, 1.0) else older.div_(k.b)


# ---- integers ----------------------------------------------------------------------------


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
        total = _grown(total, newest).add_(trunk - newest)
    if not _is(k.c, 1.0):
        total = _grown(total, newest).mul_(k.c)
    if not _is(k.a, 0.0):
        total = _grown(total, newest).add_(newest * k.a)
    return total.mul_(grid.inverse).round_()


def _is_alone(trunk: Tensor | None, k: Coefficients) -> bool:
    """Whether F is all that is added to the older stream."""
    return trunk is None and _is(k.c, 1.0) and _is(k.a, 0.0)


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


def _is(weight: Weight, value: float) -> bool:
    return not isinstance(weight, Tensor) and weight == value


def _same(weight: Weight, other: Weight) -> bool:
    return weight is other or (not isinstance(other, Tensor) and _is(weight, other))


def _grown(total: Tensor, stream: Tensor) -> Tensor:
    """`total` in the stream's shape and strides, so that it can be added to in place."""
    return total if _alike(total, stream) else torch.empty_like(stream).copy_(total)


def _alike(a: Tensor, b: Tensor) -> bool:
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
