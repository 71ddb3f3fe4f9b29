"""Files under others' names, written here name by name, into our networks."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.tal.models import converters
from examples.tal.models.backbones import NETWORKS, Backbone, Swin, VideoMAE
from examples.tal.models.converters import (
    WeightsError,
    converted,
    fitting,
    load_weights,
    recognised,
)
from examples.tal.models.motionnet import MotionNet
from examples.tal.models.slowfast import SlowFast
from examples.tal.pretraining import Classifier

# ---- whose names are whose -------------------------------------------------------------------

# A name of a file and ours, or ours that it holds one after the other.
Names = dict[str, tuple[str, ...]]

SWIN_STEM = """
    patch_embed.proj.weight patch_embed.proj.weight
    patch_embed.proj.bias   patch_embed.proj.bias
    patch_embed.norm.weight patch_embed.norm.weight
    patch_embed.norm.bias   patch_embed.norm.bias
"""
SWIN_BLOCK = """
    norm1.weight                      norm1.weight
    norm1.bias                        norm1.bias
    attn.relative_position_bias_table attn.relative_position_bias_table
    attn.relative_position_index      attn.relative_position_index
    attn.qkv.weight                   attn.qkv.weight
    attn.qkv.bias                     attn.qkv.bias
    attn.proj.weight                  attn.proj.weight
    attn.proj.bias                    attn.proj.bias
    norm2.weight                      norm2.weight
    norm2.bias                        norm2.bias
"""
SWIN_MLP = """
    mlp.fc1.weight mlp.0.weight
    mlp.fc1.bias   mlp.0.bias
    mlp.fc2.weight mlp.3.weight
    mlp.fc2.bias   mlp.3.bias
"""
SWIN_MERGING = """
    reduction.weight reduction.weight
    norm.weight      norm.weight
    norm.bias        norm.bias
"""
SWIN_NORM = "weight weight\nbias bias"

BATCH_NORM = """
    weight              weight
    bias                bias
    running_mean        running_mean
    running_var         running_var
    num_batches_tracked num_batches_tracked
"""

TRANSFORMERS_BLOCK = """
    attention.attention.q_bias       attention.attention.query.bias
    attention.attention.v_bias       attention.attention.value.bias
    attention.attention.query.weight attention.attention.query.weight
    attention.attention.key.weight   attention.attention.key.weight
    attention.attention.value.weight attention.attention.value.weight
    attention.output.dense.weight    attention.output.dense.weight
    attention.output.dense.bias      attention.output.dense.bias
    intermediate.dense.weight        intermediate.dense.weight
    intermediate.dense.bias          intermediate.dense.bias
    output.dense.weight              output.dense.weight
    output.dense.bias                output.dense.bias
    layernorm_before.weight          layernorm_before.weight
    layernorm_before.bias            layernorm_before.bias
    layernorm_after.weight           layernorm_after.weight
    layernorm_after.bias             layernorm_after.bias
"""
OFFICIAL_BLOCK = """
    norm1.weight     layernorm_before.weight
    norm1.bias       layernorm_before.bias
    attn.q_bias      attention.attention.query.bias
    attn.v_bias      attention.attention.value.bias
    attn.proj.weight attention.output.dense.weight
    attn.proj.bias   attention.output.dense.bias
    norm2.weight     layernorm_after.weight
    norm2.bias       layernorm_after.bias
"""
OFFICIAL_MLP = """
    mlp.fc1.weight intermediate.dense.weight
    mlp.fc1.bias   intermediate.dense.bias
    mlp.fc2.weight output.dense.weight
    mlp.fc2.bias   output.dense.bias
