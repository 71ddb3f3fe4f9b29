"""VSGN: graphs across time scales, and short clips seen a second time magnified.

Zhao, Thabet and Ghanem, Video Self-Stitching Graph Network for Temporal Action Localization, ICCV
2021. One step of the input is the unit of time; as in the original, a box [a, b] is b - a + 1 long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.tal.distribution import mean_over_ranks
from examples.tal.models.layers import wide
from examples.tal.models.losses import balanced_log_loss, generalized_iou_loss
from examples.tal.models.stitching import Stitching, doubled, stitched, unstitched
from examples.tal.nms import Found, by_class, hard_nms

# How offsets of boxes are scaled, and by what factor a box may grow at most.
_CENTRE, _LENGTH, _GROWTH = 10.0, 5.0, 1000 / 16
_SHORTEST = 0.05  # steps that a segment has at least
_EDGE = 1.5  # steps around an end that count as it
_SUPPLEMENT = 0.2  # weight of the losses of single steps


@dataclass(frozen=True)
class VSGNShape:
    """What a VSGN is made of, whatever its features and classes are.

    Attributes:
        width: Channels inside, a multiple of `groups`.
        levels: Scales.
        stride: Steps to one of the finest scale, a power of 2 from 2 on.
        neighbours: Edges of a node; 12 for THUMOS's features of single frames, else 10.
        scales: Lengths of anchors, in strides.
        head: Layers of the heads before the last.
        groups: Of GroupNorm.
        anchors: Overlap from which an anchor is positive.
        boxes: Overlap from which a box is of a segment's class.
        adjusted: Overlap from which a box's ends are adjusted.
        short: Samples of up to this share of the steps are stitched (VSS); 0: none.
        gap: Zeros between a sample and itself magnified.
        least: Of a class's share, for a box to be told.
        overlap: Above it the boxes of a class and a window suppress each other.
    """

    name: ClassVar[str] = "vsgn"

    width: int = 256
    levels: int = 5
    stride: int = 4
    neighbours: int = 10
    scales: tuple[float, ...] = (1.0, 1.5)
    head: int = 4
    groups: int = 32
    anchors: float = 0.5
    boxes: float = 0.5
    adjusted: float = 0.7
    short: float = 0.4
    gap: int = 30
    least: float = 0.005
    overlap: float = 0.4

    @property
    def multiple(self) -> int:
        """What lengths are multiples of."""
        return int(self.stride * 2 ** (self.levels - 1))


@dataclass(frozen=True)
class VSGNConfig(VSGNShape):
    """A VSGN for features and classes.

    Attributes:
        inputs: Channels of the features.
        classes: Of actions.
    """

    inputs: int = field(kw_only=True)
    classes: int = field(kw_only=True)


class Outputs(NamedTuple):
    """What the network says, of all anchors of all scales, the finest first.

    Attributes:
        scores: Logits [B, N, 1 + K]; 0 is the background.
        boxes: [B, N, 2], starts and ends in steps.
        adjusted: The same, their ends adjusted by the features around them.
        action: Whether a step is in an action, [B, T], a share of one.
        start: Whether one begins there.
        end: Whether one ends there.
        anchors: [N, 2].
        stitching: Where samples lie.
    """

    scores: Tensor
    boxes: Tensor
    adjusted: Tensor
    action: Tensor
    start: Tensor
    end: Tensor
    anchors: Tensor
    stitching: Stitching


class Losses(NamedTuple):
    """Of classes, boxes, adjusted boxes and single steps, and what is minimised: their sum."""

    scores: Tensor
    boxes: Tensor
    adjusted: Tensor
    steps: Tensor
    total: Tensor


class VSGN(nn.Module):
    """The network. See `VSGNConfig`."""

    def __init__(self, config: VSGNConfig) -> None:
        super().__init__()
        self.config = config
        width, each = config.width, range(config.levels)
        self.first = nn.Conv1d(config.inputs, width, 3, config.stride // 2, 1)
        self.down = nn.ModuleList(GraphLayer(width, config.neighbours) for _ in each)
        self.across = nn.ModuleList(nn.Conv1d(width, width, 3, 1, 1) for _ in each[1:])
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(width, width, 3, 2, 1, output_padding=1) for _ in each[1:]
        )
        self.merged = nn.ModuleList(nn.Conv1d(width, width, 3, 1, 1) for _ in each)
        kinds = len(config.scales)
        self.scores = _head(config, kinds * (1 + config.classes))
        self.reach = _head(config, kinds * 2)
        self.steps = nn.ModuleDict({name: _step_head(width) for name in ("action", "start", "end")})
        self.ends = nn.ModuleList(_end_head(width) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor) -> Outputs:
        """Score all anchors.

        Args:
            x: Features [B, C, T]; T is a multiple of `config.multiple`.
            mask: [B, T], True where they are real: all before all that are not.
        """
        config, steps = self.config, x.shape[-1]
        self._check(steps)
        x, stitching = stitched(x * mask[:, None], mask, config.short, config.gap)
        features = self._decoder(self._encoder(x, stitching))
        scores = _rows(map(self.scores, features), 1 + config.classes)
        anchors = self.anchors(steps, x.device)
        boxes = decoded(_rows(map(self.reach, features), 2), anchors)
        finest = features[0]
        said = {
            name: F.interpolate(
                wide(head(finest)).sigmoid(), steps, mode="linear", align_corners=True
            )[:, 0]
            for name, head in self.steps.items()
        }
        adjusted = boxes + self._offsets(boxes.detach(), finest, steps)
        return Outputs(scores, boxes, adjusted, **said, anchors=anchors, stitching=stitching)

    def _check(self, steps: int) -> None:
        config = self.config
        if steps % config.multiple:
            raise ValueError(f"{steps} steps: give a multiple of {config.multiple}.")
        nodes = 2 * steps // config.multiple
        if config.neighbours > nodes:
            raise ValueError(
                f"{config.neighbours} neighbours for the {nodes} nodes at the coarsest scale of "
                f"{steps} steps: give neighbours={nodes} at most, more steps or fewer levels."
            )

    def _encoder(self, x: Tensor, stitching: Stitching) -> list[Tensor]:
        x, found = F.relu(self.first(x)), []
        for layer in self.down:
            x = layer(x, stitching)
            found.append(x)
        return found

    def _decoder(self, encoded: list[Tensor]) -> list[Tensor]:
        """Features of all scales, the finest first."""
        last = self.config.levels - 1
        found = [F.relu(self.merged[last](encoded[last]))]
        for level in reversed(range(last)):
            coarse = F.relu(self.up[level](found[0]))
            fine = F.relu(self.across[level](encoded[level]))
            found.insert(0, F.relu(self.merged[level](fine + coarse)))
        return found

    def _offsets(self, boxes: Tensor, finest: Tensor, steps: int) -> Tensor:
        """What is added to the starts and ends, by features at and around them, [B, N, 2]."""
        boxes = boxes.clamp(0, steps - 1)
        around = (boxes[..., 1] - boxes[..., 0] + 1) / 8
        found = []
        for head, at in zip(self.ends, boxes.unbind(-1), strict=True):
            places = torch.stack([at - around, at, at + around], -1) / self.config.stride
            cells = places.long().clamp(0, finest.shape[-1] - 1)  # [B, N, 3]
            features = finest.gather(2, cells.flatten(1)[:, None].expand(-1, finest.shape[1], -1))
            trios = features.unflatten(2, cells.shape[1:]).transpose(1, 2).flatten(0, 1)
            found.append(head(trios).view(boxes.shape[:2]))
        return torch.stack(found, -1)

    def anchors(self, steps: int, device: torch.device | None = None) -> Tensor:
        """All anchors for so many steps, [N, 2]."""
        rows = []
        for level in range(self.config.levels):
            stride = self.config.stride * 2**level
            centres = torch.arange(0.5 * stride, steps, stride, device=device)
            reach = (torch.tensor(self.config.scales, device=device) * stride - 1) / 2
            ends = torch.stack([centres[:, None] - reach, centres[:, None] + reach], -1)
            rows.append(ends.flatten(0, 1))
        return torch.cat(rows)

    # ---- training ------------------------------------------------------------------------

    def loss(self, out: Outputs, segments: Sequence[Tensor], labels: Sequence[Tensor]) -> Losses:
        """What is minimised.

        Args:
            out: What the network says.
            segments: Of each sample [M, 2], starts and ends in steps.
            labels: Of each sample [M], numbers of classes.
        """
        spans, kinds = doubled(out.stitching, segments, labels)
        config, anchors = self.config, out.anchors.expand_as(out.boxes)
        scores = self._of_scores(out, matched(out.boxes.detach(), spans, kinds, config.boxes)[0])
        boxes = _of_boxes(out.boxes, *matched(anchors, spans, kinds, config.anchors))
        wanted = matched(out.boxes.detach(), spans, kinds, config.adjusted)
        adjusted = _of_boxes(out.adjusted, *wanted)
        steps = torch.stack(
            [
                balanced_log_loss(wide(said), wanted)
                for said, wanted in zip(
                    (out.action, out.start, out.end), step_targets(spans, out.action), strict=True
                )
            ]
        ).sum()
        total = scores + boxes + adjusted + _SUPPLEMENT * steps
        return Losses(scores, boxes, adjusted, steps, total)

    def _of_scores(self, out: Outputs, kinds: Tensor) -> Tensor:
        """The mean over positive boxes and that over the others, added."""
        each = F.cross_entropy(wide(out.scores).flatten(0, 1), kinds.flatten(), reduction="none")
        positive = kinds.flatten() > 0
        return mean_over_ranks(each, positive) + mean_over_ranks(each, ~positive)

    # ---- decoding ------------------------------------------------------------------------

    def decode(self, out: Outputs) -> list[Found]:
        """The segments of each sample, in steps: a score is the class's share times both ends'.

        Boxes of a class suppress each other within the sample.
        """
        shares = wide(out.scores).softmax(-1)[..., 1:]
        boxes = wide(out.adjusted).clamp(0, out.stitching.steps - 1)
        ends = [_at(out.start, boxes[..., 0]), _at(out.end, boxes[..., 1])]
        scores = shares * (ends[0] * ends[1])[..., None]
        samples = []
        for number in range(len(boxes)):
            spans = unstitched(boxes[number], out.stitching, number).sort(-1).values
            long = spans[:, 1] - spans[:, 0] > _SHORTEST  # what lay in the padding is not
            told = (shares[number] > self.config.least) & long[:, None]
            place, label = told.nonzero(as_tuple=True)
            columns = spans[place].double(), scores[number][place, label].double(), label
            found = Found(*(column.detach().cpu().numpy() for column in columns))
            samples.append(by_class(found, lambda rows: hard_nms(rows, self.config.overlap)))
        return samples


class GraphLayer(nn.Module):
    """Convolution in time and over the nearest nodes in feature space, then half the length.

    Args:
        width: Channels.
        neighbours: k.
    """

    def __init__(self, width: int, neighbours: int) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.conv = nn.Conv1d(width, width, 3, 1, 1)
        self.edge = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, stitching: Stitching) -> Tensor:
        """[B, C, T] to [B, C, T / 2]."""
        nodes = x.mT
        near = edges(nodes.detach(), self.neighbours, stitching)
        # W [x_j; x_i] + b: only the first half hangs on j, so the largest over j is that half's.
        other, own = self.edge.weight.chunk(2, 1)
        sent = F.linear(nodes, other)
        index = near.flatten(1)[..., None].expand(-1, -1, sent.shape[-1])
        largest = sent.gather(1, index).unflatten(1, near.shape[1:]).amax(2)
        graph = largest + F.linear(nodes, own, self.edge.bias)
        return F.max_pool1d(F.relu(self.conv(x) + graph.mT), 2)


@torch.no_grad()
def edges(nodes: Tensor, neighbours: int, stitching: Stitching) -> Tensor:
    """The k nearest nodes of each, itself among them, [B, T, k].

    In stitched samples the second half of the edges goes to the nearest of the rest, and from the
    magnified part to the other one only.

    Args:
        nodes: [B, T, C].
        neighbours: k.
        stitching: Where samples lie.
    """
    apart = torch.cdist(wide(nodes), wide(nodes), compute_mode="donot_use_mm_for_euclid_dist")
    near = apart.topk(neighbours, -1, largest=False).indices
    if not stitching.stitched.any():
        return near
    length, half = nodes.shape[1], neighbours // 2
    cut = ((stitching.real + stitching.gap) * length / stitching.steps).long()
    behind = torch.arange(length, device=nodes.device) >= cut[:, None]
    apart = apart.masked_fill(behind[:, :, None] & behind[:, None, :], torch.inf)
    apart = apart.scatter(2, near[..., :half], torch.inf)
    rest = apart.topk(neighbours - half, -1, largest=False).indices
    crossed = torch.cat([near[..., :half], rest], -1)
    return torch.where(stitching.stitched[:, None, None], crossed, near)


def decoded(offsets: Tensor, boxes: Tensor) -> Tensor:
    """Boxes moved and stretched by offsets [*, 2] of their centres and lengths."""
    length = boxes[..., 1] - boxes[..., 0] + 1
    centre = (boxes[..., 0] + boxes[..., 1]) / 2 + offsets[..., 0] / _CENTRE * length
    growth = (offsets[..., 1] / _LENGTH).clamp(max=math.log(_GROWTH)).exp()
    reach = (growth * length - 1) / 2
    return torch.stack([centre - reach, centre + reach], -1)


def matched(
    boxes: Tensor, segments: Sequence[Tensor], labels: Sequence[Tensor], threshold: float
) -> tuple[Tensor, Tensor]:
    """The class of each box, and its segment.

    A box is positive where its best segment overlaps it enough, or where it is the best box of any
    segment. A box is one step longer than its ends are apart, and a segment is not.

    Args:
        boxes: [B, N, 2].
        segments: Of each sample [M, 2].
        labels: Of each sample [M].
        threshold: What is enough.

    Returns:
        1 + class, or 0, [B, N]; and segments [B, N, 2].
    """
    kinds, wanted = [], []
    for own, spans, label in zip(boxes, segments, labels, strict=True):
        if not len(spans):
            kinds.append(label.new_zeros(len(own)))
            wanted.append(torch.zeros_like(own))
            continue
        start = torch.maximum(own[:, None, 0], spans[:, 0])
        shared = (torch.minimum(own[:, None, 1], spans[:, 1]) - start).clamp_min(0)
        lengths = (own[:, 1] - own[:, 0] + 1)[:, None] + spans[:, 1] - spans[:, 0]
        overlap = shared / (lengths - shared).clamp_min(1e-9)
        most, index = overlap.max(1)
        positive = (most >= threshold) | (overlap == overlap.amax(0)).any(1)
        kinds.append(torch.where(positive, 1 + label[index], 0))
        wanted.append(spans[index])
    return torch.stack(kinds), torch.stack(wanted)


def step_targets(segments: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether steps are in an action, begin and end one; three times [B, T], zeros and ones."""
    step = torch.arange(like.shape[1], device=like.device)[:, None]
    rows = []
    for spans in segments:
        start, end = spans[:, 0], spans[:, 1]
        inside = (step >= start.round()) & (step <= end.round())
        edges_ = [
            torch.minimum(at + _EDGE, step + 1) - torch.maximum(at - _EDGE, step) > 0.5
            for at in (start, end)
        ]
        rows.append(torch.stack([hit.any(1) for hit in (inside, *edges_)]))
    action, begin, finish = torch.stack(rows).to(like.dtype).unbind(1)
    return action, begin, finish


