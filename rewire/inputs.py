"""Example inputs: what a model can be called with, found by trying on fake tensors.

Candidates come from what the model says about itself (`pretrained_cfg`, or `config` with
`main_input_name`), then from its first layers with parameters. The first candidate with
which the forward runs is the example.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from rewire.errors import CannotTrace
from rewire.isolation import isolated, training_mode

_IMAGE_SIZES = (224, 256, 384, 240, 299, 192, 64, 32, 28, 128, 512, 16, 8)
_CLIPS = ((16, 224), (16, 112), (8, 224), (32, 224), (32, 112), (8, 64), (4, 32))
_LENGTHS = (16, 64, 77, 128, 8, 512)
_WIDTHS = ("in_features", "in_channels", "num_features", "num_channels", "embed_dim", "input_size")
_SEED = 0
# What a fake tensor cannot answer (a value, a data-dependent size) is no fault of the input.
_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True)
class Example:
    """What to call a model with: `model(*args, **kwargs)`.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        description: The inputs in words, and where they came from.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    description: str = "given"


@dataclass(frozen=True)
class _Spec:
    """A tensor to be made: its shape without the batch; token ids where `vocab` is set."""

    kind: str
    shape: tuple[int, ...]
    vocab: int = 0
    reserved: frozenset[int] = frozenset()


@dataclass(frozen=True)
class _Candidate:
    source: str
    args: tuple[_Spec, ...] = ()
    kwargs: Mapping[str, _Spec] = field(default_factory=dict)


def as_example(example_inputs: Any) -> Example:
    """Bring a user's `example_inputs` into one form.

    Args:
        example_inputs: A tensor (the only argument), a tuple or list (the positional
            arguments), a mapping (the keyword arguments) or an `Example`.

    Raises:
        CannotTrace: It is something else.
    """
    if isinstance(example_inputs, Example):
        return example_inputs
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, (tuple, list)):
        args = tuple(example_inputs)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        raise CannotTrace(
            f"example_inputs: got {type(example_inputs).__name__}, expected a tensor, a tuple "
            "of arguments or a dict of keyword arguments."
        )
    named = [(f"{name} ", value) for name, value in kwargs.items()]
    words = [
        f"{name}{list(value.shape)}" if isinstance(value, Tensor) else f"{name}{value!r:.40}"
        for name, value in [("", value) for value in args] + named
    ]
    return Example(args, kwargs, f"given: {', '.join(words)}")


def example_for(model: nn.Module, shape: Sequence[int] | None = None) -> Example:
    """Find inputs that `model` accepts, by trying candidates on fake tensors.

    The model is left as it was, and the global random generators are not used.

    Args:
        model: Any module that takes an image, a video, token ids or feature tensors.
        shape: The shape of its one input, batch included, where it is known.

    Returns:
        Small random tensors on the device and in the dtype of the model's parameters.

    Raises:
        CannotTrace: No candidate runs.
    """
    candidates = list(_candidates(model) if shape is None else _of_shape(model, tuple(shape)[1:]))
    batches = [2, 1] if shape is None else list(shape[:1])
    last: Exception | None = None
    for batch in batches:
        for candidate in candidates:
            last = _try(model, candidate, batch)
            if last is None:
                return _example(model, candidate, batch)
    wanted = f"shape {list(shape)}" if shape is not None else "any of the inputs"
    words = [_describe(candidate, batches[0]) for candidate in candidates[:3]]
    raise CannotTrace(
        f"{type(model).__name__}: its forward did not run with {wanted} that were tried "
        f"({len(candidates) * len(batches)} candidates: {'; '.join(words)}, ...); the last said: "
        f"{_first_line(last)}. Pass example_inputs= (on the command line --input-shape)."
    )


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """All candidates, the best evidence first, each once."""
    seen = set()
    layers = list(_from_layers(model))
    for found in chain(_from_config(model), _from_pretrained_cfg(model), layers, _guesses(layers)):
        candidate = found if found.kwargs else replace(found, args=found.args * _arity(model))
        key = (candidate.args, tuple(candidate.kwargs.items()))
        if key not in seen:
            seen.add(key)
            yield candidate


def _of_shape(model: nn.Module, shape: tuple[int, ...]) -> Iterator[_Candidate]:
    """One tensor of a given shape: token ids or floats, what suits the first layer first."""
    ids = replace(next(_tokens(model)), shape=shape)
    specs = [ids, _Spec("tensor", shape)]
    if not isinstance(next(_layers(model), None), nn.Embedding):
        specs.reverse()
    for spec in specs:
        yield _Candidate("the given shape", (spec,) * _arity(model))


def _from_pretrained_cfg(model: nn.Module) -> Iterator[_Candidate]:
    """Images of the size that a `pretrained_cfg` or `default_cfg` names."""
    for module, name in product(model.modules(), ("pretrained_cfg", "default_cfg")):
        cfg = getattr(module, name, None)
        size = cfg.get("input_size") if isinstance(cfg, Mapping) else None
        if isinstance(size, (tuple, list)) and len(size) == 3:
            first = next(_layers(model), None)
            for channels in (size[0], _width(first) if first else size[0]):
                yield _Candidate(name, (_Spec("image", (channels, *size[1:])),))
            return


