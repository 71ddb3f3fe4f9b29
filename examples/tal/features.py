"""Features of a frozen backbone, computed once: the two steps that end-to-end training replaces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from examples.tal.data.loading import Sample, Windows, collate
from examples.tal.models.backbones import Backbone


class Features(Dataset[Sample]):
    """Windows in which features [C, L] stand in the place of frames; the same in every epoch.

    Args:
        samples: Windows of frames, each of which sees all of its video or all windows there are.
        backbone: Frozen; it runs once, in eval mode.
        batch: Windows at once.
    """

    def __init__(self, samples: Windows, backbone: Backbone, batch: int = 8) -> None:
        self.videos, self.windows, self.epoch = samples.videos, samples.windows, 0
        device = next(backbone.parameters()).device
        backbone.eval()
        self._samples: list[Sample] = []
        rows = [samples[number] for number in range(len(samples))]
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            with torch.no_grad():
                found = backbone(collate(part).frames.to(device)).cpu()
            self._samples += _replaced(part, found)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Sample:
        return self._samples[number]


def _replaced(samples: Sequence[Sample], features: torch.Tensor) -> list[Sample]:
    return [sample._replace(frames=row) for sample, row in zip(samples, features, strict=True)]
