"""What an exact inverse keeps: bits and bytes of the correction tape, by coupling.

    uv run python benchmarks/tape.py --workload bert --depths 6,12,24
    uv run python benchmarks/tape.py --workload minilm         # real weights; see examples/finetune
    uv run python benchmarks/tape.py --quick                   # all workloads, shallow, once
    uv run python benchmarks/tape.py --record                  # append to records/tape.csv

Beside plain autograd and checkpointing of each block. Bits are per element of the stream and
residual module: those of the coupling, which follow from its b, and those of the normalisations
on the trunk, which follow from the weights. "Same bits": gradients equal to those of the same
forward by ordinary autograd.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import rewire
from benchmarks.recording import (
    MEBI,
    RECORDS,
    Row,
    command,
    equal_bits,
    gradients,
    keep_pages,
    paired_seconds,
    ratios,
    record,
    show,
)
from benchmarks.workloads import Autocast, Stack, vit
from rewire.profiling import profile
from rewire.reversible import kept_grids
from rewire.tape import Kept, watch_corrections

RECORD = RECORDS / "tape.csv"
RIVALS = ("plain", "checkpoint")
COUPLINGS = ("re2", "consistent(1/2)", "consistent(1/4)", "consistent(1/8)", "dr2(0.9, 0.1)")

COLUMNS = {
    "workload": "{workload} x {depth}",
    "dtype": "{dtype}",
    "way": "{way}",
    "peak MiB": "{peak_mib:.1f}",
    "bits": "{bits:.2f}",
    "of coupling": "{coupling_bits:.2f}",
    "of norms": "{norm_bits:.2f}",
    "same bits": "{same_bits}/{gradients}",
    "time x plain (p20-p80)": "{time_median:.2f} ({time_p20:.2f}-{time_p80:.2f})",
}


class Hidden(nn.Module):
    """The last hidden states of a transformers encoder, from embeddings or token ids."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, width]."""
        key = "inputs_embeds" if x.is_floating_point() else "input_ids"
        hidden: Tensor = self.encoder(**{key: x}).last_hidden_state
        return hidden


def bert(depth: int) -> tuple[nn.Module, Tensor]:
    """BERT-base (post-norm, two norms a layer) of another depth on 8 x 128 tokens, no dropout."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        num_hidden_layers=depth,
        vocab_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False)
    model.embeddings.word_embeddings.requires_grad_(False)  # its place is taken by the input
    return Hidden(model), torch.randn(8, 128, config.hidden_size, requires_grad=True)


def minilm(_: int) -> tuple[nn.Module, Tensor]:
    """MiniLM (post-norm, 6 layers) with its real weights on 8 x 128 tokens of text, no dropout."""
    from examples.finetune.tasks import sentences

    sentences.Sentences.require()
    ids, mask = sentences.tokenized([part for pair in sentences.pairs() for part in pair])
    text = ids[mask.bool()]
    model = Hidden(sentences.bert())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, text.repeat(-(-8 * 128 // len(text)))[: 8 * 128].view(8, 128)


WORKLOADS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "bert": bert,
    "vit": vit,
    "minilm": minilm,
}


def checkpointed(model: nn.Module) -> nn.Module:
    """The same blocks, each under `torch.utils.checkpoint`."""
    if isinstance(model, Stack):
        return Stack(model.blocks, checkpointed=True)
    twin = copy.deepcopy(model)
    twin.encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return twin


def way_of(name: str, model: nn.Module, x: Tensor, dtype: torch.dtype) -> nn.Module:
    """One of the rivals, or the model rewired by a coupling."""
    if name == "plain":
        return Autocast(model, dtype)
    if name == "checkpoint":
        return Autocast(checkpointed(model), dtype)
    return Autocast(rewire.make_reversible(model, x, coupling=name, check="raise"), dtype)


def bits_of(kept: list[Kept]) -> Row:
    """Bits per element and module; a normalisation's count for its module."""
    elements = sum(row.elements for row in kept)
    coupling = 8 * sum(row.nbytes for row in kept if row.elements) / elements
    norms = 8 * sum(row.nbytes for row in kept if not row.elements) / elements
    found = {"bits": coupling + norms, "coupling_bits": coupling, "norm_bits": norms}
    return {name: round(value, 3) for name, value in found.items()}


def correction(way: nn.Module, x: Tensor) -> Row:
    """Bits of a rewired model, and in how many tensors its gradients are its twin's."""
    with kept_grids(way), watch_corrections() as kept:
        found = gradients(way, x)
    with kept_grids(way), rewire.store_activations(way):
        true = gradients(way, x)
    return {**bits_of(kept), "same_bits": equal_bits(found, true), "gradients": len(true)}


NOTHING: Row = dict.fromkeys(("bits", "coupling_bits", "norm_bits"), 0.0) | {
    "same_bits": 0,
    "gradients": 0,
}


def measure(
    workload: str, depth: int, dtype: torch.dtype, names: list[str], rounds: int
) -> list[Row]:
    """One row for each way."""
    model, x = WORKLOADS[workload](depth)
    model.train()
    ways = {name: way_of(name, model, x, dtype) for name in names}
    rows = []
    for name, way in ways.items():
        found = profile(way, x)
        row = {
            "workload": workload,
            "depth": depth,
            "dtype": str(dtype).removeprefix("torch."),
            "way": name,
            "peak_mib": round(found.peak_bytes / MEBI, 2),
            "saved_mib": round(found.saved_bytes / MEBI, 2),
        }
        rows.append({**row, **(NOTHING if name in RIVALS else correction(way, x))})
    seconds = paired_seconds(ways, x, rounds)
    return [
        {**row, **ratios(seconds[row["way"]], seconds[names[0]]), "rounds": rounds} for row in rows
    ]


def main(
    workload: Annotated[str, typer.Option(help="bert, vit, minilm or all")] = "all",
    depths: Annotated[str, typer.Option(help="Depths in layers, with commas.")] = "6",
    dtypes: Annotated[str, typer.Option(help="Dtypes, with commas.")] = "float32,bfloat16",
    way: Annotated[list[str], typer.Option(help="Beside plain; repeat.")] = [*RIVALS, *COUPLINGS],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="Paired rounds for the times.")] = 5,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option(help="Two layers, one round.")] = False,
    save: Annotated[bool, typer.Option("--record", help=f"Append to {RECORD.name}.")] = False,
) -> None:
    """Measure what each coupling keeps so that its inverse is exact."""
    torch.set_num_threads(threads)
    keep_pages()
    names = ["plain", *(name for name in way if name != "plain")]
    rows: list[Row] = []
    for name in WORKLOADS if workload == "all" else [workload]:
        chosen = [6] if name == "minilm" else [2] if quick else [int(d) for d in depths.split(",")]
        for depth in chosen:
            for dtype in dtypes.split(","):
                torch.manual_seed(0)
                Console(stderr=True).print(f"{name}, {depth} layers, {dtype}")
                found = getattr(torch, dtype)
                rows += measure(name, depth, found, names, 1 if quick else rounds)
    show(rows, COLUMNS)
    if save:
        record(rows, RECORD, command=command())


if __name__ == "__main__":
    typer.run(main)
