"""Untrimmed videos made by rule: a sprite drifts about, and now and then performs a motion.

What is seen in one frame (shape, colour, place, background) does not depend on the class, so that
only motion tells it. Backgrounds are of low contrast and nothing else moves as fast as the actor:
a small network can learn it in minutes.

A second set, of trimmed clips of other motions, is there to pretrain on, as Kinetics would be. It
teaches the axis of a motion and not its direction, which some actions need: what a pretrained
network knows is not all that localization asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from examples.tal.data.annotations import Segment, Video, write_annotations
from examples.tal.data.video import Frames, write_video

Floats = NDArray[np.float64]
Random = np.random.Generator

SIZE = 64  # pixels
FPS = 10.0
ANNOTATIONS, VIDEOS = "annotations.json", "videos"
PRETRAINING = "motions"  # a folder of the same two, of trimmed clips
VERSION = "rewire synthetic 1"


@dataclass(frozen=True)
class Amounts:
    """How many videos are made.

    Attributes:
        training: Untrimmed videos to train on.
        validation: Untrimmed videos to test on.
        motions: Trimmed clips; a sixth of them are for validation.
    """

    training: int = 72
    validation: int = 48
    motions: int = 1200


class Pose(NamedTuple):
    """Where a sprite is, frame by frame.

    Attributes:
        place: [T, 2], across and down, in pixels.
        scale: [T], of its radius.
        angle: [T], radians.
    """

    place: Floats
    scale: Floats
    angle: Floats


def still(frames: int) -> Pose:
    """One that does not move."""
    return Pose(np.zeros((frames, 2)), np.ones(frames), np.zeros(frames))


# ---- motions ---------------------------------------------------------------------------------


def _phase(random: Random, frames: int) -> Floats:
    """Of a motion that repeats every 8 to 13 frames."""
    period = random.uniform(8, 13)
    return random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(frames) / period


def _circle(random: Random, frames: int, way: int) -> Pose:
    phase, radius = way * _phase(random, frames), random.uniform(6, 9)
    return still(frames)._replace(place=radius * np.stack([np.cos(phase), np.sin(phase)], 1))


def _swing(random: Random, frames: int, axis: int) -> Pose:
    pose = still(frames)
    pose.place[:, axis] = random.uniform(7, 10) * np.sin(_phase(random, frames))
    return pose


def _pulse(random: Random, frames: int) -> Pose:
    scale = 1 + random.uniform(0.35, 0.5) * np.sin(_phase(random, frames))
    return still(frames)._replace(scale=scale)


def _zigzag(random: Random, frames: int) -> Pose:
    phase = _phase(random, frames)
    wave = 2 / np.pi * np.arcsin(np.sin(phase))
    across, down = random.uniform(6, 9), random.uniform(3, 5)
    return still(frames)._replace(place=np.stack([across * wave, down * np.sin(2 * phase)], 1))


def _move(random: Random, frames: int, across: int, down: int) -> Pose:
    speed = random.choice([-1, 1]) * random.uniform(1.2, 2.0)
    way = speed * (np.arange(frames) - frames / 2)
    return still(frames)._replace(place=np.stack([across * way, down * way], 1))


def _resize(random: Random, frames: int, way: int) -> Pose:
    share = way * (np.arange(frames) / frames - 0.5)
    return still(frames)._replace(scale=np.exp(random.uniform(0.7, 1.0) * share))


def _spin(random: Random, frames: int) -> Pose:
    way = random.choice([-1, 1]) * random.uniform(0.3, 0.5)
    return still(frames)._replace(angle=way * np.arange(frames))


Motion = Callable[[Random, int], Pose]
ACTIONS: dict[str, Motion] = {
    "circle_ccw": lambda random, frames: _circle(random, frames, -1),
    "circle_cw": lambda random, frames: _circle(random, frames, 1),
    "nod_v": lambda random, frames: _swing(random, frames, 1),
    "pulse": _pulse,
    "shake_h": lambda random, frames: _swing(random, frames, 0),
    "zigzag": _zigzag,
}
MOTIONS: dict[str, Motion] = {
    "across": lambda random, frames: _move(random, frames, 1, 0),
    "grow": lambda random, frames: _resize(random, frames, 1),
    "shrink": lambda random, frames: _resize(random, frames, -1),
    "spin": _spin,
    "still": lambda random, frames: still(frames),
    "upright": lambda random, frames: _move(random, frames, 0, 1),
}


# ---- pictures --------------------------------------------------------------------------------


class Sprite(NamedTuple):
    """What moves: one of five shapes, its radius, and its two colours [2, 3]."""

    shape: int
    radius: float
    colours: Floats


def _sprite(random: Random) -> Sprite:
    dark, bright = random.uniform(0, 60, 3), random.uniform(190, 255, 3)
    colours = np.stack([dark, bright] if random.random() < 0.5 else [bright, dark])
    return Sprite(int(random.integers(5)), SIZE * random.uniform(0.11, 0.16), colours)


def _walk(random: Random, frames: int, speed: float) -> Floats:
    """A smooth random walk [T, 2] that turns back at the borders."""
    place, velocity = random.uniform(0.3, 0.7, 2) * SIZE, random.normal(0, speed, 2)
    path = np.empty((frames, 2))
    for number in range(frames):
        velocity = 0.95 * velocity + random.normal(0, 0.3 * speed, 2)
        away = (place < 0.25 * SIZE) * 1.0 - (place > 0.75 * SIZE)
        velocity += 0.2 * speed * away
        place = place + velocity
        path[number] = place
    return path


def _background(random: Random, frames: int) -> Floats:
    """A smooth field of colours of low contrast that pans slowly, [T, H, W, 3]."""
    coarse = random.uniform(-28, 28, (5, 5, 3))
    shift = np.cumsum(random.normal(0, 0.15, (frames, 2)), 0)
    brightness = np.cumsum(random.normal(0, 0.6, frames))
    axis = np.linspace(0.5, 3.5, SIZE)
    pictures = np.empty((frames, SIZE, SIZE, 3))
    for number in range(frames):
        across, down = (np.clip(axis + s / 16, 0, 3.999) for s in shift[number])
        pictures[number] = _interpolated(coarse, down, across) + brightness[number]
    return 125 + pictures


def _interpolated(coarse: Floats, down: Floats, across: Floats) -> Floats:
    def along(values: Floats, places: Floats) -> Floats:
        before = places.astype(int)
        share = (places - before).reshape(-1, *[1] * (values.ndim - 1))
        found: Floats = values[before] * (1 - share) + values[before + 1] * share
        return found

    rows = along(coarse, down)
    return along(rows.swapaxes(0, 1), across).swapaxes(0, 1)


def _cover(sprite: Sprite, across: Floats, down: Floats) -> Floats:
    """How far a pixel is inside of a sprite's outline, in radii, [H, W]; outside it is negative."""
    x, y = np.abs(across), np.abs(down)
    far = np.hypot(across, down)
    if sprite.shape == 0:
        return 1 - far
    if sprite.shape == 1:
        return 0.85 - np.maximum(x, y)
    if sprite.shape == 2:
        return 0.5 - np.maximum(down, 0.866 * x - 0.5 * down)
    if sprite.shape == 3:
        return np.maximum(np.minimum(0.35 - x, 1 - y), np.minimum(0.35 - y, 1 - x))
    return 0.3 - np.abs(far - 0.7)


