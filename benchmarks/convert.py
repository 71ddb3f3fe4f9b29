"""How long planning and rewriting take, and how that grows with the number of modules.

    python benchmarks/convert.py            # the named models, and a transformer of 6 to 96 layers

Each model is rewired from scratch several times, the example inputs found anew; seconds of the
process, so that other processes count little.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torchvision
import transformers
import typer
from torch import nn

import rewire
from benchmarks.recording import RECORDS, Row, record, show

RECORD = RECORDS / "convert.csv"


def gpt2(layers: int) -> nn.Module:
    """A narrow GPT-2: two residual modules a layer, and a cache that each layer is handed."""
    sizes = {"n_embd": 64, "n_head": 4, "vocab_size": 200, "bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2Model(transformers.GPT2Config(n_layer=layers, **sizes))


def models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """What is rewired."""
    yield "timm vit_large_patch16_224", lambda: timm.create_model("vit_large_patch16_224")
    yield "torchvision swin3d_b", torchvision.models.video.swin3d_b
    yield "torchvision resnet152", torchvision.models.resnet152
    for layers in (6, 12, 24, 48, 96):
        yield f"GPT-2, {layers} layers", lambda layers=layers: gpt2(layers)


def measured(name: str, build: Callable[[], nn.Module], rounds: int) -> Row:
    """The median of several conversions."""
    seconds, modules = [], 0
    for _ in range(rounds):
        model = build()
        gc.collect()
        start = time.process_time()
        rev = rewire.make_reversible(model)
        seconds.append(time.process_time() - start)
        modules = len(rewire.rewriting.plan_of(rev).modules)
    seconds.sort()
    median = seconds[len(seconds) // 2]
    return {
        "model": name,
        "modules": modules,
        "seconds": round(median, 2),
        "least": round(seconds[0], 2),
        "most": round(seconds[-1], 2),
        "ms_per_module": round(1000 * median / modules, 1),
        "rounds": rounds,
    }


def main(
    rounds: Annotated[int, typer.Option(help="Conversions of each model.")] = 3,
    keep: Annotated[bool, typer.Option(help="Append to the record.")] = False,
) -> None:
    """Print seconds for each model."""
    rows = [measured(name, build, rounds) for name, build in models()]
    columns = {
        "model": "{model}",
        "residual modules": "{modules}",
        "s": "{seconds:.2f}",
        "range": "{least:.2f}–{most:.2f}",
        "ms a module": "{ms_per_module}",
    }
    show(rows, columns)
    if keep:
        record(rows, RECORD)


if __name__ == "__main__":
    typer.run(main)
