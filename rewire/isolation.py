"""Running a model without leaving a mark on it."""

from __future__ import annotations

import functools
import logging
import random
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from rewire.attributes import INTERNAL, same_content
from rewire.replay import all_rng_states, set_rng_states
from rewire.residue import lru_caches, remember_holders

# Runs that patch torch or take a model apart are one at a time. One lock, so that no two threads
# can wait for each other; reentrant, for a model that is traced may hold a rewired one.
ONE_AT_A_TIME = threading.RLock()

Snapshot = dict[str, tuple[Any, Any]]
_GLOBAL_HOOKS = "_global_forward_hooks", "_global_forward_pre_hooks"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What `torch.utils.checkpoint.checkpoint` puts around a function, in one torch or another.
_CHECKPOINTS = (
    "_checkpoint_without_reentrant_generator",
    "_checkpoint_without_reentrant_generator_impl",
)
# What a fake tensor cannot answer: a value, a data-dependent size.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")


@contextmanager
def own_surroundings() -> Iterator[None]:
    """What is traced in here meets no checkpoint and no saved-tensor hook, its own or around it.

    What a trace saves is no business of an outer checkpoint or offloader, which counts it. A
    checkpoint in the traced code would note its machinery, not the code: its function is run
    as it is, and the chain drops what the checkpoint would have.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(Tensor.detach, as_it_is))
        for name in _CHECKPOINTS:
            if hasattr(torch.utils.checkpoint, name):
                replaced = mock.patch.object(torch.utils.checkpoint, name, _nothing_around)
                stack.enter_context(replaced)
        yield


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor: what unpacks it where packing has changed nothing."""
    return tensor


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    yield


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled parts run as they were written; the compiler takes a second to import."""
    imported = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if imported else nullcontext()


class _Plain(threading.local):
    """Set while a thread runs rewired homes as their authors wrote them."""

    active = False


plain = _Plain()


@contextmanager
def plain_homes() -> Iterator[None]:
    """Run rewired homes as their authors wrote them: what they are in is being traced."""
    before, plain.active = plain.active, True
    try:
        yield
    finally:
        plain.active = before


@contextmanager
def isolated(model: nn.Module, more: Iterable[Tensor] = ()) -> Iterator[None]:
    """Undo, on leaving, whatever running `model` did to it and to the generators.

    Forward hooks, the modules' own and torch's for all modules, do not run: they may store what
    they see. (Those of `torch.nn.utils.weight_norm` and its like do.) What torch logs of shapes
    that do not fit is not heard: who runs the model says what went wrong.

    Restored, also after an exception: attributes of every module (plain lists, dicts and
    sets one level deep; deeper, in objects, in classes and at the top of the files that define them
    what fake tensors came into), registered parameters, buffers, children
    and hooks, values of buffers and of tensors among the attributes, training flags, the random
    states of Python, NumPy and torch, and `functools.lru_cache`s of the packages that define the
    model, which might otherwise hold fake tensors.

    Args:
        model: The model that will be run.
        more: Tensors besides buffers whose values are restored: parameters, if it runs on them.
    """
    with ExitStack() as stack:
        _restore_at_the_end(stack, model, more)
        _LOGGER.setLevel(logging.CRITICAL)
        for name in _GLOBAL_HOOKS:
            stack.enter_context(mock.patch.dict(getattr(nn.modules.module, name), clear=True))
        for module in model.modules():
            for name in _HOOKS:
                hooks = getattr(module, name).items()
                module.__dict__[name] = OrderedDict(pair for pair in hooks if _computes(pair[1]))
        yield


def _computes(hook: Any) -> bool:
    """Whether a hook is part of the network: one of torch's that make a weight before each run."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def _restore_at_the_end(stack: ExitStack, model: nn.Module, more: Iterable[Tensor]) -> None:
    """Note how everything is; attributes are put back first, the random states last."""
    stack.callback(
        _set_random_states, random.getstate(), numpy.random.get_state(), all_rng_states()
    )
    for cache in lru_caches(model):
        stack.callback(_clear_if_used, cache, cache.cache_info().misses)
    for tensor in (*model.buffers(), *_tensor_attributes(model), *more):
        if not (tensor.is_meta or tensor.is_inference() or type(tensor) is FakeTensor):
            stack.callback(_write_back, tensor, tensor.detach().clone(), tensor._version)
    stack.callback(remember_holders(model))
    for module in model.modules():
        stack.callback(restore, module, snapshot(module))
    stack.callback(_LOGGER.setLevel, _LOGGER.level)


