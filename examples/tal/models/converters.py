"""Published weight files into the networks of `backbones`, whichever names they were saved under.

A file's layout is known by its keys. A layout is a table: names of heads, which are dropped, and
substitutions that turn each of the other names into ours. Nothing else is dropped, and what comes
out must be what the network has, shape by shape, or the network stays as it was.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Rules = tuple[tuple[str, str], ...]

# Where checkpoints keep their state_dict: MMAction2, pytorchvideo, VideoMAE (and with DeepSpeed).
_PLACES = ("state_dict", "model_state", "model", "module")
# What batch norms count and Swin computes anew: some files go without.
_DERIVED = re.compile(r"\.(num_batches_tracked|relative_position_index)$")
_SHOWN = 3


class WeightsError(ValueError):
    """A file's weights cannot be read, are unknown, or do not fit. The message says which."""


@dataclass(frozen=True)
class Layout:
    """The names that somebody saves a network's weights under.

    Attributes:
        name: For messages.
        mark: Pattern of the beginning of a name that no other layout has.
        rules: Patterns and what takes their place, one after the other, in every name.
        heads: Pattern of the beginnings of names that are dropped: what follows the backbone.
        thirds: Name, within a name, of query, key and value in one; they become three.
        spare: Beginning of names of ours that are dropped if the network has none of them.
        table: Name of ours of a fixed table that is no parameter; it must be the network's.
    """

    name: str
    mark: str
    rules: Rules
    heads: str = r"(?!)"
    thirds: str = ""
    spare: str = ""
    table: str = ""


# ---- Our own ---------------------------------------------------------------------------------

_OWN_PREFIX = "backbone.net."

# A network's state_dict, or that of a `Classifier` (see `pretraining`) or `Detector` around it.
OWN = Layout("our own", "", ((rf"^{re.escape(_OWN_PREFIX)}", ""),), r"(head|localizer)\.")

# ---- Video Swin ------------------------------------------------------------------------------

# torchvision.models.video.swin_transformer: swin3d_t, swin3d_s, swin3d_b.
SWIN_TORCHVISION = Layout(
    "Video Swin of torchvision", r"features\.\d+\.\d+\.attn\.", (("^", "net."),), r"head\."
)

# SwinTransformer/Video-Swin-Transformer and open-mmlab/mmaction2 (mmaction/models/backbones/
# swin.py); with inv_block, the rewired one of sming256/OpenTAD (re2tal_swin.py).
SWIN_MMACTION = Layout(
    "Video Swin of MMAction2 or its authors",
    r"(backbone\.)?layers\.\d+\.blocks\.",
    (
        (r"^backbone\.", ""),
        (r"\.inv_block\.[FG]m\.", "."),
        *((rf"^layers\.{n}\.blocks\.", f"features.{2 * n}.") for n in range(4)),
        *((rf"^layers\.{n}\.downsample\.", f"features.{2 * n + 1}.") for n in range(4)),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
        (r"^norm3\.", "norm."),
        ("^", "net."),
    ),
    r"(cls_)?head\.",
)

# ---- SlowFast --------------------------------------------------------------------------------

# open-mmlab/mmaction2, mmaction/models/backbones/resnet3d_slowfast.py; with Fm, the rewired one of
# sming256/OpenTAD (re2tal_slowfast.py).
SLOWFAST_MMACTION = Layout(
    "SlowFast of MMAction2",
    r"(backbone\.)?(slow|fast)_path\.",
    (
        (r"^backbone\.", ""),
        (r"\.blocks\.(\d+)\.(inv_block\.)?(Fm\.)?", r".\1."),
        (r"^slow_path\.conv1_lateral\.", "laterals.0."),
        (r"^slow_path\.layer(\d)_lateral\.", r"laterals.\1."),
        (r"^(slow|fast)_path\.conv1\.", r"\1_stem."),
        *((rf"^(slow|fast)_path\.layer{n}\.", rf"\1_stages.{n - 1}.") for n in range(1, 5)),
        *((rf"\.conv{n}\.conv\.", f".branch.{3 * n - 3}.") for n in range(1, 4)),
        *((rf"\.conv{n}\.bn\.", f".branch.{3 * n - 2}.") for n in range(1, 4)),
        (r"\.downsample\.", ".shortcut."),
        (r"\.conv\.", ".0."),
        (r"\.bn\.", ".1."),
    ),
    r"cls_head\.",
)

