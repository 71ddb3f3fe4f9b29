"""Videos, windows, and where steps lie in time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from examples.tal.data import synthetic
from examples.tal.data.annotations import (
    FileFormError,
    Prediction,
    Segment,
    Video,
    read_annotations,
)
from examples.tal.data.augmentation import Augmentation, augmented, middle
from examples.tal.data.classification import labelled, read_scores
from examples.tal.data.loading import Windows, collate, opened
from examples.tal.data.video import VideoError, find_video, probe, read_frames, write_video
from examples.tal.data.windows import Sampling, clipped, has_clips, sliding, spread, truncated


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 90 frames in which each shows its number: seven stripes are its bits."""
    path = tmp_path_factory.mktemp("videos") / "v_counted.mp4"
    bits = (np.arange(90)[:, None] >> np.arange(7)) & 1
    stripes = np.repeat(bits, 8, 1).astype(np.uint8)[:, None, :, None] * 220 + 16
    write_video(path, np.broadcast_to(stripes, (90, 32, 56, 3)), 10.0)
    return path


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of that video these are."""
    stripes = frames.mean((1, 3)).reshape(len(frames), 7, 8).mean(2)
    return ((stripes > 126) @ (1 << np.arange(7))).tolist()


def test_frames_are_those_of_their_numbers(counted: Path) -> None:
    file = probe(find_video(counted.parent, "counted"))
    assert (file.fps, file.frames, file.width, file.height) == (10.0, 90, 56, 32)
    assert numbers(read_frames(counted, range(90))) == list(range(90))
    assert numbers(read_frames(counted, [3, 3, 50, 89])) == [3, 3, 50, 89]
    assert read_frames(counted, [0], short=16).shape == (1, 16, 28, 3)


def test_frames_of_an_avi_are_counted(counted: Path, tmp_path: Path) -> None:
    """Its frames have no times of their own, and come in another order."""
    import av

    path = tmp_path / "counted.avi"
    frames = read_frames(counted, range(90))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"bf": "3", "crf": "10"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert numbers(read_frames(path, [0, 3, 50, 88])) == [0, 3, 50, 88]


def test_a_video_damaged_in_the_middle_is_left_out(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, 1, synthetic.Amounts(2, 0, 0), workers=1)
    videos = read_annotations(tmp_path / synthetic.ANNOTATIONS)
    files, _ = opened(videos, tmp_path / synthetic.VIDEOS)
    parts = videos, files, sorted(synthetic.ACTIONS), Sampling(16, stride=1)
    rows, tests = (Windows(*parts, training=training) for training in (True, False))
    files[videos[0].name].path.write_bytes(b"nothing any more")
    before = torch.default_generator.get_state()
    with pytest.warns(UserWarning, match=f"left out: .*{videos[0].name}"):
        assert rows[0].window.video == videos[1]
    with pytest.warns(UserWarning, match=f"left out: .*{videos[0].name}"):
        assert not tests[0].mask.any()
    assert torch.equal(torch.default_generator.get_state(), before)
    files[videos[1].name].path.write_bytes(b"nor here")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(VideoError, match="no video can be read"),
    ):
        rows[0]


def test_missing_corrupt_and_cut_off_videos_are_told(counted: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"no video in .* v_gone"):
        find_video(tmp_path, "gone")
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(VideoError, match="cannot be opened"):
        probe(noise)
    with pytest.raises(VideoError, match="ends with frame 89, and frame 120 was wanted"):
        read_frames(counted, [0, 120])
    (tmp_path / "fine.mp4").write_bytes(counted.read_bytes())
    videos = [Video(name, 9.0, "training") for name in ("gone", "noise", "fine")]
    files, skipped = opened(videos, tmp_path)
    assert list(files) == ["fine"]
    assert [row.name for row in skipped] == ["gone", "noise"]
    with pytest.raises(ValueError, match="ascending"):
        read_frames(counted, [5, 4])


def test_a_file_that_is_cut_off_is_skipped(counted: Path, tmp_path: Path) -> None:
    """Its header says 90 frames, and its data end before."""
    import av

    with av.open(str(counted)) as source:
        path = tmp_path / "cut.mp4"
        with av.open(str(path), "w", options={"movflags": "faststart"}) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert probe(path).frames == 90
    files, skipped = opened([Video("cut", 9.0, "training")], tmp_path)
    assert not files
    assert "cut.mp4" in skipped[0].reason


def test_times_come_back_through_a_file(counted: Path) -> None:
    """A step's time is that of the middle of the frames that are read for it."""
    video = Video("counted", 9.0, "training", (Segment(2.0, 4.0, "x"),), 10.0, 90)
    tenth = np.random.default_rng(0)
    windows = [
        (5, spread(video, 90, Sampling(18, per_step=5, stride=0))),
        *((2, w) for w in sliding(video, 10.0, 90, Sampling(8, per_step=2, stride=2))),
        (3, truncated(video, 10.0, 90, Sampling(8, per_step=3, stride=1), tenth)),
    ]
    for per_step, window in windows:
        frames = np.array(numbers(read_frames(counted, window.frames))).reshape(-1, per_step)
        stride = frames[0, 1] - frames[0, 0]  # a frame is there until the next one
        inside = frames[:, -1] + stride <= 90
        middles = (frames.mean(1) + stride / 2)[inside] / 10.0
        steps = np.arange(len(frames), dtype=float)[inside]
        assert np.abs(window.to_seconds(steps) - middles).max() < 1e-9
        assert np.allclose(window.to_steps(window.to_seconds(steps)), steps)


