"""Moving a coupling while finetuning, from the pretrained function towards re2."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from rewire.coupling import Dr2
from rewire.errors import RewireError
from rewire.planning import coupled
from rewire.reversible import courses
from rewire.rewriting import plan_of

_SHAPES = ("cosine", "linear")


class Dr2Schedule:
    """α and β of `Dr2` step by step, from nearly the original's function to re2's.

    β rises from where the model stands to 1 and α = 1 - β falls to 0, so that a stream that does
    not change stays as it is at every step. At the end nothing is kept for the inverse any more.
    Used like a learning-rate scheduler, between a backward and the next forward.

    Args:
        rev: A model rewired with `coupling=rewire.Dr2(...)`.
        steps: Calls of `step` until β is 1.
        shape: "cosine" (slow at both ends) or "linear".

    Example:
        >>> import torch, rewire
        >>> net = rewire.ReversibleSequential([torch.nn.Linear(4, 4)] * 2, coupling="dr2(0.9, 0.1)")
        >>> schedule = rewire.Dr2Schedule(net, steps=2, shape="linear")
        >>> schedule.step(), schedule.step()
        (Dr2(alpha=0.45, beta=0.55), Dr2(alpha=0.0, beta=1.0))

    Source: Dr2Net, arXiv 2401.04105, moves both coefficients while finetuning. Its own schedule
    could not be read; this one is ours.
    """

    def __init__(self, rev: nn.Module, steps: int, *, shape: str = "cosine") -> None:
        if steps < 1 or shape not in _SHAPES:
            raise ValueError(
                f"Dr2Schedule: steps={steps}, shape={shape!r}; give steps >= 1 and one of "
                f"{', '.join(map(repr, _SHAPES))}."
            )
        found = {course.coupling for course in courses(rev)}
        first = next(iter(found), None)
        if len(found) != 1 or not isinstance(first, Dr2):
            raise RewireError(
                f"Dr2Schedule: the chains' coupling is {', '.join(map(str, found)) or 'missing'}. "
                "Rewire with coupling=rewire.Dr2(0.9, 0.1)."
            )
        self._rev, self._steps, self._shape = rev, steps, shape
        self._start, self._count = first, 0

    @property
    def coupling(self) -> Dr2:
        """The coupling now."""
        done = min(1.0, self._count / self._steps)
        if self._shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        alpha, beta = self._start.alpha, self._start.beta
        return Dr2(alpha * (1 - done), beta + (1 - beta) * done)

    def step(self) -> Dr2:
        """Move on by one step, and give the coupling that the next forward will have."""
        self._count += 1
        return self._set()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"count": self._count, "start": (self._start.alpha, self._start.beta)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._count, self._start = state["count"], Dr2(*state["start"])
        self._set()

    def _set(self) -> Dr2:
        coupling = self.coupling
        for course in courses(self._rev):
            course.coupling = coupling
        for module in self._rev.modules():  # what is saved now has the coupling of now
            if "_rewire_plan" in module.__dict__:
                module.__dict__["_rewire_plan"] = coupled(plan_of(module), coupling, None)
        return coupling
