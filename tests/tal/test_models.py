"""Localizers against cases worked out by hand and values of the original; backbones rewired."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import rewire
from examples.tal.models import backbones
from examples.tal.models.actionformer import ActionFormer, ActionFormerConfig, targets
from examples.tal.models.backbones import NETWORKS, Backbone, Swin, VideoMAE, freeze_norms, prepared
from examples.tal.models.losses import distance_iou_loss
from examples.tal.models.motionnet import MotionNet
from examples.tal.models.slowfast import SlowFast

# ---- ActionFormer ----------------------------------------------------------------------------


def filled(model: nn.Module) -> nn.Module:
    """With parameters that hang on nothing random."""
    for number, parameter in enumerate(model.parameters()):
        wave = torch.sin(torch.arange(parameter.numel()) * 0.7 + number).view_as(parameter)
        near = 1.0 if parameter.dim() == 3 and parameter.shape[::2] == (1, 1) else 0.0
        parameter.data = near + 0.1 * wave
    return model


def small(**settings: object) -> ActionFormer:
    config = ActionFormerConfig(
        inputs=6, classes=3, width=8, branches=2, window=5, drop_path=0.0, **settings
    )  # type: ignore[arg-type]
    model = filled(ActionFormer(config))
    assert isinstance(model, ActionFormer)
    return model


def sample() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    x = torch.cos(torch.arange(2 * 6 * 32) * 0.31).view(2, 6, 32)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, 20:] = False
    segments = [torch.tensor([[3.2, 20.0], [30.0, 31.5]]), torch.tensor([[3.0, 9.5], [3.0, 9.5]])]
    return x * mask[:, None], mask, segments, [torch.tensor([0, 1]), torch.tensor([2, 0])]


def test_losses_are_those_of_the_original() -> None:
    """`GOLDEN` is what happyharrycn/actionformer_release gives for these weights and features."""
    model = small(smoothing=0.1, regression=1.5)
    x, mask, segments, labels = sample()
    losses = model.loss(model(x, mask), segments, labels)
    losses.total.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    found = [float(value.detach()) for value in (losses.scores, losses.reach, losses.total, norm)]
    assert found == pytest.approx(GOLDEN, rel=2e-6)


GOLDEN = [0.37993139028549194, 0.0919598788022995, 0.5178712010383606, 0.3667498826980591]


def test_points_belong_to_the_shortest_segment_in_whose_middle_they_are() -> None:
    model = small()
    points = model.points(16)
    assert points[[0, 15, 16, 24, -1]].tolist() == [
        [0, 0, 4, 1],
        [15, 0, 4, 1],
        [0, 4, 8, 2],
        [0, 8, 10000, 4],
        [12, 8, 10000, 4],
    ]
    segments = torch.tensor([[2.0, 8.0], [4.0, 7.0], [4.0, 7.0]])
    classes, reach = targets(points, segments, torch.tensor([0, 1, 2]), 3)
    # At the finest scale: 1.5 around 5.5 for the short ones, around 5 for the long one.
    wanted = {4: [1, 0, 0], 5: [0, 1, 1], 6: [0, 1, 1]}
    for time in range(16):
        assert classes[time].tolist() == wanted.get(time, [0, 0, 0]), time
    assert reach[5].tolist() == [1, 2]
    assert reach[4].tolist() == [2, 4]
    # At the second, strides of 2: ends between 4 and 8 away, the middle within 3.
    assert [float(points[n, 0]) for n in range(16, 24) if classes[n].any()] == [4, 6]
    assert reach[18].tolist() == [1, 2]
    assert not targets(points, torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 3)[0].any()


@pytest.mark.parametrize("seed", range(10))
def test_boundaries_can_be_learned_from_the_start(seed: int) -> None:
    """Both sides of most points are above zero, where their ReLU has a gradient."""
    torch.manual_seed(seed)
    model = ActionFormer(ActionFormerConfig(inputs=6, classes=3, width=16, branches=2)).eval()
    out = model(torch.randn(2, 6, 32), torch.ones(2, 32, dtype=torch.bool))
    assert bool(((out.reach > 0).float().mean((0, 1)) > 0.5).all())


def test_distance_iou_by_hand() -> None:
    loss = distance_iou_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]]))
    assert float(loss) == pytest.approx(1 - 3 / 5 + (1 / 5) ** 2)
    assert float(distance_iou_loss(torch.ones(1, 2), torch.ones(1, 2))) == 0


def test_segments_are_decoded_from_points() -> None:
    model = small().eval()
    points = model.points(8)
    scores = torch.full((1, len(points), 3), -20.0)
    reach = torch.ones(1, len(points), 2)
    scores[0, 3, 1], scores[0, 9, 2] = 2.0, 1.0
    reach[0, 3], reach[0, 9] = torch.tensor([1.5, 2.0]), torch.tensor([0.5, 1.0])
    mask = torch.ones(1, len(points), dtype=torch.bool)
    out = model(torch.zeros(1, 6, 8), torch.ones(1, 8, dtype=torch.bool))
    (found,) = model.decode(out._replace(scores=scores, reach=reach, mask=mask))
    assert found.spans.tolist() == [[1.5, 5.0], [1.0, 4.0]]
    assert found.labels.tolist() == [1, 2]
    assert found.scores == pytest.approx(torch.tensor([2.0, 1.0]).sigmoid().tolist())
    mask[0, 3] = False
    assert len(model.decode(out._replace(scores=scores, reach=reach, mask=mask))[0].scores) == 1


def test_what_is_masked_changes_nothing() -> None:
    model = small().eval()
    x, mask, _, _ = sample()
    noisy = torch.where(mask[:, None], x, torch.randn_like(x))
    one, other = model(x, mask), model(noisy, mask)
    keep = one.mask
    assert torch.allclose(one.scores[keep], other.scores[keep], atol=1e-5)
    with pytest.raises(ValueError, match="multiple of 4"):
        model(x[..., :30], mask[:, :30])


# ---- backbones -------------------------------------------------------------------------------


def test_sizes_are_the_published_ones() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in make().parameters()) / 1e6
            for name, make in NETWORKS.items()
            if name in ("slowfast_r50", "slowfast_r101", "swin_t", "videomae_b", "motionnet")
        }
    head = 2304 * 400 + 400  # SlowFast's head on Kinetics-400
    assert counts["slowfast_r50"] + head / 1e6 == pytest.approx(34.6, abs=0.06)
    assert counts["slowfast_r101"] + head / 1e6 == pytest.approx(62.9, abs=0.06)
    assert counts["swin_t"] == pytest.approx(28.2 - 0.31, abs=0.1)
    assert counts["videomae_b"] == pytest.approx(86.2, abs=0.1)
    assert counts["motionnet"] < 0.2


def tiny(name: str) -> Backbone:
    torch.manual_seed(0)
    net: nn.Module
    if name == "swin":
        net = Swin(
            patch_size=[2, 4, 4], embed_dim=8, depths=[2, 2], num_heads=[2, 2],
            window_size=[4, 4, 4], stochastic_depth_prob=0.3,
        )  # fmt: skip
    elif name == "videomae":
        net = VideoMAE(
            {
                "image_size": 32, "patch_size": 16, "num_frames": 4, "hidden_size": 16,
                "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
            }
        )  # fmt: skip
    else:
        net = SlowFast((3, 3, 1, 1), width=8) if name == "slowfast" else MotionNet((8, 16), 3)
    return Backbone(net, per_step=2)


def gradients(model: nn.Module, frames: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    loss = model(frames).square().mean()
    wanted = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True))


def same(one: list[Tensor], other: list[Tensor]) -> float:
    assert [a is None for a in one] == [b is None for b in other]
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", ["swin", "slowfast", "videomae", "motionnet"])
def test_rewired_backbones_have_the_gradients_of_stored_activations(name: str) -> None:
    """With drop path on and norms frozen; equal bits in float32, 1e-9 in float64."""
    for dtype in (torch.float64, torch.float32):
        frames = torch.rand(2, 3, 8, 32, 32, dtype=dtype)
        backbone = prepared(tiny(name).to(dtype), "rewired", example_inputs=frames, check="raise")
        freeze_norms(backbone.train())
        found = gradients(backbone, frames)
        with rewire.store_activations(backbone.net):
            stored = gradients(backbone, frames)
        assert same(found, stored) <= (1e-9 if dtype == torch.float64 else 0.0)
        assert backbone(frames).shape == (2, backbone.channels, 4)


@pytest.mark.parametrize("name", ["swin", "slowfast", "videomae", "motionnet"])
def test_checkpointed_and_frozen_backbones(name: str) -> None:
    frames = torch.rand(1, 3, 8, 32, 32)
    plain = tiny(name).train()
    checkpointed = prepared(copy.deepcopy(plain), "checkpointed")
    assert len(list(backbones.blocks(plain.net))) >= 3
    assert same(gradients(plain, frames), gradients(checkpointed, frames)) == 0
    frozen = prepared(plain, "frozen")
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert checkpointed.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="one of plain"):
        prepared(plain, "folded")
    with pytest.raises(ValueError, match="takes no options"):
        prepared(plain, "plain", coupling="re2")
