"""VSGN against values of the original and cases worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from examples.tal.models.losses import balanced_log_loss, generalized_iou_loss
from examples.tal.models.stitching import Stitching, stitched
from examples.tal.models.vsgn import (
    VSGN,
    VSGNConfig,
    decoded,
    edges,
    matched,
    step_targets,
)
from tests.tal.test_models import filled

# What coolbay/VSGN gives for the weights and features below, without VSS and with it: losses of
# classes, boxes, adjusted boxes, steps; their sum; the norm of the gradient.
GOLDEN = {
    0.0: [2.7826815, 0.30958438, 0.23411003, 2.5214229, 3.8306606, 1.1310002],
    0.4: [2.7771587, 0.31042761, 0.26555732, 2.5215263, 3.8574490, 1.1215629],
}


def small(short: float = 0.4) -> VSGN:
    config = VSGNConfig(
        inputs=6, classes=3, width=32, levels=3, neighbours=4, head=2, groups=8, short=short, gap=10
    )
    model = filled(VSGN(config))
    assert isinstance(model, VSGN)
    return model


def sample() -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    x = torch.cos(torch.arange(2 * 6 * 64) * 0.31).view(2, 6, 64)
    mask = torch.arange(64) < torch.tensor([[64], [20]])
    segments = [torch.tensor([[3.2, 20.0], [30.0, 41.5]]), torch.tensor([[3.0, 9.4], [11.0, 17.2]])]
    return x, mask, segments, [torch.tensor([0, 1]), torch.tensor([2, 0])]


@pytest.mark.parametrize("short", GOLDEN)
def test_losses_are_those_of_the_original(short: float) -> None:
    model = small(short)
    x, mask, segments, labels = sample()
    losses = model.loss(model(x, mask), segments, labels)
    losses.total.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    found = [float(value.detach()) for value in (*losses, norm)]
    assert found == pytest.approx(GOLDEN[short], rel=2e-6)


def test_anchors_and_boxes_by_hand() -> None:
    anchors = small().anchors(16)
    # Strides 4, 8, 16 with lengths 1 and 1.5 times as much; a box [a, b] is b - a + 1 long.
    assert anchors[:2].tolist() == [[0.5, 3.5], [-0.5, 4.5]]
    assert anchors[8:10].tolist() == [[0.5, 7.5], [-1.5, 9.5]]
    assert anchors[-2:].tolist() == [[0.5, 15.5], [-3.5, 19.5]]
    moved = decoded(
        torch.tensor([[5.0, 0.0], [0.0, 5 * 0.6931472]]), torch.tensor([[0.5, 3.5]] * 2)
    )
    assert moved.tolist() == [pytest.approx([2.5, 5.5]), pytest.approx([-1.5, 5.5])]
    far = decoded(torch.tensor([[0.0, 1e4]]), torch.tensor([[0.5, 3.5]]))
    assert float(far[0, 1] - far[0, 0] + 1) == pytest.approx(4 * 1000 / 16)


def test_boxes_belong_to_their_best_segment() -> None:
    boxes = torch.tensor([[[0.0, 9.0], [1.0, 5.0], [20.0, 29.0], [50.0, 52.0], [80.0, 81.0]]])
    segments = [torch.tensor([[0.0, 9.0], [20.0, 26.0], [40.0, 51.0]])]
    kinds, wanted = matched(boxes, segments, [torch.tensor([0, 1, 2])], 0.6)
    # 9 / (10 + 9 - 9); 4 / (5 + 9 - 4); 6 / (10 + 6 - 6); the last one is the best that there is.
    assert kinds.tolist() == [[1, 0, 2, 3, 0]]
    assert wanted[0, :4].tolist() == [[0, 9], [0, 9], [20, 26], [40, 51]]
    assert matched(boxes, segments, [torch.tensor([0, 1, 2])], 0.4)[0].tolist() == [[1, 1, 2, 3, 0]]
    none = matched(boxes, [torch.zeros(0, 2)], [torch.zeros(0, dtype=torch.long)], 0.5)
    assert not none[0].any()


def test_steps_of_actions_and_their_ends() -> None:
    action, start, end = step_targets([torch.tensor([[3.2, 7.6]])], torch.zeros(1, 12))
    assert action[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8]
    assert start[0].nonzero().flatten().tolist() == [2, 3, 4]  # [1.7, 4.7]
    assert end[0].nonzero().flatten().tolist() == [6, 7, 8]  # [6.1, 9.1]
    assert not torch.stack(step_targets([torch.zeros(0, 2)], torch.zeros(1, 12))).any()


def test_losses_by_hand() -> None:
    found = torch.tensor([[4.0, 0.0], [0.0, 1.0]])  # the first one's ends are crossed
    loss = generalized_iou_loss(found, torch.tensor([[2.0, 6.0], [3.0, 4.0]]))
    assert loss.tolist() == pytest.approx([1 - 2 / 6, 1 + 2 / 4])
    shares = torch.tensor([0.5, 0.5, 0.25])
    half = float(balanced_log_loss(shares, torch.tensor([1.0, 0.0, 0.0])))
    wanted = -(torch.tensor(0.5).log() + torch.tensor([0.5, 0.75]).log().mean()) / 2
    assert half == pytest.approx(float(wanted), rel=1e-4)
    assert float(balanced_log_loss(shares, torch.zeros(3))) > 0  # and no division by none


def test_short_samples_are_seen_a_second_time_magnified() -> None:
    x = torch.arange(1.0, 41).view(2, 1, 20) * torch.tensor([[[1.0]], [[0.0]]])
    x[1, 0, :5] = torch.arange(5.0)
    mask = torch.arange(20) < torch.tensor([[20], [5]])
    y, stitching = stitched(x, mask, short=0.4, gap=3)
    assert torch.equal(y[0], x[0])
    assert y[1, 0, :8].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert y[1, 0, 8:].tolist() == pytest.approx([n * 4 / 11 for n in range(12)])
    assert stitching.stitched.tolist() == [False, True]
    assert stitching.second(1) == (8, 12 / 5)


def test_edges_go_across_scales_from_what_is_magnified() -> None:
    torch.manual_seed(0)
    nodes = torch.randn(2, 16, 4)
    stitching = Stitching(torch.tensor([16, 5]), torch.tensor([False, True]), 16, 3)
    near = edges(nodes, 6, stitching)
    apart = torch.cdist(nodes, nodes)
    assert torch.equal(near[0], apart[0].topk(6, largest=False).indices)
    for node in range(16):
        own, rest = near[1, node, :3], near[1, node, 3:]
        assert torch.equal(own, apart[1, node].topk(3, largest=False).indices)
        assert not set(own.tolist()) & set(rest.tolist())
        assert node < 8 or bool((rest < 8).all())


def test_segments_of_the_magnified_part_are_put_back() -> None:
    model = small().eval()
    x, mask, _, _ = sample()
    with torch.no_grad():
        out = model(x, mask)
    begin, growth = out.stitching.second(1)
    assert (begin, growth) == (30, 34 / 20)
    boxes = torch.full_like(out.adjusted, -100.0)
    boxes[1, 0] = torch.tensor([begin + 4 * growth, begin + 10 * growth])
    boxes[1, 1] = torch.tensor([12.0, 18.0])
    scores = torch.full_like(out.scores, -9.0)
    scores[..., 0] = 9.0
    scores[1, :2, 2] = torch.tensor([20.0, 19.0])
    ones = torch.ones_like(out.start)
    said = {"scores": scores, "adjusted": boxes, "start": ones, "end": ones}
    first, second = model.decode(out._replace(**said))
    assert not len(first.scores)
    assert second.spans.tolist() == [pytest.approx([4, 10]), pytest.approx([12, 18])]
    assert second.labels.tolist() == [1, 1]
    assert second.scores == pytest.approx([1, 1], abs=1e-3)


def test_sizes_that_do_not_fit_are_refused() -> None:
    model = small()
    with pytest.raises(ValueError, match="multiple of 16"):
        model(torch.zeros(1, 6, 40), torch.ones(1, 40, dtype=torch.bool))
    with pytest.raises(ValueError, match="neighbours=2 at most"):
        model(torch.zeros(1, 6, 16), torch.ones(1, 16, dtype=torch.bool))