# facebookresearch/pytorchvideo, pytorchvideo/models/slowfast.py: blocks are the stems, four
# stages, the pooling and the head.
SLOWFAST_PYTORCHVIDEO = Layout(
    "SlowFast of pytorchvideo",
    r"blocks\.\d+\.multipathway_",
    (
        (r"^blocks\.(\d)\.multipathway_fusion\.", r"laterals.\1."),
        (r"^(blocks\.\d\.)multipathway_blocks\.0\.", r"\1slow."),
        (r"^(blocks\.\d\.)multipathway_blocks\.1\.", r"\1fast."),
        (r"^blocks\.0\.(slow|fast)\.", r"\1_stem."),
        *((rf"^blocks\.{n}\.(\w+)\.res_blocks\.", rf"\1_stages.{n - 1}.") for n in range(1, 5)),
        (r"\.branch1_(conv|norm)\.", r".shortcut.\1."),
        *((rf"\.branch2\.conv_{x}\.", f".branch.{3 * n}.") for n, x in enumerate("abc")),
        *((rf"\.branch2\.norm_{x}\.", f".branch.{3 * n + 1}.") for n, x in enumerate("abc")),
        (r"\.(conv|conv_fast_to_slow)\.", ".0."),
        (r"\.norm\.", ".1."),
    ),
    r"blocks\.6\.proj\.",
)

# ---- VideoMAE --------------------------------------------------------------------------------

# In both, fc_norm comes after the mean over all tokens, and is the head's; a last norm of every
# token is dropped for networks without one, as fine-tuning does in the authors' own code.

# transformers.models.videomae; before version 5 it had q_bias and v_bias.
VIDEOMAE_TRANSFORMERS = Layout(
    "VideoMAE of transformers",
    r"(videomae\.)?encoder\.layer\.\d+\.",
    (
        (r"^videomae\.", ""),
        (r"\.q_bias$", ".query.bias"),
        (r"\.v_bias$", ".value.bias"),
        ("^", "net."),
    ),
    r"(classifier|fc_norm|encoder_to_decoder|decoder)\.|mask_token$",
    spare="net.layernorm.",
)

# MCG-NJU/VideoMAE and OpenGVLab/VideoMAEv2 (modeling_finetune.py, modeling_pretrain.py), and
# open-mmlab/mmaction2 (mmaction/models/backbones/vit_mae.py).
VIDEOMAE_OFFICIAL = Layout(
    "VideoMAE of its authors or MMAction2",
    r"((backbone|encoder|model)\.)?blocks\.\d+\.attn\.",
    (
        (r"^(backbone|encoder|model)\.", ""),
        (r"^patch_embed\.proj(ection)?\.", "embeddings.patch_embeddings.projection."),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^blocks\.", "encoder.layer."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.q_bias$", ".attention.attention.query.bias"),
        (r"\.attn\.v_bias$", ".attention.attention.value.bias"),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.qkv\.", ".attention.attention.qkv."),
        (r"\.mlp\.(fc1|layers\.0\.0)\.", ".intermediate.dense."),
        (r"\.mlp\.(fc2|layers\.1)\.", ".output.dense."),
        (r"^norm\.", "layernorm."),
        ("^", "net."),
    ),
    r"((backbone|model)\.)?fc_norm\.|(model\.)?head\.|(cls_head|encoder_to_decoder|decoder)\."
    r"|mask_token$",
    thirds="qkv",
    spare="net.layernorm.",
    table="net.embeddings.position_embeddings",
)

LAYOUTS = (
    SWIN_TORCHVISION,
    SWIN_MMACTION,
    SLOWFAST_MMACTION,
    SLOWFAST_PYTORCHVIDEO,
    VIDEOMAE_TRANSFORMERS,
    VIDEOMAE_OFFICIAL,
)

