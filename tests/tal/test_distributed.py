"""Two processes do what one does with twice the batch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("av")

from examples.tal.data import synthetic
from examples.tal.data.annotations import read_annotations
from examples.tal.data.loading import Batch, Windows, collate, opened
from examples.tal.prediction import predict
from examples.tal.training import Recipe, Trainer, seed_all
from tests.tal.test_training import CLASSES, SAMPLING, detector

RECIPE = Recipe(epochs=1, batch=4)


def samples(root: Path, *, training: bool) -> Windows:
    videos = read_annotations(root / synthetic.ANNOTATIONS)
    files, _ = opened(videos, root / synthetic.VIDEOS)
    return Windows(videos, files, CLASSES, SAMPLING, training=training)


def gradients(trainer: Trainer, batch: Batch) -> dict[str, torch.Tensor]:
    """Those of the first step, before they are clipped."""
    trainer.recipe = Recipe(epochs=1, batch=4, clip=1e9)
    trainer.detector.localizer.eval()  # drop path draws for each process
    trainer.detector.localizer.training = True
    for name, parameter in trainer.detector.named_parameters():
        if name.endswith("scale"):  # which begin so small that nothing would be seen behind them
            torch.nn.init.ones_(parameter)
    seed_all(0)
    trainer.step(batch)
    named = trainer.detector.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def of_both(rows: Windows, numbers: Iterable[int]) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients on samples, by localizer."""
    batch = collate([rows[number] for number in numbers])
    return {
        name: gradients(Trainer(detector(localizer=name), rows, RECIPE), batch)
        for name in ("actionformer", "vsgn")
    }


def one_of_two(rank: int, root: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{root}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    rows = samples(Path(root), training=True)
    found = of_both(rows, (2 * rank, 2 * rank + 1))
    made = predict(detector(), samples(Path(root), training=False), CLASSES)
    torch.save((found, made), f"{root}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, 0, synthetic.Amounts(4, 1, 0), workers=1)
    rows = samples(tmp_path, training=True)
    wanted = of_both(rows, range(4))
    expected = predict(detector(), samples(tmp_path, training=False), CLASSES)
    assert len(expected) == 5  # which does not divide by two
    mp.start_processes(one_of_two, (str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        found, made = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for localizer, gradient in wanted.items():
            assert found[localizer].keys() == gradient.keys()
            for name, own in gradient.items():
                apart = float((found[localizer][name] - own).abs().max())
                assert apart < 1e-3 * float(own.abs().max()) + 1e-7, (localizer, name)
        assert made.keys() == expected.keys()
        for name, rows in made.items():
            scores = [row.score for row in rows]
            assert scores == pytest.approx([row.score for row in expected[name]], abs=1e-5)
