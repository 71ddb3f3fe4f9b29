"""Backbone and localizer as one network: its gradients, and its memory against depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from examples.tal.models.actionformer import ActionFormer, ActionFormerConfig
from examples.tal.models.backbones import freeze_norms, prepared
from examples.tal.models.detector import Detector
from examples.tal.models.vsgn import VSGN, VSGNConfig
from tests.tal.test_models import same, tiny

LOCALIZERS = {
    "actionformer": lambda inputs: ActionFormer(
        ActionFormerConfig(
            inputs=inputs, classes=3, width=8, stem=1, branches=2, drop_path=0.3, input_dropout=0.2
        )
    ),
    "vsgn": lambda inputs: VSGN(
        VSGNConfig(
            inputs=inputs, classes=3, width=8, levels=2, stride=2, neighbours=2, groups=2, gap=2
        )
    ),
}


def step(model: Detector, frames: Tensor, mask: Tensor) -> list[Tensor]:
    """Gradients of one training step."""
    torch.manual_seed(2)
    spans = [torch.tensor([[0.4, 3.1], [4.2, 6.6]]), torch.tensor([[0.2, 2.1]])]
    labels = [torch.tensor([2, 0]), torch.tensor([1])]
    for name, buffer in model.localizer.named_buffers():
        if name == "normalizer":  # follows the number of positive points, step by step
            buffer.fill_(100.0)
    loss = model.localizer.loss(model(frames, mask), spans, labels).total
    learning = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, learning, allow_unused=True))


@pytest.mark.parametrize("localizer", LOCALIZERS)
@pytest.mark.parametrize("backbone", ["swin", "slowfast", "videomae", "motionnet"])
def test_gradients_are_those_of_stored_activations(backbone: str, localizer: str) -> None:
    """Drop path on and norms frozen: 1e-9 in float64, and equal bits in float32."""
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    for dtype in (torch.float64, torch.float32):
        frames = torch.rand(2, 3, 16, 32, 32, dtype=dtype)
        net = prepared(tiny(backbone).to(dtype), "rewired", example_inputs=frames, check="raise")
        model = Detector(net, LOCALIZERS[localizer](net.channels).to(dtype)).train()
        freeze_norms(net)
        with rewire.store_activations(net.net):
            stored = step(model, frames, mask)
        found = step(model, frames, mask)
        assert same(found, stored) <= (1e-9 if dtype == torch.float64 else 0.0)
        assert (
            sum(g is not None and bool(g.abs().max() > 0) for g in found) > len(found) / 2
        )  # some are dropped


def test_a_wrong_gradient_would_be_seen() -> None:
    """The same comparison, with a branch that gives something else when it is run again."""
    frames, mask = torch.rand(2, 3, 16, 32, 32), torch.ones(2, 8, dtype=torch.bool)
    net = prepared(tiny("motionnet"), "rewired", example_inputs=frames)
    model = Detector(net, LOCALIZERS["actionformer"](net.channels)).train()
    freeze_norms(net)
    with rewire.store_activations(net.net):
        stored = step(model, frames, mask)
    norm = next(m for m in net.net.stages[0].modules() if isinstance(m, nn.BatchNorm3d))
    loss = model.localizer.loss

    def fault(*args: Any) -> Any:
        norm.eps = 0.01  # between forward and backward
        return loss(*args)

    model.localizer.loss = fault  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="did not repeat itself"):
        found = step(model, frames, mask)
    assert same(found, stored) > 0
