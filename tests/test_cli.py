"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner, Result

import rewire
from rewire.cli import app
from rewire.plans import Chain, Plan, Residual, Skipped
from rewire.report import plan_summary, plan_tree, verdict_table
from rewire.sizes import human_bytes
from rewire.verification import Check, Verdict
from tests.broken_files import BROKEN

GOLDEN = Path(__file__).parent / "golden"
COMMANDS = ("", "inspect", "convert", "verify", "profile", "demo")
MODEL = "timm/test_vit"
SMALL = "timm/test_vit?img_size=32&depth=2"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="rewire")


def refused(result: Result, words: str, code: int = 1) -> None:
    """The command said no, on stderr only, without a traceback."""
    assert result.exit_code == code, result.output
    assert re.search(words, " ".join(result.stderr.split())), result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    if code == 1:
        assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a pickled model in it."""
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("test_vit"), "model.pt")
    return tmp_path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewired model in a file."""
    path = tmp_path_factory.mktemp("converted") / "rev.pt"
    assert run("convert", SMALL, "-o", path).exit_code == 0
    return path


def golden(name: str, text: str) -> None:
    """Compare with a file; REWIRE_UPDATE_GOLDEN=1 writes it instead."""
    path = GOLDEN / name
    if os.environ.get("REWIRE_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text(), f"{name} differs; REWIRE_UPDATE_GOLDEN=1 writes it anew"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_help_is_the_golden_file(
    command: str, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    result = run(*filter(None, [command]), "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    golden(f"help_{command or 'rewire'}.txt", result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_waits_for_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom rewire.cli import app\n"
        "try: app(sys.argv[1:], prog_name='rewire')\n"
        "finally: assert not {'torch', 'timm', 'torchvision', 'networkx'} & sys.modules.keys()"
    )
    arguments = [sys.executable, "-c", code, *filter(None, [command]), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_module_runs_as_a_program(folder: Path) -> None:
    arguments = [sys.executable, "-m", "rewire", "inspect", "nothing.pt"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("rewire: nothing.pt: no such file")
    assert len(done.stderr.splitlines()) == 1


def test_report_waits_for_no_torch() -> None:
    code = "import sys, rewire.report; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_inspect_prints_a_tree(folder: Path) -> None:
    result = run("inspect", "model.pt")
    assert result.exit_code == 0, result.output
    plan = rewire.plan(timm.create_model("test_vit"))
    assert f"VisionTransformer: {len(plan.chains)} chain" in result.stdout
    for residual in plan.modules:
        assert f"── {residual.name} " in result.stdout


def test_inspect_prints_json_only(folder: Path) -> None:
    result = run("inspect", "model.pt", "--json", "--input-shape", "2,3,160,160")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data.pop("source") == "model.pt, a pickled VisionTransformer"
    assert [len(chain) for chain in rewire.Plan.from_dict(data).chains] == [12]


def test_include_and_exclude_reach_the_plan() -> None:
    result = run("inspect", MODEL, "--json", "--exclude", "blocks.0.*", "--exclude", "blocks.1.*")
    names = [row["name"] for row in json.loads(result.stdout)["chains"][0]["modules"]]
    assert names
    assert all(name.startswith("blocks.") for name in names)
    assert not any(name.startswith(("blocks.0.", "blocks.1.")) for name in names)


def test_nothing_to_rewire_is_a_no(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "plain.pt")
    result = run("inspect", "plain.pt")
    assert result.exit_code == 1
    assert "0 chains" in result.stdout
    assert "Is the network residual?" in result.stderr
    refused(run("convert", "plain.pt", "-o", "rev.pt"), "no chain of two or more")
    assert not Path("rev.pt").exists()


def test_convert_verify_and_load(folder: Path) -> None:
    result = run("convert", "model.pt", "-o", "rev.pt", "--export-state-dict", "weights.pt")
    assert result.exit_code == 0, result.output
    assert "12 residual modules made reversible" in result.stdout
    assert "rewire verify rev.pt" in result.stdout
    assert "rev = rewire.load('rev.pt')" in result.stdout
    rev = rewire.load("rev.pt")
    weights = torch.load("weights.pt", weights_only=True)
    assert list(weights) == list(rev.state_dict())
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt", "rev.pt", "weights.pt"]


def test_convert_prints_json_only(folder: Path) -> None:
    result = run("convert", "model.pt", "-o", "rev.pt", "--json")
    data = json.loads(result.stdout)
    assert data["out"] == "rev.pt"
    assert data["bytes"] == Path("rev.pt").stat().st_size
    assert len(data["plan"]["chains"]) == 1


def test_next_step_names_the_trust_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("clinets.py").write_text("import timm\ndef net(): return timm.create_model('test_vit')\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    result = run("convert", "clinets:net", "-o", "rev.pt")
    assert "rewire verify rev.pt --trust clinets" in result.stdout
    assert "rewire.load('rev.pt', trust=['clinets'])" in result.stdout
    refused(run("verify", "rev.pt"), "--trust clinets")
    assert isinstance(rewire.load("rev.pt", trust=["clinets"]), nn.Module)
    sys.modules.pop("clinets", None)


def test_verify_prints_json_only(converted: Path) -> None:
    data = json.loads(run("verify", converted, "--json", "--float64").stdout)
    limits = {row["name"]: row["limit"] for row in data["checks"]}
    assert data["passed"] is True
    assert limits["parameter gradients"] <= 1e-10


def test_failed_check_is_a_no(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewire import verification

    checks = [Check("keys equal", 0, 0, "keys"), Check("bytes left", 4096.0, 0, "bytes")]
    verdict = Verdict(checks, "VisionTransformer")
    monkeypatch.setattr(verification, "verify", lambda *args, **kwargs: verdict)
    result = run("verify", converted)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "4.1 kB" in result.stdout
    assert "1 of 2 checks failed (bytes left)" in result.stderr


USAGE = {
    "no such command": (("convrt",), "No such command"),
    "no model": (("inspect",), "Missing argument"),
    "no out": (("convert", "model.pt"), "Missing option"),
    "shape of words": (("inspect", "model.pt", "--input-shape", "2,x"), "numbers like 2,3,224"),
    "shape of zero": (("inspect", "model.pt", "--input-shape", "0,3"), "numbers like 2,3,224"),
    "trunk": (("inspect", "model.pt", "--trunk", "outside"), "identity or inside"),
    "out is the input": (("convert", "model.pt", "-o", "./model.pt"), "the same file"),
    "out is a directory": (("convert", "model.pt", "-o", "."), "is a directory"),
    "out is nowhere": (("convert", "model.pt", "-o", "no/rev.pt"), "no directory no"),
    "export is out": (
        ("convert", "model.pt", "-o", "rev.pt", "--export-state-dict", "rev.pt"),
        "the same file",
    ),
}


@pytest.mark.parametrize("name", USAGE)
def test_bad_usage_is_said_before_any_work(name: str, folder: Path) -> None:
    arguments, words = USAGE[name]
    refused(run(*arguments), words, code=2)
    assert sorted(path.name for path in folder.iterdir()) == ["model.pt"]


@pytest.mark.parametrize("name", ["torchscript", "truncated", "empty", "missing", "html"])
def test_broken_file_leaves_out_alone(name: str, tmp_path: Path) -> None:
    write, words = BROKEN[name]
    path, out = tmp_path / "broken.pt", tmp_path / "rev.pt"
    write(path)
    out.write_bytes(b"old")
    refused(run("convert", path, "-o", out), re.escape(words))
    assert out.read_bytes() == b"old"
    refused(run("verify", path), re.escape(words))


def test_debug_shows_the_traceback() -> None:
    result = run("inspect", "nothing.pt", "--debug")
    assert result.exit_code == 1
    assert isinstance(result.exception, rewire.BadFile)


def test_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from rewire import conversion

    def broken(*args: object) -> None:
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(conversion, "opened", broken)
    refused(run("inspect", MODEL), "unexpected KeyError.*run again with --debug")
    assert isinstance(run("inspect", MODEL, "--debug").exception, KeyError)


def test_demo_tells_gradients_and_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rewire import demonstration

    small = timm.create_model("test_vit", img_size=32, depth=2)
    monkeypatch.setattr(timm, "create_model", lambda name: small)
    monkeypatch.setattr(demonstration, "_SIZE", 32)
    result = run("demo", "--keep", "files")
    assert result.exit_code == 0, result.output
    assert re.search("gradients: equal to ordinary autograd's bit for bit", result.stdout)
    assert re.search(r"peak activation memory.*: [\d.]+ MB, the original [\d.]+ MB", result.stdout)
    assert "Next: rewire inspect MODEL" in result.stdout
    assert sorted(path.name for path in Path("files").iterdir()) == ["model.pt", "rev_model.pt"]
    failed = Verdict([Check("keys equal", 1, 0, "keys")], "VisionTransformer")
    monkeypatch.setattr(demonstration, "verify", lambda *arguments: failed)
    result = run("demo", "--json")
    assert json.loads(result.stdout)["plan"]["chains"]
    assert result.exit_code == 1
    assert result.stderr == "rewire: demo: 1 of 1 checks failed (keys equal).\n"


def _printed(renderable: Any) -> str:
    stream = io.StringIO()
    Console(width=100, file=stream, highlight=False).print(renderable)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _plan() -> Plan:
    modules = (
        Residual("layer1.0", "layer1.0", "net.py:10", 0, (0,), branch=("conv1", "bn1")),
        Residual("layer1.1", "layer1.1", "net.py:10", 0, (0,), trunk="activation"),
    )
    chain = Chain("layer1", modules, (2, 64, 56, 56), "inside", taps=("layer1.1",))
    skipped = [Skipped(f"stage.{i}", "net.py:9", "too short", "a chain of one") for i in range(5)]
    skipped.append(Skipped("", "net.py:3", "projection", "[both] operands are computed"))
    return Plan("Net", [chain], skipped, "image [2, 3, 224, 224]", 1234567)


def test_trees_are_the_golden_files() -> None:
    golden("plan_tree.txt", _printed(plan_tree(_plan())))
    golden("plan_summary.txt", _printed(plan_summary(_plan())))


def test_verdict_table_is_the_golden_file() -> None:
    checks = [
        Check("parameter gradients", 3.2e-7, 1e-3, "relative", "worst [blocks.0] of 12"),
        Check("bytes left", 41_500_000, 0, "bytes"),
        Check("outputs", float("nan"), 0, "elements"),
    ]
    golden("verdict_table.txt", _printed(verdict_table(checks, "rev.pt")))


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (3.2e12, "3200.0 GB")],
)
def test_human_bytes(count: float, words: str) -> None:
    assert human_bytes(count) == words
