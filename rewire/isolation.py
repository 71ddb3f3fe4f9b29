"""Running a model without leaving a mark on it."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from rewire.replay import all_rng_states, set_rng_states

Snapshot = dict[str, tuple[Any, Any]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What `torch.utils.checkpoint.checkpoint` puts around a function, in one torch or another.
_CHECKPOINTS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)
_LRU_CACHE = type(functools.lru_cache(lambda: None))


@contextmanager
def own_surroundings() -> Iterator[None]:
    """What is traced in here meets no checkpoint and no saved-tensor hook, its own or around it.

    What a trace saves is no business of an outer checkpoint or offloader, which counts it. A
    checkpoint in the traced code would note its machinery, not the code: its function is run
    as it is, and the chain drops what the checkpoint would have.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        for name in _CHECKPOINTS:
            if hasattr(torch.utils.checkpoint, name):
                replaced = mock.patch.object(torch.utils.checkpoint, name, _nothing_around)
                stack.enter_context(replaced)
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    yield


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Undo, on leaving, whatever running `model` did to it and to the generators.

    Forward hooks of its modules do not run: they may store what they see.

    Restored, also after an exception: attributes of every module (plain lists, dicts and
    sets one level deep), registered parameters, buffers, children and hooks, training
    flags, the random states of Python, NumPy and torch, and `functools.lru_cache`s of
    the packages that define the model, which might otherwise hold fake tensors.

    Args:
        model: The model that will be run.
    """
    attributes = [(module, snapshot(module)) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    caches = [(cache, cache.cache_info().misses) for cache in _lru_caches(model)]
    states = random.getstate(), numpy.random.get_state(), all_rng_states()
    for module in model.modules():
        for name in _HOOKS:
            module.__dict__[name] = OrderedDict()
    try:
        yield
    finally:
        for module, before in attributes:
            _restore(module, before)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
        for cache, misses in caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        set_rng_states(states[2])


@contextmanager
def training_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Set every module's training flag directly (a model's own `train` may do more)."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.__dict__["training"] = mode
        yield
    finally:
        for module, flag in flags:
            module.__dict__["training"] = flag


def snapshot(module: nn.Module) -> Snapshot:
    """Each attribute with, for plain containers, a copy of its content."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for name, value in module.__dict__.items()
    }


def changed_attribute(module: nn.Module, before: Snapshot) -> str | None:
    """Name of an attribute that is another object, or another content, than in a snapshot."""
    for name in {**before, **module.__dict__}:
        value, content = before.get(name, (None, None))
        other = module.__dict__.get(name)
        if other is not value or (content is not None and not same_content(value, content)):
            return name
    return None


def _restore(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    for name in module.__dict__.keys() - before.keys():
        del module.__dict__[name]
    for name, (value, content) in before.items():
        module.__dict__[name] = value
        if content is None or same_content(value, content):
            continue
        value.clear()
        value.extend(content) if isinstance(value, list) else value.update(content)


def same_content(value: Any, content: Any) -> bool:
    """Whether a container still holds the very same objects in the same order."""
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        pairs = zip(value.items(), content.items(), strict=True)
        return all(a is c and b is d for (a, b), (c, d) in pairs)
    return all(a is b for a, b in zip(value, content, strict=True))


@functools.lru_cache(maxsize=64)
def _caches_of(package: str, loaded: int) -> tuple[functools._lru_cache_wrapper[Any], ...]:
    """The caches that the modules of a package have at their top, with so many modules loaded."""
    sources = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == package]
    return tuple(cache for source in sources for cache in _caches_in(source))


def _caches_in(holder: Any) -> Iterator[functools._lru_cache_wrapper[Any]]:
    """The caches among the attributes of a module or class, also behind a decorator of its own."""
    for value in list(vars(holder).values()):
        if type(value) in (staticmethod, classmethod):
            value = value.__func__
        cells = value.__closure__ or () if type(value) is types.FunctionType else ()
        for item in (value, *(_content(cell) for cell in cells)):
            if type(item) is _LRU_CACHE:
                yield item


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return None


def _lru_caches(model: nn.Module) -> list[functools._lru_cache_wrapper[Any]]:
    """The `functools.lru_cache`s in modules of the packages that define the model's classes."""
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    packages -= {"torch", "builtins"}
    found = {id(c): c for package in packages for c in _caches_of(package, len(sys.modules))}
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        found |= {id(cache): cache for cache in _caches_in(cls)}
    return list(found.values())
