"""Video backbones by name, and the ways to train them: as they are, rewired, checkpointed, frozen.

A `Backbone` maps frames [B, 3, T, H, W] (red, green, blue; 0 to 1) to features [B, C, L], one for
each step of the localizer's grid: a network's maps are averaged over space and interpolated over
time. Nothing in a network knows how it is trained; rewiring finds its residual modules itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rewire
from examples.tal.models.layers import wide
from examples.tal.models.motionnet import Block, MotionNet
from examples.tal.models.slowfast import Bottleneck, SlowFast

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CENTRED = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

WAYS = ("plain", "checkpointed", "rewired", "frozen")


class Swin(nn.Module):
    """Video Swin of torchvision without its head: a map [B, C, T / 2, H / 32, W / 32].

    Args:
        size: "t", "s" or "b".
        settings: Of `torchvision.models.video.SwinTransformer3d`, to try others.
    """

    def __init__(self, size: str = "t", **settings: Any) -> None:
        super().__init__()
        video = torchvision.models.video
        if settings:
            self.net = video.SwinTransformer3d(**settings)
        else:
            self.net = getattr(video, f"swin3d_{size}")()
        self.channels = (self.net.num_features,)
        self.net.head = nn.Identity()

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Run all but the pooling and the head."""
        x = self.net.pos_drop(self.net.patch_embed(frames))
        x = self.net.norm(self.net.features(x))
        return [x.permute(0, 4, 1, 2, 3)]

    def rows(self, x: Tensor) -> Tensor:
        """The mean over space of what a block gives, [B, C, t]."""
        return x.mean((2, 3)).mT


class VideoMAE(nn.Module):
    """VideoMAE (v1, v2) of transformers, run over clips of its own length side by side.

    Args:
        config: A `transformers.VideoMAEConfig`, or keywords of one.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import VideoMAEConfig, VideoMAEModel

        self.config = VideoMAEConfig(**config) if isinstance(config, Mapping) else config
        self.net = VideoMAEModel(self.config)
        self.channels, self.clip = (self.config.hidden_size,), self.config.num_frames

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Frames [B, 3, T, H, W] to a map [B, C, T / 2, 1, 1]; T is a multiple of a clip."""
        size = self.clip
        if frames.shape[2] % size:
            raise ValueError(f"{frames.shape[2]} frames: give a multiple of {size}, a clip.")
        clips = frames.unflatten(2, (-1, size)).permute(0, 2, 3, 1, 4, 5)  # [B, n, T, 3, H, W]
        rows = self.rows(self.net(clips.flatten(0, 1)).last_hidden_state)
        together = rows.unflatten(0, (len(frames), -1)).transpose(1, 2).flatten(2)
        return [together[..., None, None]]

    def rows(self, x: Tensor) -> Tensor:
        """The mean over space of the tokens of each clip, [N, C, t]."""
        return x.unflatten(1, (self.clip // self.config.tubelet_size, -1)).mean(2).mT


# ViT sizes of VideoMAE: hidden size, layers, heads, size of the MLP, size of a patch.
_VIT = {
    "s": (384, 12, 6, 1536, 16),
    "b": (768, 12, 12, 3072, 16),
    "l": (1024, 24, 16, 4096, 16),
    "h": (1280, 32, 16, 5120, 16),
    "g": (1408, 40, 16, 6144, 14),
}


def videomae(size: str) -> VideoMAE:
    """VideoMAE by the size of its ViT: s, b, l, h, g."""
    hidden, layers, heads, inner, patch = _VIT[size]
    return VideoMAE(
        {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
        }
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "motionnet": MotionNet,
    **{f"swin_{size}": partial(Swin, size) for size in "tsb"},
    "slowfast_r50": SlowFast,
    "slowfast_r101": partial(SlowFast, (3, 4, 23, 3)),
    "slowfast_r50_mmaction": partial(SlowFast, normed=False),
    "slowfast_r101_mmaction": partial(SlowFast, (3, 4, 23, 3), normed=False),
    **{f"videomae_{size}": partial(videomae, size) for size in _VIT},
}


class Backbone(nn.Module):
    """A network's maps as features of a localizer.

    Args:
        net: Maps frames to a list of maps [B, C, t, h, w].
        per_step: Frames to a step.
        normal: Mean and deviation of each colour.
        pool: "mean" or "max", over space.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        net: nn.Module,
        per_step: int = 2,
        normal: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET,
        pool: str = "mean",
    ) -> None:
        super().__init__()
        if pool not in ("mean", "max"):
            raise ValueError(f"pool={pool!r}: mean or max.")
        self.net, self.per_step, self.pool = net, per_step, pool
        self.channels = sum(net.channels)
        for name, values in zip(("mean", "deviation"), normal, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W], shares of one or bytes, to features [B, C, T / per_step]."""
        frames = frames / 255 if frames.dtype == torch.uint8 else frames
        steps = frames.shape[2] // self.per_step
        maps = self.net((frames - self.mean) / self.deviation)
        rows = [x.amax((-2, -1)) if self.pool == "max" else wide(x).mean((-2, -1)) for x in maps]
        return torch.cat([fitted(x, steps) for x in rows], 1)


def fitted(x: Tensor, steps: int) -> Tensor:
    """Rows [B, C, t] interpolated to so many steps."""
    return x if x.shape[-1] == steps else F.interpolate(x, steps, mode="linear")


def prepared(backbone: Backbone, way: str, **options: Any) -> Backbone:
    """A backbone ready to be trained in a way, with the same parameters.

    Args:
        backbone: As it is.
        way: "plain"; "checkpointed", every block; "rewired"; "frozen": no gradients, eval mode.
        options: Of `rewire.make_reversible`, where it is rewired.
    """
    if way not in WAYS:
        raise ValueError(f"way={way!r}: one of {', '.join(WAYS)}.")
    if options and way != "rewired":
        raise ValueError(f"way={way!r} takes no options: {', '.join(options)}.")
    if way == "rewired":
        example = options.pop("example_inputs", None)
        backbone.net = rewire.make_reversible(backbone.net, example, **options)
    if way == "checkpointed":
        for block in blocks(backbone.net):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if way == "frozen":
        backbone.requires_grad_(False).eval()
    return backbone


def blocks(net: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network, as everyone checkpoints them."""
    kinds = (Block, Bottleneck, torchvision.models.video.swin_transformer.SwinTransformerBlock)
    for module in net.modules():
        if isinstance(module, kinds) or type(module).__name__ == "VideoMAELayer":
            yield module


def freeze_norms(net: nn.Module) -> None:
    """Have norms neither learn nor follow their statistics: batches of long clips are small."""
    for module in net.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)):
            module.eval()
            module.requires_grad_(False)
