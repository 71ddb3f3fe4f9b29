"""Losses on boundaries, and sums over all ranks of a distributed run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def distance_iou_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - IoU + (distance of centres / length of the hull)² of segments around the same points.

    Args:
        found: [N, 2], distances from each point to its segment's ends, not negative.
        wanted: The same of the ground truth.

    Returns:
        [N].

    Source: Zheng et al., Distance-IoU loss, AAAI 2020, in one dimension.
    """
    left, right = found.unbind(-1)
    left_wanted, right_wanted = wanted.unbind(-1)
    shared = torch.minimum(left, left_wanted) + torch.minimum(right, right_wanted)
    union = left + right + left_wanted + right_wanted - shared
    hull = torch.maximum(left, left_wanted) + torch.maximum(right, right_wanted)
    least = torch.finfo(found.dtype).eps
    apart = (right - left - right_wanted + left_wanted) / 2
    return 1 - shared / union.clamp_min(least) + (apart / hull.clamp_min(least)) ** 2


def over_ranks(count: Tensor) -> Tensor:
    """A sum over all ranks, where there are several."""
    if ranks() == 1:
        return count
    total = count.detach().clone()
    dist.all_reduce(total)
    return total


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
