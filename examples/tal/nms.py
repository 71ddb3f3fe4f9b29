"""Non-maximum suppression of segments, hard and soft, and voting; NumPy, one video at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.tal.evaluation import overlaps

Floats = NDArray[np.float64]


class Found(NamedTuple):
    """Segments of one video.

    Attributes:
        spans: [N, 2], starts and ends in any unit.
        scores: [N], shares of one.
        labels: [N], numbers of classes.
    """

    spans: Floats
    scores: Floats
    labels: NDArray[np.int64]

    def __getitem__(self, rows: object) -> Found:  # type: ignore[override]
        """Some of them."""
        return Found(self.spans[rows], self.scores[rows], self.labels[rows])  # type: ignore[index]


def nothing() -> Found:
    """No segments."""
    return Found(np.zeros((0, 2)), np.zeros(0), np.zeros(0, dtype=np.int64))


def joined(parts: Sequence[Found]) -> Found:
    """All segments of several parts."""
    if not parts:
        return nothing()
    return Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def hard_nms(found: Found, threshold: float) -> Found:
    """Drop what overlaps one of a higher score, of any class, by more than a threshold."""
    rest = found[np.argsort(-found.scores, kind="stable")]
    kept = []
    while len(rest.scores):
        kept.append(rest[:1])
        shared = overlaps(tuple(rest.spans[0]), rest.spans)
        shared[0] = np.inf
        rest = rest[shared <= threshold]
    return joined(kept)


def soft_nms(found: Found, sigma: float, least: float = 0.001, most: int = 2000) -> Found:
    """Lower scores of what overlaps one of a higher score, of any class: s exp(-IoU² / σ).

    Args:
        found: Segments.
        sigma: σ.
        least: What falls below this score is dropped.
        most: How many are kept at most.

    Source: Bodla et al., Soft-NMS, ICCV 2017.
    """
    spans, scores, labels = found.spans, found.scores.copy(), found.labels
    kept: list[int] = []
    marks: list[float] = []
    open_ = scores >= least
    while len(kept) < most and open_.any():
        best = int(np.where(open_, scores, -1.0).argmax())
        kept.append(best)
        marks.append(scores[best])
        open_[best] = False
        scores *= np.exp(-(overlaps(tuple(spans[best]), spans) ** 2) / sigma)
        open_ &= scores >= least
    return Found(spans[kept], np.array(marks), labels[kept])


def by_class(found: Found, suppress: object) -> Found:
    """Suppress each class by itself.

    Args:
        found: Segments.
        suppress: Called with those of a class.
    """
    parts = [suppress(found[found.labels == label]) for label in np.unique(found.labels)]  # type: ignore[operator]
    return joined(parts)


def vote(kept: Found, found: Found, threshold: float) -> Found:
    """Move each segment to the mean, weighted by scores, of all that overlap it by a threshold."""
    spans = kept.spans.copy()
    for number, span in enumerate(kept.spans):
        weights = found.scores * (overlaps(tuple(span), found.spans) >= threshold)
        if weights.sum() > 0:
            spans[number] = weights @ found.spans / weights.sum()
    return kept._replace(spans=spans)


def best(found: Found, most: int) -> Found:
    """Those of the highest scores, in their order."""
    return found[np.argsort(-found.scores, kind="stable")[:most]]
