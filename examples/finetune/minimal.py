"""Finetune a rewired ViT, step by step: what changes in a training loop is one line.

    uv run python -m examples.finetune.minimal
    uv run python -m examples.finetune.minimal --model timm/vit_small_patch16_224 --pretrained

The task is made up (which quarter of the picture is brightest), so that it runs offline; a network
without pretrained weights does not learn it in 30 steps, rewired or not.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional

import rewire
from rewire.sources import open_model


def pictures(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise [count, 3, size, size] with one brighter quarter, and which one it is, [count]."""
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    half = size // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = half * (label // 2), half * (label % 2)
        image[:, row : row + half, column : column + half] += 2.0
    return images, labels


def main(
    model: Annotated[str, typer.Option(help="A timm image model.")] = "timm/vit_tiny_patch16_224",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 30,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 16,
    size: Annotated[int, typer.Option(help="Height and width of the pictures.")] = 64,
    pretrained: Annotated[bool, typer.Option(help="Fetch pretrained weights.")] = False,
) -> None:
    """Finetune a rewired model on a made-up task."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    spec = f"{model}?img_size={size}&num_classes=4"
    plain = open_model(spec, pretrained=pretrained).module.train()

    rev = rewire.make_reversible(plain)  # the one line

    print(rewire.rewriting.plan_of(rev))
    optimizer = torch.optim.AdamW(rev.parameters(), lr=3e-4)
    for step in range(1, steps + 1):
        images, labels = pictures(batch, size, generator)
        logits = rev(images)
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps:
            right = (logits.argmax(-1) == labels).float().mean()
            print(f"step {step:3d}  loss {loss:.3f}  right {right:.0%}")

    images, labels = pictures(batch, size, generator)
    for name, way in (("plain", plain), ("rewired", rev)):
        print(f"{name:8s} {rewire.profile(way, images)}")


if __name__ == "__main__":
    typer.run(main)
