"""Which frames of a video a network sees at once, and where its steps lie in time.

A window has `steps` steps, the units of a localizer; a step spans `per_step` sampled frames, and
every `stride`-th frame of the file is sampled. Step g stands for its middle: segments in seconds
and in steps are told apart by `Window.to_steps` and `Window.to_seconds`, each the other's inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from examples.tal.data.annotations import Segment, Video

Floats = NDArray[np.float64]

_TRIES = 200
_LEAST = 0.01  # of a video: what is shorter is no segment of a window that is all of it


@dataclass(frozen=True)
class Sampling:
    """How windows are taken from videos.

    Attributes:
        steps: Of a window.
        per_step: Sampled frames in a step.
        stride: Frames of the file to a sampled one; 0: the frames are spread over the video, and a
            window is all of it (ActivityNet).
        overlap: Share of a window that the next one has too, in testing.
        kept: Share of a segment that is in a window for it to count there, in training.
        crop: Least share of the steps that a shorter video gets in training; 1: all there are.
        clipped: Share of a window that clips around shorter segments have, which are seen beside
            whole windows in training (VSGN: 0.38); 0: there are none.
    """

    steps: int
    per_step: int = 2
    stride: int = 2
    overlap: float = 0.5
    kept: float = 0.75
    crop: float = 1.0
    clipped: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.per_step < 1 or self.stride < 0:
            raise ValueError(
                f"steps and per_step are from 1 on and stride from 0 on, not {self.steps}, "
                f"{self.per_step} and {self.stride}."
            )
        if not (0 <= self.overlap < 1 and 0 < self.kept <= 1 and 0 < self.crop <= 1):
            raise ValueError("overlap is from 0 to less than 1; kept and crop are from 0 to 1.")
        if not 0 <= self.clipped <= 1:
            raise ValueError(f"clipped: a share of a window, not {self.clipped}.")


@dataclass(frozen=True)
class Window:
    """What is seen of a video at once.

    Attributes:
        video: The video.
        frames: Their numbers in the file, as many as steps × per_step; the last real one is
            repeated behind the end.
        real: Steps that are real.
        start: Seconds of the middle of step 0.
        step: Seconds of a step.
        segments: Those that count, in steps [M, 2].
        labels: Of each.
    """

    video: Video
    frames: tuple[int, ...]
    real: int
    start: float
    step: float
    segments: Floats
    labels: tuple[str, ...]

    def to_steps(self, seconds: Floats) -> Floats:
        """Times in steps."""
        return (seconds - self.start) / self.step

    def to_seconds(self, steps: Floats) -> Floats:
        """Steps in time, within the video."""
        return np.clip(steps * self.step + self.start, 0.0, self.video.duration)


def spread(video: Video, frames: int, sampling: Sampling) -> Window:
    """All of a video in one window, its frames spread evenly.

    Args:
        video: The video.
        frames: Of its file.
        sampling: How.
    """
    count = sampling.steps * sampling.per_step
    middles = (np.arange(count) + 0.5) * frames / count - 0.5
    numbers = np.clip(np.round(middles), 0, frames - 1).astype(int)
    step = video.duration / sampling.steps
    seen = [s for s in video.segments if s.end - s.start > _LEAST * video.duration]
    return _window(video, numbers, sampling.steps, 0.5 * step, step, seen)


def sliding(video: Video, fps: float, frames: int, sampling: Sampling) -> list[Window]:
    """Windows that cover a video, to test on; the last one ends where the video does.

    Args:
        video: The video.
        fps: Of its file.
        frames: Of its file.
        sampling: How.
    """
    there = _steps(frames, sampling)
    if there <= sampling.steps:
        return [_part(video, fps, frames, sampling, 0, there)]
    jump = max(1, round(sampling.steps * (1 - sampling.overlap)))
    starts = [*range(0, there - sampling.steps, jump), there - sampling.steps]
    return [_part(video, fps, frames, sampling, start, sampling.steps) for start in starts]


def truncated(
    video: Video, fps: float, frames: int, sampling: Sampling, random: np.random.Generator
) -> Window:
    """A random window to train on, with a segment in it if that is found in 200 tries.

    Args:
        video: The video.
        fps: Of its file.
        frames: Of its file.
        sampling: How.
        random: Draws it.
    """
    there = _steps(frames, sampling)
    length = min(there, sampling.steps)
    if there <= sampling.steps:
        length = max(1, round(there * random.uniform(sampling.crop, 1.0)))
    for _ in range(_TRIES):
        start = int(random.integers(there - length + 1))
        window = _part(video, fps, frames, sampling, start, length)
        if len(window.labels) or not video.segments:
            break
    return window


def has_clips(video: Video, fps: float, sampling: Sampling) -> bool:
    """Whether a video has a segment that `clipped` would cut out."""
    return bool(_short(video, sampling.stride * sampling.per_step / fps, sampling))


def clipped(
    video: Video, fps: float, frames: int, sampling: Sampling, random: np.random.Generator
) -> Window:
    """A random clip around one of the short segments, which begins behind the one before it.

    Args:
        video: One that `has_clips`.
        fps: Of its file.
        frames: Of its file.
        sampling: How; `clipped` says how long a clip is.
        random: Draws it.
    """
    step = sampling.stride * sampling.per_step / fps
    rows = _short(video, step, sampling)
    segment = rows[int(random.integers(len(rows)))]
    length = round(sampling.clipped * sampling.steps)
    before = max((s.end for s in video.segments if s.end <= segment.start), default=0.0)
    free = (length - 1) * step - (segment.end - segment.start)  # steps begin before it
    start = max(0.0, before, segment.start - free * random.random())
    first = min(int(start / step), max(0, _steps(frames, sampling) - 1))
    return _part(video, fps, frames, sampling, first, min(length, _steps(frames, sampling) - first))


def _short(video: Video, step: float, sampling: Sampling) -> list[Segment]:
    """Segments that fit into a clip with a step to spare."""
    longest = (round(sampling.clipped * sampling.steps) - 1) * step
    return [s for s in video.segments if s.end - s.start <= longest]


def _steps(frames: int, sampling: Sampling) -> int:
    """Steps that a video has, the last one perhaps not whole."""
    return max(1, -(-frames // (sampling.stride * sampling.per_step)))


def _part(
    video: Video, fps: float, frames: int, sampling: Sampling, start: int, length: int
) -> Window:
    """The window that begins with a step, of so many real ones."""
    span = sampling.stride * sampling.per_step  # frames of the file in a step
    numbers = start * span + np.arange(sampling.steps * sampling.per_step) * sampling.stride
    last = min(frames, (start + length) * span) - 1
    step = span / fps
    first = start * step
    inside = [
        cut
        for segment in video.segments
        if (cut := _within(segment, first, first + length * step, sampling.kept))
    ]
    return _window(video, np.minimum(numbers, last), length, first + 0.5 * step, step, inside)


def _window(
    video: Video,
    numbers: NDArray[np.int64],
    real: int,
    start: float,
    step: float,
    segments: Sequence[Segment],
) -> Window:
    spans = np.array([(s.start, s.end) for s in segments], dtype=float).reshape(-1, 2)
    labels = tuple(segment.label for segment in segments)
    frames = tuple(int(number) for number in numbers)
    return Window(video, frames, real, start, step, (spans - start) / step, labels)


def _within(segment: Segment, start: float, end: float, kept: float) -> Segment | None:
    """The part of a segment in a span, if that is enough of it."""
    first, last = max(segment.start, start), min(segment.end, end)
    length = segment.end - segment.start
    if length <= 0 or last - first < kept * length:
        return None
    return Segment(first, last, segment.label)
