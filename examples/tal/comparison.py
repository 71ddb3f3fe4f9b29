"""Ways to train one detector, side by side: same videos, same pretrained backbone, same localizer.

Every way has a schedule of its own, fixed before the test set was looked at, and is tested once, at
the end of it, with its averaged weights.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import rewire
from examples.tal.building import backbone_of, localizer_of
from examples.tal.config import Config
from examples.tal.data.annotations import Prediction, Video
from examples.tal.data.loading import Windows, collate
from examples.tal.data.synthetic import ANNOTATIONS
from examples.tal.evaluation import ACTIVITYNET_THRESHOLDS, evaluate
from examples.tal.features import Features
from examples.tal.files import append_row, written_whole
from examples.tal.models.backbones import Backbone, prepared
from examples.tal.models.detector import Detector
from examples.tal.models.losa import LoSA, Taps
from examples.tal.prediction import predict
from examples.tal.pretraining import CLASSES, Classifier, Clips, accuracy, clips, finetune, pretrain
from examples.tal.sets import Sets, sets_of
from examples.tal.training import Trainer, seed_all

_PRETRAINED = 8  # epochs on clips, the same for all ways


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        name: What it is called.
        way: Of the backbone: "features", "losa", "plain", "checkpointed" or "rewired".
        coupling: Of a rewired one.
        finetuned: Epochs on the pretraining task after rewiring.
        epochs: Of training the detector.
        rate: Of the backbone or the adapters, in the localizer's.
    """

    name: str
    way: str
    coupling: str = "re2"
    finetuned: int = 0
    epochs: int = 40
    rate: float = 0.5


# What is trained alone goes on for longer: a step of it costs less. Adapters learn faster than the
# localizer, as in the recipes of their papers, and a pretrained backbone slower.
ARMS = (
    Arm("features", "features", epochs=60),
    Arm("LoSA", "losa", epochs=60, rate=2.0),
    Arm("plain", "plain"),
    Arm("checkpointed", "checkpointed"),
    Arm("re2 at once", "rewired"),
    Arm("re2, finetuned first", "rewired", finetuned=4),
    Arm("consistent(1/8)", "rewired", "consistent(1/8)"),
)


@dataclass(frozen=True)
class Outcome:
    """What one arm came to with one seed.

    Attributes:
        arm: Its name.
        seed: Of all that is drawn.
        accuracy: Of trimmed clips, by the backbone that it began with.
        maps: mAP by threshold, and the averages over THUMOS's and ActivityNet's.
        peak_mib: Most memory of a training step beyond what stands.
        step_ms: Of a training step, median.
        seconds: Of all of it.
    """

    arm: str
    seed: int
    accuracy: float
    maps: Mapping[str, float] = field(default_factory=dict)
    peak_mib: float = 0.0
    step_ms: float = 0.0
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """As a line of a CSV file."""
        rest = {"peak_mib": self.peak_mib, "step_ms": self.step_ms, "seconds": self.seconds}
        own = {"arm": self.arm, "seed": self.seed, "accuracy": self.accuracy}
        return {**own, **self.maps, **rest}


def compare(
    config: Config, motions: Path, seeds: int, arms: Sequence[Arm] = ARMS, workers: int = 2
) -> Iterator[Outcome]:
    """Run all arms with all seeds, each in a process; gives outcomes as they come.

    Args:
        config: Of data, backbone, localizer and recipe.
        motions: Folder of the clips to pretrain on.
        seeds: How many.
        arms: The ways.
        workers: Processes at once.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        seeded = [replace(config, recipe=replace(config.recipe, seed=n)) for n in range(seeds)]
        files = list(pool.map(_kept, seeded, seeds * [motions]))
        jobs = [
            pool.submit(_one, own, motions, arm, file)
            for own, file in zip(seeded, files, strict=True)
            for arm in arms
        ]
        for job in as_completed(jobs):
            yield job.result()


def _one(config: Config, motions: Path, arm: Arm, file: Path) -> Outcome:
    """One arm with one seed, in a process of its own: the same backbone for all arms of a seed."""
    torch.set_num_threads(1)
    train, test = clips(motions, "training"), clips(motions, "validation")
    classifier = _new(config)
    classifier.load_state_dict(torch.load(file, weights_only=True))
    return run(arm, config, sets_of(config), (train, test), classifier)


def _kept(config: Config, motions: Path) -> Path:
    """The pretrained classifier of a seed: a file beside the clips, made where there is none."""
    seed = config.recipe.seed
    made_of = (motions / ANNOTATIONS).read_bytes() + repr(config.backbone).encode()
    mark = hashlib.sha256(made_of).hexdigest()[:8]
    path = motions / f"{config.backbone.name}_{_PRETRAINED}_epochs_seed_{seed}_{mark}.pt"
    if not path.exists():
        torch.set_num_threads(1)
        classifier = pretrained(config, clips(motions, "training"), _PRETRAINED)
        with written_whole(path) as beside:
            torch.save(classifier.state_dict(), beside)
    return path


def pretrained(config: Config, clips: Clips, epochs: int) -> Classifier:
    """A classifier with the configuration's backbone, new, trained on clips with its seed."""
    seed_all(config.recipe.seed)
    classifier = _new(config)
    pretrain(classifier, clips, epochs=epochs, seed=config.recipe.seed)
    return classifier


