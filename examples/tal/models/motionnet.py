"""A small residual network of 3D convolutions, which learns motions in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from examples.tal.models.slowfast import conv


class Block(nn.Module):
    """x + F(x), F = (3, 1, 1) → (1, 3, 3) → (1, 1, 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.branch = nn.Sequential(
            nn.BatchNorm3d(width),
            nn.ReLU(),
            conv(width, inner, (3, 1, 1)),
            nn.BatchNorm3d(inner),
            nn.ReLU(),
            conv(inner, inner, (1, 3, 3)),
            nn.BatchNorm3d(inner),
            nn.ReLU(),
            conv(inner, width, (1, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        result: Tensor = x + self.branch(x)
        return result


class MotionNet(nn.Module):
    """Frames of 64 × 64 pixels, seen at half their size; two frames to a step.

    Args:
        widths: Channels of each stage; they halve height and width but the first.
        depth: Blocks of a stage.
    """

    def __init__(self, widths: Sequence[int] = (16, 32), depth: int = 3) -> None:
        super().__init__()
        stem = conv(3, widths[0], (3, 5, 5), (2, 2, 2)), nn.BatchNorm3d(widths[0]), nn.ReLU()
        self.stem = nn.Sequential(*stem)
        self.stages = nn.ModuleList()
        for before, width in zip((widths[0], *widths), widths, strict=False):
            down = nn.Identity() if before == width else conv(before, width, (1, 3, 3), (1, 2, 2))
            self.stages.append(nn.Sequential(down, *(Block(width) for _ in range(depth))))
        self.norm = nn.Sequential(nn.BatchNorm3d(widths[-1]), nn.ReLU())
        self.channels = (widths[-1],)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Frames [B, 3, T, H, W] to a map [B, C, T / 2, H / 8, W / 8]."""
        x = self.stem(F.avg_pool3d(frames, (1, 2, 2)))
        for stage in self.stages:
            x = stage(x)
        return [self.norm(x)]

    def rows(self, x: Tensor) -> Tensor:
        """The mean over space of what a block gives, [B, C, t]."""
        return x.mean((-2, -1))
