"""Samples of videos for a network: frames, what is real, and the segments in steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.tal.data.annotations import Video
from examples.tal.data.augmentation import Transform
from examples.tal.data.video import VideoError, VideoFile, find_video, probe, read_frames
from examples.tal.data.windows import (
    Sampling,
    Window,
    clipped,
    has_clips,
    sliding,
    spread,
    truncated,
)


class Sample(NamedTuple):
    """A window as a network takes it.

    Attributes:
        frames: [3, T, H, W], numbers from 0 to 255.
        mask: [L], True where a step is real.
        segments: [M, 2], in steps.
        labels: [M], numbers of classes.
        window: Where it is from.
    """

    frames: Tensor
    mask: Tensor
    segments: Tensor
    labels: Tensor
    window: Window


class Batch(NamedTuple):
    """Samples together: frames [B, 3, T, H, W] and masks [B, L]; the rest by sample."""

    frames: Tensor
    mask: Tensor
    segments: list[Tensor]
    labels: list[Tensor]
    windows: list[Window]


def collate(samples: Sequence[Sample]) -> Batch:
    """A batch of samples."""
    frames, mask, segments, labels, windows = zip(*samples, strict=True)
    return Batch(
        torch.stack(frames), torch.stack(mask), list(segments), list(labels), list(windows)
    )


@dataclass(frozen=True)
class Skipped:
    """A video that cannot be used, and why."""

    name: str
    reason: str


def opened(videos: Sequence[Video], folder: Path) -> tuple[dict[str, VideoFile], list[Skipped]]:
    """The files of videos, and which videos have none that can be read to its end."""
    files, skipped = {}, []
    for video in videos:
        try:
            file = probe(find_video(folder, video.name))
            read_frames(file.path, [max(0, file.frames - 1)])  # a file that is cut off has none
            files[video.name] = file
        except VideoError as error:
            skipped.append(Skipped(video.name, str(error)))
    return files, skipped


class Windows(Dataset[Sample]):
    """Windows of videos: random ones to train on, all of them to test on.

    Args:
        videos: That can be read.
        files: Theirs.
        classes: Names, in the order of the network's.
        sampling: How windows are taken.
        training: Random windows.
        transform: Of the frames of a window; they are as they are where it is None.
        seed: Of what is drawn; with `epoch` and a sample's number it tells its window.
        short: Pixels of the shorter side before the transform.
        keep: Decoded videos are kept in memory.
        single: All labels are one class, the first.

    Attributes:
        windows: All of them, to test on; empty in training.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        files: dict[str, VideoFile],
        classes: Sequence[str],
        sampling: Sampling,
        *,
        training: bool,
        transform: Transform | None = None,
        seed: int = 0,
        short: int | None = None,
        keep: bool = False,
        single: bool = False,
    ) -> None:
        self.videos = [video for video in videos if video.name in files]
        self.files, self.sampling, self.training = files, sampling, training
        self.numbers = {label: number for number, label in enumerate(classes)}
        self.transform, self.seed, self.short, self.epoch = transform, seed, short, 0
        self.single = single
        self._kept: dict[str, Tensor] | None = {} if keep else None
        self.windows = [] if training else [w for video in self.videos for w in self._all(video)]
        cut = training and sampling.clipped and sampling.stride
        short = [v for v in self.videos if cut and has_clips(v, files[v.name].fps, sampling)]
        self._drawn_from = [*self.videos, *short] if training else []

    def __len__(self) -> int:
        return len(self._drawn_from) if self.training else len(self.windows)

    def __getitem__(self, number: int) -> Sample:
        """A sample; of what cannot be read another one in training, and none of it in testing."""
        if not self.training:
            return self._tested(self.windows[number])
        for other in range(len(self)):
            try:
                return self._drawn((number + other) % len(self))
            except VideoError as error:  # damaged in the middle
                warnings.warn(f"left out: {error}", stacklevel=2)
        raise VideoError("no video can be read any more.")

    def _drawn(self, number: int) -> Sample:
        """A random window."""
        random = np.random.default_rng([self.seed, self.epoch, number])
        video = self._drawn_from[number]
        file = self.files[video.name]
        if not self.sampling.stride:
            window = spread(video, file.frames, self.sampling)
        else:
            cut = truncated if number < len(self.videos) else clipped
            window = cut(video, file.fps, file.frames, self.sampling, random)
        return self._sample(window, self._frames(window), int(random.integers(2**31)))

    def _tested(self, window: Window) -> Sample:
        """A window to test on; no step of it is real where it cannot be read."""
        try:
            return self._sample(window, self._frames(window))
        except VideoError as error:
            warnings.warn(f"left out: {error}", stacklevel=3)
            return self._sample(replace(window, real=0), self._nothing(window))

    def _all(self, video: Video) -> list[Window]:
        file = self.files[video.name]
        if not self.sampling.stride:
            return [spread(video, file.frames, self.sampling)]
        return sliding(video, file.fps, file.frames, self.sampling)

    def _sample(self, window: Window, frames: Tensor, seed: int = 0) -> Sample:
        if self.transform is not None:
            with _drawing(seed):
                frames = self.transform(frames)
        mask = torch.arange(self.sampling.steps) < window.real
        numbers = [0 if self.single else self.numbers[label] for label in window.labels]
        labels = torch.tensor(numbers, dtype=torch.long)
        segments = torch.from_numpy(window.segments).float()
        return Sample(frames.transpose(0, 1).contiguous(), mask, segments, labels, window)

    def _nothing(self, window: Window) -> Tensor:
        """Black frames in the place of those of a window."""
        file = self.files[window.video.name]
        size = (self.short, self.short) if self.short else (file.height, file.width)
        return torch.zeros(len(window.frames), 3, *size, dtype=torch.uint8)

    def _frames(self, window: Window) -> Tensor:
        """[T, 3, H, W]."""
        file = self.files[window.video.name]
        if self._kept is None:
            return _as_tensor(read_frames(file.path, window.frames, self.short))
        whole = self._kept.get(window.video.name)
        if whole is None:
            whole = _as_tensor(read_frames(file.path, range(file.frames), self.short))
            self._kept[window.video.name] = whole
        return whole[list(window.frames)]


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Draw from a seed on the CPU; what others draw, here or on a GPU, is not touched."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _as_tensor(frames: Any) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2)