# ---- Loading ---------------------------------------------------------------------------------


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Fill a network with a file's weights; what they were saved by is seen from their names.

    Args:
        net: One of `backbones.NETWORKS`, or of their classes in another size.
        path: A file of `torch.save` or of safetensors: a state_dict, or a checkpoint with one.

    Raises:
        WeightsError: The file cannot be read, is of no known layout, or does not fit. The network
            is as it was.
    """
    try:
        state = read_state(Path(path))
        layout = recognised(state, net)
        fitted = fitting(converted(state, layout), net, layout)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error.__cause__
    net.load_state_dict(fitted)


def read_state(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file.

    Raises:
        WeightsError: There is none, or reading it would run code.
    """
    try:
        loaded = _loaded(path)
    except Exception as error:  # a damaged file may raise anything
        raise WeightsError(f"cannot be read: {_reason(error)}") from error
    while inner := next((x for x in map(_mapping(loaded).get, _PLACES) if _mapping(x)), None):
        loaded = inner
    state = _mapping(loaded)
    if not state or not all(isinstance(x, Tensor) and isinstance(k, str) for k, x in state.items()):
        found = _few(map(str, state)) or f"a {type(loaded).__name__}"
        raise WeightsError(f"holds no state_dict but {found}. Places: {', '.join(_PLACES)}.")
    # What DataParallel and its like put before every name.
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _loaded(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    # VideoMAE's checkpoints have their command line beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location="cpu", weights_only=True)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _reason(error: Exception) -> str:
    """What went wrong in one line, without torch's advice to run what is in the file."""
    if not isinstance(error, pickle.UnpicklingError):
        return next(iter(str(error).splitlines()), type(error).__name__)
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"it would run {found[1]}; save a state_dict alone." if found else "no torch.save file."


def recognised(state: Mapping[str, Tensor], net: nn.Module) -> Layout:
    """The layout of a state_dict.

    Raises:
        WeightsError: It is of none.
    """
    if net.state_dict().keys() & {key.removeprefix(_OWN_PREFIX) for key in state}:
        return OWN
    for layout in LAYOUTS:
        if any(re.match(layout.mark, key) for key in state):
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise WeightsError(
        f"of no known layout: {_few(state)}. There are {known}, and the state_dict of "
        f"{type(net).__name__} itself."
    )


def converted(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A state_dict with our names and without heads.

    Raises:
        WeightsError: Two of its names become one.
    """
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        if re.match(layout.heads, key):
            continue
        for name, part in _parted(_renamed(key, layout.rules), value, layout.thirds):
            if name in result:
                raise WeightsError(f"{layout.name}, but {key} is not the only {name}.")
            result[name] = part
    return result


def _renamed(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _parted(key: str, value: Tensor, thirds: str) -> list[tuple[str, Tensor]]:
    """Query, key and value of what holds all three; else the thing itself."""
    before, found, after = key.partition(f".{thirds}.") if thirds else (key, "", "")
    if not found:
        return [(key, value)]
    names = (f"{before}.{part}.{after}" for part in ("query", "key", "value"))
    return list(zip(names, value.tensor_split(3), strict=True))


def fitting(state: dict[str, Tensor], net: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """A converted state_dict as a network loads it.

    Raises:
        WeightsError: Names or shapes are not the network's.
    """
    own, table = net.state_dict(), _table(net, layout)
    given = {
        key: value
        for key, value in state.items()
        if key in own or not (layout.spare and key.startswith(layout.spare))
    }
    if wrong := _differences(given, own, table):
        raise WeightsError(f"{layout.name}, does not fit {type(net).__name__}; {wrong}.")
    for key in table.keys() & given.keys():
        # Files of half precision round it.
        if not torch.allclose(given[key].float(), table[key], atol=1e-2):
            raise WeightsError(f"{layout.name}, but {key} was learned; the network's is fixed.")
    return {key: given.get(key, value) for key, value in own.items()}


def _differences(
    given: dict[str, Tensor], own: Mapping[str, Tensor], table: Mapping[str, Tensor]
) -> str:
    """How weights differ from what a network has, in words; empty if they fit."""
    wanted = {**own, **table}
    missing = [key for key in own if key not in given and not _DERIVED.search(key)]
    unexpected = [key for key in given if key not in wanted]
    misshapen = [
        f"{key} (file {list(value.shape)}, network {list(wanted[key].shape)})"
        for key, value in given.items()
        if key in wanted and value.shape != wanted[key].shape
    ]
    kinds = (missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape")
    return "; ".join(f"{len(keys)} {what}: {_few(keys)}" for keys, what in kinds if keys)


def _table(net: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The fixed table that a layout's files may hold, from the network."""
    module, _, name = layout.table.rpartition(".")
    try:
        return {layout.table: getattr(net.get_submodule(module), name)} if name else {}
    except AttributeError:
        return {}


def _few(keys: Iterable[str]) -> str:
    """The first names, and whether there are more."""
    listed = list(keys)
    return ", ".join(listed[:_SHOWN]) + (", …" if len(listed) > _SHOWN else "")
