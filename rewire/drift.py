"""The free check of a reversible chain: it begins with both streams equal.

What backward has rebuilt at the start of a chain must therefore agree. The difference
tracks the true error of the reconstruction, and also shows branches that do not repeat,
weights changed between forward and backward, and lost random states.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Reconstruction = tuple[str, float]


@dataclass(eq=False)
class Chain:
    """A chain's name, and whether its user has been warned."""

    name: str
    warned: bool = False


_listeners: list[list[Reconstruction]] = []
_pending: list[tuple[Chain, Tensor, float]] = []


class DriftWarning(UserWarning):
    """The streams rebuilt in backward differ by more than rounding explains."""


def limit(dtype: torch.dtype) -> float:
    """Largest relative difference without a warning: the square root of the rounding unit."""
    return math.sqrt(torch.finfo(dtype).eps)


def compare(chain: Chain, newest: Tensor, older: Tensor, coarsest: torch.dtype) -> None:
    """Compare both streams at the start of a chain.

    The bound is that of the streams' rounding, or one rounding of the coarsest dtype that a
    branch ran in: with bfloat16 branches the gradients are no finer anyway.

    On an accelerator the verdict is read at the next comparison, so that backward
    does not wait for the device.
    """
    if newest.device.type == "meta" or newest.numel() == 0:
        return
    bound = max(limit(newest.dtype), torch.finfo(coarsest).eps)
    with torch.no_grad():
        scale = newest.abs().amax().clamp_min_(torch.finfo(newest.dtype).tiny)
        relative = torch.sub(newest, older).abs_().amax() / scale
    if not _listeners and newest.device.type != "cpu":
        while _pending:
            _judge(*_pending.pop(0))
        _pending.append((chain, relative, bound))
        return
    _judge(chain, relative, bound)


@contextmanager
def watch_reconstruction() -> Iterator[list[Reconstruction]]:
    """Collect (chain, largest difference relative to the stream) of each backward."""
    found: list[Reconstruction] = []
    _listeners.append(found)
    try:
        yield found
    finally:
        _listeners[:] = [listener for listener in _listeners if listener is not found]


def _judge(chain: Chain, relative: Tensor, bound: float) -> None:
    difference = float(relative)
    for listener in _listeners:
        listener.append((chain.name, difference))
    if difference <= bound or chain.warned or _listeners:
        return
    chain.warned = True
    warnings.warn(
        f"chain {chain.name or '(model)'}: the streams rebuilt in backward differ by "
        f"{difference:.1e} of their size at the chain's start (at most {bound:.1e} is "
        "rounding), so its gradients "
        "are not exact. Look with `rewire.verify`; float32 without autocast is the most exact.",
        DriftWarning,
        stacklevel=2,
    )
