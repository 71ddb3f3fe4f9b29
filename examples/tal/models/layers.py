"""Layers on masked sequences [B, C, T]: every convolution zeroes what is not real."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedConv1d(nn.Conv1d):
    """A convolution that keeps a mask; the mask of a strided one is every s-th step of it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        bias: bool = True,
        groups: int = 1,
    ) -> None:
        super().__init__(
            inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=bias
        )
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Convolve.

        Args:
            x: [B, C, T]; T is a multiple of the stride.
            mask: [B, T], True where x is real.

        Returns:
            [B, C', T / s] and its mask.
        """
        mask = mask[:, :: self.stride[0]]
        return super().forward(x) * mask[:, None], mask


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels at each step."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, T]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class AffineDropPath(nn.Module):
    """A learnt scale of each channel, and drop path of each sample.

    Args:
        width: Channels.
        drop: Share of samples that a branch is dropped for in training.
        scale: Of each channel at the start.
    """

    def __init__(self, width: int, drop: float, scale: float = 1e-4) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, width, 1), scale))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        """Scale, and drop."""
        x = self.scale * x
        if not self.training or self.drop == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
        return x * keep / (1 - self.drop)


class LocalAttention(nn.Module):
    """Attention over time whose queries, keys and values are convolved first.

    Args:
        width: Channels.
        heads: Parts of the channels that attend on their own.
        window: Steps that each step sees, itself in the middle; -1: all.
        stride: Steps of the input to one of the output.
    """

    def __init__(self, width: int, heads: int, window: int, stride: int = 1) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide {width} channels.")
        if window != -1 and window % 2 == 0:
            raise ValueError(f"a window has a middle: {window} is even.")
        self.heads, self.window = heads, window
        names = ("query", "key", "value")
        self.convs = nn.ModuleDict(
            {n: MaskedConv1d(width, width, 3, stride, bias=False, groups=width) for n in names}
        )
        self.norms = nn.ModuleDict({n: ChannelNorm(width) for n in names})
        self.projections = nn.ModuleDict({n: pointwise(width, width) for n in names})
        self.out = pointwise(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend: [B, C, T] and mask to [B, C, T / s] and its mask."""
        parts = {}
        for name, conv in self.convs.items():
            y, out_mask = conv(x, mask)
            y = self.projections[name](self.norms[name](y))
            parts[name] = y.unflatten(1, (self.heads, -1)).transpose(2, 3)  # [B, h, T, C / h]
        parts["value"] = parts["value"] * out_mask[:, None, :, None]
        seen = self._seen(out_mask)
        y = F.scaled_dot_product_attention(**parts, attn_mask=seen)
        y = y.transpose(2, 3).flatten(1, 2)
        return self.out(y) * out_mask[:, None], out_mask

    def _seen(self, mask: Tensor) -> Tensor:
        """[B, 1, T, T]: which keys each query sees. Its own always: no row is empty."""
        steps = torch.arange(mask.shape[1], device=mask.device)
        apart = (steps[:, None] - steps).abs()
        near = apart >= 0 if self.window == -1 else apart <= self.window // 2
        return ((mask[:, None, :] & near) | (apart == 0))[:, None]


class Block(nn.Module):
    """A transformer block on a masked sequence, which may halve its length.

    Args:
        width: Channels.
        heads: Of attention.
        window: Of attention.
        stride: 1 or 2.
        drop_path: Share of samples that a branch is dropped for.
    """

    def __init__(self, width: int, heads: int, window: int, stride: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.attention = LocalAttention(width, heads, window, stride)
        hidden = 4 * width
        self.mlp = nn.Sequential(pointwise(width, hidden), nn.GELU(), pointwise(hidden, width))
        self.pool = nn.MaxPool1d(3, 2, 1) if stride == 2 else nn.Identity()
        self.drop1, self.drop2 = (AffineDropPath(width, drop_path) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, T] and mask to [B, C, T / s] and its mask."""
        y, mask = self.attention(self.norm1(x), mask)
        real = mask[:, None]
        x = self.pool(x) * real + self.drop1(y)
        return x + self.drop2(self.mlp(self.norm2(x)) * real), mask


def sinusoid(length: int, width: int) -> Tensor:
    """Sines and cosines of positions, [1, C, T], divided by the root of C."""
    position = torch.arange(length, dtype=torch.float64)[:, None]
    rate = torch.exp(-math.log(10000) * 2 * (torch.arange(width, dtype=torch.float64) // 2) / width)
    angle = position * rate
    table = torch.where(torch.arange(width) % 2 == 0, angle.sin(), angle.cos())
    return (table.T[None] / width**0.5).float()


def pointwise(inputs: int, outputs: int) -> nn.Conv1d:
    """A convolution of one step, whose bias begins at zero."""
    conv = nn.Conv1d(inputs, outputs, 1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def wide(x: Tensor) -> Tensor:
    """In float32 at least: under autocast, means and losses would lose too much in half of it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
