"""The arithmetic of the two streams, and nothing else.

A coupling turns the residual chain x_{i+1} = x_i + F_i(x_i) into an invertible one. All
of rewire's stream arithmetic is here, so that another coupling is one more class.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Coupling(Protocol):
    """How a residual branch advances the two streams, and how that is undone."""

    name: str

    def forward(
        self, newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None = None
    ) -> Tensor:
        """The stream that follows `newest`."""

    def inverse(
        self,
        newer: Tensor,
        newest: Tensor,
        branch: Tensor,
        trunk: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Recover `older` from what `forward` returned."""

    def merge(self, newest: Tensor, older: Tensor) -> Tensor:
        """The chain's output."""


class Re2:
    """x_{i+1} = x_{i-1} + G_i(x_i), with G_i(z) = F_i(T(z)) + (T(z) - z).

    T is an elementwise operation on the trunk (an activation after the add); without
    one, G = F. Shapes are [*S]; the streams are float32 or float64, and the branch may
    be of a lower precision and broadcast.

    Source: Re2TAL, arXiv 2211.14053, section 3.
    """

    name = "re2"

    def forward(
        self, newest: Tensor, older: Tensor, branch: Tensor, trunk: Tensor | None = None
    ) -> Tensor:
        """x_{i+1} from x_i (`newest`), x_{i-1} (`older`), F_i and T(x_i) (`trunk`)."""
        if trunk is not None:
            older = older + (trunk - newest)
        return older + branch

    def inverse(
        self,
        newer: Tensor,
        newest: Tensor,
        branch: Tensor,
        trunk: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """x_{i-1} from x_{i+1} (`newer`), x_i, F_i and T(x_i).

        Exact up to one rounding of each operation; along a chain the roundings add.
        `out` may be `newer` or `branch` itself.
        """
        older = torch.sub(newer, branch, out=out)
        return older if trunk is None else older.sub_(trunk - newest)

    def merge(self, newest: Tensor, older: Tensor) -> Tensor:
        """The mean of the streams. The sum is halved in place: one stream less at the peak."""
        return torch.add(newest, older).mul_(0.5)


COUPLINGS: dict[str, Coupling] = {coupling.name: coupling for coupling in (Re2(),)}
