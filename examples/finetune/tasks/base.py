"""What a task is: a pretrained network, batches to finetune it on, and a judgement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class MissingPackage(Exception):
    """A task's weights or data come in a package that is not installed."""


class Task(ABC):
    """One pretrained network and its data, drawn by a seed.

    Attributes:
        model: The original, in eval mode. Ways to train copy it.
        example: Positional inputs of `model` as one training step has them.
    """

    needs: ClassVar[Mapping[str, str]] = {}
    """What has to be importable, and what pip calls it."""
    learning_rate: ClassVar[float]
    """One for all ways, chosen for the original: none is tuned for a coupling."""
    batch_size: ClassVar[int] = 32

    model: nn.Module
    example: tuple[Tensor, ...]

    def __init__(self, seed: int, device: torch.device, *, quick: bool = False) -> None:
        self.require()
        self.seed = seed
        self.device = device
        self.quick = quick

    @classmethod
    def require(cls) -> None:
        """Raise MissingPackage, with the command that helps, unless all is installed."""
        missing = [package for module, package in cls.needs.items() if find_spec(module) is None]
        if missing:
            raise MissingPackage(f"needs {', '.join(missing)}: pip install {' '.join(missing)}")

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Endless training batches, the same in every call."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """What finetuning minimises."""

    @abstractmethod
    def quality(self, model: nn.Module) -> dict[str, float]:
        """Named measures on held-out data, the headline first; the model is left in eval mode."""

    def calibration(self) -> Iterator[Tensor]:
        """Inputs to re-estimate BatchNorm statistics from."""
        for inputs, _ in self.batches():
            yield inputs

    @property
    def has_batchnorm(self) -> bool:
        """Whether there are statistics to re-estimate."""
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        return any(isinstance(module, kinds) for module in self.model.modules())

    def generator(self) -> torch.Generator:
        """A fresh generator; everything that is drawn for a task comes from one."""
        return torch.Generator().manual_seed(self.seed)


def shuffled(
    inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, epoch by epoch; what does not fill a batch is left for another epoch."""
    while True:
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        for chosen in order.split(size):
            if len(chosen) == size:
                yield inputs[chosen], targets[chosen]


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """The share of rows whose largest entry is the target."""
    return (logits.argmax(-1) == targets).float().mean().item()
