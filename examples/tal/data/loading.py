"""Samples of videos for a network: frames, what is real, and the segments in steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from examples.tal.data.annotations import Video
from examples.tal.data.video import VideoError, VideoFile, find_video, probe, read_frames
from examples.tal.data.windows import Sampling, Window, sliding, spread, truncated

Augmentation = Callable[[Tensor], Tensor]  # of all frames [T, 3, H, W] alike


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
    """The files of videos, and which videos have none that can be read."""
    files, skipped = {}, []
    for video in videos:
        try:
            files[video.name] = probe(find_video(folder, video.name))
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
        training: Random windows, augmented.
        augment: Of the frames of a window; they are as they are where it is None.
        seed: Of what is drawn; with `epoch` and a sample's number it tells its window.
        short: Pixels of the shorter side.
        keep: Decoded videos are kept in memory.

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
        augment: Augmentation | None = None,
        seed: int = 0,
        short: int | None = None,
        keep: bool = False,
    ) -> None:
        self.videos = [video for video in videos if video.name in files]
        self.files, self.sampling, self.training = files, sampling, training
        self.numbers = {label: number for number, label in enumerate(classes)}
        self.augment, self.seed, self.short, self.epoch = augment, seed, short, 0
        self._kept: dict[str, Tensor] | None = {} if keep else None
        self.windows = [] if training else [w for video in self.videos for w in self._all(video)]

    def __len__(self) -> int:
        return len(self.videos) if self.training else len(self.windows)

    def __getitem__(self, number: int) -> Sample:
        if not self.training:
            return self._sample(self.windows[number], None)
        random = np.random.default_rng([self.seed, self.epoch, number])
        video = self.videos[number]
        file = self.files[video.name]
        if self.sampling.stride:
            window = truncated(video, file.fps, file.frames, self.sampling, random)
        else:
            window = spread(video, file.frames, self.sampling)
        return self._sample(window, int(random.integers(2**31)))

    def _all(self, video: Video) -> list[Window]:
        file = self.files[video.name]
        if not self.sampling.stride:
            return [spread(video, file.frames, self.sampling)]
        return sliding(video, file.fps, file.frames, self.sampling)

    def _sample(self, window: Window, seed: int | None) -> Sample:
        frames = self._frames(window)
        if self.augment is not None and seed is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                frames = self.augment(frames)
        mask = torch.arange(self.sampling.steps) < window.real
        labels = torch.tensor([self.numbers[label] for label in window.labels], dtype=torch.long)
        segments = torch.from_numpy(window.segments).float()
        return Sample(frames.transpose(0, 1).contiguous(), mask, segments, labels, window)

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


def _as_tensor(frames: Any) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2)
