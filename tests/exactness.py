"""Running a rewired network beside its twin, which stores activations, and comparing all bits."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.coupling import coupling_from
from rewire.drift import watch_reconstruction
from rewire.grid import Grid
from rewire.links import Course
from rewire.structure import tensors_of
from tests.networks import MODES, NETWORKS, Mode


def courses(model: nn.Module) -> list[Course]:
    """The chains of a model, each once."""
    chains = [c for m in model.modules() for c in (m, *m.__dict__.get("_chains", ()))]
    found = {id(c.course): c.course for c in chains if isinstance(c, rewire.ReversibleSequential)}
    return list(found.values())


def run(
    model: nn.Module, x: Tensor, mode: Mode = MODES["fp32"], *, seed: int = 5, **kwargs: Any
) -> list[Tensor]:
    """Outputs, gradients of the input and of all parameters, and buffers."""
    torch.manual_seed(seed)
    x = x.detach().to(mode.dtype).requires_grad_()
    with mode(x.device.type):
        outputs = [t for t in tensors_of(model(x, **kwargs)) if t.is_floating_point()]
    loss = sum(((number + 1) * t.double().sin()).sum() for number, t in enumerate(outputs))
    wrt = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, wrt, allow_unused=True)
    values = [t.detach().clone() for t in (*outputs, *model.buffers())]
    return [*values, *(torch.zeros(()) if g is None else g for g in grads)]


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, grids and buffers are as before afterwards."""
    grids = [(course, course.grid) for course in courses(model)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    for course, grid in grids:
        course.grid = copy.copy(grid)
    try:
        yield
    finally:
        for course, grid in grids:
            course.grid = grid
        for buffer, value in buffers:
            buffer.copy_(value)


def by_autograd(model: nn.Module, function: Callable[[], list[Tensor]]) -> list[Tensor]:
    """What a function gives where `model` runs with activations stored; leaves no trace."""
    with as_found(model), rewire.store_activations(model):
        return function()


def run_stored(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """As `run`, by plain autograd; leaves no trace."""
    return by_autograd(model, lambda: run(model, *args, **kwargs))


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """All tensors equal, bit for bit; not all of them zero."""
    assert len(found) == len(expected)
    assert any(bool(t.any()) for t in expected)
    other = [n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if not same(a, b)]
    assert not other, f"{len(other)} of {len(found)} tensors differ: {other[:9]}"


def same(a: Tensor, b: Tensor) -> bool:
    """Of one dtype and equal; NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def assert_as_stored(model: nn.Module, function: Callable[[], list[Tensor]]) -> None:
    """A function that runs `model` gives the same bits as by plain autograd."""
    expected = by_autograd(model, function)
    assert_same_bits(function(), expected)


def assert_exact(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """As `run` by plain autograd, and both streams agree where the chain starts."""
    expected = run_stored(model, x, *args, **kwargs)
    with watch_reconstruction() as seen:
        found = run(model, x, *args, **kwargs)
    assert_same_bits(found, expected)
    assert seen, "backward did not come to the start of a chain"
    assert not any(difference for _, difference in seen), seen


@functools.cache
def plan_of(network: str, depth: int) -> rewire.Plan:
    make, inputs = NETWORKS[network]
    return rewire.plan(make(depth), inputs())


@functools.cache
def _made(network: str, depth: int, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(depth)
    model = NETWORKS[network][0](depth).to(dtype)
    rev = rewire.make_reversible(model, plan=plan_of(network, depth), check="raise")
    assert [len(course.sites) for course in courses(rev)] == [depth]
    return rev


def rewired(network: str, depth: int, mode: Mode, coupling: str = "re2") -> nn.Module:
    """A rewired network, in train mode."""
    return renewed(_made(network, depth, mode.dtype), coupling)


def renewed(model: nn.Module, coupling: str) -> nn.Module:
    """Another coupling; what ran before is forgotten, so that tests do not depend on others."""
    for course in courses(model):
        course.coupling, course.grid, course.drift.warned = coupling_from(coupling), Grid(), False
        course.run.site = -1
    return model.train()


def spread(names: str, *axes: Iterable[Any], turns: int = 1, rest: bool = True) -> Any:
    """Parametrize by all combinations; a few of these, with each value in one, are fast.

    Args:
        names: As for pytest.
        axes: The values of each.
        turns: How often the longest axis is gone through.
        rest: Whether the other combinations run too, as slow tests.
    """
    table = [list(axis) for axis in axes]
    count = turns * max(map(len, table))
    fast = {tuple((n + n // len(axis)) % len(axis) for axis in table) for n in range(count)}
    params = []
    for place in itertools.product(*(range(len(axis)) for axis in table)):
        row = [axis[i] for axis, i in zip(table, place, strict=True)]
        if place in fast or rest:
            marks = () if place in fast else (pytest.mark.slow,)
            params.append(pytest.param(*row, id="-".join(map(_word, row)), marks=marks))
    return pytest.mark.parametrize(names.split(", "), params)


def some(name: str, values: Iterable[Any], slow: Iterable[Any]) -> Any:
    """Parametrize by values, a few of which are slow tests."""
    slow = set(slow)
    params = [pytest.param(v, marks=(pytest.mark.slow,) if v in slow else ()) for v in values]
    return pytest.mark.parametrize(name, params)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def prove(network: str, mode: str, depth: int, coupling: str, steps: int = 2) -> None:
    """Two batches: the second one stands on the grid that the first one left."""
    rev = rewired(network, depth, MODES[mode], coupling)
    for _ in range(steps):
        assert_exact(rev, NETWORKS[network][1](), MODES[mode])
