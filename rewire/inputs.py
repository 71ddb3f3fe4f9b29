"""Example inputs: what a model can be called with, found by trying on fake tensors.

Candidates come from what the model says about itself (`pretrained_cfg`, or `config` with
`main_input_name`), then from its first layers. The first that runs is the example.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor as fakes
from torch.utils._pytree import tree_leaves, tree_map

from rewire.errors import CannotTrace
from rewire.isolation import NEEDS_VALUES, isolated, lend_fakes, training_mode, uncompiled

_IMAGE_SIZES = (224, 256, 384, 240, 299, 192, 64, 32, 28, 128, 512, 16, 8)
_CLIPS = ((16, 224), (16, 112), (8, 224), (32, 224), (32, 112), (8, 64), (4, 32))
_LENGTHS = (16, 64, 77, 128, 8, 512)
_WIDTHS = ("in_features", "in_channels", "num_features", "num_channels", "embed_dim", "input_size")
_INPUTS = ("decoder_input_ids", "input_ids", "pixel_values", "input_features", "input_values")


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


def without_memory(example: Example) -> Example:
    """An example in which zeros stand for tensors on the meta device; they take no memory."""

    def standing_in(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        return zeros.requires_grad_(tensor.requires_grad)

    tensors = tree_leaves((example.args, dict(example.kwargs)))
    if not any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tensors):
        return example
    return mapped(example, standing_in)


def mapped(example: Example, change: Callable[[Tensor], Tensor]) -> Example:
    """An example with other tensors, and copies of all else."""

    def each(value: Any) -> Any:
        return change(value) if isinstance(value, Tensor) else copy.deepcopy(value)

    args, kwargs = tree_map(each, (example.args, dict(example.kwargs)))
    return replace(example, args=args, kwargs=kwargs)


def one_more(example: Example) -> tuple[int, Example]:
    """The batch size, and the example with its first sample appended once more."""
    leaves = tree_leaves((example.args, dict(example.kwargs)))
    batch = next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()), 0)

    def grown(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[:1]]) if tensor.shape[:1] == (batch,) else tensor

    return batch, mapped(example, grown)


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


_Failure = tuple[_Candidate, Exception]


def as_example(example_inputs: Any) -> Example:
    """Bring a user's `example_inputs` into one form.

    Args:
        example_inputs: A tensor, a tuple of arguments, a dict of kwargs, or an `Example`.

    Raises:
        CannotTrace: It is something else.
    """
    if isinstance(example_inputs, Example):
        return example_inputs
    if isinstance(example_inputs, Mapping):
        return Example((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Example(tuple(example_inputs))
    if isinstance(example_inputs, Tensor):
        return Example((example_inputs,))
    got = type(example_inputs).__name__
    raise CannotTrace(f"example_inputs: got {got}, expected a tensor, a tuple or a dict of kwargs.")


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
    candidates = list(_of_shape(model, shape) if shape else _candidates(model))
    batches = [shape[0]] if shape else [2, 1]
    failures: list[_Failure] = []
    for number, (batch, candidate) in enumerate(product(batches, candidates)):
        found = _search(model, candidate, batch, failures)
        if found is None and number == 0:  # fake parameters refuse a few things, `.to()` among them
            found = _search(model, candidate, batch, [], lend=False)
        if found is not None:
            return _example(model, found, batch)
    # The first candidate has the best evidence, so its error tells the most.
    first, error = failures[0]
    lines = str(error).strip().splitlines() or [""]
    raise CannotTrace(
        f"{type(model).__name__}: its forward ran with none of {len(failures)} inputs that were "
        f"tried; with {_describe(first, batches[0])}: {type(error).__name__}: "
        f"{lines[0][:200].rstrip('.')}. Pass example_inputs= (on the command line --input-shape), "
        f"such as {_request(model, failures)}."
    )


def _search(
    model: nn.Module,
    candidate: _Candidate,
    batch: int,
    failures: list[_Failure],
    *,
    lend: bool = True,
) -> _Candidate | None:
    """A candidate that runs, or that does with what its errors ask for."""
    asking: _Candidate | None = candidate
    while asking is not None:
        error = _run(model, asking, batch, fake=True, lend=lend)
        if isinstance(error, NEEDS_VALUES):  # no fault of the input
            error = _run(model, asking, batch, fake=False)
        if error is None:
            return asking
        failures.append((asking, error))
        asking = _with_asked(model, asking, error)
    return None


def _with_asked(model: nn.Module, candidate: _Candidate, error: Exception) -> _Candidate | None:
    """The candidate with those arguments too that the model's complaint names."""
    given = {*candidate.kwargs, *list(_parameters(model))[: len(candidate.args)]}
    specs = {name: next(_told(model, name), None) for name in _asked(model, error) - given}
    more = {name: spec for name, spec in sorted(specs.items()) if spec is not None}
    return replace(candidate, kwargs={**candidate.kwargs, **more}) if more else None