def test_sliding_windows_cover_and_end_where_the_video_ends() -> None:
    video = Video("v", 30.0, "validation", (Segment(1.0, 2.0, "x"), Segment(25.0, 29.0, "y")))
    windows = sliding(video, 10.0, 300, Sampling(32, per_step=2, stride=2, overlap=0.5))
    covered = {number // 4 for window in windows for number in window.frames[: 2 * window.real]}
    assert covered == set(range(75))
    assert windows[-1].frames[-1] == 298
    assert next(window.labels for window in windows if window.labels) == ("x",)
    assert all(window.real == 32 for window in windows)
    first = windows[0].segments[0]
    assert windows[0].to_seconds(first).tolist() == pytest.approx([1.0, 2.0])


def test_short_videos_are_masked_and_truncated_ones_have_a_segment() -> None:
    video = Video("v", 4.0, "training", (Segment(3.0, 3.5, "x"),))
    (short,) = sliding(video, 10.0, 40, Sampling(32, per_step=2, stride=1))
    assert (short.real, short.frames[39], short.frames[-1]) == (20, 39, 39)
    random = np.random.default_rng(0)
    long = Video("v", 60.0, "training", (Segment(50.0, 52.0, "x"), Segment(3.0, 9.0, "y")))
    for _ in range(20):
        window = truncated(long, 10.0, 600, Sampling(32, per_step=2, stride=1), random)
        assert window.labels
        spans = window.segments
        assert (spans[:, 1] <= 31.5 + 1e-9).all()
        assert (spans[:, 0] >= -0.5 - 1e-9).all()


def test_clips_are_cut_around_short_segments() -> None:
    sampling, random = Sampling(40, per_step=2, stride=1, clipped=0.4), np.random.default_rng(0)
    spans = (Segment(1.0, 30.0, "x"), Segment(31.0, 32.0, "y"), Segment(40.0, 41.0, "z"))
    video = Video("v", 60.0, "training", spans)
    for _ in range(30):
        window = clipped(video, 10.0, 600, sampling, random)
        assert window.real == 16  # 3.2 seconds
        start = window.frames[0] / 10
        (segment,) = window.segments
        label = window.labels[0]
        assert window.to_seconds(segment).tolist() == [*{"y": (31, 32), "z": (40, 41)}[label]]
        assert start >= {"y": 29.8, "z": 37.8 - 0.2}[label]
    assert not has_clips(Video("v", 60.0, "training", spans[:1]), 10.0, sampling)
    assert not has_clips(video, 10.0, Sampling(40, per_step=2, stride=1))


def test_every_frame_of_a_window_is_transformed_alike() -> None:
    given = Augmentation(crop=(0.3, 0.9), flip=True, jitter=0.4, operations=2)
    frames = torch.randint(0, 255, (1, 3, 40, 60)).byte().expand(6, 3, 40, 60).contiguous()
    transform = augmented(given, 24)
    found = {}
    for seed in range(8):
        torch.manual_seed(seed)
        seen = transform(frames)
        assert seen.shape == (6, 3, 24, 24)
        assert seen.dtype == torch.uint8
        assert bool((seen == seen[:1]).all())
        found[seed] = seen
    assert not torch.equal(found[0], found[1])
    assert torch.equal(middle(24)(frames), frames[..., 8:32, 18:42])
    assert torch.equal(augmented(Augmentation(), 24)(frames), middle(24)(frames))
    with pytest.raises(ValueError, match="two shares"):
        Augmentation(crop=(0.5,))


def test_segments_get_the_classes_of_their_videos(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"class": ["a", "b", "c"], "results": {"v": [0.1, 0.6, 0.3]}}))
    found = {"v": [Prediction(0, 1, "action", 0.5)]}
    rows = labelled(found, read_scores(path), top=2)["v"]
    assert [(row.label, row.score) for row in rows] == [("b", 0.3), ("c", 0.15)]
    with pytest.raises(FileFormError, match=r"no scores of 1 videos \(w"):
        labelled({"w": []}, read_scores(path), top=2)
    for content in ({"class": ["a"], "results": {"v": [1, 2]}}, {"results": {}}, [1]):
        path.write_text(json.dumps(content))
        with pytest.raises(FileFormError, match="scores"):
            read_scores(path)


