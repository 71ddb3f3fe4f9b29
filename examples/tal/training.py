"""Training a detector: one loop for features and frames, resumable, on one process or several."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

from examples.tal.data.annotations import Prediction
from examples.tal.data.loading import Batch, Windows, collate
from examples.tal.data.windows import Window
from examples.tal.files import append_row, written_whole
from examples.tal.models.backbones import freeze_norms
from examples.tal.models.detector import Detector, Suppression, predictions
from examples.tal.models.losses import ranks
from examples.tal.nms import Found

LAST = "last.pt"
_LOG = "log.csv"
_PARTS = ("detector", "average", "optimizer", "scaler")  # of a trainer, that a state holds


@dataclass(frozen=True)
class Recipe:
    """How a detector is trained.

    Attributes:
        epochs: Passes over the videos.
        warmup: Epochs in which the rate rises from zero; it falls as a cosine behind them.
        batch: Samples of a step, over all processes.
        rate: Of the localizer.
        backbone_rate: Of the backbone, or of the adapters beside it.
        decay: Of weights of convolutions and linear layers; nothing else decays.
        clip: Largest norm of a gradient.
        ema: Share of the averaged weights that a step keeps, at most (see `averaging`); those are
            what is evaluated.
        freeze_norms: Norms of the backbone neither learn nor follow their statistics.
        amp: "bfloat16" or "float16" for autocast; empty: none.
        seed: Of weights made new, of the order of samples, and of all that is drawn.
        workers: Processes that load samples.
    """

    epochs: int = 40
    warmup: float = 5.0
    batch: int = 4
    rate: float = 1e-3
    backbone_rate: float = 5e-4
    decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    freeze_norms: bool = True
    amp: str = ""
    seed: int = 0
    workers: int = 0


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Trainer:
    """Trains a detector on windows of videos.

    Args:
        detector: On its device.
        samples: To train on.
        recipe: How.
        folder: Gets the last state, from which it goes on, and a log; None: neither.
    """

    def __init__(
        self, detector: Detector, samples: Windows, recipe: Recipe, folder: Path | None = None
    ) -> None:
        self.detector, self.samples, self.recipe, self.folder = detector, samples, recipe, folder
        self.device = next(detector.parameters()).device
        self.epoch = 0
        if recipe.batch % ranks():
            raise ValueError(f"batch {recipe.batch} does not divide over {ranks()} processes.")
        self._train_mode()  # before anybody asks what learns
        self.optimizer = torch.optim.AdamW(groups(detector, recipe))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = AveragedModel(detector, multi_avg_fn=averaging(recipe.ema), use_buffers=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        self._model: nn.Module = detector
        if ranks() > 1:
            self._model = DistributedDataParallel(detector)

    # ---- epochs ----------------------------------------------------------------------------

    def run(
        self,
        told: Callable[[int, Mapping[str, float]], None] | None = None,
        watched: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
        *,
        until: int | None = None,
    ) -> None:
        """Train until all epochs are over, from where it stands.

        Args:
            told: Called after each epoch with its number and means of its losses.
            watched: Passes the batches of an epoch on, to show how far it is.
            until: Stop after this epoch already.
        """
        while self.epoch < min(self.recipe.epochs, until or self.recipe.epochs):
            means = self._one_epoch(watched)
            self.epoch += 1
            if self.folder is not None and _is_first():
                rate = self.optimizer.param_groups[0]["lr"]
                append_row(self.folder / _LOG, {"epoch": self.epoch, "rate": rate, **means})
                self.save(self.folder / LAST)
            if told is not None:
                told(self.epoch, means)

    def _one_epoch(self, watched: Callable[[Iterable[Batch]], Iterable[Batch]]) -> dict[str, float]:
        self.samples.epoch = self.epoch
        loader = self._loader()
        seed_all(self.recipe.seed * 1_000_003 + self.epoch * 1009 + _rank())
        self._train_mode()
        sums: dict[str, float] = {}
        for number, batch in enumerate(watched(loader)):
            self._set_rate(self.epoch + number / len(loader))
            for name, value in self.step(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(loader)
        return sums

    def _train_mode(self) -> None:
        self.detector.train()
        backbone = self.detector.backbone
        if backbone is None:
            return
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            backbone.eval()
        elif self.recipe.freeze_norms:
            freeze_norms(backbone)

    def _loader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(self.recipe.seed + self.epoch)
        sampler = None
        if ranks() > 1:
            sampler = DistributedSampler(self.samples, seed=self.recipe.seed)
            sampler.set_epoch(self.epoch)
        return DataLoader(
            self.samples,
            self.recipe.batch // ranks(),
            shuffle=sampler is None,
            sampler=sampler,
            generator=generator,
            num_workers=self.recipe.workers,
            collate_fn=collate,
            drop_last=len(self.samples) >= self.recipe.batch,
        )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step; gives the losses."""
        self.optimizer.zero_grad(set_to_none=True)
        with _autocast(self.device, self.recipe.amp):
            out = self._model(batch.frames.to(self.device), batch.mask.to(self.device))
        losses = self.detector.localizer.loss(out, batch.segments, batch.labels)
        self.scaler.scale(losses.total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update_parameters(self.detector)
        return {**losses._asdict(), "norm": norm}

    def _set_rate(self, epoch: float) -> None:
        share = schedule(epoch, self.recipe.warmup, self.recipe.epochs)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    # ---- state ------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all that going on needs, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in _PARTS}
        with written_whole(path) as beside:
            torch.save({"epoch": self.epoch, **state}, beside)

    def resume(self) -> bool:
        """Go on from the folder's last state, if there is one."""
        path = None if self.folder is None else self.folder / LAST
        if path is None or not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.epoch = state["epoch"]
        return True


def averaging(ema: float) -> Callable[[Any, Any, Any], None]:
    """Moving averages for `AveragedModel` that forget faster at first.

    After n steps they keep (1 + n) / (10 + n) of a step, and no more than `ema`: short trainings
    are not averaged with their beginnings.
    """

    def average(averaged: Any, current: Any, steps: Any) -> None:
        keep = min(ema, (1 + float(steps)) / (10 + float(steps)))
        get_ema_multi_avg_fn(keep)(averaged, current, steps)  # type: ignore[no-untyped-call]

    return average


def schedule(epoch: float, warmup: float, epochs: float) -> float:
    """Share of the rate: a rise in a straight line, and half a cosine down to zero."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / max(1e-9, epochs - warmup))))


def groups(detector: Detector, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by rate and decay: only weights of convolutions and linear layers decay."""
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    decaying = {id(layer.weight) for layer in detector.modules() if isinstance(layer, layers)}
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            rate = recipe.rate if name.startswith("localizer.") else recipe.backbone_rate
            decay = recipe.decay if id(parameter) in decaying else 0.0
            found.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": rows, "lr": rate, "weight_decay": decay} for (rate, decay), rows in found.items()
    ]


