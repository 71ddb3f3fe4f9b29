"""The sets of a configuration: windows to train on, windows to test on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from examples.tal.config import Config
from examples.tal.data.annotations import (
    FileFormError,
    Video,
    classes_of,
    of_subset,
    read_annotations,
)
from examples.tal.data.loading import Skipped, Windows, opened


class Sets(NamedTuple):
    """Windows to train on and to test on, and the classes' names."""

    training: Windows
    testing: Windows
    classes: list[str]


def sets_of(config: Config) -> tuple[Sets, list[Skipped]]:
    """The sets of a configuration, and the videos that cannot be read.

    Raises:
        FileFormError: Annotations cannot be read, or no video of a set can.
    """
    data = config.data
    every = read_annotations(Path(data.annotations))
    parts = [of_subset(every, name) for name in (data.training, data.validation)]
    classes = classes_of(video for part in parts for video in part)
    files, skipped = opened([video for part in parts for video in part], Path(data.videos))

    def windows(videos: Sequence[Video], training: bool) -> Windows:
        rest = {"seed": config.recipe.seed, "short": data.short or None}
        found = Windows(
            videos, files, classes, data.sampling, training=training, keep=data.keep, **rest
        )
        if not found.videos:
            raise FileFormError(f"{data.videos}: none of {len(videos)} videos can be read.")
        return found

    return Sets(windows(parts[0], True), windows(parts[1], False), classes), skipped
