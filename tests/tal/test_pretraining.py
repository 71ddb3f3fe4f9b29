"""Clips in mirrors, and a classifier that learns from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("av")

from examples.tal.models.backbones import CENTRED, Backbone
from examples.tal.models.motionnet import MotionNet
from examples.tal.pretraining import CLASSES, Classifier, Clips, accuracy, mirrored, pretrain

WAYS = {"across": (2, 0), "upright": (0, 2), "still": (0, 0)}


def dot(across: int, down: int) -> Tensor:
    """A bright dot that moves, [3, T, H, W]."""
    frames = torch.zeros(3, 8, 32, 32)
    for time in range(8):
        x, y = 16 + across * (time - 4), 16 + down * (time - 4)
        frames[:, time, y - 1 : y + 2, x - 1 : x + 2] = 200
    return frames


def seen(frames: Tensor) -> str:
    """Along which axis the dot goes."""
    places = []
    for picture in (frames[:, 0].sum(0), frames[:, -1].sum(0)):
        rows, columns = torch.nonzero(picture > picture.max() - 1, as_tuple=True)
        places.append((float(columns.float().mean()), float(rows.float().mean())))
    (x, y), (then_x, then_y) = places
    if max(abs(then_x - x), abs(then_y - y)) < 1:
        return "still"
    return "across" if abs(then_x - x) > abs(then_y - y) else "upright"


def test_labels_are_those_of_what_is_seen_in_the_mirror() -> None:
    names = list(WAYS) * 30
    frames = torch.stack([dot(*WAYS[name]) for name in names])
    labels = torch.tensor([CLASSES.index(name) for name in names])
    found = mirrored(frames, labels, torch.Generator().manual_seed(0))
    assert [seen(clip) for clip in found.frames] == [CLASSES[n] for n in found.labels]
    assert not torch.equal(found.labels, labels)
    grow = torch.tensor([CLASSES.index("grow")] * 40)
    kinds = {CLASSES[n] for n in mirrored(frames[:40], grow, torch.Generator()).labels}
    assert kinds == {"grow", "shrink"}


def test_a_classifier_learns() -> None:
    ways = [(name, sign) for name in ("across", "upright") for sign in (-1, 1)] * 8
    names = [name for name, _ in ways]
    frames = torch.stack([dot(sign * WAYS[n][0], sign * WAYS[n][1]) for n, sign in ways])
    data = Clips(frames, torch.tensor([CLASSES.index(name) for name in names]))
    torch.manual_seed(0)
    classifier = Classifier(Backbone(MotionNet((8, 16), 1), normal=CENTRED), len(CLASSES))
    before = accuracy(classifier, data)
    losses: list[float] = []
    pretrain(classifier, data, epochs=60, batch=16, rate=1e-2, told=lambda _, x: losses.append(x))
    assert losses[-1] < 0.7 * losses[0]
    assert accuracy(classifier, data) > before + 0.3
