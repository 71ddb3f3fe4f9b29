"""What a detector finds in the videos of a set, on one process or several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Subset

from examples.tal.data.annotations import Prediction
from examples.tal.data.loading import Batch, Windows, collate
from examples.tal.data.windows import Window
from examples.tal.distribution import rank, ranks
from examples.tal.models.detector import Suppression, autocast, predictions
from examples.tal.nms import Found


@torch.no_grad()
def predict(
    detector: nn.Module,
    samples: Windows,
    classes: Sequence[str],
    suppression: Suppression | None = None,
    *,
    batch: int = 4,
    amp: str = "",
    workers: int = 0,
) -> dict[str, list[Prediction]]:
    """Predictions for all videos of a set; with several processes each takes its share of them.

    Args:
        detector: An `AveragedModel` of one, too.
        samples: Windows to test on.
        classes: Names.
        suppression: How segments are thinned out.
        batch: Windows at once, on each process.
        amp: As of `Recipe`.
        workers: Processes that load windows.
    """
    own = getattr(detector, "module", detector)
    device = next(own.parameters()).device
    found: dict[str, list[tuple[Window, Found]]] = {}
    with _evaluating(detector):
        for part in _own_batches(samples, batch, workers):
            with autocast(device, amp):
                out = detector(part.frames.to(device), part.mask.to(device))
            for window, rows in zip(part.windows, own.localizer.decode(out), strict=True):
                found.setdefault(window.video.name, []).append((window, rows))
    made = {
        name: predictions(*zip(*rows, strict=True), classes, suppression or Suppression())  # type: ignore[arg-type]
        for name, rows in found.items()
    }
    return _gathered(made)


@contextmanager
def _evaluating(detector: nn.Module) -> Iterator[None]:
    """In eval mode; every module is put back as it was, frozen norms too."""
    modes = {module: module.training for module in detector.modules()}
    detector.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _own_batches(samples: Windows, batch: int, workers: int) -> DataLoader[Batch]:
    """The windows of this process's videos: all windows of a video are one process's."""
    names = [video.name for video in samples.videos]
    mine = set(names[rank() :: ranks()])
    numbers = [n for n, w in enumerate(samples.windows) if w.video.name in mine]
    rest = {"num_workers": workers, "collate_fn": collate}
    return DataLoader(Subset(samples, numbers), batch, **rest)  # type: ignore[arg-type]


def _gathered(own: dict[str, list[Prediction]]) -> dict[str, list[Prediction]]:
    """The predictions of all processes."""
    if ranks() == 1:
        return own
    parts: list[dict[str, list[Prediction]]] = [{}] * ranks()
    dist.all_gather_object(parts, own)
    return {name: rows for part in parts for name, rows in sorted(part.items())}
