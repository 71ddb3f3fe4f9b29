"""Video self-stitching (VSS): a short sample with itself, magnified, in one sequence.

Zhao, Thabet and Ghanem, Video Self-Stitching Graph Network for Temporal Action Localization, ICCV
2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Stitching(NamedTuple):
    """Where samples lie in their sequences.

    Attributes:
        real: Steps of each sample, [B].
        stitched: Whether it is there a second time, magnified, [B].
        steps: Of a sequence.
        gap: Zeros between both.
    """

    real: Tensor
    stitched: Tensor
    steps: int
    gap: int

    def second(self, number: int) -> tuple[int, float]:
        """Where the magnified sample begins, and by what it is magnified."""
        real = int(self.real[number])
        return real + self.gap, (self.steps - real - self.gap) / real


def stitched(x: Tensor, mask: Tensor, short: float, gap: int) -> tuple[Tensor, Stitching]:
    """Short samples with themselves, magnified over the rest of the sequence, behind a gap.

    Args:
        x: [B, C, T], zeros where it is not real.
        mask: [B, T].
        short: Samples of up to this share of the steps are stitched.
        gap: Zeros between a sample and itself magnified.
    """
    steps = x.shape[-1]
    real = mask.sum(1)
    chosen = (real <= short * steps) & (real > 0) & (real + gap < steps)
    stitching = Stitching(real, chosen, steps, gap)
    if not chosen.any():
        return x, stitching
    rows = list(x)
    for number in chosen.nonzero().flatten().tolist():
        sample = x[number, :, : int(real[number])]
        begin, _ = stitching.second(number)
        large = F.interpolate(sample[None], steps - begin, mode="linear", align_corners=True)[0]
        rows[number] = torch.cat([sample, sample.new_zeros(len(sample), gap), large], 1)
    return torch.stack(rows), stitching


def doubled(
    stitching: Stitching, segments: Sequence[Tensor], labels: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Segments of each sample, those of stitched ones a second time, magnified."""
    spans, kinds, device = [], [], stitching.real.device
    for number, (own, label) in enumerate(zip(segments, labels, strict=True)):
        own, label = own.to(device), label.to(device)
        if stitching.stitched[number]:
            begin, growth = stitching.second(number)
            own, label = torch.cat([own, own * growth + begin]), torch.cat([label, label])
        spans.append(own)
        kinds.append(label)
    return spans, kinds


def unstitched(boxes: Tensor, stitching: Stitching, number: int) -> Tensor:
    """Boxes [N, 2] where their sample is; those in the magnified part are put back."""
    real = stitching.real[number]
    if stitching.stitched[number]:
        begin, growth = stitching.second(number)
        boxes = torch.where(boxes[:, :1] >= real, (boxes - begin) / growth, boxes)
    return boxes.clamp(torch.zeros_like(real), (real - 1).clamp_min(0))
