"""Networks, precisions and couplings over which gradients are shown to be exact."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16
COUPLINGS = (
    "re2",
    "re2(sum)",
    "re2(last)",
    "consistent(1/2)",
    "consistent(1/4)",
    "consistent(1/8)",
    "dr2(0.9, 0.1)",
    "dr2(1, 0.3)",
    "dr2(0.5, 0.5)",
    "dr2(1, 1.3)",
    "bdia",
)


@dataclass(frozen=True)
class Mode:
    """In which precision a model runs."""

    dtype: torch.dtype
    autocast: bool = False

    def __call__(self, device: str = "cpu") -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, self.autocast)


MODES = {
    "fp32": Mode(torch.float32),
    "bf16 autocast": Mode(torch.float32, autocast=True),
    "bf16 parameters": Mode(torch.bfloat16),
    "fp64": Mode(torch.float64),
}


# ---- networks ----------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """LayerNorm and attention in two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(y.transpose(1, 2).flatten(2))


def perceptron(width: int = WIDTH) -> nn.Module:
    """LayerNorm, Linear, GELU, Linear."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


def convolutions(width: int = 8) -> nn.Module:
    """Conv, BatchNorm, ReLU, Conv, BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )


class DropPath(nn.Module):
    """Drops a branch for whole samples."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), *(1,) * (x.dim() - 1)).bernoulli_(0.7) / 0.7


class Stack(nn.Module):
    """x = T_i(x + F_i(x)) in the code of the root itself."""

    def __init__(self, stem: nn.Module, branches: Iterable[nn.Module], trunk: Any = None) -> None:
        super().__init__()
        self.stem, self.branches = stem, nn.ModuleList(branches)
        self.trunks = nn.ModuleList(trunk() if trunk else nn.Identity() for _ in self.branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch, trunk in zip(self.branches, self.trunks, strict=True):
            x = trunk(x + branch(x))
        return x


class Rescale(nn.Module):
    """Channels times a constant."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def transformer(depth: int, stem: nn.Module | None = None, norm: Any = None) -> nn.Module:
    """Attention and MLP in turn."""
    branches = [perceptron() if i % 2 else SelfAttention() for i in range(depth)]
    return Stack(stem or nn.Linear(WIDTH, WIDTH), branches, norm)


def dropping(depth: int) -> nn.Module:
    """Dropout in one half of the branches, drop path in the other."""
    drops = [DropPath, functools.partial(nn.Dropout, 0.3)]
    branches = [nn.Sequential(perceptron(), drops[i % 2]()) for i in range(depth)]
    return Stack(nn.Linear(WIDTH, WIDTH), branches)


def with_outliers(depth: int) -> nn.Module:
    """Two channels 50 times the rest."""
    factors = torch.ones(WIDTH)
    factors[[3, 11]] = 50.0
    return transformer(depth, Rescale(factors))


def residual_net(depth: int) -> nn.Module:
    """ReLU on the trunk."""
    stem = nn.Conv2d(3, 8, 3, padding=1)
    return Stack(stem, (convolutions() for _ in range(depth)), functools.partial(nn.ReLU, True))


def rows(batch: int = 2) -> Tensor:
    """[batch, 6, WIDTH]."""
    return torch.randn(batch, 6, WIDTH)


def pictures(batch: int = 3) -> Tensor:
    """[batch, 3, 5, 5]."""
    return torch.randn(batch, 3, 5, 5)


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "pre-norm transformer": (transformer, rows),
    "post-norm transformer": (lambda depth: transformer(depth, norm=_layer_norm), rows),
    "conv-BatchNorm-ReLU": (residual_net, pictures),
    "outlier channels": (with_outliers, rows),
    "tiny stem": (lambda depth: transformer(depth, Rescale(torch.full((WIDTH,), 0.05))), rows),
    "dropout and drop path": (dropping, rows),
}


def _layer_norm() -> nn.Module:
    """With weights that are not one, and of both signs."""
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    nn.init.normal_(norm.bias, 0.0, 0.5)
    return norm
