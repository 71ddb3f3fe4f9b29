"""The zoo: `pytest -m zoo` examines every model, each in a process of its own.

Hours on two cores; `python benchmarks/zoo.py run` does the same and can be stopped. The record that
it leaves is held here to what it must say, in no time.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import nn

import rewire
from benchmarks.examination import Examination, gradients_bit_by_bit
from benchmarks.menagerie import Specimen, specimens, truth
from benchmarks.zoo import RECORD, examine_all, lost, read
from benchmarks.zoo_tables import CONVERTED, markdown, summary
from rewire.inputs import as_example
from tests.specimens import SPECIMENS

# Where finder and detector agree against the truth: benchmarks/README.md says why.
OTHERWISE = {
    "timm/tiny_vit_5m_224": "2 2 2 2 2 2 2 2",
    "torchvision/raft_small": "2 2",
}
KNOWN = {name: row["chains"] for name, row in truth().items()} | OTHERWISE
RECORDED = read(RECORD)
REFUSED = ["WanTransformer3DModel"]  # casts on its trunk, which autocast makes real


def same_chains(row: dict[str, str]) -> bool:
    """Whether a line has the chains of the truth."""
    name = f"{row['library']}/{row['model']}"
    return name not in KNOWN or row["chains"] == KNOWN[name]


@pytest.mark.zoo
@pytest.mark.parametrize("specimen", specimens(), ids=lambda specimen: specimen.id)
def test_model(specimen: Specimen) -> None:
    [row] = examine_all([specimen], 1, 1800)
    assert not row["verdict"].startswith("FAILED"), row["verdict"]
    assert same_chains(row), row["chains"]


def test_names_are_unique() -> None:
    names = [specimen.id for specimen in specimens()]
    assert len(set(names)) == len(names)


def test_the_record_has_no_failure() -> None:
    assert RECORDED
    assert [row["model"] for row in RECORDED if row["verdict"].startswith("FAILED")] == []


def test_the_record_has_the_chains_of_the_truth() -> None:
    assert [row["model"] for row in RECORDED if not same_chains(row)] == []


def test_every_chain_that_is_not_rewired_has_a_reason() -> None:
    cut = [row for row in RECORDED if int(row["modules"] or 0) < int(row["of_modules"] or 0)]
    assert [row["model"] for row in cut if not row["reason"]] == []


def test_every_rewired_model_of_the_record_is_verified() -> None:
    rewired = [row for row in RECORDED if int(row["modules"] or 0)]
    verified = [row for row in rewired if row["verdict"] in CONVERTED]
    assert [row["model"] for row in rewired if row not in verified] == []
    assert [row["model"] for row in verified if not float(row["gradient_error"]) <= 1e-10] == []


def test_every_model_of_the_record_ran_in_eval_and_train_mode() -> None:
    rewired = [row for row in RECORDED if int(row["modules"] or 0)]
    unknown = [r["model"] for r in rewired if "-" in (r["plain_eval"], r["plain_train"])]
    assert unknown == []


def test_exact_mode_is_exact_or_refused() -> None:
    modes = {row[mode] for row in RECORDED for mode in ("exact", "autocast")}
    assert modes <= {"yes", "-", "refused", ""}  # "": nothing rewired, or not examined since
    assert [row["model"] for row in RECORDED if row["autocast"] == "refused"] == REFUSED


def test_the_readme_shows_the_record() -> None:
    assert summary(RECORDED) in (Path(__file__).parents[1] / "README.md").read_text()


# ---- the driver ----------------------------------------------------------------------------


def small(name: str = "plus") -> Specimen:
    """A network of the tests as a model of the zoo."""
    spec = SPECIMENS["plus"]
    return Specimen("tests", name, "tests", spec.make, lambda: (spec.inputs().float(),))


@pytest.mark.filterwarnings("ignore::rewire.drift.DriftWarning")
def test_gradients_that_differ_in_a_bit_are_a_fault() -> None:
    specimen, model = small(), SPECIMENS["plus"].make().float()
    example = as_example(SPECIMENS["plus"].inputs().float())
    found = {}
    for precision in ("exact", "fast"):
        result = Examination(specimen)
        plan = rewire.plan(model, example, precision=precision)
        gradients_bit_by_bit(result, model, plan, example)
        found[precision] = result.numbers["exact"]
    assert found == {"exact": "yes", "fast": "NO"}


def crash() -> nn.Module:
    """Ends its process."""
    raise SystemExit(3)


def hang() -> nn.Module:
    """Takes longer than any model may."""
    time.sleep(600)
    raise AssertionError


def driven() -> list[dict[str, str]]:
    """Lines as the driver gives them, from a process in which autograd has no threads yet."""
    code = """
import json
from benchmarks.zoo import examine_all
from tests.test_zoo import Specimen, crash, hang, small
ends = [small(), Specimen("tests", "dies", "tests", crash)]
print(json.dumps([
    *examine_all(ends, 1, 120), *examine_all([Specimen("tests", "hangs", "tests", hang)], 1, 0.1)
]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
def test_each_model_has_a_process_and_one_that_dies_or_hangs_is_a_line_too() -> None:
    good, dies, hangs = driven()
    assert good["verdict"] == "verified"
    assert dies["verdict"].startswith("FAILED: its process ended")
    assert hangs["verdict"].startswith("FAILED: out of time")
    text = markdown([good, lost(small("other"), "FAILED: out of time")])
    assert "| **all** | 2 | 1 | 1 | 0 | 1 | 1 | 3 of 3 |" in text
    assert "tests/plus" in text
