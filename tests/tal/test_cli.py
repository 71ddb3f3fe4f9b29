"""The commands as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("av")

from examples.tal.cli import app
from examples.tal.config import Config as Whole
from examples.tal.config import ConfigError, built, read_config
from examples.tal.data.annotations import read_predictions, write_annotations, write_predictions
from tests.tal.test_evaluation import FOUND, TRUTH

CONFIGS = Path(__file__).parents[2] / "examples" / "tal" / "configs"

TINY = """
data:
  annotations: {root}/annotations.json
  videos: {root}/videos
  sampling: {{steps: 48, per_step: 2, stride: 1}}
  size: 64
backbone: {{name: motionnet, way: rewired, pool: max, normal: centred}}
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
    assert "cannot be read" in refused(*files[:2], tmp_path / "no.json", *files[3:])


def test_prepare_train_go_on_predict(tmp_path: Path) -> None:
    root, out, config = tmp_path / "data", tmp_path / "out", tmp_path / "c.yaml"
    run("prepare", root, "--synthetic", "--videos", "3,2,0", "--workers", 1)
    (root / "videos" / "video_0001.mp4").write_bytes(b"no video")
    for epochs in (1, 2):
        config.write_text(TINY.format(root=root, epochs=epochs))
        result = CliRunner().invoke(app, ["train", str(config), "--out", str(out)])
        assert result.exit_code == 0, result.output
        assert "video_0001: " in result.stderr
    assert "going on after epoch 1" in result.stderr
    assert len((out / "log.csv").read_text().splitlines()) == 3
    run("predict", config, "--out", out, "--to", tmp_path / "p.json")
    assert read_predictions(tmp_path / "p.json") == read_predictions(out / "predictions.json")
    assert "Run train first" in refused(
        "predict", config, "--out", tmp_path / "no", "--to", tmp_path / "q.json"
    )


def test_configurations_are_read_and_bad_ones_say_where() -> None:
    found = {path.name: read_config(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    assert len(found) >= 2
    assert all(config.backbone.way == "rewired" for config in found.values())
    data = {"annotations": "a", "videos": "b"}
    for content, said in (
        ([], "keys and values"),
        ({}, "needs data"),
        ({"data": {**data, "video": "c"}}, "c: data: unknown video"),
        ({"data": {**data, "keep": "yes"}}, "c: data: keep: 'yes' is no bool"),
        ({"data": data, "recipe": {"epochs": 1.5}}, "1.5 is no int"),
        ({"data": data, "localizer": {"window": ["x"]}}, "'x' is no int"),
    ):
        with pytest.raises(ConfigError, match=said):
            built(Whole, content, "c")
