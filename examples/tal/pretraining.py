"""Pretraining a backbone on trimmed clips of motions, as others are on Kinetics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.tal.data.annotations import of_subset, read_annotations
from examples.tal.data.synthetic import ANNOTATIONS, MOTIONS, VIDEOS
from examples.tal.data.video import find_video, read_frames
from examples.tal.models.backbones import Backbone
from examples.tal.training import schedule

CLASSES = sorted(MOTIONS)
# What a motion becomes in a mirror; what is left out stays.
_TURNED = {"across": "upright", "upright": "across"}
_REVERSED = {"grow": "shrink", "shrink": "grow"}


class Classifier(nn.Module):
    """A backbone, and a linear layer on its features' mean over time.

    Args:
        backbone: Frames to features [B, C, L].
        classes: Their number.
    """

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.channels, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [B, 3, T, H, W], from 0 to 255, to logits."""
        result: Tensor = self.head(self.backbone(frames.float() / 255).mean(-1))
        return result


@dataclass(frozen=True)
class Clips:
    """Clips of one length: frames [N, 3, T, H, W], numbers from 0 to 255, and labels [N]."""

    frames: Tensor
    labels: Tensor


def clips(root: Path, subset: str) -> Clips:
    """The trimmed clips of a generated folder."""
    frames, labels = [], []
    for video in of_subset(read_annotations(root / ANNOTATIONS), subset):
        path = find_video(root / VIDEOS, video.name)
        pictures = torch.from_numpy(read_frames(path, range(video.frames or 0)))
        frames.append(pictures.permute(3, 0, 1, 2))
        labels.append(CLASSES.index(video.segments[0].label))
    return Clips(torch.stack(frames), torch.tensor(labels))


def mirrored(frames: Tensor, labels: Tensor, generator: torch.Generator) -> Clips:
    """Clips in mirrors of space and time, and in other colours, with the labels of what is seen."""
    frames, labels = frames.clone(), labels.clone()
    mirrors: list[tuple[Callable[[Tensor], Tensor], dict[str, str]]] = [
        (lambda x: x.flip(-1), {}),
        (lambda x: x.flip(-2), {}),
        (lambda x: x.transpose(-1, -2), _TURNED),
        (lambda x: x.flip(-3), _REVERSED),
    ]
    for mirror, names in mirrors:
        becomes = torch.tensor([CLASSES.index(names.get(name, name)) for name in CLASSES])
        chosen = torch.rand(len(labels), generator=generator) < 0.5
        frames[chosen] = mirror(frames[chosen])
        labels[chosen] = becomes[labels[chosen]]
    shape = len(labels), 3, 1, 1, 1
    gain = 1 + 0.2 * (2 * torch.rand(shape, generator=generator) - 1)
    shift = 25 * (2 * torch.rand(shape, generator=generator) - 1)
    return Clips((frames * gain + shift).clamp(0, 255), labels)


def pretrain(
    classifier: Classifier,
    data: Clips,
    *,
    epochs: int = 8,
    batch: int = 32,
    rate: float = 2e-3,
    seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> None:
    """Train a classifier on clips.

    Args:
        classifier: On its device.
        data: The clips.
        epochs: Passes over them.
        batch: Clips of a step.
        rate: Largest, after a tenth of the steps; it falls as a cosine.
        seed: Of the order, and of mirrors.
        told: Called after each epoch with its number and mean loss.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    device = next(classifier.parameters()).device
    optimizer = torch.optim.AdamW(classifier.parameters(), rate, weight_decay=0.05)
    steps = max(1, len(data.labels) // batch)
    classifier.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        total = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(epoch + step / steps, 0.1 * epochs, epochs)
            rows = order[step * batch : (step + 1) * batch]
            seen = mirrored(data.frames[rows], data.labels[rows], generator)
            loss = F.cross_entropy(classifier(seen.frames.to(device)), seen.labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += float(loss.detach()) / steps
        if told is not None:
            told(epoch + 1, total)


def finetune(classifier: Classifier, data: Clips, epochs: int, seed: int) -> None:
    """Go on with a pretrained classifier whose function has changed, at a quarter of the rate."""
    if epochs:
        pretrain(classifier, data, epochs=epochs, rate=5e-4, seed=seed)


@torch.no_grad()
def accuracy(classifier: Classifier, data: Clips, batch: int = 32) -> float:
    """Share of clips that are told right."""
    classifier.eval()
    device = next(classifier.parameters()).device
    right = 0
    for start in range(0, len(data.labels), batch):
        rows = slice(start, start + batch)
        found = classifier(data.frames[rows].to(device)).argmax(1).cpu()
        right += int((found == data.labels[rows]).sum())
    return right / len(data.labels)