def _draw(picture: Floats, sprite: Sprite, pose: Pose, number: int) -> None:
    """Draw a sprite into one frame [H, W, 3]."""
    radius = sprite.radius * pose.scale[number]
    across, down = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    across, down = (
        (axis - p) / radius for axis, p in zip((across, down), pose.place[number], strict=True)
    )
    cos, sin = np.cos(pose.angle[number]), np.sin(pose.angle[number])
    across, down = cos * across + sin * down, cos * down - sin * across
    share = np.clip(radius * _cover(sprite, across, down) + 0.5, 0, 1)[..., None]
    half = np.clip(radius * down + 0.5, 0, 1)[..., None]  # two colours: turning is seen
    colour = sprite.colours[0] * (1 - half) + sprite.colours[1] * half
    picture += share * (colour - picture)


def rendered(random: Random, pose: Pose) -> Frames:
    """A video of a sprite that moves so, and another that hardly moves."""
    frames = len(pose.scale)
    pictures = _background(random, frames)
    other = _sprite(random)
    slow = still(frames)._replace(place=_walk(random, frames, 0.15))
    sprite = _sprite(random)
    for number, picture in enumerate(pictures):
        _draw(picture, other._replace(radius=0.4 * other.radius), slow, number)
        _draw(picture, sprite, pose, number)
    pictures += random.normal(0, 2.5, pictures.shape)
    return pictures.clip(0, 255).round().astype(np.uint8)


