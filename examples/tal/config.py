"""A training as a YAML file: its keys are the fields of these dataclasses, and no others."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

import rewire
from examples.tal.data.augmentation import Augmentation
from examples.tal.data.windows import Sampling
from examples.tal.evaluation import THUMOS_THRESHOLDS, check_thresholds
from examples.tal.models.actionformer import ActionFormerShape
from examples.tal.models.detector import Suppression
from examples.tal.models.losa import LoSAShape
from examples.tal.models.vsgn import VSGNShape
from examples.tal.training import Recipe

Made = TypeVar("Made")


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
        size: Height and width that a network sees.
        short: Pixels of the shorter side before a random crop; 0: `size`. In testing it is `size`.
        augmentation: In training.
        keep: Decoded videos are kept in memory.
        classifier: A file of classes' scores of whole videos. The localizer then tells only that
            there is an action, and a segment's score is its own times its video's for a class.
        top: Classes of a video that its segments get from the classifier.
    """

    annotations: str
    videos: str
    training: str = "training"
    validation: str = "validation"
    sampling: Sampling = field(default_factory=lambda: Sampling(steps=48, stride=1))
    size: int = 224
    short: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    keep: bool = False
    classifier: str = ""
    top: int = 2

    def __post_init__(self) -> None:
        if self.size < 1 or self.top < 1:
            raise ValueError(f"size and top are from 1 on, not {self.size} and {self.top}.")
        if 0 < self.short < self.size:
            raise ValueError(f"short: {self.short} pixels are fewer than size: {self.size}.")


@dataclass(frozen=True)
class BackboneConfig:
    """Which network, and how it is trained.

    Attributes:
        name: One of `backbones.NETWORKS`.
        way: "plain", "checkpointed", "rewired", "frozen", or "losa": frozen, with adapters.
        options: Of `rewire.make_reversible`, where it is rewired.
        weights: A file of weights, see `converters`; empty: none.
        pool: "mean" or "max" over space.
        normal: "imagenet" or "centred": mean and deviation of colours.
    """

    name: str = "motionnet"
    way: str = "rewired"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str = ""
    pool: str = "mean"
    normal: str = "imagenet"


@dataclass(frozen=True)
class Config:
    """A training, its data and its test.

    Attributes:
        data: Videos.
        backbone: The network that sees frames.
        losa: The adapters beside it, where its way is "losa".
        localizer: The network that finds segments; its `name` is "actionformer" or "vsgn".
        recipe: How they are trained.
        suppression: How found segments are thinned out.
        thresholds: Of overlap, in the test.
    """

    data: DataConfig
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    losa: LoSAShape = field(default_factory=LoSAShape)
    localizer: ActionFormerShape | VSGNShape = field(default_factory=ActionFormerShape)
    recipe: Recipe = field(default_factory=Recipe)
    suppression: Suppression = field(default_factory=Suppression)
    thresholds: tuple[float, ...] = THUMOS_THRESHOLDS

    def __post_init__(self) -> None:
        if self.data.keep and self.recipe.workers:
            raise ValueError("data: keep keeps videos in one process; recipe: workers must be 0.")
        backbone = self.backbone
        if backbone.options and backbone.way != "rewired":
            raise ValueError(f"backbone: way {backbone.way!r} takes no options.")
        known = inspect.signature(rewire.make_reversible).parameters.keys()
        if unknown := backbone.options.keys() - known:
            there = ", ".join(name for name in known if name not in ("model", "example_inputs"))
            raise ValueError(f"backbone: options: unknown {', '.join(unknown)}. There are {there}.")
        if backbone.way == "checkpointed" and not self.recipe.freeze_norms:
            raise ValueError(
                "backbone: checkpointed norms run twice a step; recipe: freeze_norms must be true."
            )
        check_thresholds(self.thresholds)


# What a training may be gone on with otherwise: it changes no network, and no step that was made.
_FREE = ("recipe: epochs", "recipe: workers", "data: keep", "backbone: weights")


def differences(config: Config, saved: dict[str, Any], parts: tuple[str, ...]) -> list[str]:
    """Keys in which a configuration differs from that of a saved training.

    Args:
        config: The one.
        saved: `dataclasses.asdict` of the other.
        parts: Which of its parts are compared.
    """
    own = dataclasses.asdict(config)
    return [key for part in parts for key in _differing(own[part], saved.get(part), part)]


def _differing(one: Any, other: Any, where: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [k for n in one for k in _differing(one[n], other.get(n), f"{where}: {n}")]
    return [where] if one != other and where not in _FREE else []


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
    hints, none = typing.get_type_hints(kind), dataclasses.MISSING
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := content.keys() - fields.keys():
        known = ", ".join(fields)
        raise ConfigError(
            f"{where}: unknown {', '.join(sorted(map(str, unknown)))}. There are {known}."
        )
    values = {name: _value(hints[name], v, f"{where}: {name}") for name, v in content.items()}
    needed = {n for n, f in fields.items() if f.default is none and f.default_factory is none}
    if missing := needed - values.keys():
        raise ConfigError(f"{where}: needs {', '.join(sorted(missing))}.")
    try:
        return kind(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):
        kind, value = _chosen(typing.get_args(kind), value, where)
    if dataclasses.is_dataclass(kind):
        return built(kind, value, where)  # type: ignore[arg-type]
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, list):
        inner = typing.get_args(kind)[0]
        return tuple(_value(inner, item, where) for item in value)
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is not (origin or kind):
        raise ConfigError(f"{where}: {value!r} is no {getattr(kind, '__name__', kind)}.")
    return value


def _chosen(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, Any]:
    """Which of several types a value is of, and the value: a dataclass goes by its name in it."""
    if not dataclasses.is_dataclass(kinds[0]):
        one, other = kinds
        return (other if isinstance(value, list) else one), value
    if not isinstance(value, dict):
        return kinds[0], value
    names = {kind.name: kind for kind in kinds}
    rest = dict(value)
    name = rest.pop("name", kinds[0].name)
    if name not in names:
        raise ConfigError(f"{where}: {name!r} is none of {', '.join(names)}.")
    return names[name], rest
