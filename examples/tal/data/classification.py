"""Classes of whole videos by somebody else's network, for a localizer that knows actions only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from examples.tal.data.annotations import FileFormError, Prediction, plain_name, read_json

ACTION = "action"  # the one class of such a localizer


@dataclass(frozen=True)
class VideoScores:
    """Scores of whole videos.

    Attributes:
        classes: Names.
        scores: By video, a share of one for each class.
    """

    classes: Sequence[str]
    scores: Mapping[str, Sequence[float]]

    def check(self, videos: Iterable[str]) -> None:
        """Refuse videos that have no scores.

        Raises:
            FileFormError: One has none.
        """
        if missing := sorted(set(videos) - self.scores.keys()):
            raise FileFormError(
                f"the classifier's file has no scores of {len(missing)} videos ({missing[0]}, ...)."
            )

    def check_labels(self, labels: Sequence[str]) -> None:
        """Refuse a file of other classes.

        Raises:
            FileFormError: None of the labels is one of its classes.
        """
        if not set(labels) & set(self.classes):
            raise FileFormError(
                f"the classifier's file has other classes: {', '.join(self.classes[:3])}, ..., "
                f"and the annotations {', '.join(labels[:3])}, ..."
            )


def read_scores(path: Path) -> VideoScores:
    """Scores from a JSON file {"class": [NAME, ...], "results": {VIDEO: [SHARE, ...]}}.

    That is the layout of the CUHK classifier's file, which ActivityNet's localizers use.

    Raises:
        FileFormError: It is no such file.
    """
    content = read_json(path)
    try:
        names = [str(name) for name in content["class"]]
        results = content["results"].items()
        rows = {plain_name(video): [float(v) for v in row] for video, row in results}
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise FileFormError(f"{path}: has no 'class' and 'results' of scores: {error!r}") from error
    for video, row in rows.items():
        if len(row) != len(names):
            raise FileFormError(f"{path}: {video}: {len(row)} scores for {len(names)} classes.")
    return VideoScores(names, rows)


def labelled(
    found: Mapping[str, Sequence[Prediction]], given: VideoScores, top: int
) -> dict[str, list[Prediction]]:
    """Every segment once for each of its video's best classes, their scores multiplied.

    Args:
        found: Segments of the one class.
        given: Of their videos.
        top: How many classes of a video.

    Raises:
        FileFormError: A video has no scores.
    """
    given.check(found)
    result = {}
    for name, rows in found.items():
        scores = np.asarray(given.scores[name])
        best = np.argsort(-scores, kind="stable")[:top]
        result[name] = [
            replace(row, label=given.classes[n], score=row.score * float(scores[n]))
            for n in best
            for row in rows
        ]
    return result
