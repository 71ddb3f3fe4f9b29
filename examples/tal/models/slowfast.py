"""SlowFast networks: few frames with many channels beside many frames with few.

Feichtenhofer et al., SlowFast Networks for Video Recognition, ICCV 2019. The layers, their order
and their numbers are those of `pytorchvideo.models.slowfast` (whose laterals have BatchNorm and
ReLU) or of MMAction2 (whose have none); weights of both convert, see `converters`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Triple = tuple[int, int, int]


def conv(inputs: int, outputs: int, kernel: Triple, stride: Triple = (1, 1, 1)) -> nn.Conv3d:
    """A convolution without bias that keeps sizes but for its stride."""
    padding = tuple(size // 2 for size in kernel)
    return nn.Conv3d(inputs, outputs, kernel, stride, padding, bias=False)


class Bottleneck(nn.Module):
    """ReLU(x + F(x)), F = (kt, 1, 1) → (1, 3, 3) → (1, 1, 1); a projection where sizes change.

    Args:
        inputs: Channels.
        inner: Channels inside.
        outputs: Channels.
        time: kt.
        stride: In space.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, time: int, stride: int) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            projection = conv(inputs, outputs, (1, 1, 1), (1, stride, stride))
            self.shortcut = nn.Sequential(projection, nn.BatchNorm3d(outputs))
        self.branch = nn.Sequential(
            conv(inputs, inner, (time, 1, 1)),
            nn.BatchNorm3d(inner),
            nn.ReLU(),
            conv(inner, inner, (1, 3, 3), (1, stride, stride)),
            nn.BatchNorm3d(inner),
            nn.ReLU(),
            conv(inner, outputs, (1, 1, 1)),
            nn.BatchNorm3d(outputs),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W]."""
        result: Tensor = self.relu(self.shortcut(x) + self.branch(x))
        return result


class Lateral(nn.Sequential):
    """From the fast pathway to the slow one: every α-th of its steps, with twice its channels."""

    def __init__(self, channels: int, alpha: int, normed: bool) -> None:
        convolution = conv(channels, 2 * channels, (7, 1, 1), (alpha, 1, 1))
        rest = (nn.BatchNorm3d(2 * channels), nn.ReLU()) if normed else ()
        super().__init__(convolution, *rest)


class SlowFast(nn.Module):
    """SlowFast-R50 (τ = α = 4, β = 1/8) by default; depths (3, 4, 23, 3) are R101.

    Args:
        depths: Blocks of each stage.
        width: Channels of the slow stem.
        alpha: Frames of the fast pathway to one of the slow one.
        beta: Channels of the slow pathway to one of the fast one.
        normed: Laterals have BatchNorm and ReLU.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        alpha: int = 4,
        beta: int = 8,
        *,
        normed: bool = True,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        fast = width // beta
        self.slow_stem, self.fast_stem = _stem(width, 1), _stem(fast, 5)
        self.slow_stages, self.fast_stages = nn.ModuleList(), nn.ModuleList()
        self.laterals = nn.ModuleList()
        slow_inputs, fast_inputs = width, fast
        for number, depth in enumerate(depths):
            self.laterals.append(Lateral(fast_inputs, alpha, normed))
            inputs = slow_inputs + 2 * fast_inputs
            stride, scale = 1 if number == 0 else 2, 2**number
            sizes = depth, stride
            self.slow_stages.append(_stage(inputs, width * scale, 3 if number > 1 else 1, *sizes))
            self.fast_stages.append(_stage(fast_inputs, fast * scale, 3, *sizes))
            slow_inputs, fast_inputs = 4 * width * scale, 4 * fast * scale
        self.channels = (slow_inputs, fast_inputs)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Maps of the slow pathway [B, 32 w, T / α, ...] and of the fast one [B, 4 w, T, ...].

        Args:
            frames: [B, 3, T, H, W]; T is a multiple of α.
        """
        if frames.shape[2] % self.alpha:
            raise ValueError(f"{frames.shape[2]} frames: give a multiple of {self.alpha}.")
        slow, fast = self.slow_stem(frames[:, :, :: self.alpha]), self.fast_stem(frames)
        stages = zip(self.laterals, self.slow_stages, self.fast_stages, strict=True)
        for lateral, slow_stage, fast_stage in stages:
            slow = slow_stage(torch.cat([slow, lateral(fast)], 1))
            fast = fast_stage(fast)
        return [slow, fast]

    def rows(self, x: Tensor) -> Tensor:
        """The mean over space of what a block gives, [B, C, t]."""
        return x.mean((-2, -1))


def _stem(width: int, time: int) -> nn.Sequential:
    return nn.Sequential(
        conv(3, width, (time, 7, 7), (1, 2, 2)),
        nn.BatchNorm3d(width),
        nn.ReLU(),
        nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    )


def _stage(inputs: int, inner: int, time: int, depth: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inputs, inner, 4 * inner, time, stride)
    rest = (Bottleneck(4 * inner, inner, 4 * inner, time, 1) for _ in range(depth - 1))
    return nn.Sequential(first, *rest)