def _of_boxes(boxes: Tensor, kinds: Tensor, wanted: Tensor) -> Tensor:
    """The mean generalized-IoU loss of positive boxes."""
    return mean_over_ranks(generalized_iou_loss(wide(boxes), wide(wanted)), kinds > 0)


def _at(shares: Tensor, places: Tensor) -> Tensor:
    """Shares [B, T] at places [B, N] between steps: the mean of both steps'."""
    low, high = (wide(shares).gather(1, side.long()) for side in (places.floor(), places.ceil()))
    return (low + high) / 2


def _rows(maps: Iterable[Tensor], columns: int) -> Tensor:
    """Maps [B, A x columns, T] of all scales as rows [B, N, columns]."""
    return torch.cat([m.mT.reshape(len(m), -1, columns) for m in maps], 1)


def _head(config: VSGNShape, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(config.head):
        conv = nn.Conv1d(config.width, config.width, 3, 1, 1)
        layers += [conv, nn.GroupNorm(config.groups, config.width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(config.width, outputs, 3, 1, 1))


def _step_head(width: int) -> nn.Sequential:
    conv, last = nn.Conv1d(width, width, 3, 1, 1), nn.Conv1d(width, 1, 1)
    return nn.Sequential(conv, nn.ReLU(), last)


def _end_head(width: int) -> nn.Sequential:
    """Of three features, at the left, in the middle and at the right, to one offset."""
    return nn.Sequential(nn.Conv1d(width, width, 3, 2), nn.ReLU(), nn.Conv1d(width, 1, 1))
