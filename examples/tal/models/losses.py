"""Losses on boundaries and steps."""

from __future__ import annotations

import torch
from torch import Tensor

from examples.tal.distribution import mean_over_ranks


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


def generalized_iou_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """1 - IoU + the share of the hull that neither segment covers.

    Args:
        found: [*, 2], two ends in any order.
        wanted: The same of the ground truth, starts and ends.

    Returns:
        [*].

    Source: Rezatofighi et al., Generalized Intersection over Union, CVPR 2019, in one dimension.
    """
    start, end = found.amin(-1), found.amax(-1)
    first, last = wanted.unbind(-1)
    shared = (torch.minimum(end, last) - torch.maximum(start, first)).clamp_min(0)
    union = end - start + last - first - shared + 1e-7
    hull = torch.maximum(end, last) - torch.minimum(start, first) + 1e-7
    return 1 - shared / union + (hull - union) / hull


def balanced_log_loss(shares: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy, half of it the mean over ones and half that over zeros.

    Args:
        shares: From 0 to 1, any shape.
        wanted: Ones and zeros.
    """
    least = 1e-5
    ones = mean_over_ranks(-(shares + least).log(), wanted > 0.5)
    zeros = mean_over_ranks(-(1 - shares + least).log(), wanted <= 0.5)
    return (ones + zeros) / 2