def _tensor_attributes(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        yield from (value for value in vars(module).values() if type(value) is Tensor)


def _write_back(tensor: Tensor, value: Tensor, version: int) -> None:
    with torch.no_grad():
        if tensor._version != version or not _same_values(tensor, value):
            tensor.copy_(value)


def _same_values(tensor: Tensor, value: Tensor) -> bool:
    """Whether two tensors are the same, NaN included (statistics change and their version not)."""
    if not _is_dense(tensor):
        return True
    same = torch.eq(tensor, value)
    return bool(same.all()) or bool((same | (tensor.isnan() & value.isnan())).all())


def _clear_if_used(cache: functools._lru_cache_wrapper[Any], misses: int) -> None:
    if cache.cache_info().misses != misses:
        cache.cache_clear()


def _set_random_states(python: Any, arrays: Any, tensors: Any) -> None:
    random.setstate(python)
    numpy.random.set_state(arrays)
    set_rng_states(tensors)


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


def lend_fakes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake twins in the place of parameters, buffers and tensors among the attributes.

    `isolated` puts those back. Operations on fake tensors alone are remembered by torch: they take
    a quarter of the time.
    """

    def twin(tensor: Tensor) -> Tensor:
        usual = type(tensor) in (nn.Parameter, Tensor) and _can_be_faked(tensor)
        return mode.from_tensor(tensor) if usual else tensor

    replace_tensors(model, twin)


def replace_tensors(model: nn.Module, twin: Callable[[Tensor], Tensor]) -> None:
    """Put others in the place of parameters, buffers and tensors among the attributes."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        attributes: dict[str, Any] = module.__dict__
        for registry in (attributes["_parameters"], attributes["_buffers"], attributes):
            for name, value in registry.items():
                if isinstance(value, Tensor):
                    registry[name] = twin(value)


def _can_be_faked(tensor: Tensor) -> bool:
    usual = _is_dense(tensor) and tensor.is_leaf
    return usual and not tensor.is_meta and not tensor.is_inference()


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)


def snapshot(module: nn.Module) -> Snapshot:
    """Each attribute with, for plain containers, a copy of its content."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list, set, deque)) else None)
        for name, value in module.__dict__.items()
    }


def changed_attributes(module: nn.Module, before: Snapshot) -> tuple[dict[str, Any], list[str]]:
    """Plain attributes and buffers that are set anew since a snapshot, and names of what else.

    Else are containers that hold something else, parameters, children and hooks, and whatever is
    not there any more.
    """
    set_: dict[str, Any] = {}
    other = [name for name in before if name not in module.__dict__]
    for name, value in module.__dict__.items():
        then, content = before.get(name, (None, None))
        if name == "_buffers" and value is then:
            set_ |= {n: b for n, b in value.items() if n in content and b is not content[n]}
            other += [name] if value.keys() != content.keys() else []
        elif name in INTERNAL or value is then:
            changed = value is not then or (content is not None and not same_content(then, content))
            other += [name] if changed else []
        else:
            set_[name] = value
    return set_, other


def restore(module: nn.Module, before: Snapshot) -> None:
    """Have every attribute as in a snapshot."""
    for name in module.__dict__.keys() - before.keys():
        del module.__dict__[name]
    for name, (value, content) in before.items():
        module.__dict__[name] = value
        if content is None or same_content(value, content):
            continue
        value.clear()
        value.extend(content) if isinstance(value, (list, deque)) else value.update(content)
