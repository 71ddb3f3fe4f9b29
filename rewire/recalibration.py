"""Recalibration: BatchNorm statistics estimated again for what the norms see now.

Rewiring changes the activations of a network, but its running means and variances are
those of the original: in eval mode the norms then subtract and divide by the wrong numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from rewire.errors import RewireError
from rewire.isolation import training_mode
from rewire.replay import all_rng_states, set_rng_states

Norms = dict[str, _BatchNorm]  # by qualified name
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int = 8) -> int:
    """Estimate the running statistics of every BatchNorm again, on some batches of data.

    The new statistics are the plain average over the batches (each counts the same, whatever
    its size); those before are forgotten. A BatchNorm that runs several times a batch averages
    over all its calls; one that does not run keeps what it had. Only the BatchNorms are in
    training mode, so that nothing is dropped or drawn; no gradient is computed. Training
    flags, momenta, all other buffers and the random generators are left as found.

    All or nothing: if it is interrupted half-way (an error in the loader or the model,
    Ctrl-C), the statistics are what they were before.

    A rewired model shares its buffers with the original: afterwards the statistics fit the
    model that was recalibrated, and no longer the other. In distributed training each process
    averages over its own batches, except where the norms are `SyncBatchNorm`s.

    Args:
        model: Any model with BatchNorms that track statistics, rewired or not.
        loader: Gives batches: a tensor; a tuple or list whose first item is the model's input,
            such as (images, labels); or a mapping of keyword arguments. They are moved to the
            device of the model's first parameter.
        batches: How many to use. Where there are fewer, those there are.

    Returns:
        The number of batches used.

    Raises:
        RewireError: No BatchNorm tracks statistics or none runs, the loader gives nothing or
            something else, or statistics came out as NaN or infinite.

    Example:
        >>> import torch
        >>> from rewire.recalibration import recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> low, high = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([[5.0, 2.0]] * 2)
        >>> recalibrate(model, [(low, "labels"), (high, "labels")])
        2
        >>> model[0].running_mean
        tensor([3.5000, 1.5000])

    Source: as for stochastic weight averaging (arXiv 1803.05407, `torch.optim.swa_utils`),
    whose averaged weights no training step has run either; here it is Re2TAL's rewiring
    (arXiv 2211.14053) that makes the activations other ones.
    """
    norms = _norms(model)
    _check(model, norms, loader, batches)
    before = {name: _copied(norm) for name, norm in norms.items()}
    with _generators_kept(), _other_buffers_kept(model, norms):
        try:
            with _averaging(model, norms):
                used = _run(model, loader, batches)
            reached = _reached(model, norms)
            _check_finite(reached, used)
            _put(norms, {name: before[name] for name in norms.keys() - reached.keys()})
        except BaseException:
            _put(norms, before)
            raise
    return used


def _norms(model: nn.Module) -> Norms:
    """The BatchNorms that keep statistics, each once."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and all(getattr(module, buffer) is not None for buffer in _STATISTICS)
    }


def _check(model: nn.Module, norms: Norms, loader: Iterable[Any], batches: int) -> None:
    """Refuse, before anything is touched, what cannot give statistics."""
    if not norms:
        raise RewireError(
            f"{type(model).__qualname__}: none of its {len(list(model.modules()))} modules is a "
            "BatchNorm that tracks statistics. It needs no recalibration."
        )
    if batches < 1:
        raise RewireError(f"batches: got {batches}. Statistics need one batch or more.")
    if isinstance(loader, (Tensor, Mapping)):
        raise RewireError(
            f"loader: got one {type(loader).__qualname__}, expected an iterable of batches. "
            "Pass a DataLoader, or the batch in a list."
        )


@contextmanager
def _averaging(model: nn.Module, norms: Norms) -> Iterator[None]:
    """The BatchNorms average over their calls, from zero; all other modules are in eval mode."""
    momenta = [(norm, norm.momentum) for norm in norms.values()]
    with training_mode(model, False):
        try:
            for norm, _ in momenta:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for the cumulative average
                norm.training = True
            yield
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum


def _run(model: nn.Module, loader: Iterable[Any], batches: int) -> int:
    """Call the model on up to `batches` batches, and count them."""
    device = next(chain(model.parameters(), model.buffers())).device
    used = 0
    for batch in islice(loader, batches):
        args, kwargs = _call(batch, used)
        args, kwargs = tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
        with torch.no_grad():  # not around the loader, which may use gradients itself
            model(*args, **kwargs)
        used += 1
    if not used:
        raise RewireError(
            "loader: it gave no batch; the statistics are unchanged. Pass one that holds data (a "
            "generator gives its batches only once)."
        )
    return used


def _call(batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model in what a loader gives."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, (tuple, list)) and batch:
        return (batch[0],), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    empty = "an empty " if isinstance(batch, (tuple, list)) else "a "
    raise RewireError(
        f"loader: batch {number} is {empty}{type(batch).__qualname__}, expected a tensor, a tuple "
        "that starts with the model's input, or a dict of keyword arguments. Wrap the loader in a "
        "generator that gives one of these."
    )


def _reached(model: nn.Module, norms: Norms) -> Norms:
    """The norms that ran; one in a head for training only does not, say."""
    reached = {name: norm for name, norm in norms.items() if norm.num_batches_tracked}
    if not reached:
        raise RewireError(
            f"{type(model).__qualname__}: none of its {len(norms)} BatchNorms ran, the first is "
            f"{next(iter(norms)) or '(model)'}; the statistics are unchanged. Pass a model whose "
            "forward runs them in eval mode."
        )
    return reached


def _check_finite(reached: Norms, used: int) -> None:
    """Refuse statistics that would spoil every later forward."""
    for name, norm in reached.items():
        if not all(bool(getattr(norm, part).isfinite().all()) for part in _STATISTICS):
            raise RewireError(
                f"{name or '(model)'}: its statistics hold NaN or infinity, averaged over {used} "
                "batches; all are left as they were. Look for these in the batches and in the "
                "parameters."
            )


# ---- leaving things as found -------------------------------------------------------------


def _copied(norm: _BatchNorm) -> list[Tensor]:
    return [getattr(norm, name).detach().clone() for name in _STATISTICS]


@torch.no_grad()
def _put(norms: Norms, values: Mapping[str, list[Tensor]]) -> None:
    """Write statistics in place: other modules may hold the same tensors."""
    for name, tensors in values.items():
        for part, tensor in zip(_STATISTICS, tensors, strict=True):
            getattr(norms[name], part).copy_(tensor)


@contextmanager
def _other_buffers_kept(model: nn.Module, norms: Norms) -> Iterator[None]:
    """Undo, on leaving, what running the model did to buffers that are no statistics of `norms`.

    Not `isolated`: forward hooks must run here, since some are part of the model (FSDP2's
    gather its parameters, spectral norm's compute a weight).
    """
    estimated = {id(norm) for norm in norms.values()}
    others = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
        if id(module) not in estimated or name not in _STATISTICS
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in others:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """The random generators of Python, NumPy and torch end where they began.

    The model draws nothing, but a shuffling loader does.
    """
    states = random.getstate(), numpy.random.get_state(), all_rng_states()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        set_rng_states(states[2])
