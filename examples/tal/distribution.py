"""Sums and means over the processes of a distributed run; of one process they are its own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one."""
    return dist.get_rank() if ranks() > 1 else 0


def over_ranks(count: Tensor) -> Tensor:
    """A sum over all ranks, where there are several."""
    if ranks() == 1:
        return count
    total = count.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of chosen values on all ranks, as this rank's part of a mean over ranks; or 0."""
    count = over_ranks(chosen.sum()).clamp_min(1)
    return (values * chosen).sum() * ranks() / count


def mean_of_ranks(value: float, device: torch.device) -> float:
    """The mean of a number over all ranks."""
    total = over_ranks(torch.tensor(value, dtype=torch.float32, device=device))
    return float(total) / ranks()
