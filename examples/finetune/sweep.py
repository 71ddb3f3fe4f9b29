"""One task, one seed: each way of rewiring, from the pretrained weights through finetuning."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import rewire
from examples.finetune.loop import finetune
from examples.finetune.records import Row
from examples.finetune.tasks import Task
from rewire.rewriting import is_rewired, plan_of

ORIGINAL = "original"
MEBI = 2**20
ROUNDS = 3


@dataclass(frozen=True)
class Way:
    """A coupling and a granularity to rewire by; `original` is left as it is."""

    coupling: str
    granularity: str = ""

    def __str__(self) -> str:
        return f"{self.coupling} by {self.granularity}" if self.granularity else self.coupling

    def applied(self, model: nn.Module, example: tuple[torch.Tensor, ...]) -> nn.Module:
        """What is finetuned; shares its parameters with `model`."""
        if self.coupling == ORIGINAL:
            return model
        return rewire.make_reversible(
            model, example, coupling=self.coupling, granularity=self.granularity
        )


@dataclass(frozen=True)
class Measured:
    """Named numbers at one stage."""

    stage: str
    values: dict[str, float]

    def rows(self, task: str, way: Way, seed: int) -> list[Row]:
        """One row for each number."""
        where = (task, way.coupling, way.granularity, seed, self.stage)
        return [Row(*where, metric, value) for metric, value in self.values.items()]


def measurements(task: Task, way: Way, stops: Sequence[int]) -> Iterator[Measured]:
    """Rewire, recalibrate where there is BatchNorm, finetune; judge at each stage.

    The original goes through the same stages: what finetuning and new statistics do to a
    network is not the coupling's doing.
    """
    torch.manual_seed(task.seed)  # dropout of all ways alike
    original = copy.deepcopy(task.model)
    model = way.applied(original, task.example)
    yield Measured("start", {**task.quality(model), **distance(task, model)})
    if task.has_batchnorm:
        rewire.recalibrate(model, task.calibration(), batches=8)
        yield Measured("recalibrated", {**task.quality(model), **distance(task, model)})
    for step in finetune(model, task.batches(), task.loss, task.learning_rate, stops):
        yield Measured(str(step), task.quality(model))
    yield Measured("cost", cost(task, model, original))


def distance(task: Task, model: nn.Module) -> dict[str, float]:
    """How far the network's output is from the original's, on a training batch."""
    if not is_rewired(model):
        return {}
    return {"output error": rewire.distance(task.model, model, *task.example).output.relative}


def cost(task: Task, model: nn.Module, original: nn.Module) -> dict[str, float]:
    """Activation memory and time of forward and backward, in turns with the original's.

    Bits are those that the coupling's inverse needs, per element of the stream and module.
    """
    plain, own = [], []
    for _ in range(1 if task.quick else ROUNDS):
        plain.append(rewire.profile(original.train(), *task.example))
        own.append(rewire.profile(model.train(), *task.example))
    found = {
        "peak MiB": own[-1].peak_bytes / MEBI,
        "peak ×": own[-1].peak_bytes / plain[-1].peak_bytes,
        "seconds": min(run.step_seconds for run in own),
        "time ×": statistics.median(
            mine.step_seconds / its.step_seconds for mine, its in zip(own, plain, strict=True)
        ),
    }
    if is_rewired(model):
        chains = plan_of(model).chains
        found["modules"] = sum(map(len, chains))
        found["bits"] = max(chain.bits for chain in chains)
    return found
