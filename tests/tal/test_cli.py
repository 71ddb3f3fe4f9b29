"""The commands as a user calls them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("av")

from examples.tal.building import localizer_of
from examples.tal.cli import app
from examples.tal.config import Config as Whole
from examples.tal.config import ConfigError, built, read_config
from examples.tal.data.annotations import read_predictions, write_annotations, write_predictions
from examples.tal.models.backbones import NETWORKS
from examples.tal.models.vsgn import VSGNShape
from tests.tal.test_evaluation import FOUND, TRUTH

CONFIGS = Path(__file__).parents[2] / "examples" / "tal" / "configs"

TINY = """
data:
  annotations: {root}/annotations.json
  videos: {root}/videos
  sampling: {{steps: 48, per_step: 2, stride: 1}}
  size: 64
backbone: {{name: motionnet, way: rewired, pool: max, normal: centred, weights: "{weights}"}}
localizer: {{width: 16, stem: 1, branches: 2, window: -1}}
recipe: {{epochs: {epochs}, warmup: 1, batch: 2}}
"""


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def test_evaluate_prints_json_and_nothing_else(tmp_path: Path) -> None:
    truth, found = tmp_path / "gt.json", tmp_path / "p.json"
    write_annotations(truth, TRUTH, "test")
    write_predictions(found, FOUND, "test")
    files = ["evaluate", "--ground-truth", truth, "--predictions", found]
    printed = json.loads(run(*files, "--thresholds", "0.5,0.9", "--json"))
    assert list(printed) == ["mAP"]
    wanted = {"0.5": 5 / 6, "0.9": 1 / 3, "average": 7 / 12}
    assert printed["mAP"] == {name: pytest.approx(value) for name, value in wanted.items()}
    assert "average recall" in run(*files)
    assert "There are validation" in refused(*files, "--subset", "training")
    assert "numbers with commas" in refused(*files, "--thresholds", "half")
    assert "shares from 0 to 1" in refused(*files, "--thresholds", "50")
    write_annotations(truth, [replace(v, name=f"v_{v.name}") for v in TRUTH], "test")
    assert json.loads(run(*files, "--thresholds", "0.5,0.9", "--json")) == printed
    found.write_text('{"results": {"A": [{"segment": [1], "label": "c", "score": 1}]}}')
    assert "a segment is [start, end], not [1]" in refused(*files)
    assert "cannot be read" in refused(*files[:2], tmp_path / "no.json", *files[3:])


def test_prepare_train_go_on_predict(tmp_path: Path) -> None:
    root, out, config = tmp_path / "data", tmp_path / "out", tmp_path / "c.yaml"
    run("prepare", root, "--synthetic", "--videos", "3,2,12", "--workers", 1)
    weights = tmp_path / "weights.pt"
    config.write_text(TINY.format(root=root, epochs=1, weights=""))
    run("pretrain", config, root, "--to", weights, "--epochs", 1, "--finetuned", 1)
    (root / "videos" / "video_0001.mp4").write_bytes(b"no video")
    for epochs in (1, 2):
        config.write_text(TINY.format(root=root, epochs=epochs, weights=weights))
        result = CliRunner().invoke(app, ["train", str(config), "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert "video_0001: " in result.stderr
    assert "going on after epoch 1" in result.stderr
    assert len((out / "log.csv").read_text().splitlines()) == 3
    run("predict", config, "--out", out, "--to", tmp_path / "p.json")
    assert read_predictions(tmp_path / "p.json") == read_predictions(out / "predictions.json")
    config.write_text(config.read_text().replace("width: 16", "width: 32"))
    for command in (["train"], ["predict", "--to", tmp_path / "p.json"]):
        assert "otherwise: localizer: width" in refused(*command, config, "--out", out)
    (out / "last.pt").write_bytes(b"garbage")
    assert "last.pt: cannot be read" in refused("train", config, "--out", out)
    assert "there is none" in refused("train", config, "--out", out, "--device", "cuda:77")
    assert "Run train first" in refused(
        "predict", config, "--out", tmp_path / "no", "--to", tmp_path / "q.json"
    )


def test_configurations_are_read_and_bad_ones_say_where() -> None:
    found = {path.name: read_config(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    assert len(found) >= 6
    for name, config in found.items():
        assert config.backbone.name in NETWORKS
        assert config.backbone.way == ("losa" if "losa" in name else "rewired")
        assert config.localizer.name in name
        assert localizer_of(config, 8, 3) is not None
    data = {"annotations": "a", "videos": "b"}
    for content, said in (
        ([], "keys and values"),
        ({}, "needs data"),
        ({"data": {**data, "video": "c"}}, "c: data: unknown video"),
        ({"data": {**data, "keep": "yes"}}, "c: data: keep: 'yes' is no bool"),
        ({"data": data, "recipe": {"epochs": 1.5}}, "1.5 is no int"),
        ({"data": data, "localizer": {"window": ["x"]}}, "'x' is no int"),
        ({"data": data, "localizer": {"name": "tsn"}}, "'tsn' is none of actionformer, vsgn"),
        ({"data": data, "localizer": {"name": "vsgn", "window": 3}}, "unknown window"),
        ({"data": {**data, "short": 100}}, "c: data: short: 100 pixels are fewer"),
        ({"data": data, "recipe": {"amp": "bf16"}}, "c: recipe: amp is bfloat16 or float16"),
        ({"data": data, "backbone": {"way": "losa", "options": {"a": 1}}}, "takes no options"),
        ({"data": data, "backbone": {"options": {"chunk": 1}}}, "unknown chunk. There are plan"),
        ({"data": {**data, "keep": True}, "recipe": {"workers": 2}}, "workers must be 0"),
        ({"data": data, "suppression": {"sigma": 0}}, "c: suppression: sigma: a number above 0"),
        ({"data": data, "thresholds": []}, "thresholds: shares from 0 to 1"),
        ({"data": data, "recipe": {"epochs": 0}}, "epochs and batch are from 1 on"),
        ({"data": {**data, "sampling": {"steps": 0}}}, "sampling: steps and per_step"),
        ({"data": {**data, "sampling": {"steps": 8, "kept": 3}}}, "kept and crop"),
    ):
        with pytest.raises(ConfigError, match=said):
            built(Whole, content, "c")
    chosen = built(Whole, {"data": data, "localizer": {"name": "vsgn", "levels": 3}}, "c")
    assert chosen.localizer == VSGNShape(levels=3)


@pytest.mark.parametrize(
    ("backbone", "localizer"),
    [
        ("{name: motionnet, way: losa, pool: max}", "{width: 16, stem: 1, branches: 2}"),
        (
            "{name: motionnet, way: frozen}",
            "{name: vsgn, width: 32, levels: 3, neighbours: 6, stride: 2, gap: 4, groups: 8}",
        ),
    ],
)
def test_other_ways_and_localizers_train(backbone: str, localizer: str, tmp_path: Path) -> None:
    root, config = tmp_path / "data", tmp_path / "c.yaml"
    run("prepare", root, "--synthetic", "--videos", "2,1,0", "--workers", 1)
    text = TINY.format(root=root, epochs=1, weights="").splitlines()[:5]
    rest = [f"backbone: {backbone}", f"localizer: {localizer}", "losa: {every: 2, width: 16}"]
    config.write_text("\n".join([*text, *rest, "recipe: {epochs: 1, batch: 2}"]))
    assert "mAP" in run("train", config, "--out", tmp_path / "out")
    picture = tmp_path / "line.png"
    files = ["--ground-truth", root / "annotations.json"]
    files += ["--predictions", tmp_path / "out" / "predictions.json"]
    run("timeline", *files, "--video", "video_0002", "--to", picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "no video 'x'" in refused("timeline", *files, "--video", "x", "--to", picture)