def test_the_generator_writes_what_it_says_and_the_same_twice(tmp_path: Path) -> None:
    amounts = synthetic.Amounts(training=3, validation=2, motions=8)
    for name in ("a", "b"):
        synthetic.generate(tmp_path / name, seed=5, amounts=amounts, workers=1)
    videos = read_annotations(tmp_path / "a" / synthetic.ANNOTATIONS)
    assert videos == read_annotations(tmp_path / "b" / synthetic.ANNOTATIONS)
    assert [video.subset for video in videos] == ["training"] * 3 + ["validation"] * 2
    assert all(1 <= len(video.segments) <= 5 for video in videos)
    for video in videos:
        path = find_video(tmp_path / "a" / synthetic.VIDEOS, video.name)
        assert probe(path).frames == video.frames
        frames = read_frames(path, range(video.frames or 0))
        other = find_video(tmp_path / "b" / synthetic.VIDEOS, video.name)
        assert np.array_equal(frames, read_frames(other, range(video.frames or 0)))
    motions = read_annotations(tmp_path / "a" / synthetic.PRETRAINING / synthetic.ANNOTATIONS)
    assert {video.segments[0].label for video in motions} == set(synthetic.MOTIONS)


def test_samples_are_drawn_by_seed_epoch_and_number(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, 1, synthetic.Amounts(4, 0, 0), workers=1)
    videos = read_annotations(tmp_path / synthetic.ANNOTATIONS)
    files, _ = opened(videos, tmp_path / synthetic.VIDEOS)
    sampling = Sampling(16, per_step=2, stride=1)
    classes = sorted(synthetic.ACTIONS)
    first, again, kept = (
        Windows(videos, files, classes, sampling, training=True, keep=keep)
        for keep in (False, False, True)
    )
    assert first[2].window.frames == again[2].window.frames
    assert np.array_equal(first[2].frames, kept[2].frames)
    again.epoch = 1
    assert first[2].window.frames != again[2].window.frames
    batch = collate([first[0], first[1]])
    assert batch.frames.shape == (2, 3, 32, 64, 64)
    assert batch.mask.shape == (2, 16)
