"""The loop: that it goes on as if it had not stopped, and that a detector learns."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from examples.tal.cli import SMALL
from examples.tal.comparison import ARMS, compare, outcomes_table, pretrained, run
from examples.tal.config import BackboneConfig, Config, DataConfig, read_config
from examples.tal.data import synthetic
from examples.tal.data.annotations import Video, of_subset, read_annotations
from examples.tal.data.loading import Windows, opened
from examples.tal.data.video import VideoFile
from examples.tal.data.windows import Sampling
from examples.tal.evaluation import evaluate
from examples.tal.models.actionformer import (
    ActionFormer,
    ActionFormerConfig,
    ActionFormerShape,
)
from examples.tal.models.backbones import CENTRED, Backbone, prepared
from examples.tal.models.detector import Detector, Suppression
from examples.tal.models.losa import LoSAShape
from examples.tal.models.motionnet import MotionNet
from examples.tal.models.vsgn import VSGN, VSGNConfig, VSGNShape
from examples.tal.prediction import predict
from examples.tal.pretraining import Clips
from examples.tal.sets import Sets
from examples.tal.training import Recipe, Trainer, averaged, groups, schedule, seed_all
from tests.tal.test_models import tiny

CLASSES = sorted(synthetic.ACTIONS)
SAMPLING = Sampling(48, per_step=2, stride=1)
RECIPE = Recipe(epochs=4, warmup=1, batch=2, workers=0)

Set = tuple[list[Video], dict[str, VideoFile]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Set:
    root = tmp_path_factory.mktemp("synthetic")
    synthetic.generate(root, 0, synthetic.Amounts(5, 2, 0), workers=1)
    every = read_annotations(root / synthetic.ANNOTATIONS)
    return every, opened(every, root / synthetic.VIDEOS)[0]


def detector(way: str = "rewired", localizer: str = "actionformer") -> Detector:
    seed_all(0)
    net = MotionNet((8, 16), 2)
    options = {"example_inputs": torch.rand(1, 3, 16, 64, 64)} if way == "rewired" else {}
    backbone = prepared(Backbone(net, normal=CENTRED, pool="max"), way, **options)
    sizes = {"inputs": 16, "classes": len(CLASSES)}
    if localizer == "vsgn":
        shape = VSGNShape(width=64, levels=4, stride=2, neighbours=6, head=2, groups=8, gap=4)
        return Detector(backbone, VSGN(VSGNConfig(**asdict(shape), **sizes)))
    config = ActionFormerConfig(**sizes, width=16, branches=3, stem=1, window=-1)
    return Detector(backbone, ActionFormer(config))


def windows(videos: Set, subset: str = "training", *, training: bool = True) -> Windows:
    rows = of_subset(videos[0], subset)
    return Windows(rows, videos[1], CLASSES, SAMPLING, training=training, keep=True)


def test_going_on_gives_what_not_stopping_gives(videos: Set, tmp_path: Path) -> None:
    whole = Trainer(detector(), windows(videos), RECIPE)
    whole.run()
    first = Trainer(detector(), windows(videos), RECIPE, tmp_path)
    first.run(until=2)
    second = Trainer(detector(), windows(videos), RECIPE, tmp_path)
    assert second.resume()
    assert second.epoch == 2
    second.run()
    for one, other in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(one, other)
    log = (tmp_path / "log.csv").read_text().splitlines()
    assert len(log) == 5
    assert log[0].startswith("epoch,rate,scores,reach,total,norm")


def test_rates_rise_and_fall_and_only_weights_decay() -> None:
    assert [schedule(e, 5, 45) for e in (0, 2.5, 5, 25, 45)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    model = detector("plain")
    found = groups(model, RECIPE)
    decay = {id(p): g["weight_decay"] for g in found for p in g["params"]}
    rates = {id(p): g["lr"] for g in found for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (decay[id(parameter)] > 0) == (parameter.dim() >= 3 and "scale" not in name), name
        assert rates[id(parameter)] == (5e-4 if name.startswith("backbone") else 1e-3)


def test_averages_copy_whole_numbers_and_share_what_does_not_learn() -> None:
    """Swin's table of positions is one; a mean of it, cut to whole numbers, would be another."""
    model = Detector(prepared(tiny("swin"), "frozen"), torch.nn.Linear(2, 2))
    average = averaged(model, ema=0.999)
    for _ in range(60):
        average.update_parameters(model)
    pairs = list(zip(average.module.buffers(), model.buffers(), strict=True))
    assert all(torch.equal(mean, own) for mean, own in pairs if not own.is_floating_point())
    assert any(not own.is_floating_point() for _, own in pairs)
    frozen = zip(average.module.backbone.parameters(), model.backbone.parameters(), strict=True)
    assert all(mean.data_ptr() == own.data_ptr() for mean, own in frozen)
    assert average.module.localizer.weight.data_ptr() != model.localizer.weight.data_ptr()


