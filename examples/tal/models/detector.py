"""A backbone and a localizer as one network, and what becomes of its segments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from examples.tal.data.annotations import Prediction
from examples.tal.data.windows import Window
from examples.tal.nms import Found, best, by_class, joined, soft_nms, vote


class Localizer(Protocol):
    """What finds segments in features."""

    def __call__(self, x: Tensor, mask: Tensor) -> Any:
        """Outputs for features [B, C, L] and a mask [B, L]."""

    def loss(self, out: Any, segments: Sequence[Tensor], labels: Sequence[Tensor]) -> Any:
        """Losses with a `total`; segments in steps."""

    def decode(self, out: Any) -> list[Found]:
        """Segments of each sample, in steps."""


class Detector(nn.Module):
    """Frames to a localizer's outputs.

    Args:
        backbone: Frames [B, 3, T, H, W] to features [B, C, L]; None: features come in.
        localizer: Features to outputs.
        adapter: What the backbone gives, and a mask, to features; None: it gives features.
    """

    def __init__(
        self,
        backbone: nn.Module | None,
        localizer: nn.Module,
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.localizer, self.adapter = backbone, localizer, adapter

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        """Run on frames, bytes or shares of one, or on features."""
        if self.backbone is not None:
            x = self.backbone(x)
        if self.adapter is not None:
            x = self.adapter(x, mask)
        return self.localizer(x, mask)


@dataclass(frozen=True)
class Suppression:
    """How overlapping segments are thinned out.

    Attributes:
        sigma: Of soft-NMS; 0.5 for THUMOS (0.7 end to end), 0.75 for ActivityNet.
        least: Scores below it are dropped, as are all up to 0.001.
        most: Segments kept of a video.
        classes: Each class is thinned out by itself.
        voting: Overlap from which segments vote on the kept ones' ends; 0: none do. Not with
            classes by themselves.
    """

    sigma: float = 0.5
    least: float = 0.001
    most: int = 200
    classes: bool = True
    voting: float = 0.0

    def __post_init__(self) -> None:
        if self.sigma <= 0:
            raise ValueError(f"sigma: a number above 0, not {self.sigma}.")


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """Autocast to a type by its name; none where it is empty."""
    return torch.autocast(device.type, getattr(torch, amp)) if amp else nullcontext()


def predictions(
    windows: Sequence[Window],
    found: Sequence[Found],
    classes: Sequence[str],
    suppression: Suppression,
) -> list[Prediction]:
    """Predictions for one video, from all of its windows.

    Args:
        windows: Of one video.
        found: Of each, in steps.
        classes: Their names.
        suppression: How they are thinned out.
    """
    placed = [
        rows._replace(spans=window.to_seconds(rows.spans))
        for window, rows in zip(windows, found, strict=True)
    ]
    rows = joined(placed)
    settings = {"sigma": suppression.sigma, "least": suppression.least, "most": suppression.most}
    thin = partial(soft_nms, **settings)
    kept = by_class(rows, thin) if suppression.classes else thin(rows)
    if suppression.voting and not suppression.classes:
        kept = vote(kept, rows, suppression.voting)
    kept = best(kept, suppression.most)
    columns = zip(kept.spans, kept.scores, kept.labels, strict=True)
    return [
        Prediction(float(span[0]), float(span[1]), classes[int(label)], float(score))
        for span, score, label in columns
    ]
