"""The tasks by name."""

from __future__ import annotations

from examples.finetune.tasks.base import MissingPackage, Task
from examples.finetune.tasks.digits import DigitsResnet, DigitsVit
from examples.finetune.tasks.pictures import Pictures
from examples.finetune.tasks.sentences import Sentences

TASKS: dict[str, type[Task]] = {
    "digits-vit": DigitsVit,
    "digits-resnet": DigitsResnet,
    "efficientnet": Pictures,
    "minilm": Sentences,
}

__all__ = ["TASKS", "MissingPackage", "Task"]
