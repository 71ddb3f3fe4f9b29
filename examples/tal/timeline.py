"""A video as a line of time: what is annotated, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.tal.data.annotations import Prediction, Video
from examples.tal.figures import new_figure, write_figure

_TRUTH, _COLOURS = "black", "viridis"


def draw_timeline(
    path: Path, video: Video, predictions: Sequence[Prediction], least: float = 0.1
) -> None:
    """Draw a video's segments, a row for each class: annotated ones above, found ones below.

    Args:
        path: The picture; its ending says of which kind.
        video: With its annotations.
        predictions: Of the video; the brighter one is drawn, the higher is its score.
        least: Scores below it are left out.

    Raises:
        ValueError: matplotlib is not installed.
    """
    shown = sorted((row for row in predictions if row.score >= least), key=lambda row: row.score)
    labels = sorted({row.label for row in (*video.segments, *shown)}, reverse=True)
    figure = new_figure((10, 1.2 + 0.5 * max(1, len(labels))), dpi=120)
    axes = figure.add_subplot()
    scale = _scale()
    for height, label in enumerate(labels):
        own = [(s.start, s.end - s.start) for s in video.segments if s.label == label]
        axes.broken_barh(own, (height + 0.05, 0.35), color=_TRUTH)
        found = [row for row in shown if row.label == label]
        axes.broken_barh(
            [(row.start, row.end - row.start) for row in found],
            (height - 0.4, 0.35),
            facecolors=[scale.to_rgba(row.score) for row in found],
            edgecolors="white",
            linewidth=0.5,
        )
    axes.set(xlim=(0, video.duration), xlabel="seconds", title=video.name)
    axes.set_yticks(range(len(labels)), labels)
    figure.colorbar(scale, ax=axes, label=f"score of what was found, from {least:g} on")
    write_figure(path, figure)


def _scale() -> Any:
    """Scores as colours."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, 1), _COLOURS)