"""
MMACTION_MLP = OFFICIAL_MLP.replace("fc1", "layers.0.0").replace("fc2", "layers.1")


def named(table: str, theirs: str = "", ours: str = "") -> Names:
    lines = (line.split() for line in table.strip().splitlines())
    return {theirs + one: (ours + other,) for one, other in lines}


def swin_torchvision(depths: tuple[int, ...]) -> Names:
    with torch.device("meta"):
        keys = Swin(depths=depths, **SWIN).state_dict()
    return {key.removeprefix("net."): (key,) for key in keys}


def swin_mmaction(depths: tuple[int, ...], norm: str = "norm3", rewired: bool = False) -> Names:
    first, second = ("inv_block.Fm.", "inv_block.Gm.") if rewired else ("", "")
    names = named(SWIN_STEM, "backbone.", "net.")
    for layer, depth in enumerate(depths):
        for block in range(depth):
            theirs = f"backbone.layers.{layer}.blocks.{block}."
            ours = f"net.features.{2 * layer}.{block}."
            for key, value in named(SWIN_BLOCK, "", ours).items():
                names[theirs + (second if key.startswith("norm2") else first) + key] = value
            names |= named(SWIN_MLP, theirs + second, ours)
        if layer + 1 < len(depths):
            theirs = f"backbone.layers.{layer}.downsample."
            names |= named(SWIN_MERGING, theirs, f"net.features.{2 * layer + 1}.")
    return names | named(SWIN_NORM, f"backbone.{norm}.", "net.norm.")


def swin_authors(depths: tuple[int, ...]) -> Names:
    found = swin_mmaction(depths, "norm")
    return {key.removeprefix("backbone."): value for key, value in found.items()}


def convolution(theirs: tuple[str, str], ours: str, first: int) -> Names:
    """A convolution and its batch norm, which are two modules in a row of ours."""
    weight = {f"{theirs[0]}.weight": (f"{ours}.{first}.weight",)}
    return weight | named(BATCH_NORM, f"{theirs[1]}.", f"{ours}.{first + 1}.")


def slowfast_mmaction(depths: tuple[int, ...], rewired: bool = False) -> Names:
    names: Names = {"backbone.slow_path.conv1_lateral.conv.weight": ("laterals.0.0.weight",)}
    for number in range(1, len(depths)):
        theirs = f"backbone.slow_path.layer{number}_lateral.conv.weight"
        names[theirs] = (f"laterals.{number}.0.weight",)
    for path in ("slow", "fast"):
        stem = f"backbone.{path}_path.conv1"
        names |= convolution((f"{stem}.conv", f"{stem}.bn"), f"{path}_stem", 0)
        for stage, depth in enumerate(depths):
            for block in range(depth):
                middle = "blocks." if rewired else ""
                theirs = f"backbone.{path}_path.layer{stage + 1}.{middle}{block}."
                ours = f"{path}_stages.{stage}.{block}."
                if block == 0:
                    pair = f"{theirs}downsample.conv", f"{theirs}downsample.bn"
                    names |= convolution(pair, f"{ours}shortcut", 0)
                inner = theirs + ("" if not rewired else "inv_block.Fm." if block else "Fm.")
                for number in (1, 2, 3):
                    pair = f"{inner}conv{number}.conv", f"{inner}conv{number}.bn"
                    names |= convolution(pair, f"{ours}branch", 3 * (number - 1))
    return names


def slowfast_pytorchvideo(depths: tuple[int, ...]) -> Names:
    names: Names = {}
    for stage in range(len(depths)):
        fusion = f"blocks.{stage}.multipathway_fusion."
        pair = f"{fusion}conv_fast_to_slow", f"{fusion}norm"
        names |= convolution(pair, f"laterals.{stage}", 0)
    for number, path in enumerate(("slow", "fast")):
        stem = f"blocks.0.multipathway_blocks.{number}."
        names |= convolution((f"{stem}conv", f"{stem}norm"), f"{path}_stem", 0)
        for stage, depth in enumerate(depths):
            for block in range(depth):
                theirs = f"blocks.{stage + 1}.multipathway_blocks.{number}.res_blocks.{block}."
                ours = f"{path}_stages.{stage}.{block}."
                if block == 0:
                    pair = f"{theirs}branch1_conv", f"{theirs}branch1_norm"
                    names |= convolution(pair, f"{ours}shortcut", 0)
                for place, letter in enumerate("abc"):
                    pair = f"{theirs}branch2.conv_{letter}", f"{theirs}branch2.norm_{letter}"
                    names |= convolution(pair, f"{ours}branch", 3 * place)
    return names


def videomae_transformers(layers: int, prefix: str = "videomae.") -> Names:
    patches = "embeddings.patch_embeddings.projection."
    names = named(SWIN_NORM, f"{prefix}{patches}", f"net.{patches}")
    for layer in range(layers):
        at = f"encoder.layer.{layer}."
        names |= named(TRANSFORMERS_BLOCK, f"{prefix}{at}", f"net.{at}")
    return names


def videomae_official(layers: int, prefix: str = "", mmaction: bool = False) -> Names:
    theirs = f"{prefix}patch_embed.{'projection' if mmaction else 'proj'}."
    names = named(SWIN_NORM, theirs, "net.embeddings.patch_embeddings.projection.")
    for layer in range(layers):
        theirs, ours = f"{prefix}blocks.{layer}.", f"net.encoder.layer.{layer}."
        names |= named(OFFICIAL_BLOCK, theirs, ours)
        names |= named(MMACTION_MLP if mmaction else OFFICIAL_MLP, theirs, ours)
        parts = ("query", "key", "value")
        names[f"{theirs}attn.qkv.weight"] = tuple(
            f"{ours}attention.attention.{part}.weight" for part in parts
        )
    return names


# ---- files -----------------------------------------------------------------------------------

SWIN: dict[str, Any] = {
    "patch_size": [2, 4, 4], "embed_dim": 8, "num_heads": [2, 2, 4, 4], "window_size": [4, 4, 4],
}  # fmt: skip
VIT = {
    "image_size": 32, "patch_size": 16, "num_frames": 4, "hidden_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
DEPTHS = (2, 1, 2, 1)


def swin() -> nn.Module:
    return Swin(depths=DEPTHS, **SWIN)


def slowfast(normed: bool) -> Callable[[], nn.Module]:
    return lambda: SlowFast(DEPTHS, width=8, normed=normed)


def videomae(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: VideoMAE({**VIT, **settings})


def filled(net: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with no two parameters or statistics alike."""
    generator = torch.Generator().manual_seed(seed)
    for value in net.state_dict().values():
        if value.is_floating_point():
            spread = 0.2 * torch.rand(value.shape, generator=generator)
            value.copy_(spread + (0.5 if value.dim() == 1 else -0.1))
    return net.eval()


