"""What the benchmarks run: stacks of residual blocks, and ways to run them."""

from __future__ import annotations

from collections.abc import Iterable

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Stack(nn.Module):
    """Blocks in a row; each under `torch.utils.checkpoint` where asked."""

    def __init__(self, blocks: Iterable[nn.Module], *, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


class Bottleneck(nn.Module):
    """x + F(x), F = 1x1, 3x3, 1x1 convolutions with BatchNorm."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The residual module."""
        return x + self.body(x)


class ConvBlock(nn.Module):
    """x + F(x), F = two 3x3 convolutions with BatchNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The residual module."""
        return x + self.body(x)


class Autocast(nn.Module):
    """A model under autocast to a dtype; float32 leaves it as it is."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        """Run the model, on inputs of the device that they are on."""
        enabled = self.dtype != torch.float32
        with torch.autocast(x.device.type, self.dtype if enabled else None, enabled=enabled):
            result: Tensor = self.model(x)
        return result


def vit(depth: int) -> tuple[nn.Module, Tensor]:
    """ViT blocks of width 384 on 8 x 197 tokens."""
    blocks = [Block(384, 6, qkv_bias=True) for _ in range(depth)]
    return Stack(blocks), torch.randn(8, 197, 384, requires_grad=True)


def bottlenecks(depth: int) -> tuple[nn.Module, Tensor]:
    """Bottlenecks of width 256 on 8 x 28 x 28 pixels."""
    blocks = [Bottleneck(256, 64) for _ in range(depth)]
    return Stack(blocks), torch.randn(8, 256, 28, 28, requires_grad=True)


def convs(depth: int) -> tuple[nn.Module, Tensor]:
    """Blocks of two 3x3 convolutions of width 64 on 8 x 56 x 56 pixels."""
    blocks = [ConvBlock(64) for _ in range(depth)]
    return Stack(blocks), torch.randn(8, 64, 56, 56, requires_grad=True)


class Embedded(nn.Module):
    """A language model on embeddings, so that its input is one tensor with a gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings [B, T, C] to logits."""
        logits: Tensor = self.model(inputs_embeds=x, use_cache=False).logits
        return logits


def gpt2(depth: int) -> tuple[nn.Module, Tensor]:
    """GPT-2 of transformers (124 million parameters with 12 layers) on 256 embedded tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=depth))
    return Embedded(model), torch.randn(1, 256, 768, requires_grad=True)


def timm_vit(depth: int) -> tuple[nn.Module, Tensor]:
    """The whole of timm's ViT-S, with another depth, on 8 pictures."""
    return timm.create_model("vit_small_patch16_224", depth=depth), torch.randn(8, 3, 224, 224)
