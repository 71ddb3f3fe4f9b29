"""Memory of a training step against frames: what grows with depth, what does not, and is it so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.tal import memory
from examples.tal.memory import Row, backbone_for, estimate, measure
from examples.tal.models.backbones import NETWORKS, Swin, VideoMAE
from examples.tal.models.slowfast import SlowFast

SIZE = 64
DEEP = ("short", "long")


def tiny_swin(depths: Sequence[int]) -> partial[Swin]:
    return partial(
        Swin, patch_size=[2, 4, 4], embed_dim=16, depths=list(depths),
        num_heads=[1, 2, 4, 8][: len(depths)], window_size=[2, 4, 4], stochastic_depth_prob=0.1,
    )  # fmt: skip


TINY: dict[str, Any] = {
    "short": tiny_swin((2, 2, 6, 2)),
    "long": tiny_swin((2, 2, 18, 2)),
    "swin": tiny_swin((6,)),
    "slowfast": partial(SlowFast, (8, 1), width=16),
    "videomae": partial(
        VideoMAE,
        {
            "image_size": SIZE, "patch_size": 8, "num_frames": 4, "hidden_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 1024,
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _tiny_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in TINY.items():
        monkeypatch.setitem(NETWORKS, name, make)


def test_what_is_kept_for_backward_does_not_grow_with_depth_once_rewired() -> None:
    """Twelve blocks more: to within 1 % when rewired, by more than half when plain."""
    short, long = (
        estimate(backbone_for(name, "rewired", SIZE, values=False), 4, SIZE) for name in DEEP
    )
    assert long.saved_bytes == pytest.approx(short.saved_bytes, rel=0.01)
    # Measured: on so few numbers that is faster than on tensors without values.
    before, after = (measure(backbone_for(name, "plain", SIZE), 4, SIZE) for name in DEEP)
    assert before is not None
    assert after is not None
    assert after.saved_bytes > 1.5 * before.saved_bytes
    assert short.saved_bytes < 0.5 * before.saved_bytes


@pytest.mark.parametrize(
    ("network", "frames", "ways"),
    [
        pytest.param("swin", 4, ["plain", "checkpointed", "rewired"], marks=pytest.mark.slow),
        pytest.param(
            "slowfast",
            8,
            ["plain", "checkpointed", "rewired", "rewired+outside"],
            marks=pytest.mark.slow,
        ),
        ("videomae", 8, ["plain", "rewired"]),
    ],
)
def test_each_way_takes_less_than_the_one_before_and_as_estimated(
    network: str, frames: int, ways: Sequence[str]
) -> None:
    """Estimates are within 2 % of what is measured."""
    rows = list(memory.run([network], [frames], ways, size=SIZE, measured_to=frames))
    shares = memory.agreement(rows)
    assert [row.way for row in shares] == ways
    assert list(shares.values()) == pytest.approx([1.0] * len(shares), rel=0.02)
    assert all(row.seconds for row in shares)
    peaks = [row.peak_bytes or 0 for row in shares]
    assert all(after < before for before, after in pairwise(peaks)), peaks


@pytest.mark.slow
def test_chunks_take_less_yet() -> None:
    ways = ["rewired", "rewired+chunks"]
    rows = list(memory.run(["videomae"], [32], ways, size=SIZE, measured_to=32))
    assert list(memory.agreement(rows).values()) == pytest.approx([1.0, 1.0], rel=0.02)
    whole, parts = (row.peak_bytes or 0 for row in rows if row.kind == "measured")
    assert parts < whole


def test_what_does_not_fit_is_estimated_alone() -> None:
    few = partial(memory.run, ["motionnet"], [4, 8], ["plain"], size=SIZE)
    found = [(row.frames, row.kind) for row in few(measured_to=4)]
    assert found == [(4, "estimated"), (4, "measured"), (8, "estimated")]
    assert [row.kind for row in few(measured_to=8, within=1)] == ["estimated"] * 2
    (row,) = memory.run(["motionnet"], [4], ["plain"], "cuda", size=SIZE, measured_to=0)
    assert (row.kind, row.device) == ("estimated", "cuda")


def test_what_there_is_not_is_said() -> None:
    with pytest.raises(ValueError, match="'swin_x' is no network"):
        list(memory.run(["swin_x"]))
    with pytest.raises(ValueError, match="'folded' is no way"):
        list(memory.run(["swin"], ways=["folded"]))
    with pytest.raises(ValueError, match="'tpu' is no device"):
        list(memory.run(["swin"], device="tpu"))
    with pytest.raises(ValueError, match="give a multiple of 4"):
        list(memory.run(["slowfast"], [6], ["plain"], size=SIZE))


# ---- rows ------------------------------------------------------------------------------------


def made() -> list[Row]:
    sizes = {"plain": 2**32, "rewired": 2**30}
    rows = [
        Row("swin_t", way, frames, 224, "estimated", "cpu", peak * frames // 64, 1, 2, 3, 4)
        for way, peak in sizes.items()
        for frames in (64, 128)
    ]
    measured = Row("swin_t", "rewired", 64, 224, "measured", "cpu", 2**30 + 2**24, 1, 2, 3, 4, 0.5)
    return [*rows, measured, Row("swin_t", "plain", 128, 224, "measured", "cpu", None)]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for row in made():
        memory.append(path, row)
    assert memory.read(path) == made()
    heading = path.read_text().splitlines()[0]
    assert heading.endswith("seconds,date,torch,machine")


def test_the_table_has_estimates_and_in_brackets_what_was_measured() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(memory.table(made()))
    cells = [[cell.strip() for cell in line.split("│")] for line in captured.get().splitlines()]
    assert ["", "swin_t", "plain", "4.00", "8.00 (out of memory)", ""] in cells
    assert ["", "swin_t", "rewired", "1.00 (1.02)", "2.00", ""] in cells
    assert "1.016 to 1.016" in captured.get()


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "figures" / "memory.png"
    memory.plot(made(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no rows"):
        memory.plot([], path)
