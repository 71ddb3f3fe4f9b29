"""Networks of a configuration."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from examples.tal.config import Config, ConfigError
from examples.tal.models.actionformer import ActionFormer, ActionFormerConfig, ActionFormerShape
from examples.tal.models.backbones import CENTRED, IMAGENET, NETWORKS, Backbone, prepared
from examples.tal.models.converters import load_weights
from examples.tal.models.detector import Detector
from examples.tal.models.losa import LoSA, Taps
from examples.tal.models.vsgn import VSGN, VSGNConfig

_FEW = 32  # frames: enough for every network to tell its channels
_NORMALS = {"imagenet": IMAGENET, "centred": CENTRED}


def detector_of(config: Config, classes: int) -> Detector:
    """The network of a configuration, on the CPU.

    Raises:
        ConfigError: There is no such network, or its sizes do not fit.
    """
    given, backbone, size = config.backbone, backbone_of(config), config.data.size
    localizer = localizer_of(config, backbone.channels, classes)
    if given.way == "losa":
        taps = Taps(backbone, config.losa, torch.zeros(1, 3, _FEW, size, size))
        return Detector(taps, localizer, LoSA(taps.channels, config.losa))
    return Detector(ready(config, backbone), localizer)


def ready(config: Config, backbone: Backbone) -> Backbone:
    """A backbone ready to be trained in the configuration's way."""
    options, sampling, size = dict(config.backbone.options), config.data.sampling, config.data.size
    if config.backbone.way == "rewired":
        # Without values: rewiring looks at shapes, and a window of real frames may not fit.
        frames = sampling.steps * sampling.per_step
        options["example_inputs"] = torch.empty(1, 3, frames, size, size, device="meta")
    return prepared(backbone, config.backbone.way, **options)


def backbone_of(config: Config) -> Backbone:
    """The backbone as it is, with its weights.

    Raises:
        ConfigError: There is no such network.
    """
    given = config.backbone
    if given.name not in NETWORKS:
        raise ConfigError(f"backbone: {given.name!r} is none of {', '.join(NETWORKS)}.")
    if given.normal not in _NORMALS:
        raise ConfigError(f"backbone: normal is {' or '.join(_NORMALS)}, not {given.normal!r}.")
    net = NETWORKS[given.name]()
    if given.weights:
        load_weights(net, given.weights)
    return Backbone(net, config.data.sampling.per_step, _NORMALS[given.normal], given.pool)


def localizer_of(config: Config, channels: int, classes: int) -> nn.Module:
    """The localizer for features of so many channels.

    Raises:
        ConfigError: A window is no multiple of what it halves.
    """
    shape, steps = config.localizer, config.data.sampling.steps
    if steps % shape.multiple:
        raise ConfigError(
            f"data: sampling: {steps} steps are no multiple of {shape.multiple}, which the "
            "localizer's scales need."
        )
    settings = {**dataclasses.asdict(shape), "inputs": channels, "classes": classes}
    if isinstance(shape, ActionFormerShape):
        return ActionFormer(ActionFormerConfig(**settings))
    return VSGN(VSGNConfig(**settings))
