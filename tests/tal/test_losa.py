"""LoSA: adapters beside a frozen backbone."""

from __future__ import annotations

import pytest
import torch

from examples.tal.models.actionformer import ActionFormer, ActionFormerConfig
from examples.tal.models.detector import Detector
from examples.tal.models.losa import LoSA, LoSAShape, Taps
from tests.tal.test_models import tiny

SHAPE = LoSAShape(every=2, width=16, heads=2, window=3, pooled=3, chunk=2)


def detector(name: str, shape: LoSAShape = SHAPE) -> tuple[Detector, Taps]:
    taps = Taps(tiny(name), shape, torch.rand(1, 3, 8, 32, 32))
    config = ActionFormerConfig(inputs=taps.channels[-1], classes=2, width=8, branches=1, stem=1)
    return Detector(taps, ActionFormer(config), LoSA(taps.channels, shape)), taps


@pytest.mark.parametrize("name", ["swin", "slowfast", "videomae", "motionnet"])
def test_at_first_it_is_the_frozen_features_and_nothing_goes_back(name: str) -> None:
    frames, mask = torch.rand(2, 3, 8, 32, 32), torch.ones(2, 4, dtype=torch.bool)
    model, taps = detector(name)
    model.train()
    assert model.adapter is not None
    assert torch.equal(model.adapter(taps(frames), mask), taps.backbone(frames))
    out = model(frames, mask)
    spans, labels = [torch.tensor([[0.5, 2.5]])] * 2, [torch.tensor([1])] * 2
    model.localizer.loss(out, spans, labels).total.backward()
    for name_, parameter in model.named_parameters():
        assert (parameter.grad is None) == name_.startswith("backbone."), name_
        if name_.endswith("scale") and "adapter." in name_:
            assert float(parameter.grad.abs()) > 0


def test_clips_are_seen_one_after_the_other() -> None:
    frames = torch.rand(1, 3, 16, 32, 32)
    sizes: list[tuple[int, ...]] = []
    _, taps = detector("videomae", LoSAShape(every=2, width=16, chunk=2))
    taps.backbone.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    rows = taps(frames)
    assert sizes == [(2, 3, 4, 32, 32)] * 2
    assert {row.shape[-1] for row in rows} == {8}
    assert torch.allclose(rows[-1], taps.backbone(frames), atol=1e-6)
    with pytest.raises(ValueError, match="multiple of a clip, 4"):
        taps(frames[:, :, :10])


def test_what_is_masked_changes_nothing() -> None:
    torch.manual_seed(0)
    model = LoSA([5, 7], SHAPE)
    for adapter in model.adapters:
        adapter.scale.data.fill_(1.0)
    rows, mask = [torch.randn(2, 5, 9), torch.randn(2, 7, 9)], torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    noisy = [torch.where(mask[:, None], row, 100 * torch.randn_like(row)) for row in rows]
    one, other = model(rows, mask), model(noisy, mask)
    assert torch.allclose(one[0], other[0])
    assert torch.allclose(one[1, :, :4], other[1, :, :4], atol=1e-5)
    alone = model([row[1:, :, :4] for row in rows], mask[1:, :4])
    assert torch.allclose(alone[0], one[1, :, :4], atol=1e-5)
    assert not torch.allclose(one[0], rows[-1][0])
