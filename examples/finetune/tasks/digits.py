"""Handwritten digits: a ViT and a ResNet, trained here in seconds, then rewired."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from examples.finetune.loop import finetune
from examples.finetune.tasks.base import Task, accuracy, shuffled

TEST = 450


class PostActivation(nn.Module):
    """relu(x + F(x)), as in the first ResNets: the activation is on the trunk."""

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
        return torch.relu(x + self.body(x))


def resnet(width: int = 32, depth: int = 8) -> nn.Module:
    """[N, 1, 8, 8] to [N, 10]: one stage, `depth` residual modules."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *[PostActivation(width) for _ in range(depth)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def vit(width: int = 64, depth: int = 6) -> nn.Module:
    """[N, 1, 8, 8] to [N, 10]: 16 patches of 2 x 2, `2 * depth` residual modules."""
    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=width, depth=depth, num_heads=4,
        num_classes=10, class_token=False, global_pool="avg", weight_init="skip",
    )  # fmt: skip
    # timm's beginnings are for long training: in hundreds of steps these learn to see places.
    nn.init.normal_(model.pos_embed, std=0.5)
    return model


class Digits(Task):
    """Ten classes of 8 x 8 pictures; the seed draws the network's weights and the test set."""

    needs: ClassVar = {"sklearn": "scikit-learn"}
    learning_rate = 3e-4
    batch_size = 64
    pretraining = 600

    def __init__(self, seed: int, device: torch.device, *, quick: bool = False) -> None:
        super().__init__(seed, device, quick=quick)
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(data.target).long()
        order = torch.randperm(len(images), generator=self.generator())
        images, labels = images[order].to(device), labels[order].to(device)
        judged = TEST // 3 if quick else TEST
        self.test = images[:judged], labels[:judged]
        self.train = images[TEST:], labels[TEST:]
        self.model = self._pretrained(self.pretraining // 4 if quick else self.pretraining)
        self.example = (self.train[0][: self.batch_size],)

    @abstractmethod
    def network(self) -> nn.Module:
        """The network, untrained."""

    def _pretrained(self, steps: int) -> nn.Module:
        model = self.network().to(self.device)
        batches = self.batches()
        for learning_rate, part in ((1e-3, 2 * steps // 3), (1e-4, steps // 3)):
            list(finetune(model, batches, self.loss, learning_rate, [part]))
        return model.eval()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and labels."""
        return shuffled(*self.train, self.batch_size, self.generator())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    @torch.no_grad()
    def quality(self, model: nn.Module) -> dict[str, float]:
        """Accuracy, and how often the original says the same."""
        images, labels = self.test
        logits = model.eval()(images)
        said = self.model.eval()(images).argmax(-1)
        return {"accuracy": accuracy(logits, labels), "agreement": accuracy(logits, said)}


class DigitsVit(Digits):
    """A pre-norm transformer."""

    def network(self) -> nn.Module:
        """The ViT."""
        return vit()


class DigitsResnet(Digits):
    """A post-activation ResNet."""

    pretraining = 300

    def network(self) -> nn.Module:
        """The ResNet."""
        return resnet()