def test_predicting_leaves_frozen_norms_as_they_are(videos: Set) -> None:
    trainer = Trainer(detector(), windows(videos), RECIPE)
    modes = [module.training for module in trainer.detector.modules()]
    predict(trainer.detector, windows(videos, "validation", training=False), CLASSES)
    assert [module.training for module in trainer.detector.modules()] == modes
    assert set(modes) == {True, False}


@pytest.mark.parametrize("localizer", ["actionformer", "vsgn"])
def test_predictions_cover_every_video_once(videos: Set, localizer: str) -> None:
    rows = windows(videos, "validation", training=False)
    found = predict(detector("plain", localizer), rows, CLASSES, Suppression(most=7))
    assert sorted(found) == sorted(video.name for video in rows.videos)
    for predictions in found.values():
        assert 0 < len(predictions) <= 7
        assert all(0 <= row.start < row.end <= 9.6 for row in predictions)


@pytest.mark.slow
@pytest.mark.parametrize("localizer", ["actionformer", "vsgn"])
def test_a_rewired_detector_overfits_five_videos(videos: Set, localizer: str) -> None:
    recipe = Recipe(epochs=120, warmup=5, batch=5, rate=2e-3, backbone_rate=2e-3, ema=0.9)
    trainer = Trainer(detector(localizer=localizer), windows(videos), recipe)
    trainer.run()
    rows = windows(videos, training=False)
    found = predict(trainer.average, rows, CLASSES)
    assert evaluate(rows.videos, found).average > 0.95


@pytest.mark.slow
def test_end_to_end_training_beats_features(tmp_path: Path) -> None:
    """By 5 points of average mAP at least, with the comparison's own videos and schedules."""
    synthetic.generate(tmp_path, 1)
    given = read_config(SMALL)
    places = {"annotations": synthetic.ANNOTATIONS, "videos": synthetic.VIDEOS}
    places = {name: str(tmp_path / part) for name, part in places.items()}
    config = replace(given, data=replace(given.data, **places))
    motions = tmp_path / synthetic.PRETRAINING
    arms = [arm for arm in ARMS if arm.way in ("features", "plain")]
    found = {row.arm: row.maps["average"] for row in compare(config, motions, 1, arms)}
    features, plain = (found[arm.name] for arm in arms)
    assert plain > features + 0.05


@pytest.mark.slow
def test_every_way_of_the_comparison_runs(videos: Set) -> None:
    """One epoch of each, on few videos: rows, and what they cost."""
    training, testing = windows(videos), windows(videos, "validation", training=False)
    data = DataConfig("", "", sampling=SAMPLING)
    backbone = BackboneConfig(pool="max", normal="centred")
    localizer = ActionFormerShape(width=16, stem=1, branches=3, window=-1)
    config = Config(
        data,
        backbone,
        localizer=localizer,
        recipe=Recipe(batch=2, warmup=0.5),
        losa=LoSAShape(every=2, width=16),
    )
    clips = Clips(torch.randint(0, 255, (8, 3, 8, 64, 64)).byte(), torch.arange(8) % 6)
    classifier = pretrained(config, clips, epochs=1)
    found = [
        run(
            replace(arm, epochs=1),
            config,
            Sets(training, testing, testing.videos, CLASSES, [], None),
            (clips, clips),
            classifier,
        )
        for arm in ARMS
        if not arm.finetuned
    ]
    peaks = {row.arm: row.peak_mib for row in found}
    plain = peaks["plain"]
    assert peaks["features"] < 0.2 * plain
    assert peaks["re2 at once"] < 0.8 * plain
    assert outcomes_table(found, [row.arm for row in found]).row_count == len(found)
