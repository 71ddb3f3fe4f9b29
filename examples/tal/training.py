"""Training a detector: one loop for features and frames, resumable, on one process or several."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler

from examples.tal.data.loading import Batch, Windows, collate
from examples.tal.distribution import mean_of_ranks, rank, ranks
from examples.tal.files import append_row, written_whole
from examples.tal.models.backbones import freeze_norms
from examples.tal.models.detector import Detector, autocast

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
        horizon: Epoch at which the cosine would end; 0: the last. Re2TAL's is far behind it.
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
    horizon: int = 0
    amp: str = ""
    seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.amp not in ("", "bfloat16", "float16"):
            raise ValueError(f"amp is bfloat16 or float16, or empty; not {self.amp!r}.")
        if self.epochs < 1 or self.batch < 1 or self.workers < 0 or self.warmup < 0:
            raise ValueError("epochs and batch are from 1 on, workers and warmup from 0 on.")


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch; NumPy takes 32 bits."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Trainer:
    """Trains a detector on windows of videos.

    Args:
        detector: On its device.
        samples: To train on.
        recipe: How.
        folder: Gets the last state, from which it goes on, and a log; None: neither.
        config: What all was made of, kept with the state.
    """

    def __init__(
        self,
        detector: Detector,
        samples: Windows,
        recipe: Recipe,
        folder: Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = dict(config or {})
        self.detector, self.samples, self.recipe, self.folder = detector, samples, recipe, folder
        self.device = next(detector.parameters()).device
        self.epoch = 0
        if recipe.batch % ranks():
            raise ValueError(f"batch {recipe.batch} does not divide over {ranks()} processes.")
        self._train_mode()  # before anybody asks what learns
        self.optimizer = torch.optim.AdamW(groups(detector, recipe))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = averaged(detector, recipe.ema)
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
        last = self.recipe.epochs if until is None else min(until, self.recipe.epochs)
        while self.epoch < last:
            means = self._one_epoch(watched)
            self.epoch += 1
            if self.folder is not None and rank() == 0:
                self._keep(self.folder, means)
            if told is not None:
                told(self.epoch, means)

    def _keep(self, folder: Path, means: Mapping[str, float]) -> None:
        """Write the state, and a row of the log."""
        self.save(folder / LAST)
        if self.epoch == 1:  # another training's
            (folder / _LOG).unlink(missing_ok=True)
        rate = self.recipe.rate * self._share(self.epoch - 1)
        append_row(folder / _LOG, {"epoch": self.epoch, "rate": rate, **means})

    def _one_epoch(self, watched: Callable[[Iterable[Batch]], Iterable[Batch]]) -> dict[str, float]:
        self.samples.epoch = self.epoch
        loader = self._loader()
        seed_all(self.recipe.seed * 1_000_003 + self.epoch * 1009 + rank())
        self._train_mode()
        sums: dict[str, float] = {}
        for number, batch in enumerate(watched(loader)):
            self._set_rate(self.epoch + number / len(loader))
            for name, value in self.step(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) / len(loader)
        return {name: mean_of_ranks(value, self.device) for name, value in sums.items()}

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
        with autocast(self.device, self.recipe.amp):
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
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self._share(epoch)

    def _share(self, epoch: float) -> float:
        return schedule(epoch, self.recipe.warmup, self.recipe.horizon or self.recipe.epochs)

    # ---- state ------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all that going on needs, whole or not at all."""
        state = {name: getattr(self, name).state_dict() for name in _PARTS}
        with written_whole(path) as beside:
            torch.save({"epoch": self.epoch, "config": self.config, **state}, beside)

    def resume(self, state: Mapping[str, Any] | None = None) -> bool:
        """Go on from the folder's last state, if there is one.

        Args:
            state: It, of `read_last`; None: it is read.
        """
        path = None if self.folder is None else self.folder / LAST
        there = path is not None and path.exists()
        if mean_of_ranks(float(there), self.device) not in (0.0, 1.0):
            raise ValueError(f"{path}: not every process sees it; --out must be a shared folder.")
        if path is None or not there:
            return False
        state = state or read_last(path)
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.epoch = state["epoch"]
        return True


def read_last(path: Path) -> dict[str, Any]:
    """What `Trainer.save` wrote, on the CPU.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return {"config": {}, **{name: state[name] for name in ("epoch", "config", *_PARTS)}}
    except Exception as error:  # a damaged file may raise anything
        reason = type(error).__name__
        raise ValueError(
            f"{path}: cannot be read ({reason}). Remove it, or name another --out."
        ) from error


def averaged(detector: Detector, ema: float = 0.0) -> AveragedModel:
    """A detector of moving averages, which is what is tested; what does not learn is shared."""
    average = AveragedModel(detector, multi_avg_fn=averaging(ema), use_buffers=True)
    for mean, own in zip(average.module.parameters(), detector.parameters(), strict=True):
        if not own.requires_grad:
            mean.data = own.data
    return average


def averaging(ema: float) -> Callable[[Any, Any, Any], None]:
    """Moving averages for `AveragedModel` that forget faster at first.

    After n steps they keep (1 + n) / (10 + n) of a step, and no more than `ema`: short trainings
    are not averaged with their beginnings. Whole numbers, as of tables of positions, are copied.
    """

    def average(means: Any, current: Any, steps: Any) -> None:
        keep = min(ema, (1 + float(steps)) / (10 + float(steps)))
        if means[0].is_floating_point():
            get_ema_multi_avg_fn(keep)(means, current, steps)  # type: ignore[no-untyped-call]
        else:
            torch._foreach_copy_(means, current)

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