# ---- videos ----------------------------------------------------------------------------------


def untrimmed(random: Random, labels: Sequence[str]) -> tuple[Frames, list[Segment]]:
    """A video of 76 to 96 frames, and its 1 to 5 segments of 10 to 30 frames, in seconds."""
    frames = int(random.integers(76, 97))
    pose = still(frames)._replace(place=_walk(random, frames, 0.4))
    segments, at = [], int(random.integers(2, 16))
    for _ in range(int(random.integers(1, 6))):
        length = int(random.integers(10, 31))
        if at + length > frames - 2:
            break
        label = str(random.choice(labels))
        moved = ACTIONS[label](random, length)
        pose.place[at : at + length] += moved.place
        pose.scale[at : at + length] *= moved.scale
        segments.append(Segment(at / FPS, (at + length) / FPS, label))
        at += length + int(random.integers(6, 24))
    return rendered(random, pose), segments


def trimmed(random: Random, label: str, frames: int = 16) -> Frames:
    """A clip of one of the motions to pretrain on."""
    moved = MOTIONS[label](random, frames)
    place = random.uniform(0.35, 0.65, 2) * SIZE + moved.place
    return rendered(random, moved._replace(place=place, angle=moved.angle + random.uniform(0, 6)))


def generate(root: Path, seed: int = 0, amounts: Amounts = Amounts(), workers: int = 2) -> None:
    """Render both sets into a folder. The same seed gives the same pictures.

    Args:
        root: Gets `annotations.json`, `videos/`, and the same of the clips in `motions/`.
        seed: Of all that is drawn.
        amounts: How many videos.
        workers: Processes.
    """
    jobs = [_Job(root, seed, number, "training") for number in range(amounts.training)]
    jobs += [
        _Job(root, seed, amounts.training + number, "validation")
        for number in range(amounts.validation)
    ]
    clips = [
        _Job(root / PRETRAINING, seed, number, "validation" if number % 6 == 5 else "training")
        for number in range(amounts.motions)
    ]
    with ProcessPoolExecutor(workers) as pool:
        videos = list(pool.map(_untrimmed_file, jobs))
        motions = list(pool.map(_trimmed_file, clips, chunksize=20))
    write_annotations(root / PRETRAINING / ANNOTATIONS, motions, VERSION)
    write_annotations(root / ANNOTATIONS, videos, VERSION)


class _Job(NamedTuple):
    root: Path
    seed: int
    number: int
    subset: str


def _untrimmed_file(job: _Job) -> Video:
    random = np.random.default_rng([job.seed, 0, job.number])
    frames, segments = untrimmed(random, sorted(ACTIONS))
    return replace(_written(job, f"video_{job.number:04d}", frames), segments=tuple(segments))


def _trimmed_file(job: _Job) -> Video:
    random = np.random.default_rng([job.seed, 1, job.number])
    labels = sorted(MOTIONS)
    label = labels[job.number % len(labels)]
    video = _written(job, f"clip_{job.number:04d}", trimmed(random, label))
    return replace(video, segments=(Segment(0.0, video.duration, label),))


def _written(job: _Job, name: str, frames: Frames) -> Video:
    write_video(job.root / VIDEOS / f"{name}.mp4", frames, FPS)
    return Video(name, len(frames) / FPS, job.subset, (), FPS, len(frames))
