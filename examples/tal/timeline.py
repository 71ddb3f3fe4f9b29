"""A video as a line of time: what is annotated, and what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from examples.tal.data.annotations import Prediction, Video
from examples.tal.files import written_whole

_TRUTH = "black"
_COLOURS = matplotlib.colormaps["viridis"]


def draw_timeline(
    path: Path, video: Video, predictions: Sequence[Prediction], least: float = 0.1
) -> None:
    """Draw a video's segments, a row for each class: annotated ones above, found ones below.

    Args:
        path: The picture; its ending says of which kind.
        video: With its annotations.
        predictions: Of the video; the brighter one is drawn, the higher is its score.
        least: Scores below it are left out.
    """
    shown = sorted((row for row in predictions if row.score >= least), key=lambda row: row.score)
    labels = sorted({row.label for row in (*video.segments, *shown)}, reverse=True)
    figure = Figure(figsize=(10, 1.2 + 0.5 * max(1, len(labels))), layout="constrained")
    axes = figure.add_subplot()
    for height, label in enumerate(labels):
        own = [(s.start, s.end - s.start) for s in video.segments if s.label == label]
        axes.broken_barh(own, (height + 0.05, 0.35), color=_TRUTH)
        found = [row for row in shown if row.label == label]
        axes.broken_barh(
            [(row.start, row.end - row.start) for row in found],
            (height - 0.4, 0.35),
            facecolors=[_COLOURS(row.score) for row in found],
            edgecolors="white",
            linewidth=0.5,
        )
    axes.set(xlim=(0, video.duration), xlabel="seconds", title=video.name)
    axes.set_yticks(range(len(labels)), labels)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), _COLOURS)
    figure.colorbar(scale, ax=axes, label=f"score of what was found, from {least:g} on")
    with written_whole(path) as beside:
        figure.savefig(beside, format=path.suffix.lstrip(".") or "png", dpi=120)
