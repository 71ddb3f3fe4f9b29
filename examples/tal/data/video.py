"""Frames of video files, read and written with PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from examples.tal.files import written_whole

Frames = NDArray[np.uint8]  # [T, H, W, 3], red, green, blue

ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
# Seconds that a file may end before what its header says: headers round.
_SHORT = 0.5


class VideoError(OSError):
    """A video is missing, cut off, or cannot be decoded. The message names it, and what it has."""


@dataclass(frozen=True)
class VideoFile:
    """What a file says of itself.

    Attributes:
        path: Where it is.
        fps: Frames in a second.
        frames: Their number.
        width: In pixels.
        height: In pixels.
    """

    path: Path
    fps: float
    frames: int
    width: int
    height: int


def find_video(folder: Path, name: str) -> Path:
    """The file of a video, by any of the names that people give it: NAME.mp4, v_NAME.mp4, ...

    Raises:
        VideoError: There is none.
    """
    for prefix in ("", "v_"):
        for ending in ENDINGS:
            path = folder / f"{prefix}{name}{ending}"
            if path.is_file():
                return path
    raise VideoError(f"{name}: no video in {folder} (looked for {name}.*, v_{name}.*)")


def probe(path: Path) -> VideoFile:
    """What a file says of itself; its frames are counted where it does not.

    Raises:
        VideoError: It is no video.
    """
    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path)
            rate = stream.average_rate
            if rate is None or rate <= 0:
                raise VideoError(f"{path}: has no frame rate.")
            count = stream.frames or sum(1 for _ in container.decode(stream))
            return VideoFile(path, float(rate), count, stream.width, stream.height)
    except av.FFmpegError as error:
        raise VideoError(f"{path}: cannot be opened: {error}") from error


def read_frames(path: Path, numbers: Sequence[int], short: int | None = None) -> Frames:
    """Frames of a video by number.

    Only what lies between the last key frame before the first of them and the last is decoded; of
    an .avi, all up to the last.

    Args:
        path: The file.
        numbers: In ascending order; one may come several times. Frames that a variable rate
            leaves out are the ones before them.
        short: Pixels of the shorter side; frames are as they are where it is None.

    Raises:
        VideoError: It cannot be decoded, or ends before the last of them.
    """
    wanted = list(numbers)
    if wanted != sorted(wanted) or not wanted or wanted[0] < 0:
        raise ValueError("numbers of frames are given in ascending order, from 0 on.")
    found: list[Frames] = []
    last, at = None, -1
    try:
        with av.open(str(path)) as container:
            stream = _stream(container, path)
            stream.thread_type = "AUTO"
            fps, start = stream.average_rate or Fraction(25), stream.start_time or 0
            timed = container.format.name != "avi"  # there frames have no times of their own
            if timed:
                _seek(container, stream, wanted[0] / fps, start)
            for count, frame in enumerate(container.decode(stream)):
                number = round((frame.pts - start) * stream.time_base * fps) if timed else count
                while last is not None and len(found) < len(wanted) and wanted[len(found)] < number:
                    found.append(_image(last, short))
                last, at = frame, number
                if len(found) == len(wanted) or wanted[-1] < number:
                    break
    except av.FFmpegError as error:
        raise VideoError(f"{path}: cannot be decoded behind frame {at}: {error}") from error
    if last is None or wanted[-1] - at > _SHORT * fps:
        raise VideoError(f"{path}: ends with frame {at}, and frame {wanted[-1]} was wanted.")
    found += [_image(last, short)] * (len(wanted) - len(found))
    return np.stack(found)


def write_video(path: Path, frames: Frames, fps: float, quality: int = 18) -> None:
    """Write frames as H.264, whole or not at all.

    Args:
        path: The file.
        frames: [T, H, W, 3]; height and width are even.
        fps: Frames in a second.
        quality: x264's constant rate factor; less is better.
    """
    with written_whole(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # Looking ahead, x264 reads memory that nobody wrote: the same frames gave other files.
        blind = "threads=1:mbtree=0:rc-lookahead=0:sync-lookahead=0"
        stream.options = {"crf": str(quality), "preset": "veryfast", "x264-params": blind}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _stream(container: av.container.InputContainer, path: Path) -> av.video.VideoStream:
    if not container.streams.video:
        raise VideoError(f"{path}: has no video stream.")
    return container.streams.video[0]


def _seek(
    container: av.container.InputContainer,
    stream: av.video.VideoStream,
    seconds: Fraction,
    start: int,
) -> None:
    """To the last key frame before a time."""
    if seconds > 1 and stream.time_base is not None:
        container.seek(start + int(seconds / stream.time_base), stream=stream)


def _image(frame: av.VideoFrame, short: int | None) -> Frames:
    if short is None or min(frame.width, frame.height) == short:
        return frame.to_ndarray(format="rgb24")
    share = short / min(frame.width, frame.height)
    size = {"width": round(frame.width * share), "height": round(frame.height * share)}
    return frame.reformat(format="rgb24", **size, interpolation="BILINEAR").to_ndarray()
