"""Where memory goes, original and rewired side by side: the rows, the table, the pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rewire import balance as balances
from rewire.accounting import optimizer_named
from rewire.balance import Balance, Row, balance
from rewire.conversion import Request
from rewire.errors import RewireError
from rewire.plans import Chain, Plan, Residual
from rewire.plotting import need_matplotlib, plot_curves, plot_steps
from rewire.profiling import Profile
from rewire.report import balance_table
from rewire.sizes import bytes_of
from tests.test_cli import _printed, golden, refused, run

MB = 10**6
SMALL = "timm/test_vit?img_size=32&depth=2"


def profiles() -> Balance:
    modules = tuple(
        Residual(f"blocks.{i}", f"blocks.{i}", "net.py:1", 0, (0,), branch=("conv",))
        for i in range(2)
    )
    saved = (("blocks.0.conv", 30 * MB), ("blocks.1.conv", 30 * MB), ("stem.conv", 5 * MB))
    common = (40 * MB, MB, 40 * MB, 80 * MB, 2 * MB, 3 * MB)
    original = Profile(90 * MB, 68 * MB, 0, 0.25, "cpu", 0, 0.0, *common, saved)
    kept = (("stem.conv", 5 * MB), ("blocks.1.conv", MB))
    rewired = Profile(20 * MB, 13 * MB, 0, 0.3, "cpu", 0, 0.0, *common, kept, 4 * MB)
    plan = Plan("Net", [Chain("blocks", modules)], [], "", 0)
    return Balance("net.pt", "image", "measured on cpu", "Adam", plan, original, rewired)


def test_rows_by_hand() -> None:
    """A module of a chain that keeps something all the same stands outside, in both columns."""
    rows = {row.name: (row.original, row.rewired) for row in profiles().rows()}
    assert rows["chains (2 residual modules)"] == (30 * MB, 4 * MB)
    assert rows["outside: stem.conv"] == (5 * MB, 5 * MB)
    assert rows["outside: blocks.1"] == (30 * MB, MB)
    assert rows["the output"] == (3 * MB, 3 * MB)
    assert rows["all together"] == (253 * MB, 183 * MB)
    saved = [row for row in profiles().rows() if row.group == "saved"]
    assert sum(row.original or 0 for row in saved) == 68 * MB
    assert sum(row.rewired or 0 for row in saved) == 13 * MB


def test_table_is_the_golden_file() -> None:
    golden("balance_table.txt", _printed(balance_table(profiles().rows(), 200 * MB)))


def test_many_parts_are_added_up() -> None:
    found = profiles()
    parts = tuple((f"part{i}", (10 - i) * MB) for i in range(9))
    found = Balance(**{**vars(found), "original": _with(found.original, outside=parts)})
    rows = {row.name: row for row in found.rows()}
    assert len([name for name in rows if name.startswith("outside")]) == 7
    assert rows["outside: part0"][2:] == (10 * MB, 0)
    assert rows["outside: 5 more"][2:] == ((5 + 4 + 3 + 2 - 5) * MB, 6 * MB), "parts 6, 7, 8, ..."


def _with(profile: Profile, **changes: Any) -> Profile:
    return Profile(**{**vars(profile), **changes})


def test_measured_and_estimated_say_the_same() -> None:
    measured = balance(SMALL, Request(shape=(2, 3, 32, 32)), "cpu", "sgd")
    estimated = balance(SMALL, Request(shape=(2, 3, 32, 32)), "cpu", "SGD", estimated=True)
    assert measured.how == "measured on cpu"
    assert estimated.how == "estimated for cpu"
    rows = [list(found.rows()) for found in (measured, estimated)]
    assert rows[0].pop().group == "time"
    assert rows[0] == rows[1]
    assert rows[0][3] == Row("standing", "optimizer (SGD)", 0, 0)


def test_too_large_to_measure_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balances, "_free_bytes", lambda device: MB)
    found = balance(SMALL, Request(shape=(2, 3, 32, 32)), "cpu", "none")
    assert found.original.estimated
    assert found.how.startswith("estimated for cpu (measuring takes")
    assert found.how.endswith("1.0 MB are free)")
    assert found.optimizer == "none"


def test_out_of_memory_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(balances, "profile", full)
    with pytest.raises(RewireError, match="the original does not fit on cpu: --estimate"):
        balance(SMALL, Request(), "cpu", "adam")


def test_optimizers_by_name() -> None:
    assert optimizer_named("adamw") is torch.optim.AdamW
    assert optimizer_named("None") is None
    with pytest.raises(RewireError, match=r"no optimizer of torch\.optim\. There are ASGD, "):
        optimizer_named("adma")


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GB", 24 * 10**9), ("16 GiB", 2**34), ("800mb", 8 * 10**8), ("1.5TB", 1.5e12), ("7", 7)],
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "x24GB", "2.4.1GB", "-5GB", "24GBB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory"):
        bytes_of(text)


# ---- the command -------------------------------------------------------------------------


def test_command_prints_the_table() -> None:
    result = run("profile", SMALL, "--estimate", "--budget", "1MB")
    assert result.exit_code == 0, result.output
    assert "estimated for cpu" in result.stdout
    assert "missing" in result.stdout
    assert "chains (4 residual modules)" in result.stdout


def test_command_without_a_gpu_estimates_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ("profile", SMALL, "--device", "cuda", "--json", "--budget", "24GB")
    data = json.loads(run(*arguments).stdout)
    assert data["how"] == "estimated for cuda (no GPU is here)"
    assert data["budget_bytes"] == 24 * 10**9
    assert data["rewired"]["peak_bytes"] < data["original"]["peak_bytes"]
    assert data["original"]["step_seconds"] is None


def test_command_of_nothing_to_rewire_shows_the_original() -> None:
    result = run("profile", "torch.nn:Flatten")
    assert result.exit_code == 1
    result = run("profile", "torchvision/alexnet", "--input-shape", "1,3,64,64", "--estimate")
    assert result.exit_code == 1
    assert "all together" in result.stdout
    assert "no chain to rewire" in result.stderr


def test_bad_usage_is_said_before_any_work(tmp_path: Path) -> None:
    refused(run("profile", SMALL, "--device", "tpu"), "cpu or cuda", code=2)
    refused(run("profile", SMALL, "--budget", "much"), "no amount of memory", code=2)
    refused(run("profile", SMALL, "--budget", "0.3"), "no amount of memory", code=2)
    refused(run("profile", SMALL, "--plot", tmp_path), "is a directory", code=2)
    refused(run("profile", SMALL, "--optimizer", "adma"), "no optimizer of torch.optim")


# ---- pictures ----------------------------------------------------------------------------


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RewireError, match="pip install matplotlib"):
        need_matplotlib()
    path = tmp_path / "step.png"
    refused(run("profile", SMALL, "--plot", path), "pip install matplotlib")
    assert not path.exists()


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_steps({"original": [1, 5, 2], "rewired": [1, 2, 1]}, tmp_path / "a.png", "a step")
    plot_curves({"plain": [(6, 2e9), (12, 4e9)]}, tmp_path / "b.svg", "depth")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "depth" in (tmp_path / "b.svg").read_text()
    with pytest.raises(RewireError, match=r"c\.words: cannot be written"):
        plot_steps({"original": [1]}, tmp_path / "c.words")
    result = run("profile", SMALL, "--estimate", "--plot", tmp_path / "d.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "d.png").stat().st_size > 10_000
