"""The sets of a configuration: windows to train on, windows to test on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.tal.config import Config
from examples.tal.data.annotations import (
    FileFormError,
    Video,
    classes_of,
    of_subset,
    read_annotations,
)
from examples.tal.data.augmentation import augmented, middle
from examples.tal.data.classification import ACTION, VideoScores, read_scores
from examples.tal.data.loading import Skipped, Windows, opened


class Sets(NamedTuple):
    """What a detector is trained and tested on.

    Attributes:
        training: Windows to train on; None where they were not asked for.
        testing: Windows to test on.
        wanted: Videos to test on, those that cannot be read among them.
        classes: Names of the localizer's classes.
        skipped: Videos that cannot be read.
        scores: Of whole videos by a classifier, where the localizer knows actions only.
    """

    training: Windows | None
    testing: Windows
    wanted: list[Video]
    classes: list[str]
    skipped: list[Skipped]
    scores: VideoScores | None


def sets_of(config: Config, *, testing_only: bool = False) -> Sets:
    """The sets of a configuration.

    Args:
        config: Says where they are.
        testing_only: No file of the training videos is opened.

    Raises:
        FileFormError: Annotations cannot be read, no video of a set can, or one has no scores.
    """
    data = config.data
    every = read_annotations(Path(data.annotations))
    parts = [of_subset(every, name) for name in (data.training, data.validation)]
    scores = read_scores(Path(data.classifier)) if data.classifier else None
    classes = [ACTION] if scores else classes_of(video for part in parts for video in part)
    used = parts[1:] if testing_only else parts
    files, skipped = opened([video for part in used for video in part], Path(data.videos))

    def windows(videos: Sequence[Video], short: int, **options: Any) -> Windows:
        rest = {"seed": config.recipe.seed, "keep": data.keep, "single": scores is not None}
        found = Windows(videos, files, classes, data.sampling, short=short, **rest, **options)
        if not found.videos:
            raise FileFormError(f"{data.videos}: none of {len(videos)} videos can be read.")
        return found

    testing = windows(parts[1], data.size, training=False, transform=middle(data.size))
    if not classes:
        raise FileFormError(f"{data.annotations}: no video of both subsets has a label.")
    if scores is not None:
        scores.check_labels(classes_of(parts[1]))
        scores.check(video.name for video in testing.videos)
    if testing_only:
        return Sets(None, testing, parts[1], classes, skipped, scores)
    augment = augmented(data.augmentation, data.size)
    training = windows(parts[0], data.short or data.size, training=True, transform=augment)
    return Sets(training, testing, parts[1], classes, skipped, scores)