def _from_config(model: nn.Module) -> Iterator[_Candidate]:
    """Keyword inputs of a model that names its main input and describes itself in `config`."""
    main = getattr(model, "main_input_name", None)
    if not isinstance(main, str) or getattr(model, "config", None) is None:
        return
    names = inspect.signature(model.forward).parameters
    others = {
        name: next(_named(model, name))
        for name in ("decoder_input_ids", "input_ids", "pixel_values")
        if name in names and name != main
    }
    decoder = {name: spec for name, spec in others.items() if name == "decoder_input_ids"}
    # Most want the main input, encoder-decoders the decoder's ids too, dual encoders all.
    for extra, spec in product((decoder, others, {}), list(_named(model, main))):
        yield _Candidate("config", (), {main: spec, **extra})


def _named(model: nn.Module, name: str) -> Iterator[_Spec]:
    """Tensors that an input called `name` may want."""
    if "ids" in name:
        yield from _tokens(model)
    elif "pixel" in name or "image" in name:
        yield from _pixels(model)
    elif "values" in name or "features" in name:
        yield from _sounds(model)
    yield from (spec for candidate in _from_layers(model) for spec in candidate.args)


def _from_layers(model: nn.Module) -> Iterator[_Candidate]:
    """Inputs that suit the first layers with parameters, one of each kind, in order."""
    seen: set[str] = set()
    names = {id(module): name for name, module in model.named_modules()}
    for layer in _layers(model):
        kind = _kind(layer)
        if kind not in seen:
            seen.add(kind)
            source = f"{names[id(layer)] or 'the model'} ({type(layer).__name__})"
            yield from (_Candidate(source, (spec,)) for spec in _of_kind(model, layer, kind))


def _guesses(layers: list[_Candidate]) -> Iterator[_Candidate]:
    """Images, for models whose layers gave none (a linear layer on unfolded patches)."""
    if not any(candidate.args[0].kind == "image" for candidate in layers):
        for channels, size in product((3, 1), _IMAGE_SIZES):
            yield _Candidate("a guess", (_Spec("image", (channels, size, size)),))


def _kind(layer: nn.Module) -> str:
    """What a first layer takes."""
    if isinstance(layer, nn.Embedding):
        return "token ids"
    kernel = getattr(layer, "kernel_size", None)
    if isinstance(kernel, tuple) and 1 <= len(kernel) <= 3:
        return ("sequence", "image", "video")[len(kernel) - 1]
    if isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
        return "image"
    return "video" if isinstance(layer, nn.BatchNorm3d) else "features"


def _of_kind(model: nn.Module, layer: nn.Module, kind: str) -> Iterator[_Spec]:
    width = _width(layer)
    if kind == "token ids":
        yield from _tokens(model)
    elif kind == "image":
        yield from _pixels(model, width)
    elif kind == "video":
        yield from (_Spec(kind, (width, frames, size, size)) for frames, size in _CLIPS)
    elif kind == "sequence":
        yield from (_Spec(kind, (width, length)) for length in (64, *_LENGTHS[2:], 4000, 16000))
        yield _Spec(kind, (64, width))
    else:
        lengths = (16, *_table_lengths(model, width))
        yield from (_Spec(kind, (length, width)) for length in lengths)
        yield _Spec(kind, (width,))


