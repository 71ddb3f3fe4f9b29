"""What `outside="checkpoint"` saves on real models, beside the original and the chains alone.

    uv run python benchmarks/outside.py --rounds 5 --keep
    uv run python benchmarks/outside.py --only resnet50 --spared 0,0.05,0.2 --every

Peaks are those of one training step (`rewire.profile`): bytes of live tensors, gradients
allocated beforehand. Times are paired, way by way in turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Annotated
from unittest import mock

import torch
import torchvision
import typer
from torch import Tensor, nn

import rewire
from benchmarks.recording import (
    MEBI,
    RECORDS,
    Row,
    gradients,
    keep_pages,
    paired_seconds,
    ratios,
    record,
    show,
)
from rewire import outside
from rewire.plans import Plan
from rewire.profiling import profile

RECORD = RECORDS / "outside.csv"

COLUMNS = {
    "model": "{model}",
    "input": "{input}",
    "way": "{way}",
    "stretches": "{stretches}",
    "peak MiB": "{peak_mib}",
    "× original": "{peak_ratio}",
    "kept MiB": "{saved_mib}",
    "left": "{left_bytes}",
    "gradients": "{equal_gradients}",
    "time × original": "{time_median} ({time_p20}–{time_p80})",
}


def _segmentation(name: str) -> Callable[[], nn.Module]:
    return lambda: Main(getattr(torchvision.models.segmentation, name)(weights_backbone=None))


class Main(nn.Module):
    """A segmentation model that gives its main output only, as one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """The class scores."""
        scores: Tensor = self.model(x)["out"]
        return scores


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name)

    return make


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (torchvision.models.resnet50, (8, 3, 160, 160)),
    "resnet152": (torchvision.models.resnet152, (4, 3, 160, 160)),
    "timm resnetv2_50": (_timm("resnetv2_50"), (4, 3, 160, 160)),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, (8, 3, 160, 160)),
    "convnext_tiny": (torchvision.models.convnext_tiny, (4, 3, 160, 160)),
    "swin_t": (torchvision.models.swin_t, (4, 3, 224, 224)),
    "swin3d_t": (torchvision.models.video.swin3d_t, (1, 3, 16, 112, 112)),
    "mvit_v2_s": (torchvision.models.video.mvit_v2_s, (1, 3, 16, 224, 224)),
    "fcn_resnet50": (_segmentation("fcn_resnet50"), (4, 3, 160, 160)),
    "maxvit_t": (torchvision.models.maxvit_t, (2, 3, 224, 224)),
    "coatnet_0": (_timm("coatnet_0_224"), (2, 3, 224, 224)),
    "deeplabv3_resnet50": (_segmentation("deeplabv3_resnet50"), (4, 3, 160, 160)),
}


def _ways(
    model: nn.Module, x: Tensor, spared: list[float], every: bool
) -> Iterator[tuple[str, nn.Module, Plan | None]]:
    """The ways of running a model, with the plans that they have."""
    yield "original", model, None
    plan = rewire.plan(model, x, outside="checkpoint")
    plain = dataclasses.replace(plan, outside=())
    yield "rewired", rewire.make_reversible(model, plan=plain), plain
    yield "outside", rewire.make_reversible(model, plan=plan), plan
    for share in spared:
        with mock.patch.object(outside, "SPARED", share):
            other = rewire.plan(model, x, outside="checkpoint")
        yield f"outside, {share:g} spared", rewire.make_reversible(model, plan=other), other
    if every:
        with mock.patch.object(outside, "_spare"):
            other = rewire.plan(model, x, outside="checkpoint")
        yield "outside, every stretch", rewire.make_reversible(model, plan=other), other


def measure(name: str, rounds: int, spared: list[float], every: bool) -> list[Row]:
    """The rows of one model."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().train(), torch.randn(shape)
    ways = list(_ways(model, x, spared, every))
    seconds = paired_seconds({way: one for way, one, _ in ways}, x, rounds + 1)
    rows: list[Row] = []
    for way, one, plan in ways:
        found = profile(one, x)
        peak = found.peak_bytes / MEBI
        first = rows[0]["peak_mib"] if rows else round(peak, 1)
        rows.append(
            {
                "model": name,
                "input": "x".join(map(str, shape)),
                "way": way,
                "modules": 0 if plan is None else len(plan.modules),
                "stretches": 0 if plan is None else len(plan.outside),
                "peak_mib": round(peak, 1),
                "peak_ratio": round(peak / first, 3),
                "saved_mib": round(found.saved_bytes / MEBI, 1),
                "left_bytes": found.left_bytes,
                "equal_gradients": "" if plan is None else _equal(one, x),
                **ratios(seconds[way][1:], seconds["original"][1:]),
            }
        )
    return rows


def _equal(model: nn.Module, x: Tensor) -> str:
    """How many gradients have the bits that they have where everything is stored."""
    torch.manual_seed(1)
    with rewire.store_activations(model):
        expected = gradients(model, x)
    torch.manual_seed(1)
    found = gradients(model, x)
    same = sum(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return f"{same} / {len(expected)}"


def main(
    only: Annotated[str, typer.Option(help="Names of models, with commas between.")] = "",
    rounds: Annotated[int, typer.Option(help="Steps of each way.")] = 3,
    spared: Annotated[str, typer.Option(help="Other shares than `SPARED`, to compare.")] = "",
    every: Annotated[bool, typer.Option(help="Also every stretch that frees anything.")] = False,
    keep: Annotated[bool, typer.Option(help="Append to the record.")] = False,
) -> None:
    """Print what each model takes."""
    torch.set_num_threads(1)
    keep_pages()
    shares = [float(share) for share in spared.split(",") if share]
    rows = []
    for name in only.split(",") if only else MODELS:
        rows += measure(name, rounds, shares, every)
        show(rows[-len(shares) - 3 - every :], COLUMNS)
    if keep:
        record(rows, RECORD, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