def _new(config: Config) -> Classifier:
    """One that has learned nothing yet, whatever the configuration's weights are."""
    bare = replace(config, backbone=replace(config.backbone, weights=""))
    return Classifier(backbone_of(bare), len(CLASSES))


def run(
    arm: Arm,
    config: Config,
    sets: Sets,
    motions: tuple[Clips, Clips],
    classifier: Classifier,
) -> Outcome:
    """Train one arm with one seed, and test it.

    Args:
        arm: The way.
        config: Of data, localizer and recipe, and the seed of all that is drawn.
        sets: To train on and to test on.
        motions: Clips of the pretraining task, to train and to test on.
        classifier: The pretrained one; a copy of it is used.
    """
    start, seed = time.perf_counter(), config.recipe.seed
    classifier = copy.deepcopy(classifier)
    backbone = classifier.backbone
    if arm.way == "rewired":
        example = collate([sets.training[0]]).frames.float() / 255
        backbone.net = rewire.make_reversible(backbone.net, example, coupling=arm.coupling)
        finetune(classifier, motions[0], arm.finetuned, seed)
    told = accuracy(classifier, motions[1])
    rate = arm.rate * config.recipe.rate
    recipe = replace(config.recipe, epochs=arm.epochs, backbone_rate=rate)
    seed_all(seed)
    detector, samples, tests = _network(arm, config, backbone, sets)
    trainer = Trainer(detector, samples, recipe)
    peak, milliseconds = cost_of_a_step(trainer)
    trainer.run()
    found = predict(trainer.average, tests, sets.classes, config.suppression)
    maps = _maps(tests.videos, found, config.thresholds)
    seconds = time.perf_counter() - start
    return Outcome(arm.name, seed, told, maps, peak, milliseconds, seconds)


def _network(
    arm: Arm, config: Config, backbone: Backbone, sets: Sets
) -> tuple[Detector, Windows | Features, Windows | Features]:
    """The detector of an arm, and what it is trained and tested on."""
    localizer = localizer_of(config, backbone.channels, len(sets.classes))
    if arm.way == "features":
        rows = (Features(windows, backbone) for windows in (sets.training, sets.testing))
        return Detector(None, localizer), *rows
    if arm.way == "losa":
        taps = Taps(backbone, config.losa, collate([sets.training[0]]).frames)
        adapter = LoSA(taps.channels, config.losa)
        return Detector(taps, localizer, adapter), sets.training, sets.testing
    if arm.way == "checkpointed":
        prepared(backbone, "checkpointed")
    return Detector(backbone, localizer), sets.training, sets.testing


def cost_of_a_step(trainer: Trainer, steps: int = 5) -> tuple[float, float]:
    """Most MiB of a training step beyond what stands, and its milliseconds; all is put back."""
    detector = copy.deepcopy(trainer.detector)
    twin = Trainer(detector, trainer.samples, trainer.recipe)
    batch = collate([trainer.samples[number] for number in range(trainer.recipe.batch)])
    twin.step(batch)  # optimizer state, tables
    peak = rewire.profile(detector, batch.frames, batch.mask).peak_bytes
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        twin.step(batch)
        times.append(time.perf_counter() - start)
    return peak / 2**20, 1000 * statistics.median(times)


def _maps(
    videos: Sequence[Video],
    found: Mapping[str, Sequence[Prediction]],
    thresholds: Sequence[float],
) -> dict[str, float]:
    """mAP at thresholds, their average, and the average over ActivityNet's."""
    result = evaluate(videos, found, thresholds)
    named = {f"mAP@{limit:g}": float(v) for limit, v in zip(thresholds, result.means, strict=True)}
    strict = evaluate(videos, found, ACTIVITYNET_THRESHOLDS).average
    return {**named, "average": result.average, "average .5–.95": strict}


def append(path: Path, outcome: Outcome) -> None:
    """Add a line to a CSV file."""
    facts = {"date": date.today().isoformat(), "torch": torch.__version__}
    append_row(path, {**outcome.row(), **facts})


def outcomes_table(found: Sequence[Outcome], names: Sequence[str]) -> Table:
    """Means and ranges over seeds, a line for each arm."""
    columns: dict[str, Callable[[Outcome], float]] = {
        "mAP": lambda row: 100 * row.maps["average"],
        ".5–.95": lambda row: 100 * row.maps["average .5–.95"],
        "clips": lambda row: 100 * row.accuracy,
        "MiB": lambda row: row.peak_mib,
        "ms": lambda row: row.step_ms,
    }
    table = Table("", *columns, padding=(0, 0), title="means over seeds, and ranges")
    for name in names:
        rows = [outcome for outcome in found if outcome.arm == name]
        table.add_row(name, *(_spread([of(row) for row in rows]) for of in columns.values()))
    return table


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    middle = f"{statistics.mean(values):.1f}"
    return middle if len(values) == 1 else f"{middle} {min(values):.0f}–{max(values):.0f}"