def _tokens(model: nn.Module) -> Iterator[_Spec]:
    config = getattr(model, "config", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    rows = [table.num_embeddings for table in tables]
    vocab = min(filter(None, (_int(_setting(config, "vocab_size")), *rows[:1])), default=2)
    # A second table holds positions (or 2 or 3 segments). Fake tensors do not check
    # indices, and some tables begin with an offset: stay well inside.
    said = _int(_setting(config, "max_position_embeddings", "n_positions", "max_target_positions"))
    longest = said or min((n for n in rows[1:] if n > 3), default=max(_LENGTHS))
    exact = _table_lengths(model, tables[0].embedding_dim) if tables else []
    rest = [length for length in _LENGTHS if length <= longest]
    for length in (min(16, max(longest // 2, 1)), *exact, *rest, longest):
        yield _Spec("token ids", (length,), vocab, _reserved(config))


def _pixels(model: nn.Module, channels: int = 0) -> Iterator[_Spec]:
    config = getattr(model, "config", None)
    channels = _int(_setting(config, "num_channels", "in_channels", "in_chans")) or channels
    channels = channels or next((_width(m) for m in _layers(model) if _kind(m) == "image"), 3)
    frames = _int(_setting(config, "num_frames", "frames_per_clip"))
    said = _pair(_setting(config, "image_size", "img_size", "crop_size"))
    found = (_pair(_setting(m, "image_size", "img_size")) for m in model.modules())
    said = said or next(filter(None, found), None)
    for height, width in ([said] if said else []) + [(size, size) for size in _IMAGE_SIZES]:
        if frames:
            yield _Spec("video", (frames, channels, height, width))
        yield _Spec("image", (channels, height, width))


def _sounds(model: nn.Module) -> Iterator[_Spec]:
    config = getattr(model, "config", None)
    mels = _int(_setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel"))
    positions = _int(_setting(config, "max_source_positions"))
    if mels and positions:
        yield _Spec("spectrogram", (mels, 2 * positions))
    if mels:
        yield _Spec("spectrogram", (_int(_setting(config, "max_length")) or 128, mels))
    yield _Spec("waveform", (16000,))
    yield _Spec("waveform", (1, 16000))


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that own parameters and say how wide their input is."""
    for module in model.modules():
        owns = next(module.parameters(recurse=False), None) is not None
        if owns and (_width(module) or isinstance(module, nn.Embedding)):
            yield module


def _width(layer: nn.Module) -> int:
    """Number of features or channels a layer takes; 0 where it does not say."""
    shape = getattr(layer, "normalized_shape", None)
    if isinstance(shape, tuple) and shape:
        return int(shape[-1])
    return next((n for name in _WIDTHS if (n := _int(getattr(layer, name, None)))), 0)


def _table_lengths(model: nn.Module, width: int) -> list[int]:
    """Lengths of tables of positions held as plain parameters, [T, width] or [1, T, width]."""
    return [
        p.shape[-2]
        for module in model.modules()
        for p in module.parameters(recurse=False)
        if not isinstance(module, (nn.Linear, nn.Embedding, nn.MultiheadAttention))
        if p.dim() in (2, 3) and p.shape[-1] == width and p.shape[:-2].numel() == 1
    ][:2]


def _setting(config: Any, *names: str) -> Any:
    """The first of `names` that a config has, else that one of its sub-configs has."""
    values = (getattr(config, name, None) for name in names)
    nested = (v for v in getattr(config, "__dict__", {}).values() if hasattr(v, "model_type"))
    found = chain(values, (_setting(value, *names) for value in nested))
    return next((value for value in found if value is not None), None)


def _reserved(config: Any) -> frozenset[int]:
    """Token ids with a meaning (padding, image places): not to be drawn at random."""
    values = getattr(config, "__dict__", {}).items()
    return frozenset(v for k, v in values if k.endswith("_token_id") and isinstance(v, int))


def _arity(model: nn.Module) -> int:
    """How many positional arguments `forward` cannot do without, at least 1."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.kind in kinds and p.default is p.empty for p in parameters))


def _int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _pair(value: Any) -> tuple[int, int] | None:
    """A size as (height, width), from a number or from the last two of a sequence."""
    if _int(value):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) >= 2 and all(map(_int, value)):
        return value[-2], value[-1]
    return None


def _try(model: nn.Module, candidate: _Candidate, batch: int) -> Exception | None:
    """Run the forward on fake tensors, or on real ones where it asks for values."""
    error = _run(model, candidate, batch, fake=True)
    if isinstance(error, _NEEDS_VALUES) and _place(model)[0].type != "meta":
        return _run(model, candidate, batch, fake=False)
    return error


def _run(model: nn.Module, candidate: _Candidate, batch: int, *, fake: bool) -> Exception | None:
    """What the forward raised with this candidate; nothing is left behind."""
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with isolated(model, values=not fake), training_mode(model, False), mode, torch.no_grad():
        example = _example(model, candidate, batch, empty=fake)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model(*example.args, **example.kwargs)
        except Exception as error:
            return error.with_traceback(None)
    return None


def _example(
    model: nn.Module, candidate: _Candidate, batch: int, *, empty: bool = False
) -> Example:
    """The tensors of a candidate: random by a generator of our own, or without values."""
    device, dtype = _place(model)
    generator = torch.Generator().manual_seed(_SEED)

    def tensor(spec: _Spec) -> Tensor:
        shape = (batch, *spec.shape)
        if empty or device.type == "meta":
            return torch.empty(shape, dtype=torch.int64 if spec.vocab else dtype, device=device)
        if not spec.vocab:
            return torch.randn(shape, generator=generator).to(device, dtype)
        free = [i for i in range(min(spec.vocab, 1000)) if i not in spec.reserved] or [0]
        drawn = torch.randint(len(free), shape, generator=generator)
        return torch.tensor(free)[drawn].to(device)

    args = tuple(tensor(spec) for spec in candidate.args)
    kwargs = {name: tensor(spec) for name, spec in candidate.kwargs.items()}
    return Example(args, kwargs, _describe(candidate, batch))


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of the first parameter and dtype of the first floating one."""
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    dtypes = (p.dtype for p in parameters if p.is_floating_point())
    return device, next(dtypes, torch.get_default_dtype())


def _describe(candidate: _Candidate, batch: int) -> str:
    """Such as "image [2, 3, 224, 224], from pretrained_cfg"."""
    specs = [("", spec) for spec in candidate.args]
    specs += [(f"{name} = ", spec) for name, spec in candidate.kwargs.items()]
    words = [f"{name}{spec.kind} {[batch, *spec.shape]}" for name, spec in specs]
    return f"{', '.join(words)}, from {candidate.source}"


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
