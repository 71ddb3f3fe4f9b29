"""Which branches of a rewired model run part by part, how, and why the others do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewire.cuts import Found
from rewire.errors import RewireError
from rewire.estimation import on_fakes
from rewire.inputs import as_example, example_for
from rewire.plans import Parts
from rewire.reversible import chains, store_activations


def parts(rev: nn.Module, example_inputs: Any = None) -> list[Parts]:
    """How each branch of a rewired model is run on an input, in the mode that the model is in.

    Nothing is computed: the model runs on fake tensors.

    Args:
        rev: What `rewire.make_reversible` gave, with `chunks=`.
        example_inputs: As for `rewire.plan`.

    Raises:
        RewireError: The model is not rewired.

    Example:
        >>> import timm, torch, rewire
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> rev = rewire.make_reversible(model, chunks=4)
        >>> for row in rewire.parts(rev, torch.zeros(8, 3, 224, 224))[:2]:
        ...     print(row)
        blocks.0.attn: 4 along dimension 0 (7.3 MB whole)
        blocks.0.mlp: 4 along dimension 0 (12.1 MB whole)
    """
    if not any(chains(rev)):
        raise RewireError(
            f"{type(rev).__qualname__} is not rewired. Pass what `rewire.make_reversible` gave."
        )
    example = example_for(rev) if example_inputs is None else as_example(example_inputs)
    with on_fakes(rev, example.args, example.kwargs) as (twin, args, kwargs):
        with store_activations(twin), torch.enable_grad():  # a tape would ask for values
            twin(*args, **kwargs)
        branches = [branch for chain in chains(twin) for branch in chain.branches]
    return [_row(branch.name, branch.cutting.last) for branch in branches]


def _row(name: str, found: Found | None) -> Parts:
    if found is None:
        return Parts(name, (), 0, "chunks is 1")
    return Parts(name, found.axes, found.saved_bytes, found.reason)