def _asked(model: nn.Module, error: Exception) -> set[str]:
    """Arguments of the forward that an error names. PyTorch's own name sizes and operands."""
    if not isinstance(error, (TypeError, ValueError, AssertionError, KeyError)):
        return set()
    return set(re.findall(r"\w{3,}", str(error))) & set(_parameters(model))


def _request(model: nn.Module, failures: Sequence[_Failure]) -> str:
    """A line to paste that names what the forward wants, its values left open."""
    candidate, error = failures[0]
    names = [*_required(model), *candidate.kwargs, *sorted(_asked(model, error))]
    names = names or list(_parameters(model))[:1]
    named = ", ".join(f'"{name}": ...' for name in dict.fromkeys(names))
    return f"rewire.plan(model, {{{named}}})" if named else "rewire.plan(model, (...,))"


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """All candidates, the best evidence first, each once."""
    seen = set()
    sizes = product((3, 1), _IMAGE_SIZES)  # for a linear layer on unfolded patches
    guesses = (_Candidate("a guess", (_Spec("image", (c, s, s)),)) for c, s in sizes)
    sources = (_from_config(model), _from_pretrained_cfg(model), _from_layers(model), guesses)
    for found in chain(*sources):
        for candidate in _filled(model, found):
            key = (candidate.args, tuple(candidate.kwargs.items()))
            if key not in seen:
                seen.add(key)
                yield candidate


def _filled(model: nn.Module, found: _Candidate) -> Iterator[_Candidate]:
    """A candidate with all arguments that `forward` cannot do without.

    Their names tell what they are; those whose names tell nothing are like the one found.
    """
    required = _required(model)
    if found.kwargs:
        others = {name: next(_named(model, name), None) for name in required}
        more = {name: spec for name, spec in others.items() if spec is not None}
        yield replace(found, kwargs={**more, **found.kwargs})
        return
    (spec,) = found.args
    if len(required) > 1:
        yield replace(found, args=tuple(_like(model, name, spec) for name in required))
    yield replace(found, args=found.args * max(1, len(required)))


def _like(model: nn.Module, name: str, spec: _Spec) -> _Spec:
    """What an argument called `name` is, beside another."""
    told = list(_told(model, name))
    return spec if not told or spec.kind in {one.kind for one in told} else told[0]


def _of_shape(model: nn.Module, shape: Sequence[int]) -> Iterator[_Candidate]:
    """One tensor of a given shape: token ids or floats, what suits the first layer first."""
    rest = tuple(shape[1:])
    specs = [replace(next(_tokens(model)), shape=rest), _Spec("tensor", rest)]
    if not isinstance(next(_layers(model), None), nn.Embedding):
        specs.reverse()
    yield from (
        _Candidate("the given shape", (spec,) * max(1, len(_required(model)))) for spec in specs
    )


def _from_pretrained_cfg(model: nn.Module) -> Iterator[_Candidate]:
    """Images of the size that a `pretrained_cfg` or `default_cfg` names."""
    for module, name in product(model.modules(), ("pretrained_cfg", "default_cfg")):
        cfg = getattr(module, name, None)
        size = cfg.get("input_size") if isinstance(cfg, Mapping) else None
        if isinstance(size, (tuple, list)) and len(size) == 3:
            yield _Candidate(name, (_Spec("image", tuple(size)),))
            return