def renamed(net: nn.Module, names: Names) -> dict[str, Tensor]:
    """What somebody else would have saved of a network."""
    state = net.state_dict()
    assert {name for ours in names.values() for name in ours} == state.keys()
    return {theirs: torch.cat([state[x] for x in ours]) if len(ours) > 1 else state[ours[0]]
            for theirs, ours in names.items()}  # fmt: skip


def norm(name: str, size: int = 16) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.rand(size), f"{name}.bias": torch.rand(size)}


HEAD = {"head.weight": torch.rand(4, 64), "head.bias": torch.rand(4)}
MM_HEAD = {f"cls_{name.replace('head', 'head.fc_cls')}": value for name, value in HEAD.items()}
PRETRAINING = {"mask_token": torch.rand(1, 1, 8), "encoder_to_decoder.weight": torch.rand(8, 16)}
DECODER = {**PRETRAINING, **norm("decoder.norm", 8), "decoder.blocks.0.attn.q_bias": torch.rand(8)}

CASES: dict[str, tuple[Callable[[], nn.Module], Names, dict[str, Tensor], str]] = {
    "torchvision": (swin, swin_torchvision(DEPTHS), HEAD, ""),
    "swin mmaction": (swin, swin_mmaction(DEPTHS), MM_HEAD, "state_dict"),
    "swin authors": (swin, swin_authors(DEPTHS), HEAD, "model"),
    "swin rewired": (swin, swin_mmaction(DEPTHS, rewired=True), MM_HEAD, "state_dict"),
    "slowfast mmaction": (slowfast(False), slowfast_mmaction(DEPTHS), MM_HEAD, "state_dict"),
    "slowfast rewired": (slowfast(False), slowfast_mmaction(DEPTHS, True), MM_HEAD, "state_dict"),
    "pytorchvideo": (
        slowfast(True), slowfast_pytorchvideo(DEPTHS),
        {"blocks.6.proj.weight": torch.rand(4, 64)}, "model_state",
    ),
    "transformers": (
        videomae(), videomae_transformers(3),
        {**norm("fc_norm"), "classifier.bias": torch.rand(4)}, "",
    ),
    "transformers, pretrained": (
        videomae(), videomae_transformers(3),
        {**norm("videomae.layernorm"), **norm("decoder.norm", 8), **PRETRAINING}, "",
    ),
    "transformers, alone": (videomae(), videomae_transformers(3, ""), {}, ""),
    "videomae v1": (videomae(), videomae_official(3), {**norm("fc_norm"), **HEAD}, "module"),
    "videomae, pretrained": (
        videomae(), videomae_official(3, "encoder."), {**norm("encoder.norm"), **DECODER}, "model",
    ),
    "videomae, with its last norm": (
        videomae(use_mean_pooling=False),
        videomae_official(3, "encoder.") | named(SWIN_NORM, "encoder.norm.", "net.layernorm."),
        DECODER, "model",
    ),
    "videomae mmaction": (
        videomae(), videomae_official(3, "backbone.", True),
        {**norm("backbone.fc_norm"), **MM_HEAD}, "state_dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_network_comes_back_from_a_file_under_others_names(case: str, tmp_path: Path) -> None:
    make, names, extra, place = CASES[case]
    net, other, frames = filled(make()), filled(make(), 1), torch.rand(1, 3, 8, 32, 32)
    state = {**renamed(net, names), **extra}
    torch.save({place: state, "meta": {"epoch": 3}} if place else state, tmp_path / "w.pth")
    save_file({k: x.contiguous().clone() for k, x in state.items()}, tmp_path / "w.safetensors")
    wanted = net(frames)
    assert not torch.equal(other(frames)[0], wanted[0])
    for name in ("w.pth", "w.safetensors"):
        loaded = filled(copy.deepcopy(other), 1)
        load_weights(loaded, tmp_path / name)
        assert all(map(torch.equal, loaded(frames), wanted))
        for key, value in net.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key


SIZES = {
    "swin_t": (2, 2, 6, 2), "swin_s": (2, 2, 18, 2), "slowfast_r50": (3, 4, 6, 3),
    "slowfast_r101": (3, 4, 23, 3),
}  # fmt: skip
FULL: list[tuple[str, Callable[[], nn.Module], Names, converters.Layout]] = [
    *((name, NETWORKS[name], make(SIZES[name]), layout)
      for name in ("swin_t", "swin_s")
      for make, layout in (
          (swin_torchvision, converters.SWIN_TORCHVISION),
          (swin_mmaction, converters.SWIN_MMACTION),
          (swin_authors, converters.SWIN_MMACTION),
      )),
    *((name, NETWORKS[name], slowfast_pytorchvideo(SIZES[name]), converters.SLOWFAST_PYTORCHVIDEO)
      for name in ("slowfast_r50", "slowfast_r101")),
    *((f"{name}, no norms", lambda depths=SIZES[name]: SlowFast(depths, normed=False),
       slowfast_mmaction(SIZES[name]), converters.SLOWFAST_MMACTION)
      for name in ("slowfast_r50", "slowfast_r101")),
    *(("videomae_b", NETWORKS["videomae_b"], make(12), layout)
      for make, layout in (
          (videomae_transformers, converters.VIDEOMAE_TRANSFORMERS),
          (videomae_official, converters.VIDEOMAE_OFFICIAL),
      )),
]  # fmt: skip
# How many names the authors' code gives a backbone of these sizes.
COUNTS = {
    (converters.SWIN_TORCHVISION, "swin_t"): 183,
    (converters.SWIN_MMACTION, "swin_t"): 183,
    (converters.SLOWFAST_PYTORCHVIDEO, "slowfast_r50"): 660,
    (converters.SLOWFAST_MMACTION, "slowfast_r50, no norms"): 640,
    (converters.VIDEOMAE_OFFICIAL, "videomae_b"): 158,
}


@functools.cache
def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize(("name", "make", "names", "layout"), FULL)
def test_all_names_of_published_sizes_become_all_of_ours(
    name: str, make: Callable[[], nn.Module], names: Names, layout: converters.Layout
) -> None:
    net = on_meta(make)
    state = renamed(net, names)
    assert len(state) == COUNTS.get((layout, name), len(state))
    assert recognised(state, net) is layout
    found = converted(state, layout)
    assert found.keys() == net.state_dict().keys()
    assert fitting(found, net, layout).keys() == found.keys()


GOLDEN = [
    (converters.SWIN_TORCHVISION, "features.4.5.mlp.3.bias", "net.features.4.5.mlp.3.bias"),
    (converters.SWIN_MMACTION, "layers.2.downsample.norm.bias", "net.features.5.norm.bias"),
    (
        converters.SWIN_MMACTION,
        "backbone.layers.2.blocks.17.mlp.fc2.weight",
        "net.features.4.17.mlp.3.weight",
    ),
    (converters.SWIN_MMACTION, "backbone.norm3.weight", "net.norm.weight"),
    (
        converters.SLOWFAST_MMACTION,
        "backbone.slow_path.layer3_lateral.conv.weight",
        "laterals.3.0.weight",
    ),
    (
        converters.SLOWFAST_MMACTION,
        "backbone.slow_path.layer1.0.conv1.conv.weight",
        "slow_stages.0.0.branch.0.weight",
    ),
    (
        converters.SLOWFAST_MMACTION,
        "backbone.fast_path.layer4.2.conv3.bn.running_var",
        "fast_stages.3.2.branch.7.running_var",
    ),
    (converters.SLOWFAST_MMACTION, "backbone.fast_path.conv1.bn.weight", "fast_stem.1.weight"),
    (
        converters.SLOWFAST_PYTORCHVIDEO,
        "blocks.0.multipathway_fusion.norm.bias",
        "laterals.0.1.bias",
    ),
    (
        converters.SLOWFAST_PYTORCHVIDEO,
        "blocks.3.multipathway_blocks.1.res_blocks.0.branch1_norm.weight",
        "fast_stages.2.0.shortcut.1.weight",
    ),
    (
        converters.SLOWFAST_PYTORCHVIDEO,
        "blocks.4.multipathway_blocks.0.res_blocks.2.branch2.norm_b.weight",
        "slow_stages.3.2.branch.4.weight",
    ),
    (
        converters.VIDEOMAE_TRANSFORMERS,
        "videomae.encoder.layer.11.attention.attention.v_bias",
        "net.encoder.layer.11.attention.attention.value.bias",
    ),
    (
        converters.VIDEOMAE_OFFICIAL,
        "blocks.39.attn.q_bias",
        "net.encoder.layer.39.attention.attention.query.bias",
    ),
    (
        converters.VIDEOMAE_OFFICIAL,
        "backbone.blocks.10.mlp.layers.0.0.bias",
        "net.encoder.layer.10.intermediate.dense.bias",
    ),
]


@pytest.mark.parametrize(("layout", "theirs", "ours"), GOLDEN)
def test_some_names_letter_by_letter(layout: converters.Layout, theirs: str, ours: str) -> None:
    assert list(converted({theirs: torch.zeros(1)}, layout)) == [ours]


def test_our_own_files_load(tmp_path: Path) -> None:
    """Alone, in a classifier or a detector, halved, under DataParallel, without counters."""
    net = filled(MotionNet((8, 16), 2))
    classifier = Classifier(Backbone(net), 3)
    alone, whole = net.state_dict(), classifier.state_dict()
    net_in_detector = {f"backbone.net.{key}": value for key, value in alone.items()}
    halves = {key: value.half() if value.is_floating_point() else value
              for key, value in alone.items()}  # fmt: skip
    files = {
        "net": alone,
        "classifier": whole,
        "detector": {**net_in_detector, "localizer.stem.weight": torch.rand(3)},
        "parallel": {"state_dict": {f"module.{key}": value for key, value in alone.items()}},
        "counts": {key: value for key, value in alone.items() if "num_batches" not in key},
        "halves": halves,
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pt")
        loaded = filled(MotionNet((8, 16), 2), 1)
        load_weights(loaded, tmp_path / f"{name}.pt")
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, (halves if name == "halves" else alone)[key].to(value)), key


# ---- refusals --------------------------------------------------------------------------------


def refusal(net: nn.Module, content: Any, path: Path) -> str:
    """One line that names the file; the network is as it was."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(net, path)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


class Command:
    """What a file must not do."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        (b"", "cannot be read: EOFError"),
        (b"no weights" * 9, "cannot be read: no torch.save file"),
        (b"PK\3\4 and no archive" * 9, "cannot be read"),
        ({"a": Command()}, "it would run posix.system"),
        ([1, 2], "holds no state_dict but a list"),
        ({"optimizer": {}, "epoch": 3}, "holds no state_dict but optimizer, epoch"),
        ({1: torch.zeros(1)}, "holds no state_dict but 1"),
        ({"s1.conv": torch.zeros(1)}, "of no known layout: s1.conv. There are Video Swin of"),
    ],
)
def test_files_that_hold_no_weights(content: Any, told: str, tmp_path: Path) -> None:
    assert told in refusal(MotionNet((8,), 1), content, tmp_path / "w.pth")


