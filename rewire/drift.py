"""The free check of a reversible chain: it begins with both streams equal.

What backward has rebuilt at the start of a chain must therefore agree: bit for bit on the
grid, and up to rounding in plain floats, where the difference tracks the true error. It also
shows branches that do not repeat themselves and weights changed between forward and backward.
NaN and infinity are no drift: they go on to whoever scales the loss.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from rewire.errors import NotRepeatable
from rewire.fused import apart
from rewire.observers import observing

CHECKS = ("warn", "raise", "off")
Reconstruction = tuple[str, float]


@dataclass(eq=False)
class Chain:
    """A chain's name, what to do where it drifts, and whether its user has been warned."""

    name: str
    check: str = "warn"
    warned: bool = False

    def report(self, message: str) -> None:
        """Raise, or warn once, as the user wishes."""
        if self.check == "raise":
            raise NotRepeatable(message)
        if self.check == "warn" and not self.warned:
            self.warned = True
            warnings.warn(message, DriftWarning, stacklevel=2)


class _Verdict(NamedTuple):
    chain: Chain
    relative: Tensor
    bound: float
    exact: bool
    ready: Any  # an event of the device, or None


_listeners: list[list[Reconstruction]] = []
_pending: list[_Verdict] = []


class DriftWarning(UserWarning):
    """The streams rebuilt in backward differ by more than rounding explains."""


def limit(dtype: torch.dtype) -> float:
    """Largest relative difference without a warning: the square root of the rounding unit."""
    return math.sqrt(torch.finfo(dtype).eps)


def compare(
    chain: Chain, newest: Tensor, older: Tensor, coarsest: torch.dtype, *, exact: bool
) -> None:
    """Compare both streams at the start of a chain.

    On the grid they must agree bit for bit. In plain floats the bound is that of the streams'
    rounding, or one rounding of the coarsest dtype that a branch ran in: with bfloat16
    branches the gradients are no finer anyway.

    On an accelerator the verdict is read at a later comparison, when it is there, so that
    backward does not wait for the device; `check="raise"` waits.
    """
    if chain.check == "off" and not _listeners:
        return
    if newest.device.type == "meta" or newest.numel() == 0:
        return
    bound = 0.0 if exact else max(limit(newest.dtype), torch.finfo(coarsest).eps)
    with torch.no_grad():
        size, difference = apart(newest, older)
        if isinstance(newest, FakeTensor):  # it took memory; there are no values to judge
            return
        scale = size.clamp_min(torch.finfo(newest.dtype).tiny)
        relative = torch.where(difference.isinf(), torch.nan, difference / scale)
    if newest.device.type == "cuda" and not _listeners and chain.check != "raise":
        _postpone(_Verdict(chain, relative, bound, exact, None))
    else:
        _judge(_Verdict(chain, relative, bound, exact, None))


def mark(stream: Tensor) -> Tensor:
    """What tells a stream from another one, for `compare`: its sum and its norm, [2]."""
    stream = stream.detach()
    return torch.stack([stream.sum(), torch.linalg.vector_norm(stream)])


def watch_reconstruction() -> AbstractContextManager[list[Reconstruction]]:
    """Collect (chain, largest difference relative to the stream) of each backward."""
    return observing(_listeners)


def _postpone(verdict: _Verdict) -> None:
    """Send a verdict to the host, and judge those that have arrived."""
    here = torch.empty((), dtype=verdict.relative.dtype, pin_memory=True)
    here.copy_(verdict.relative, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    _pending.append(verdict._replace(relative=here, ready=event))
    while _pending and _pending[0].ready.query():
        _judge(_pending.pop(0))


def _judge(verdict: _Verdict) -> None:
    chain, difference = verdict.chain, float(verdict.relative)
    for listener in _listeners:
        listener.append((chain.name, difference))
    if not difference > verdict.bound or _listeners:  # NaN is no drift
        return
    where = f"chain {chain.name or '(model)'}: the streams rebuilt in backward differ by"
    size = f"{difference:.1e} of their size"
    if verdict.exact:
        why = (
            "and must not: a branch did not repeat itself (`rewire.verify` names it), something it "
            "reads was changed between forward and backward, or the streams outgrew their grid in "
            "this step, which the next step's is made for"
        )
    else:
        why = (
            f"(at most {verdict.bound:.1e} is rounding): its gradients are not exact. "
            'precision="exact" leaves no rounding; where it says the same, a branch does not '
            "repeat itself (`rewire.verify` names it) or something it reads was changed between "
            "forward and backward"
        )
    chain.report(f"{where} {size}, {why}.")
