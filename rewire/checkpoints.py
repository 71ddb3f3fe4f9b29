"""Weights in training checkpoints: where they are, and whether they fit a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# fmt: off
WEIGHT_KEYS = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "ema",
    "ema_state_dict", "model_ema", "state_dict_ema", "weights", "params", "teacher", "student",
)
# fmt: on
_PREFIXES = ("module.", "_orig_mod.", "model.")


def found_in(loaded: Any) -> tuple[nn.Module | None, dict[str, Tensor], str]:
    """The module or the state_dict in what a file held, and under which key."""
    if isinstance(loaded, nn.Module):
        return loaded, {}, ""
    if not isinstance(loaded, Mapping):
        return None, {}, ""
    tensors = {key: value for key, value in loaded.items() if isinstance(value, Tensor)}
    if tensors and all(
        isinstance(value, Tensor) or "extra" in key for key, value in loaded.items()
    ):
        return None, tensors, ""
    for key in WEIGHT_KEYS:
        module, weights, where = found_in(loaded.get(key))
        if module is not None or weights:
            return module, weights, f" under {key!r}{where}"
    return None, {}, ""


def without_prefixes(
    weights: dict[str, Tensor], expected: Mapping[str, Any]
) -> tuple[dict[str, Tensor], str]:
    """`weights` without what DDP, torch.compile and Lightning put before every key."""
    stripped = ""
    while True:
        prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in weights)), None)
        if prefix is None or all(key.startswith(prefix) for key in expected):
            return weights, f" (prefix {stripped} removed)" if stripped else ""
        stripped += prefix
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}


def difference(weights: Mapping[str, Tensor], expected: Mapping[str, Any]) -> str:
    """How weights differ from what a model expects, in words; empty if they fit."""
    lacking = [key for key in expected if key not in weights and "_extra_state" not in key]
    surplus = [key for key in weights if key not in expected]
    if lacking or surplus:
        first = f" (first: {(lacking or surplus)[0]})"
        return f"{len(lacking)} keys are missing and {len(surplus)} are unknown{first}."
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            return (
                f"{key} is {list(value.shape)} in the file and {list(expected[key].shape)} in the "
                "model. Arguments go behind the name, e.g. timm/NAME?num_classes=10."
            )
    return ""
