"""The race of rewire and its rivals: all run or say why not, and the rows have one form."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from benchmarks import memory, pictures, rivals, tables
from benchmarks.costs import step_bytes, zero_gradients
from benchmarks.memory import Case, Setting, cases, measure, percentiles
from benchmarks.recording import Row, largest_error
from benchmarks.rivals import BUDGETED, LIBRARIES, WAYS, Offloaded, Subject, blocks_of, make
from benchmarks.workloads import Bottleneck, Stack
from rewire.meters import LiveBytes
from rewire.profiling import scalar_loss

# What libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

CPU = Setting(torch.device("cpu"), torch.float32, rounds=1)
MODULES = {"reformer": "reformer_pytorch"}
# compile needs a C++ compiler and a minute, offload nothing that a CPU has.
QUICK = [name for name in WAYS if "compile" not in name and name not in BUDGETED] + [
    "budget-checkpoint"
]


def subject(dtype: torch.dtype = torch.float32, depth: int = 4) -> Subject:
    torch.manual_seed(0)
    model = Stack([Bottleneck(8, 4) for _ in range(depth)])
    return Subject(model, torch.randn(2, 8, 6, 6, requires_grad=True), dtype)


def gradients_by(name: str, given: Subject) -> list[Tensor]:
    """Gradients that a step in a way leaves on the input and the parameters."""
    given.model.train()
    zero_gradients(given.leaves)
    scalar_loss(make(name, given)(given.x)).backward()
    return [leaf.grad.clone() for leaf in given.leaves if leaf.grad is not None]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return measure(Case("vit", depth=2, batch=1), QUICK, CPU)[0]


def test_every_way_runs_or_says_why_not(rows: list[Row]) -> None:
    assert [row["way"] for row in rows] == QUICK
    for row in rows:
        if row["peak_mib"] == "":
            assert row["note"].startswith("ModuleNotFoundError"), row
        else:
            assert row["peak_mib"] > 1
            assert row["ms_p50"] > 1
            assert 0.2 < row["time_p50"] < 10


def test_rows_have_one_form(rows: list[Row]) -> None:
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0] == rows[0] | {"what": "vit", "depth": 2, "batch": 1, "frames": ""}
    assert rows[0] == rows[0] | {"input": "1x197x384", "dtype": "float32", "way": "plain"}
    assert rows[0]["peak_ratio"] == rows[0]["time_p20"] == rows[0]["time_p80"] == 1
    by_way = {row["way"]: row for row in rows}
    assert by_way["rewire"]["peak_ratio"] < 0.9
    assert by_way["rewire-auto"]["peak_ratio"] < 0.8
    room = by_way["checkpoint"]["peak_ratio"]
    assert by_way["budget-checkpoint"]["peak_ratio"] < 1.05 * room


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-sqrt", "offload"])
def test_gradients_are_those_of_plain(name: str) -> None:
    given = subject()
    plain = gradients_by("plain", given)
    assert largest_error(gradients_by(name, given), plain) < 1e-5


@pytest.mark.parametrize("name", [name for name in LIBRARIES if name != "momentumnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_libraries_compute_what_rewire_does(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip(MODULES.get(name, name))
    given = subject(dtype)
    error = largest_error(gradients_by(name, given), gradients_by("rewire", given))
    assert error < (1e-3 if dtype == torch.float32 else 0.2)


def test_momentumnet_gives_gradients_to_all() -> None:
    pytest.importorskip("momentumnet")
    assert all(grad.abs().sum() > 0 for grad in gradients_by("momentumnet", subject()))


def test_a_failing_rival_becomes_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(given: Subject) -> nn.Module:
        raise ValueError("it does not\nwork")

    def out_of_memory(given: Subject) -> nn.Module:
        return Offloaded(given.model, limit=1000)

    monkeypatch.setitem(WAYS, "checkpoint", fail)
    monkeypatch.setitem(WAYS, "offload", out_of_memory)
    found = {row["way"]: row for row in rows_of_small(["checkpoint", "offload"])}
    assert list(found) == ["plain", "checkpoint", "offload", "rewire"]
    assert found["checkpoint"]["note"] == "ValueError: it does not"
    assert found["offload"]["note"].startswith("MemoryError: more than")
    assert found["offload"]["peak_mib"] == found["offload"]["time_p50"] == ""
    assert found["rewire"]["time_p50"] > 0


def test_where_plain_fails_there_are_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WAYS, "plain", lambda given: nn.Linear(1, 1))
    plain, rewired = rows_of_small([])
    assert plain["note"].startswith("RuntimeError")
    assert rewired["peak_mib"] > 0
    assert rewired["ms_p50"] > 0
    assert rewired["peak_ratio"] == rewired["time_p50"] == ""


def rows_of_small(names: list[str]) -> list[Row]:
    given = subject()
    asked = [name for name in WAYS if name in {"plain", *names, "rewire"}]
    return memory.rows_of(memory.race(given, asked, CPU), 1)


def test_ways_that_do_not_apply_say_so() -> None:
    linear = Subject(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(rivals.CannotApply, match="only for the stacks"):
        rivals.branches_of(linear)
    with pytest.raises(rivals.CannotApply, match="3 branches"):
        rivals.pairs_of(subject(depth=3))


def test_blocks_are_found_with_those_that_project() -> None:
    from torchvision.models import resnet50

    model = resnet50().eval()
    names = blocks_of(model, torch.randn(2, 3, 64, 64))
    assert names == [f"layer{i}.{j}" for i, n in enumerate((3, 4, 6, 3), 1) for j in range(n)]


def test_bytes_are_those_of_live_tensors() -> None:
    given = Case("vit", depth=1, batch=1).subject(CPU.device, CPU.dtype)
    zero_gradients(given.leaves)
    found = step_bytes(given.model, given.x)
    with LiveBytes() as meter:
        scalar_loss(given.model(given.x)).backward()
    assert found.peak == pytest.approx(meter.peak, rel=0.01)
    assert found.left == 0


def test_cases_are_all_combinations() -> None:
    assert cases(["a"], "all", "6", ("1,2", "32", "")) == [
        Case("a", None, 1, 32, None),
        Case("a", None, 2, 32, None),
    ]
    assert [case.depth for case in cases([], "vit", "6,12", ("", "", ""))] == [6, 12]


def test_percentiles() -> None:
    assert percentiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (2.0, 3.0, 4.0)


@pytest.fixture
def app() -> object:
    import typer

    app = typer.Typer()
    app.command()(memory.main)
    return app


def test_the_program_records_each_case(app: object, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    asked = "--workload bottlenecks --depths 2,4 --batch 1 --rounds 1 --against checkpoint --json"
    result = CliRunner().invoke(app, [*asked.split(), "--record", "--to", str(file)])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    with file.open() as stream:
        kept = list(csv.DictReader(stream))
    assert [row["way"] for row in kept] == ["plain", "checkpoint", "rewire"] * 2
    assert [row["depth"] for row in kept] == ["2"] * 3 + ["4"] * 3
    assert [float(row["peak_mib"]) for row in kept] == [row["peak_mib"] for row in printed]
    assert kept[0]["device"].startswith("CPU")
    assert {"torch", "commit", "date", "note", "time_p80"} <= set(kept[0])


def test_estimates_stand_beside_the_peaks(app: object) -> None:
    asked = "--workload vit --depths 2 --batch 1 --rounds 0 --against checkpoint --estimate"
    result = CliRunner().invoke(app, [*asked.split(), "--json"])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    for row in json.loads(result.stdout):
        assert row["estimate_mib"] == pytest.approx(row["peak_mib"], rel=0.05)
    assert memory.ESTIMATED in CliRunner().invoke(app, asked.split()).stdout  # type: ignore[arg-type]


def test_without_the_device_there_are_estimates_alone(
    app: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = "--workload bottlenecks --depths 2 --batch 1 --device cuda --against checkpoint --json"
    result = CliRunner().invoke(app, [*asked.split(), "--estimate"])  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert all(row["estimate_mib"] > 0 and row["peak_mib"] == row["ms_p50"] == "" for row in rows)
    result = CliRunner().invoke(app, asked.split())  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert "--estimate" in result.output


def row(way: str, depth: Any = "", input_: str = "2x3x8x8", peak: Any = 1.0) -> Row:
    sizes = {"depth": depth, "frames": "", "batch": 2, "input": input_}
    return {"what": "net", "way": way, "peak_mib": peak, "estimate_mib": 3.0, **sizes}


def test_pictures_show_what_was_swept() -> None:
    rows = [row("plain", 2), row("rewire", 2), row("plain", 4, peak=2.0), row("rewire", 4, peak="")]
    assert pictures.swept(rows) == "depth"
    assert pictures.curves(rows, "depth") == {
        "plain": [(2, 2**20), (4, 2**21)],
        "rewire": [(2, 2**20), (4, 3 * 2**20)],
    }
    sizes = [row("plain"), row("plain", input_="2x3x16x16")]
    assert pictures.swept(sizes) == "size"
    assert pictures.curves(sizes, "size") == {"plain": [(8, 2**20), (16, 2**20)]}
    assert pictures.swept([row("plain"), row("rewire")]) is None


def test_the_program_draws(app: object, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    asked = "--workload bottlenecks --batch 1 --rounds 0 --against checkpoint --plot"
    for depths in ("2", "2,3"):
        file = tmp_path / f"{depths}.svg"
        call = [*asked.split(), str(file), "--depths", depths]
        result = CliRunner().invoke(app, call)  # type: ignore[arg-type]
        assert result.exit_code == 0, result.output
        words = "blocks" if "," in depths else "end of backward"
        assert words.replace(" ", "") in file.read_text().replace(" ", "")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("--against rewired", "no way"),
        ("--workload vits", "no workload"),
        ("--model timm/resnet1", "no such"),
        ("--workload vit --depths 1 --frames 4", "--frames is not for vit"),
        ("--dtype int8", "no dtype"),
    ],
)
def test_wrong_options_are_told(app: object, asked: str, told: str) -> None:
    result = CliRunner().invoke(app, asked.split())  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert told in " ".join(result.output.replace("│", " ").split())


def test_the_readme_has_the_records_of_the_rivals() -> None:
    text = tables.README.read_text()
    assert tables.written(text) == text
    assert "**rewire-8**" in text
