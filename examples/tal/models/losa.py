"""LoSA: adapters over long and short ranges of time, beside a frozen backbone.

Gupta et al., LoSA: Long-Short-range Adapter for Scaling End-to-End Temporal Action Localization,
WACV 2025: intermediate features of a frozen backbone go through two adapters each, their outputs
are fused by gates and added to the last features; nothing is propagated back through the backbone.
No code of it is public and its layers could not be read: those here are of our own design.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.tal.models.backbones import Backbone, blocks, fitted
from examples.tal.models.layers import ChannelNorm, MaskedConv1d, pointwise, wide


@dataclass(frozen=True)
class LoSAShape:
    """Of the adapters.

    Attributes:
        every: Blocks of the backbone to one with adapters; the last block has them always.
        width: Channels inside.
        heads: Of attention.
        window: Steps that the short-range adapter sees.
        pooled: Steps to one that the long-range adapter sees.
        clip: Frames that the backbone sees at once; 0: as many as it was made for, or all.
        chunk: Clips that it sees side by side.
    """

    every: int = 4
    width: int = 256
    heads: int = 4
    window: int = 9
    pooled: int = 4
    clip: int = 0
    chunk: int = 8

    def __post_init__(self) -> None:
        if min(self.every, self.width, self.heads, self.pooled, self.chunk) < 1:
            raise ValueError("every, width, heads, pooled and chunk are from 1 on.")
        if self.window % 2 == 0:
            raise ValueError(f"window: an odd number of steps, not {self.window}.")


class Taps(nn.Module):
    """A frozen backbone that runs over clips, a few at a time, and keeps means over space alone.

    Args:
        backbone: It does not learn any more, and stays in eval mode.
        shape: Which blocks are tapped, and how the clips are.
        example: Frames [1, 3, T, H, W] that it runs on once, to learn the rows' channels.

    Attributes:
        channels: Of each row.
    """

    def __init__(self, backbone: Backbone, shape: LoSAShape, example: Tensor) -> None:
        super().__init__()
        self.backbone, self.shape = backbone.requires_grad_(False), shape
        every = list(blocks(backbone.net))
        self._tapped = [b for n, b in enumerate(reversed(every)) if n % shape.every == 0]
        self.eval()
        own = getattr(backbone.net, "clip", 0)
        self._clip = shape.clip or own
        with torch.no_grad():
            self.channels = [row.shape[1] for row in self._rows(example[:, :, : own or None])]

    def train(self, mode: bool = True) -> Taps:
        """Stay in eval mode, whatever the mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> list[Tensor]:
        """Frames [B, 3, T, H, W] to rows [B, C, L] of the tapped blocks; the features are last."""
        clip = self._clip or frames.shape[2]
        if frames.shape[2] % clip:
            raise ValueError(f"{frames.shape[2]} frames: give a multiple of a clip, {clip}.")
        clips = frames.unflatten(2, (-1, clip)).transpose(1, 2).flatten(0, 1)
        parts = [self._rows(part) for part in clips.split(self.shape.chunk)]
        together = [torch.cat(rows) for rows in zip(*parts, strict=True)]
        return [x.unflatten(0, (len(frames), -1)).transpose(1, 2).flatten(2) for x in together]

    def _rows(self, clips: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        net, steps = self.backbone.net, clips.shape[2] // self.backbone.per_step

        def keep(_block: nn.Module, _inputs: object, output: Tensor) -> None:
            found.append(fitted(wide(net.rows(output)), steps))

        with ExitStack() as hooks:
            for block in self._tapped:
                hooks.callback(block.register_forward_hook(keep).remove)
            features = self.backbone(clips)
        return [*found, features]


class LoSA(nn.Module):
    """Adapters on rows of a backbone; at first they add nothing to its features.

    y = z + Σ tanh(γ) W [g ⊙ S + (1 - g) ⊙ L], with γ = 0 at the start of training.

    Args:
        channels: Of the rows; the features' are last.
        shape: Of the adapters.
    """

    def __init__(self, channels: Sequence[int], shape: LoSAShape) -> None:
        super().__init__()
        *tapped, last = channels
        self.query = nn.Sequential(pointwise(last, shape.width), ChannelNorm(shape.width))
        self.adapters = nn.ModuleList(Adapter(inputs, last, shape) for inputs in tapped)

    def forward(self, rows: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Features for the localizer.

        Args:
            rows: [B, C, L] each.
            mask: [B, L], True where they are real.
        """
        *tapped, features = rows
        query = self.query(features)
        added = [a(query, row, mask) for a, row in zip(self.adapters, tapped, strict=True)]
        return torch.stack([features, *added]).sum(0)


class Adapter(nn.Module):
    """Two adapters of one row, of short and of long range, and the gate between them.

    Args:
        inputs: Channels of the row.
        outputs: Channels of the features.
        shape: Of both.
    """

    def __init__(self, inputs: int, outputs: int, shape: LoSAShape) -> None:
        super().__init__()
        width, self.pooled = shape.width, shape.pooled
        self.key = nn.Sequential(pointwise(inputs, width), ChannelNorm(width))
        self.near = CrossAttention(width, shape.heads, shape.window)
        self.conv = MaskedConv1d(width, width, 3, groups=width)
        self.far = CrossAttention(width, shape.heads, -1)
        self.gate = pointwise(2 * width, width)
        self.up = pointwise(width, outputs)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, query: Tensor, row: Tensor, mask: Tensor) -> Tensor:
        """What is added to the features [B, C, L]."""
        key = self.key(row)
        short = self.near(query, key, mask) + self.conv(key * mask[:, None], mask)[0]
        long = self.far(query, *self._pooled(key, mask))
        gate = self.gate(torch.cat([short, long], 1)).sigmoid()
        fused: Tensor = self.up(gate * short + (1 - gate) * long)
        return self.scale.tanh() * fused * mask[:, None]

    def _pooled(self, key: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Means over what is real of several steps, and which of them have any."""
        real = mask[:, None].to(key.dtype)
        total, share = (F.avg_pool1d(x, self.pooled, ceil_mode=True) for x in (key * real, real))
        return total / share.clamp_min(1e-6), share[:, 0] > 0


class CrossAttention(nn.Module):
    """Attention from one sequence to another.

    Args:
        width: Channels.
        heads: Of attention.
        window: Steps around its own that a query sees; -1: all.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.projections = nn.ModuleList(pointwise(width, width) for _ in range(3))
        self.out = pointwise(width, width)

    def forward(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        """Queries [B, C, L], keys [B, C, S], S = L in a window, and a mask [B, S] to [B, C, L]."""
        inputs = zip(self.projections, (query, key, key), strict=True)
        parts = [layer(x).unflatten(1, (self.heads, -1)).mT for layer, x in inputs]
        seen = mask[:, None] if self.window == -1 else self._near(mask)
        y = F.scaled_dot_product_attention(*parts, attn_mask=seen[:, None])
        result: Tensor = self.out(y.mT.flatten(1, 2))
        return result

    def _near(self, mask: Tensor) -> Tensor:
        """[B, L, L]: the real steps around each one, and itself, so that no row is empty."""
        steps = torch.arange(mask.shape[1], device=mask.device)
        apart = (steps[:, None] - steps).abs()
        return (mask[:, None] & (apart <= self.window // 2)) | (apart == 0)
