"""`rewire demo`: the main job on an embedded default, offline, in about a minute."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rewire.conversion import Conversion, convert
from rewire.report import progress
from rewire.storage import load
from rewire.verification import verify

if TYPE_CHECKING:
    from rewire.verification import Verdict

_MODEL = "vit_small_patch16_224"
_SEED = 0
_BATCH = 2
_SIZE = 224


@dataclass(frozen=True)
class Demonstration:
    """What the demo made and measured."""

    model_path: Path
    conversion: Conversion
    verdict: Verdict


def demonstrate(folder: Path) -> Demonstration:
    """Save a ViT-S/16 (12 layers, random weights) in `folder`, convert, load and verify it."""
    import timm

    model_path, rewired_path = folder / "model.pt", folder / "rev_model.pt"
    making = progress(f"Making timm's {_MODEL} and saving it as {model_path}")
    with making, torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        torch.save(timm.create_model(_MODEL), model_path)
        image = torch.randn(_BATCH, 3, _SIZE, _SIZE)
    conversion = convert(str(model_path), rewired_path)
    with progress(f"Loading {rewired_path}"):
        rev = load(rewired_path)
    with progress("Verifying: gradients, statistics, memory"):
        verdict = verify(rev, image)
    return Demonstration(model_path, conversion, verdict)
