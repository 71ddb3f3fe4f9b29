"""One step of the two streams, forth and back, in floats or on the grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewire import fused, integers
from rewire.corrections import Digits
from rewire.coupling import WHOLE, Coupling, slack_of, width_of
from rewire.cuts import Place, at_broadcast
from rewire.grid import OnGrid, rounded, straight
from rewire.integers import Coefficients, is_, same


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
        return self.measured(newest, older, branch, trunk)[0]

    def measured(
        self, newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, and the largest absolute value where what made it knows it."""
        k, grid = self.k, self.grid
        if grid is None:
            return _in_floats(newest, older, branch, trunk, k), None
        newest, older, branch = newest.detach(), older.detach(), branch.detach()
        trunk = None if trunk is None else trunk.detach()
        if grid.behind:
            value = integers.couple(newest, older, branch, trunk, k, grid)
            return rounded(value, grid), None
        if fused.takes(older, k):
            return fused.couple(newest, older, branch, trunk, k, grid)
        return integers.couple(newest, older, branch, trunk, k, grid), None

    def attached(
        self, value: Tensor, newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None
    ) -> Tensor:
        """A value of `forward` with the gradient of the equation."""
        a, b, c = self.k
        if trunk is None:
            return straight(value, (b, older), (a, newest), (c, branch))
        return straight(value, (b, older), (a - c, newest), (c, branch), (c, trunk))

    def at(self, place: Place, dims: int) -> Coupled:
        """The same for one part of streams of `dims` dimensions."""
        a, b, c = (at_broadcast(place, weight, dims) for weight in self.k)
        return Coupled(self.coupling, Coefficients(a, b, c), self.grid)

    def keep(self, older: Tensor) -> None:
        """Keep what the inverse will need of x_{i-1}."""
        grid, b = self.grid, self.k.b
        if grid is None:
            self.kept = older.detach() if is_(b, 0.0) else None
            return
        width = self._width
        if grid.behind or width == WHOLE:
            self.kept = older.detach()
        elif width:
            pack = fused.pack if fused.takes(older, self.k) else integers.pack
            self.correction = pack(older.detach(), b, grid, width, self._slack)

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
        terms = newer, newest, branch, trunk, self.k, self.grid, self.correction, self._slack
        if fused.takes(newer, self.k):
            fused.uncouple(*terms, out)
        else:
            integers.uncouple(*terms, out, own_branch=own_branch)
        return out


# ---- plain floats ------------------------------------------------------------------------


def _in_floats(
    newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None, k: Coefficients
) -> Tensor:
    if trunk is not None and same(k.a, k.c):  # as the network was: c (F + T), without x - x
        branch, k = branch + trunk, k._replace(a=0.0)
    elif trunk is not None:
        branch = branch + (trunk - newest)
    total = (older if is_(k.b, 1.0) else older * k.b) + (branch if is_(k.c, 1.0) else branch * k.c)
    return total if is_(k.a, 0.0) else total + newest * k.a


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
    branch = branch if is_(k.c, 1.0) else branch * k.c
    older = torch.sub(newer, branch, out=newer if own else None)
    if not is_(k.a, 0.0):
        older -= newest * k.a
    return older if is_(k.b, 1.0) else older.div_(k.b)
