"""ActionFormer: a transformer of several time scales, with a point at every step of each.

Zhang, Wu and Li, ActionFormer: Localizing Moments of Actions with Transformers, ECCV 2022.
One step of the finest sequence is the unit of time here ("grid unit").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from examples.tal.distribution import over_ranks, ranks
from examples.tal.models.layers import Block, ChannelNorm, MaskedConv1d, sinusoid, wide
from examples.tal.models.losses import distance_iou_loss
from examples.tal.nms import Found, joined

_INFINITE = 10000.0
_RADIUS = 1.5  # of the middle of a segment in which points are its own, in strides
_MOMENTUM = 0.9


@dataclass(frozen=True)
class ActionFormerShape:
    """What an ActionFormer is made of, whatever its features and classes are.

    Attributes:
        width: Channels inside; 512 for THUMOS, 256 for ActivityNet.
        heads: Of attention.
        embeddings: Convolutions before the transformer.
        stem: Blocks at the finest scale.
        branches: Blocks that halve the length; there is one scale more.
        window: Steps that attention sees, for each scale or all; -1: all steps.
        input_dropout: Share of input channels dropped.
        drop_path: Share of samples that a branch is dropped for.
        positions: Length for which positions are encoded; 0: they are not.
        normalizer: Number of positive points at the start.
        smoothing: Of labels.
        regression: Weight of the boundaries' loss.
        range: Length up to which a segment is found at the finest scale, times √2 at most: the
            first of the ranges 0–4, 4–8, 8–16, ...
    """

    name: ClassVar[str] = "actionformer"

    width: int = 512
    heads: int = 4
    embeddings: int = 2
    stem: int = 2
    branches: int = 5
    window: int | tuple[int, ...] = 19
    input_dropout: float = 0.0
    drop_path: float = 0.1
    positions: int = 0
    normalizer: float = 100.0
    smoothing: float = 0.0
    regression: float = 1.0
    range: float = 4.0

    @property
    def levels(self) -> int:
        """Scales."""
        return self.branches + 1

    @property
    def multiple(self) -> int:
        """What lengths are multiples of."""
        return int(2**self.branches)


@dataclass(frozen=True)
class ActionFormerConfig(ActionFormerShape):
    """An ActionFormer for features and classes.

    Attributes:
        inputs: Channels of the features.
        classes: Of actions.
    """

    inputs: int = field(kw_only=True)
    classes: int = field(kw_only=True)


class Outputs(NamedTuple):
    """What the network says, of all points of all scales, the finest first.

    Attributes:
        scores: Logits [B, N, K].
        reach: Distances to both ends, in strides [B, N, 2].
        mask: [B, N], True where a point is real.
        points: [N, 4]: time, shortest and longest reach, stride; in grid units.
    """

    scores: Tensor
    reach: Tensor
    mask: Tensor
    points: Tensor


class Losses(NamedTuple):
    """Of the scores and the boundaries, and what is minimised: their weighted sum."""

    scores: Tensor
    reach: Tensor
    total: Tensor


class ActionFormer(nn.Module):
    """The network. See `ActionFormerConfig`."""

    normalizer: Tensor

    def __init__(self, config: ActionFormerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.dropout = nn.Dropout1d(config.input_dropout)
        sizes = [config.inputs] + config.embeddings * [width]
        self.embeddings = nn.ModuleList(
            _NormedConv(inputs, width) for inputs in sizes[: config.embeddings]
        )
        windows = config.window
        if isinstance(windows, int):
            windows = (windows,) * config.levels
        if len(windows) != config.levels:
            raise ValueError(f"{len(windows)} windows for {config.levels} scales.")
        rest = config.heads, config.drop_path
        self.stem = nn.ModuleList(
            Block(width, rest[0], windows[0], 1, rest[1]) for _ in range(config.stem)
        )
        self.branches = nn.ModuleList(
            Block(width, rest[0], window, 2, rest[1]) for window in windows[1:]
        )
        if config.positions:
            self.register_buffer("encoding", sinusoid(config.positions, width), persistent=False)
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(config.levels))
        self.scores = _Head(width, config.classes)
        self.reach = _Head(width, 2)
        self.scales = nn.Parameter(torch.ones(config.levels))
        nn.init.constant_(self.scores.last.bias, -math.log(99))  # a share of 1 in 100 at first
        # A stride to both sides at first: where a side begins below zero it would never learn.
        nn.init.ones_(self.reach.last.bias)
        self.register_buffer("normalizer", torch.tensor(config.normalizer))

    def forward(self, x: Tensor, mask: Tensor) -> Outputs:
        """Score all points.

        Args:
            x: Features [B, C, T]; T is a multiple of `config.multiple`.
            mask: [B, T], True where they are real.
        """
        if x.shape[-1] % self.config.multiple:
            raise ValueError(
                f"{x.shape[-1]} steps: give a multiple of {self.config.multiple} "
                f"({self.config.branches} halvings); pad, and mask the padding."
            )
        scores, reach, masks = [], [], []
        for level, (feature, real) in enumerate(self._pyramid(x, mask)):
            scores.append(self.scores(feature, real))
            reach.append(F.relu(self.scales[level] * self.reach(feature, real)))
            masks.append(real)
        points = self.points(x.shape[-1], x.device)
        return Outputs(torch.cat(scores, 1), torch.cat(reach, 1), torch.cat(masks, 1), points)

    def _pyramid(self, x: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features and masks of all scales."""
        x = self.dropout(x * mask[:, None])
        for embedding in self.embeddings:
            x = embedding(x, mask)
        if self.config.positions:
            x = x + self._encoding(x.shape[-1]) * mask[:, None]
        for block in self.stem:
            x, mask = block(x, mask)
        found = [(x, mask)]
        for block in self.branches:
            found.append(block(*found[-1]))
        return [(norm(x), mask) for norm, (x, mask) in zip(self.norms, found, strict=True)]

    def _encoding(self, length: int) -> Tensor:
        encoding: Tensor = self.encoding
        if length > encoding.shape[-1]:  # a longer video than in training
            return F.interpolate(encoding, length, mode="linear", align_corners=False)
        return encoding[..., :length]

    def points(self, length: int, device: torch.device | None = None) -> Tensor:
        """All points for so many steps, see `Outputs`."""
        rows = []
        for level in range(self.config.levels):
            stride = 2**level
            least = self.config.range * 2 ** (level - 1) if level else 0.0
            last = level == self.config.levels - 1
            most = _INFINITE if last else self.config.range * stride
            times = torch.arange(0, length, stride, dtype=torch.float32, device=device)
            rest = times.new_tensor([least, most, stride]).expand(len(times), 3)
            rows.append(torch.cat([times[:, None], rest], 1))
        return torch.cat(rows)

    # ---- training ------------------------------------------------------------------------

    def loss(self, out: Outputs, segments: Sequence[Tensor], labels: Sequence[Tensor]) -> Losses:
        """What is minimised.

        Args:
            out: What the network says.
            segments: Of each sample [M, 2], starts and ends in grid units.
            labels: Of each sample [M], numbers of classes.
        """
        config = self.config
        wanted = [
            targets(out.points, spans.to(out.points), label.to(out.points.device), config.classes)
            for spans, label in zip(segments, labels, strict=True)
        ]
        classes = torch.stack([row[0] for row in wanted])
        reach = torch.stack([row[1] for row in wanted])
        positive = (classes.sum(-1) > 0) & out.mask
        share = ranks() / self._normalized(positive.sum())
        smooth = classes * (1 - config.smoothing) + config.smoothing / (config.classes + 1)
        of_scores = sigmoid_focal_loss(
            wide(out.scores[out.mask]), smooth[out.mask], alpha=0.25, gamma=2, reduction="sum"
        )
        of_reach = distance_iou_loss(wide(out.reach[positive]), reach[positive]).sum()
        of_scores, of_reach = of_scores * share, of_reach * share
        return Losses(of_scores, of_reach, of_scores + config.regression * of_reach)

    def _normalized(self, positive: Tensor) -> Tensor:
        """What losses are divided by: a running mean of the number of positive points."""
        count = over_ranks(positive).clamp_min(1).to(self.normalizer.dtype)
        if not self.training:
            return count
        self.normalizer.lerp_(count, 1 - _MOMENTUM)
        return self.normalizer.clone()

    # ---- decoding ------------------------------------------------------------------------

    def decode(self, out: Outputs, *, least: float = 0.001, most: int = 2000) -> list[Found]:
        """The segments of each sample, in grid units, before any suppression.

        Args:
            out: What the network says.
            least: Scores below it are dropped.
            most: Pairs of a point and a class that are kept of each scale.
        """
        lengths = [int((out.points[:, 3] == 2**n).sum()) for n in range(self.config.levels)]
        samples = []
        for scores, reach, mask in zip(out.scores, out.reach, out.mask, strict=True):
            columns = (wide(scores).sigmoid() * mask[:, None], reach, out.points)
            levels = zip(*(wide(column).split(lengths) for column in columns), strict=True)
            samples.append(joined([_decoded(*level, least, most) for level in levels]))
        return samples


