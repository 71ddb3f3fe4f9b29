"""Average precision and recall, suppression, and the files they are read from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.tal.data.annotations import (
    FileFormError,
    Prediction,
    Segment,
    Video,
    of_subset,
    read_annotations,
    read_predictions,
    write_annotations,
    write_predictions,
)
from examples.tal.evaluation import average_recall, evaluate
from examples.tal.nms import Found, by_class, hard_nms, soft_nms, vote

TRUTH = [
    Video(
        "A",
        40.0,
        "validation",
        (Segment(0, 10, "c"), Segment(20, 30, "c"), Segment(20.0005, 30, "c")),
    ),
    Video("B", 40.0, "validation", (Segment(5, 15, "c"),)),
]
FOUND = {
    "A": [Prediction(0, 10, "c", 0.9), Prediction(1, 10, "c", 0.8), Prediction(22, 30, "c", 0.7)],
    "B": [Prediction(5, 10, "c", 0.6)],
    "C": [Prediction(0, 1, "c", 0.5)],
}


def test_a_case_worked_out_by_hand() -> None:
    found = evaluate(TRUTH, FOUND, [0.5, 0.75, 0.9])
    assert found.means == pytest.approx([5 / 6, 5 / 9, 1 / 3], abs=1e-12)
    printed = found.to_dict()["mAP"]
    assert list(printed) == ["0.5", "0.75", "0.9", "average"]
    assert printed["average"] == pytest.approx((5 / 6 + 5 / 9 + 1 / 3) / 3)


def precision_by_hand(
    truth: list[Video], found: dict[str, list[Prediction]], limit: float
) -> float:
    """The same from its definition, one prediction after the other."""
    per_class = []
    for label in sorted({s.label for video in truth for s in video.segments}):
        open_ = [(v.name, s.start, s.end) for v in truth for s in v.segments if s.label == label]
        total = len(open_)
        rows = [(p.score, n, p) for n, ps in found.items() for p in ps if p.label == label]
        points, hits = [], 0
        for rank, (_, name, p) in enumerate(sorted(rows, key=lambda row: -row[0]), 1):
            best, which = 0.0, None
            for segment in open_:
                shared = min(p.end, segment[2]) - max(p.start, segment[1])
                whole = max(p.end, segment[2]) - min(p.start, segment[1])
                if segment[0] == name and shared > 0 and shared / whole > best:
                    best, which = shared / whole, segment
            if which is not None and best >= limit:
                open_.remove(which)
                hits += 1
            points.append((hits / total, hits / rank))
        area, before = 0.0, 0.0
        for recall, _ in points:
            if recall > before:
                area += (recall - before) * max(p for r, p in points if r >= recall)
                before = recall
        per_class.append(area)
    return sum(per_class) / len(per_class)


@pytest.mark.parametrize("seed", range(5))
def test_random_cases_agree_with_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth, found = [], {}
    for number in range(12):
        spans = (
            random.uniform(0, 90, (random.integers(0, 5), 1))
            + random.uniform(0, 12, (1, 2)).cumsum()
        )
        segments = tuple(Segment(a, b, str(random.choice(list("xyz")))) for a, b in spans)
        truth.append(Video(f"v{number}", 120.0, "validation", segments))
        near = [
            Prediction(
                s.start + random.normal(0, 2), s.end + random.normal(0, 2), s.label, random.random()
            )
            for s in segments
            for _ in range(3)
        ]
        far = [
            Prediction(a, a + 9, "xyzw"[n % 4], random.random())
            for n, a in enumerate(random.uniform(0, 100, 6))
        ]
        found[f"v{number}"] = near + far
    limits = [0.3, 0.5, 0.7]
    means = evaluate(truth, found, limits).means
    wanted = [precision_by_hand(truth, found, limit) for limit in limits]
    assert np.abs(means - wanted).max() < 1e-9
    assert 0.05 < means.mean() < 0.95


def test_recall_is_that_of_the_best_proposals() -> None:
    recall = average_recall(TRUTH, FOUND, [0.5, 0.95], [1, 10])
    assert recall[1] == pytest.approx((2 + 1) / 6)  # [0, 10] at both, half of [5, 15] at one
    assert recall[10] == pytest.approx((3 + 1) / 6)
    assert average_recall(TRUTH, {})[100] == 0


def test_nothing_predicted_and_nothing_there() -> None:
    assert evaluate(TRUTH, {}).average == 0
    with pytest.raises(ValueError, match="no segment"):
        evaluate([Video("A", 1.0, "validation")], FOUND)


# ---- suppression ---------------------------------------------------------------------------


def rows(*spans: tuple[float, float, float, int]) -> Found:
    columns = np.array(spans)
    return Found(columns[:, :2], columns[:, 2], columns[:, 3].astype(int))


def test_soft_nms_lowers_scores_by_the_square_of_the_overlap() -> None:
    found = soft_nms(rows((0, 10, 0.9, 0), (5, 15, 0.8, 0), (20, 30, 0.5, 0)), sigma=0.5)
    assert found.spans.tolist() == [[0, 10], [5, 15], [20, 30]]
    assert found.scores == pytest.approx([0.9, 0.8 * np.exp(-((1 / 3) ** 2) / 0.5), 0.5])
    assert len(soft_nms(rows((0, 10, 0.9, 0), (0, 10, 0.8, 0)), sigma=0.1).scores) == 1
    assert len(soft_nms(rows((0, 10, 0.9, 0), (20, 30, 0.8, 0)), sigma=0.5, most=1).scores) == 1


def test_hard_nms_drops_and_classes_are_apart() -> None:
    found = rows((0, 10, 0.9, 0), (1, 10, 0.8, 1), (20, 30, 0.5, 0))
    assert hard_nms(found, 0.5).scores.tolist() == [0.9, 0.5]
    assert by_class(found, lambda part: hard_nms(part, 0.5)).scores.tolist() == [0.9, 0.5, 0.8]


def test_votes_are_weighted_by_scores() -> None:
    found = rows((0, 10, 0.6, 0), (0, 11, 0.3, 0), (50, 60, 0.9, 0))
    kept = vote(rows((0, 10, 0.6, 0)), found, 0.9)
    assert kept.spans.tolist() == [[0, pytest.approx((0.6 * 10 + 0.3 * 11) / 0.9)]]


# ---- files -----------------------------------------------------------------------------------


def test_annotations_and_predictions_come_back(tmp_path: Path) -> None:
    path, results = tmp_path / "deep" / "a.json", tmp_path / "p.json"
    videos = [
        Video("A", 4.0, "training", (Segment(0.5, 1.5, "jump"), Segment(2, 3, "run")), 25.0, 100)
    ]
    write_annotations(path, videos, "test")
    assert read_annotations(path) == videos
    assert len(json.loads(path.read_text())["taxonomy"]) == 3
    write_predictions(results, FOUND, "test")
    assert read_predictions(results) == FOUND


def test_layouts_that_people_have(tmp_path: Path) -> None:
    path = tmp_path / "vsgn.json"
    entry = {"segment": ["1.5", "3.0"], "label": "jump"}
    vague = {"segment": [0, 1], "label": "Ambiguous"}
    row = {"duration": 9, "subset": "Test", "annotations": [entry, vague]}
    path.write_text(json.dumps({"database": {"v": row}}))
    assert read_annotations(path) == [Video("v", 9.0, "Test", (Segment(1.5, 3.0, "jump"),))]
    with pytest.raises(FileFormError, match="There are Test"):
        of_subset(read_annotations(path), "testing")
    results = tmp_path / "r.json"
    results.write_text(json.dumps({"results": {"v_x": [{**entry, "score": 0.5}]}}))
    assert read_predictions(results) == {"x": [Prediction(1.5, 3.0, "jump", 0.5)]}


def one(video: str) -> str:
    return '{"database": {"v": {"subset": "t", ' + video + "}}}"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "JSON"),
        ("[]", "'database'"),
        (one('"annotations": []'), "v: has no 'duration'"),
        (one('"duration": "long"'), "'long' is no number"),
        (one('"duration": NaN'), "finite"),
        (one('"duration": 1, "annotations": [{"label": "x"}]'), "annotation 0: has no 'segment'"),
        (one('"duration": 1, "annotations": [{"label": "x", "segment": [1]}]'), "start, end"),
    ],
)
def test_bad_files_say_where(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(FileFormError, match=said):
        read_annotations(path)
