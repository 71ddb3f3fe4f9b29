"""A training as a YAML file: its keys are the fields of these dataclasses, and no others."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from examples.tal.data.windows import Sampling
from examples.tal.evaluation import THUMOS_THRESHOLDS
from examples.tal.models.actionformer import ActionFormer, ActionFormerConfig, ActionFormerShape
from examples.tal.models.backbones import CENTRED, IMAGENET, NETWORKS, Backbone, prepared
from examples.tal.models.detector import Detector, Suppression
from examples.tal.training import Recipe

Made = TypeVar("Made")

_NORMALS = {"imagenet": IMAGENET, "centred": CENTRED}


class ConfigError(ValueError):
    """A configuration has a key or a value that it cannot have. The message says where."""


@dataclass(frozen=True)
class DataConfig:
    """Where videos are, and how windows are taken from them.

    Attributes:
        annotations: The JSON file.
        videos: The folder of the videos.
        training: Subset to train on.
        validation: Subset to test on.
        sampling: Of windows.
        short: Pixels of the shorter side; 0: as they are.
        keep: Decoded videos are kept in memory.
    """

    annotations: str
    videos: str
    training: str = "training"
    validation: str = "validation"
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=48, stride=1))
    short: int = 0
    keep: bool = False


@dataclass(frozen=True)
class BackboneConfig:
    """Which network, and how it is trained.

    Attributes:
        name: One of `NETWORKS`.
        way: "plain", "checkpointed", "rewired" or "frozen".
        options: Of `rewire.make_reversible`, where it is rewired.
        weights: A file of a state_dict of the network; empty: none.
        pool: "mean" or "max" over space.
        normal: "imagenet" or "centred": mean and deviation of colours.
        size: Height and width of the frames that it is rewired on.
    """

    name: str = "motionnet"
    way: str = "rewired"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    pool: str = "mean"
    normal: str = "imagenet"
    size: int = 64


@dataclass(frozen=True)
class Config:
    """A training, its data and its test.

    Attributes:
        data: Videos.
        backbone: The network that sees frames.
        localizer: The network that finds segments.
        recipe: How both are trained.
        suppression: How found segments are thinned out.
        thresholds: Of overlap, in the test.
    """

    data: DataConfig
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    localizer: ActionFormerShape = field(default_factory=ActionFormerShape)
    recipe: Recipe = field(default_factory=Recipe)
    suppression: Suppression = field(default_factory=Suppression)
    thresholds: tuple[float, ...] = THUMOS_THRESHOLDS


def read_config(path: Path) -> Config:
    """A configuration; relative paths in it begin where the command runs.

    Raises:
        ConfigError: It cannot be read, or has what it cannot have.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    return built(Config, content, str(path))


def built(kind: type[Made], content: Any, where: str) -> Made:
    """A dataclass from a mapping of its fields, and so inside.

    Raises:
        ConfigError: A key is unknown or missing, or a value is of another type.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: keys and values were expected, not {content!r}.")
    hints = typing.get_type_hints(kind)
    if unknown := content.keys() - hints.keys():
        known = ", ".join(hints)
        raise ConfigError(f"{where}: unknown {', '.join(sorted(unknown))}. There are {known}.")
    values = {name: _value(hints[name], v, f"{where}: {name}") for name, v in content.items()}
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    none = dataclasses.MISSING
    needed = {f.name for f in fields if f.default is none and f.default_factory is none}
    if missing := needed - values.keys():
        raise ConfigError(f"{where}: needs {', '.join(sorted(missing))}.")
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return built(kind, value, where)  # type: ignore[arg-type]
    if isinstance(kind, types.UnionType):
        one, other = typing.get_args(kind)
        kind = other if isinstance(value, list) else one
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list):
        inner = typing.get_args(kind)[0]
        return tuple(_value(inner, item, where) for item in value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is not (origin or kind):
        raise ConfigError(f"{where}: {value!r} is no {getattr(kind, '__name__', kind)}.")
    return value


def detector_of(config: Config, classes: int) -> Detector:
    """The network of a configuration, on the CPU.

    Raises:
        ConfigError: There is no such network, or its sizes do not fit.
    """
    given = config.backbone
    backbone, options = backbone_of(config), dict(given.options)
    if given.way == "rewired":
        sampling = config.data.sampling
        frames = sampling.steps * sampling.per_step
        options["example_inputs"] = torch.zeros(1, 3, frames, given.size, given.size)
    backbone = prepared(backbone, given.way, **options)
    return Detector(backbone, localizer_of(config, backbone.channels, classes))


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
        net.load_state_dict(torch.load(given.weights, map_location="cpu", weights_only=True))
    return Backbone(net, config.data.sampling.per_step, _NORMALS[given.normal], given.pool)


def localizer_of(config: Config, channels: int, classes: int) -> ActionFormer:
    """The localizer for features of so many channels.

    Raises:
        ConfigError: A window is no multiple of what it halves.
    """
    steps, halvings = config.data.sampling.steps, config.localizer.branches
    if steps % 2**halvings:
        raise ConfigError(
            f"data: sampling: {steps} steps are no multiple of {2**halvings} (2 to the power of "
            "localizer: branches)."
        )
    settings = dataclasses.asdict(config.localizer)
    return ActionFormer(ActionFormerConfig(inputs=channels, classes=classes, **settings))
