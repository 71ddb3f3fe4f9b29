"""Annotations and predictions in the JSON files of ActivityNet and its followers.

The same layout serves ActivityNet-1.3 (`activity_net.v1-3.min.json`), THUMOS-14 as OpenTAD and
VSGN write it, and predictions as both challenges take them:

    {"version": ..., "taxonomy": [...], "database": {VIDEO: {"duration": SECONDS,
        "subset": "training", "annotations": [{"segment": [START, END], "label": NAME}]}}}
    {"version": ..., "external_data": {...}, "results": {VIDEO: [
        {"segment": [START, END], "label": NAME, "score": SHARE_OF_ONE}]}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.tal.files import written_whole

# What annotators could not tell (THUMOS-14): it is in no class, and not counted as wrong.
AMBIGUOUS = "Ambiguous"


class FileFormError(ValueError):
    """A file has not the layout that it should have. The message says where."""


@dataclass(frozen=True)
class Segment:
    """A labelled span of a video, in seconds."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Prediction:
    """A span that a network found, in seconds; the score is a share of one."""

    start: float
    end: float
    label: str
    score: float


@dataclass(frozen=True)
class Video:
    """A video and what happens in it.

    Attributes:
        name: Its key in the file, without prefix or ending.
        duration: Seconds.
        subset: "training", "validation" or "testing", as the file has it.
        segments: What is annotated, in order of time.
        fps: Frames in a second, where the file says so.
        frames: Their number, where the file says so.
    """

    name: str
    duration: float
    subset: str
    segments: tuple[Segment, ...] = ()
    fps: float | None = None
    frames: int | None = None


def read_annotations(path: Path, *, skip: Iterable[str] = (AMBIGUOUS,)) -> list[Video]:
    """The videos of an annotation file.

    Args:
        path: The JSON file.
        skip: Labels to leave out.

    Raises:
        FileFormError: It is no such file; the message names the video and the annotation.
    """
    skipped = set(skip)
    database = _member(read_json(path), "database", path)
    videos = []
    for name, row in database.items():
        where = f"{path}: {name}"
        segments = []
        for number, entry in enumerate(_get(row, "annotations", [], where)):
            here = f"{where}, annotation {number}"
            label = str(_get(entry, "label", None, here))
            if label not in skipped:
                start, end = _span(entry, here)
                if start > end:
                    raise FileFormError(f"{here}: it starts at {start:g} and ends at {end:g}.")
                segments.append(Segment(start, end, label))
        segments.sort(key=lambda segment: (segment.start, segment.end))
        frames = row.get("frame")
        video = Video(
            plain_name(name),
            _number(_get(row, "duration", None, where), f"{where}: duration"),
            str(_get(row, "subset", None, where)),
            tuple(segments),
            None if row.get("fps") is None else _number(row["fps"], f"{where}: fps"),
            None if frames is None else int(_number(frames, f"{where}: frame")),
        )
        videos.append(video)
    return videos


def write_annotations(path: Path, videos: Sequence[Video], version: str) -> None:
    """Write videos as an annotation file, with a taxonomy of one level."""
    labels = classes_of(videos)
    root = {"nodeId": 0, "nodeName": "Root", "parentId": None, "parentName": None}
    nodes = [
        {"nodeId": 1 + number, "nodeName": label, "parentId": 0, "parentName": "Root"}
        for number, label in enumerate(labels)
    ]
    database = {
        video.name: {
            "duration": video.duration,
            "subset": video.subset,
            "fps": video.fps,
            "frame": video.frames,
            "annotations": [
                {
                    "segment": [segment.start, segment.end],
                    "label": segment.label,
                    "label_id": labels.index(segment.label),
                }
                for segment in video.segments
            ],
        }
        for video in videos
    }
    _write(path, {"version": version, "taxonomy": [root, *nodes], "database": database})


def read_predictions(path: Path) -> dict[str, list[Prediction]]:
    """The predictions of a results file, by video.

    Raises:
        FileFormError: It is no such file.
    """
    found = {}
    for name, rows in _member(read_json(path), "results", path).items():
        predictions = []
        if not isinstance(rows, list):
            raise FileFormError(f"{path}: {name}: a list was expected, not {rows!r}.")
        for number, entry in enumerate(rows):
            here = f"{path}: {name}, prediction {number}"
            label = str(_get(entry, "label", None, here))
            score = _number(_get(entry, "score", None, here), f"{here}: score")
            predictions.append(Prediction(*_span(entry, here), label, score))
        found[plain_name(name)] = predictions
    return found


def write_predictions(
    path: Path, predictions: Mapping[str, Sequence[Prediction]], version: str
) -> None:
    """Write predictions as the challenges take them."""
    results = {
        name: [
            {"segment": [row.start, row.end], "label": row.label, "score": row.score}
            for row in rows
        ]
        for name, rows in predictions.items()
    }
    external = {"used": False, "details": ""}
    _write(path, {"version": version, "external_data": external, "results": results})


def plain_name(name: str) -> str:
    """A video's name; some files have it as that of its file, v_NAME."""
    return name.removeprefix("v_")


def classes_of(videos: Iterable[Video]) -> list[str]:
    """All labels, in alphabetical order: a network's classes by number."""
    return sorted({segment.label for video in videos for segment in video.segments})


def of_subset(videos: Iterable[Video], subset: str) -> list[Video]:
    """The videos of a subset.

    Raises:
        FileFormError: There are none; the message says which subsets there are.
    """
    every = list(videos)
    found = [video for video in every if video.subset == subset]
    if not found:
        there = ", ".join(sorted({video.subset for video in every})) or "no video"
        raise FileFormError(f"subset {subset!r}: no video is in it. There are {there}.")
    return found


# ---- JSON -----------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileFormError: It cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormError(f"{path}: cannot be read as JSON: {error}") from error


def _write(path: Path, data: Any) -> None:
    with written_whole(path) as beside:
        beside.write_text(json.dumps(data, indent=1), encoding="utf-8")


def _member(data: Any, name: str, path: Path) -> dict[str, Any]:
    found = data.get(name) if isinstance(data, dict) else None
    if not isinstance(found, dict):
        raise FileFormError(f"{path}: has no object {name!r} at its top; it is another file.")
    return found


def _get(row: Any, name: str, default: Any, where: str) -> Any:
    if not isinstance(row, dict):
        raise FileFormError(f"{where}: an object was expected, not {row!r}.")
    found = row.get(name, default)
    if found is None:
        raise FileFormError(f"{where}: has no {name!r}.")
    return found


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)  # VSGN's files have strings
    except (TypeError, ValueError) as error:
        raise FileFormError(f"{where}: {value!r} is no number.") from error
    if not math.isfinite(number):
        raise FileFormError(f"{where}: {value!r} is no finite number.")
    return number


def _span(entry: Any, where: str) -> tuple[float, float]:
    ends = _get(entry, "segment", None, where)
    if not isinstance(ends, list) or len(ends) != 2:
        raise FileFormError(f"{where}: a segment is [start, end], not {ends!r}.")
    start, end = (_number(value, f"{where}: segment") for value in ends)
    return start, end