def _from_config(model: nn.Module) -> Iterator[_Candidate]:
    """Keyword inputs of a model that names its main input and describes itself in `config`."""
    main = getattr(model, "main_input_name", None)
    main = main[0] if isinstance(main, (list, tuple)) and main else main
    if not isinstance(main, str) or getattr(model, "config", None) is None:
        return
    names = _parameters(model)
    extras = [name for name in _INPUTS if name in names and name != main]
    others = {name: spec for name in extras if (spec := next(_named(model, name), None))}
    decoder = {name: spec for name, spec in others.items() if name == "decoder_input_ids"}
    # Most want the main input, encoder-decoders the decoder's ids too, dual encoders all.
    for spec, extra in product(_named(model, main), (decoder, others, {})):
        yield _Candidate("config", (), {main: spec, **extra})


def _named(model: nn.Module, name: str) -> Iterator[_Spec]:
    """Tensors that an input called `name` may want."""
    layers = (spec for candidate in _from_layers(model) for spec in candidate.args)
    return chain(_told(model, name), layers)


def _told(model: nn.Module, name: str) -> Iterator[_Spec]:
    """Tensors that an input called `name` is by its name; none where that tells nothing."""
    words = {
        "ids": _tokens,
        "pixel": _pixels,
        "image": _pixels,
        "values": _sounds,
        "features": _sounds,
        "timestep": _steps,
    }
    return chain(*(maker(model) for word, maker in words.items() if word in name))


def _from_layers(model: nn.Module) -> Iterator[_Candidate]:
    """Inputs that suit the first layers with parameters, one of each kind, in order."""
    names = {id(module): name for name, module in model.named_modules()}
    firsts: dict[str, nn.Module] = {}
    for layer in _layers(model):
        firsts.setdefault(_kind(layer), layer)
    for kind, layer in firsts.items():
        source = f"{names[id(layer)] or 'the model'} ({type(layer).__name__})"
        yield from (_Candidate(source, (spec,)) for spec in _of_kind(model, layer, kind))


def _kind(layer: nn.Module) -> str:
    """What a first layer takes."""
    kernel = getattr(layer, "kernel_size", None)
    if isinstance(kernel, tuple) and 1 <= len(kernel) <= 3:
        return ("sequence", "image", "video")[len(kernel) - 1]
    return "token ids" if isinstance(layer, nn.Embedding) else "features"