# ---- evaluation -----------------------------------------------------------------------------


@torch.no_grad()
def predict(
    detector: nn.Module,
    samples: Windows,
    classes: Sequence[str],
    suppression: Suppression | None = None,
    *,
    batch: int = 4,
    amp: str = "",
) -> dict[str, list[Prediction]]:
    """Predictions for all videos of a set; with several processes each takes its share of them.

    Args:
        detector: An `AveragedModel` of one, too.
        samples: Windows to test on.
        classes: Names.
        suppression: How segments are thinned out.
        batch: Windows at once.
        amp: As of `Recipe`.
    """
    own = getattr(detector, "module", detector)
    device = next(own.parameters()).device
    training = detector.training
    detector.eval()
    found: dict[str, list[tuple[Window, Found]]] = {}
    for part in _own_batches(samples, batch):
        with _autocast(device, amp):
            out = detector(part.frames.to(device), part.mask.to(device))
        for window, rows in zip(part.windows, own.localizer.decode(out), strict=True):
            found.setdefault(window.video.name, []).append((window, rows))
    detector.train(training)
    made = {
        name: predictions(*zip(*rows, strict=True), classes, suppression or Suppression())  # type: ignore[arg-type]
        for name, rows in found.items()
    }
    return _gathered(made)


def _own_batches(samples: Windows, batch: int) -> Iterator[Batch]:
    """The windows of this process's videos: all windows of a video are one process's."""
    names = [video.name for video in samples.videos]
    mine = set(names[_rank() :: ranks()])
    numbers = [n for n, w in enumerate(samples.windows) if w.video.name in mine]
    for start in range(0, len(numbers), batch):
        yield collate([samples[number] for number in numbers[start : start + batch]])


def _gathered(own: dict[str, list[Prediction]]) -> dict[str, list[Prediction]]:
    """The predictions of all processes."""
    if ranks() == 1:
        return own
    parts: list[Any] = [None] * ranks()
    dist.all_gather_object(parts, own)
    return {name: rows for part in parts for name, rows in sorted(part.items())}


def _autocast(device: torch.device, amp: str) -> Any:
    return torch.autocast(device.type, getattr(torch, amp)) if amp else nullcontext()


def _rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


def _is_first() -> bool:
    return _rank() == 0