def test_broken_safetensors(tmp_path: Path) -> None:
    message = refusal(MotionNet((8,), 1), b"\0" * 99, tmp_path / "w.safetensors")
    assert "cannot be read: " in message


def test_what_does_not_fit_is_named_with_shapes(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = renamed(swin(), swin_mmaction(DEPTHS))
    message = refusal(MotionNet((8, 16), 2), state, path)
    assert "Video Swin of MMAction2 or its authors, does not fit MotionNet; 70 missing: " in message
    assert "70 missing: stem.0.weight, stem.1.weight, stem.1.bias, …; 99 unexpected: " in message
    flat = state | {"backbone.patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}
    assert (
        "1 of another shape: net.patch_embed.proj.weight (file [8, 3, 4, 4], "
        "network [8, 3, 2, 4, 4])."
    ) in refusal(swin(), flat, path)
    less = {key: value for key, value in state.items() if "norm3" not in key}
    assert "does not fit Swin; 2 missing: net.norm.weight, net.norm.bias." in refusal(
        swin(), less, path
    )
    twice = state | norm("backbone.norm", 64)
    assert "but backbone.norm.weight is not the only net.norm.weight" in refusal(
        swin(), twice, path
    )


def test_slowfast_with_and_without_norms_of_laterals_are_two(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    without = renamed(slowfast(False)(), slowfast_mmaction(DEPTHS))
    message = refusal(slowfast(True)(), without, path)
    assert (
        "16 missing: laterals.0.1.weight, laterals.0.1.bias, laterals.0.1.running_mean" in message
    )
    normed = renamed(slowfast(True)(), slowfast_pytorchvideo(DEPTHS))
    assert "20 unexpected: laterals.0.1.weight" in refusal(slowfast(False)(), normed, path)


def test_videomae_of_other_arithmetic(tmp_path: Path) -> None:
    """Cosine attention, scaled residuals and learned positions have no place in ours."""
    path, net = tmp_path / "w.pth", videomae()()
    assert isinstance(net, VideoMAE)
    state = renamed(net, videomae_official(3))
    for name in ("attn.scale", "gamma_1"):
        message = refusal(net, state | {f"blocks.0.{name}": torch.zeros(16)}, path)
        assert f"1 unexpected: net.encoder.layer.0.{name}" in message
    table = net.net.embeddings.position_embeddings
    learned = refusal(net, state | {"pos_embed": table + 0.1}, path)
    assert "net.embeddings.position_embeddings was learned" in learned
    longer = refusal(net, state | {"pos_embed": torch.zeros(1, 32, 16)}, path)
    assert "(file [1, 32, 16], network [1, 8, 16])" in longer
    torch.save({"module": state | {"pos_embed": table.half()}}, path)
    load_weights(net, path)
    stored = {f"backbone.{key}": value for key, value in {**state, "pos_embed": table}.items()}
    torch.save(stored, path)
    load_weights(net, path)


def test_commands_say_it_and_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    from examples.tal.cli import one_line_errors

    with pytest.raises(typer.Exit), one_line_errors():
        load_weights(MotionNet((8,), 1), tmp_path / "no.pth")
    assert "no.pth: cannot be read: [Errno 2] No such" in " ".join(capsys.readouterr().err.split())


# ---- the original ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_slowfast_is_the_one_of_pytorchvideo(tmp_path: Path) -> None:
    models = pytest.importorskip("pytorchvideo.models.slowfast")
    theirs = filled(models.create_slowfast(slowfast_fusion_conv_kernel_size=(7, 1, 1)))
    torch.save({"model_state": theirs.state_dict()}, tmp_path / "w.pyth")
    ours = SlowFast().eval()
    load_weights(ours, tmp_path / "w.pyth")
    theirs.blocks = theirs.blocks[:5]  # without pooling and head
    frames = torch.rand(1, 3, 8, 32, 32)
    with torch.no_grad():
        for found, wanted in zip(ours(frames), theirs([frames[:, :, ::4], frames]), strict=True):
            torch.testing.assert_close(found, wanted)