def _of_kind(model: nn.Module, layer: nn.Module, kind: str) -> Iterator[_Spec]:
    width = _width(layer)
    if kind == "token ids":
        return _tokens(model)
    if kind == "image":
        return _pixels(model, width)
    shapes: dict[str, list[tuple[int, ...]]] = {
        "video": [(width, frames, size, size) for frames, size in _CLIPS],
        "sequence": [*((width, n) for n in (64, 128, 8, 512, 4000, 16000)), (64, width)],
        "features": [*((n, width) for n in (16, *_table_lengths(model, width))), (width,)],
    }
    return (_Spec(kind, shape) for shape in shapes[kind])


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
    # Ids with a meaning (padding, image places) are not to be drawn at random.
    named = getattr(config, "__dict__", {}).items()
    reserved = frozenset(v for k, v in named if k.endswith("_token_id") and isinstance(v, int))
    for length in (min(16, max(longest // 2, 1)), *exact, *rest, longest):
        yield _Spec("token ids", (length,), vocab, reserved)


def _pixels(model: nn.Module, channels: int = 0) -> Iterator[_Spec]:
    config = getattr(model, "config", None)
    channels = _int(_setting(config, "num_channels", "in_channels", "in_chans")) or channels
    channels = channels or next((_width(m) for m in _layers(model) if _kind(m) == "image"), 3)
    frames = _int(_setting(config, "num_frames", "frames_per_clip"))
    sayers = (config, *model.modules())
    found = (_pair(_setting(sayer, "image_size", "img_size", "crop_size")) for sayer in sayers)
    said = next(filter(None, found), None)
    for height, width in ([said] if said else []) + [(size, size) for size in _IMAGE_SIZES]:
        if frames:
            yield _Spec("video", (frames, channels, height, width))
        yield _Spec("image", (channels, height, width))


def _sounds(model: nn.Module) -> Iterator[_Spec]:
    config = getattr(model, "config", None)
    mels = _int(_setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel"))
    frames = 2 * _int(_setting(config, "max_source_positions"))
    longest = _int(_setting(config, "max_length")) or 128
    series = _int(_setting(config, "context_length"))
    columns = _int(_setting(config, "num_input_channels", "input_size"))
    if series and columns:
        yield _Spec("series", (series, columns))
    for shape in ((mels, frames), (longest, mels)):
        if all(shape):
            yield _Spec("spectrogram", shape)
    yield from (_Spec("waveform", shape) for shape in ((16000,), (1, 16000)))


def _steps(model: nn.Module) -> Iterator[_Spec]:
    """One time of a diffusion for each sample."""
    yield _Spec("times", (), 1000)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers with parameters that say how wide their input is."""
    for module in model.modules():
        layer = isinstance(module, nn.MultiheadAttention) or not any(module.children())
        owns = layer and any(True for _ in module.parameters(recurse=False))
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


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What `forward` takes, by name; what it collects into `*args` or `**kwargs` has none."""
    given = inspect.signature(model.forward).parameters
    return {n: p for n, p in given.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _required(model: nn.Module) -> list[str]:
    """Positional arguments that `forward` cannot do without."""
    given = _parameters(model).items()
    return [n for n, p in given if p.default is p.empty and p.kind is not p.KEYWORD_ONLY]


def _int(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _pair(value: Any) -> tuple[int, int] | None:
    """A size as (height, width), from a number or from the last two of a sequence."""
    sides = (value, value) if _int(value) else value
    if isinstance(sides, (tuple, list)) and len(sides) >= 2 and all(map(_int, sides)):
        return sides[-2], sides[-1]
    return None


def _run(
    model: nn.Module, candidate: _Candidate, batch: int, *, fake: bool, lend: bool = False
) -> Exception | None:
    """What the forward raised with this candidate; nothing is left behind."""
    mode = fakes.FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with isolated(model), training_mode(model, False), mode, torch.no_grad():
        example = _example(model, candidate, batch, empty=fake)
        if lend and isinstance(mode, fakes.FakeTensorMode):
            lend_fakes(model, mode)
        try:
            eager = uncompiled()
            with eager, warnings.catch_warnings(action="ignore"):
                model(*example.args, **example.kwargs)
        except Exception as error:
            return error.with_traceback(None)
    return None


def _example(
    model: nn.Module, candidate: _Candidate, batch: int, *, empty: bool = False
) -> Example:
    """The tensors of a candidate: random by a generator of our own, or without values."""
    parameters = [*model.parameters(), torch.empty(0)]
    device = parameters[0].device
    dtype = next(p.dtype for p in parameters if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)

    def tensor(spec: _Spec) -> Tensor:
        shape = (batch, *spec.shape)
        if empty or device.type == "meta":
            return torch.empty(shape, dtype=torch.int64 if spec.vocab else dtype, device=device)
        if not spec.vocab:
            return torch.randn(shape, generator=generator).to(device, dtype)
        free = [i for i in range(min(spec.vocab, 1000)) if i not in spec.reserved] or [0]
        drawn = torch.randint(len(free), shape, generator=generator)
        return torch.tensor(free)[drawn].to(device)

    kwargs = {name: tensor(spec) for name, spec in candidate.kwargs.items()}
    return Example(tuple(map(tensor, candidate.args)), kwargs, _describe(candidate, batch))


def _describe(candidate: _Candidate, batch: int) -> str:
    """Such as "image [2, 3, 224, 224], from pretrained_cfg"."""
    named = [*(("", spec) for spec in candidate.args), *candidate.kwargs.items()]
    words = [f"{name} {spec.kind} {[batch, *spec.shape]}".strip() for name, spec in named]
    return f"{', '.join(words)}, from {candidate.source}"