def targets(
    points: Tensor, segments: Tensor, labels: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """What the network should say of each point.

    A point belongs to the shortest segment around it in whose middle it is and whose ends are
    as far from it as its scale looks.

    Args:
        points: [N, 4], see `Outputs`.
        segments: [M, 2] in grid units.
        labels: [M].
        classes: Their number.

    Returns:
        Classes [N, K] of zeros and ones, and distances to both ends in strides [N, 2].
    """
    if not len(segments):
        return points.new_zeros(len(points), classes), points.new_zeros(len(points), 2)
    time, least, most, stride = (column[:, None] for column in points.unbind(1))
    start, end = segments.unbind(1)
    reach = torch.stack([time - start, end - time], -1)  # [N, M, 2]
    middle = (start + end) / 2
    since = time - torch.maximum(start, middle - _RADIUS * stride)
    until = torch.minimum(end, middle + _RADIUS * stride) - time
    far = reach.amax(-1)
    own = (torch.minimum(since, until) > 0) & (far >= least) & (far <= most)
    lengths = torch.where(own, end - start, torch.inf)
    shortest, index = lengths.min(1)
    together = own & (lengths <= shortest[:, None] + 1e-3)
    one_hot = F.one_hot(labels, classes).to(points.dtype)
    nearest = reach[torch.arange(len(points), device=points.device), index]
    return (together.to(points.dtype) @ one_hot).clamp(0, 1), nearest / stride


class _NormedConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = MaskedConv1d(inputs, outputs, 3, bias=False)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x, mask)[0]))


class _Head(nn.Module):
    """Shared by all scales: two convolutions, and one to the outputs [B, T, K]."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.tower = nn.ModuleList(_NormedConv(width, width) for _ in range(2))
        self.last = MaskedConv1d(width, outputs, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.tower:
            x = layer(x, mask)
        result: Tensor = self.last(x, mask)[0].transpose(1, 2)
        return result


def _decoded(scores: Tensor, reach: Tensor, points: Tensor, least: float, most: int) -> Found:
    """The segments of one scale of one sample, those of the highest scores."""
    flat = scores.flatten()
    order = flat.argsort(descending=True, stable=True)[:most]
    order = order[flat[order] > least]
    place, label = order // scores.shape[1], order % scores.shape[1]
    time, stride = points[place, 0], points[place, 3]
    spans = torch.stack([time - reach[place, 0] * stride, time + reach[place, 1] * stride], 1)
    long = spans[:, 1] - spans[:, 0] > 0.05
    columns = spans[long].double(), flat[order][long].double(), label[long]
    return Found(*(column.detach().cpu().numpy() for column in columns))
