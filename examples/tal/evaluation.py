"""Mean average precision at thresholds of temporal overlap, and average recall of proposals.

The rules are those of ActivityNet's evaluator and ActionFormer's, which give the same numbers:

* Classes are the labels in the ground truth; what is predicted of others is not looked at.
* A segment that is there twice (same label, both ends within a millisecond) counts once, one
  without length not at all.
* All predictions of a class, of all videos, are taken by decreasing score. One is right where it
  overlaps a segment that no earlier one has taken by at least the threshold; the best such
  segment is taken by it.
* Average precision is the area under the precision that can still be reached at each recall
  (PASCAL VOC from 2010 on, all points).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.tal.data.annotations import Prediction, Segment, Video, classes_of

Floats = NDArray[np.float64]

THUMOS_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
ACTIVITYNET_THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
_SAME = 1e-3  # seconds


@dataclass(frozen=True)
class Evaluation:
    """What predictions are worth.

    Attributes:
        thresholds: Of overlap.
        classes: Labels of the ground truth.
        precision: Average precision [thresholds, classes], shares of one.
    """

    thresholds: tuple[float, ...]
    classes: tuple[str, ...]
    precision: Floats

    @property
    def means(self) -> Floats:
        """mAP at each threshold."""
        means: Floats = self.precision.mean(axis=1)
        return means

    @property
    def average(self) -> float:
        """mAP averaged over the thresholds."""
        return float(self.means.mean())

    def to_dict(self) -> dict[str, dict[str, float]]:
        """`{"mAP": {"0.3": ..., "average": ...}}`, ready for JSON."""
        rows = zip(self.thresholds, self.means, strict=True)
        named = {f"{threshold:g}": float(mean) for threshold, mean in rows}
        return {"mAP": {**named, "average": self.average}}


def check_thresholds(limits: Sequence[float]) -> None:
    """Refuse what are no shares of overlap.

    Raises:
        ValueError: One is not above 0 and up to 1, or there are none.
    """
    if not limits or not all(0 < limit <= 1 for limit in limits):
        raise ValueError(f"thresholds: shares from 0 to 1, not {list(limits)}.")


def evaluate(
    videos: Sequence[Video],
    predictions: Mapping[str, Sequence[Prediction]],
    thresholds: Sequence[float] = THUMOS_THRESHOLDS,
) -> Evaluation:
    """Mean average precision of predictions.

    Args:
        videos: The ground truth.
        predictions: By video, in any order. What is predicted of other videos is wrong.
        thresholds: Of overlap (intersection over union), shares of one.

    Raises:
        ValueError: There is no segment in the ground truth.

    Example:
        >>> video = Video("v", 30.0, "validation", (Segment(0, 10, "c"), Segment(20, 30, "c")))
        >>> found = {"v": [Prediction(0, 10, "c", 0.9), Prediction(21, 30, "c", 0.8)]}
        >>> evaluate([video], found, [0.5, 0.95]).means.tolist()
        [1.0, 0.5]
    """
    classes = classes_of(videos)
    if not classes:
        raise ValueError("the ground truth has no segment.")
    truth = {video.name: distinct(video.segments) for video in videos}
    precision = np.zeros((len(thresholds), len(classes)))
    for column, label in enumerate(classes):
        spans = {
            name: _spans(s for s in segments if s.label == label)
            for name, segments in truth.items()
        }
        rows = [
            (name, row)
            for name, found in predictions.items()
            for row in found
            if row.label == label
        ]
        precision[:, column] = _average_precision(spans, rows, thresholds)
    return Evaluation(tuple(thresholds), tuple(classes), precision)


def average_recall(
    videos: Sequence[Video],
    predictions: Mapping[str, Sequence[Prediction]],
    thresholds: Sequence[float] = ACTIVITYNET_THRESHOLDS,
    proposals: Sequence[int] = (1, 5, 10, 50, 100),
) -> dict[int, float]:
    """Average recall of the best proposals of each video, whatever their label.

    Args:
        videos: The ground truth.
        predictions: By video, in any order.
        thresholds: Over which recall is averaged.
        proposals: How many of the highest scores of each video count.

    Returns:
        For each number of proposals the share of all segments that one of them overlaps enough.
    """
    best = []
    for video in videos:
        rows = sorted(predictions.get(video.name, ()), key=lambda row: -row.score)
        found = _spans(rows)
        spans = ((segment.start, segment.end) for segment in distinct(video.segments))
        best += [_running_maximum(overlaps(span, found)) for span in spans]
    limits = np.array(thresholds)
    recalls = {}
    for number in proposals:
        reached = np.array([row[min(number, len(row)) - 1] if len(row) else 0.0 for row in best])
        recalls[number] = float((reached[:, None] >= limits).mean()) if best else 0.0
    return recalls


def distinct(segments: Sequence[Segment]) -> list[Segment]:
    """Segments with a length, each once."""
    kept: list[Segment] = []
    for segment in segments:
        twice = any(
            segment.label == other.label
            and abs(segment.start - other.start) <= _SAME
            and abs(segment.end - other.end) <= _SAME
            for other in kept
        )
        if segment.end > segment.start and not twice:
            kept.append(segment)
    return kept


def overlaps(span: tuple[float, float], spans: Floats) -> Floats:
    """Intersection over union of a span with each of others [N, 2]."""
    start, end = span
    shared = np.clip(np.minimum(end, spans[:, 1]) - np.maximum(start, spans[:, 0]), 0, None)
    union = (end - start) + (spans[:, 1] - spans[:, 0]) - shared
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)


def _spans(rows: Iterable[Segment | Prediction]) -> Floats:
    return np.array([(row.start, row.end) for row in rows], dtype=np.float64).reshape(-1, 2)


def _running_maximum(values: Floats) -> Floats:
    return np.maximum.accumulate(values) if len(values) else values


def _average_precision(
    truth: Mapping[str, Floats],
    rows: Sequence[tuple[str, Prediction]],
    thresholds: Sequence[float],
) -> Floats:
    """Average precision of one class at each threshold."""
    positives = sum(len(spans) for spans in truth.values())
    if not rows or not positives:
        return np.zeros(len(thresholds))
    order = np.array([row.score for _, row in rows]).argsort()[::-1]
    right = np.zeros((len(thresholds), len(rows)), dtype=bool)
    taken = {name: np.zeros((len(thresholds), len(spans)), bool) for name, spans in truth.items()}
    for place, number in enumerate(order):
        name, row = rows[number]
        if not len(truth.get(name, ())):
            continue
        found = overlaps((row.start, row.end), truth[name])
        for level, threshold in enumerate(thresholds):
            free = np.where(taken[name][level], -1.0, found)
            best = int(free.argmax())
            if free[best] >= threshold:
                right[level, place] = taken[name][level, best] = True
    return np.array([_area(row, positives) for row in right])


def _area(right: NDArray[np.bool_], positives: int) -> float:
    """Area under the envelope of precision over recall."""
    hits = right.cumsum()
    recall = np.concatenate([[0.0], hits / positives, [1.0]])
    precision = np.concatenate([[0.0], hits / np.arange(1, len(right) + 1), [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(((recall[steps] - recall[steps - 1]) * envelope[steps]).sum())
