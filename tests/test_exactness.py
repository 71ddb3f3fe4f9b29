"""Exact gradients: bit for bit those of plain autograd through the same forward.

A model runs twice from the same state of grids, statistics and generators, once with activations
stored. Networks x dtypes x depths x couplings.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

WIDTH = 16
COUPLINGS = (
    "re2",
    "re2(sum)",
    "re2(last)",
    "consistent(1/2)",
    "consistent(1/4)",
    "consistent(1/8)",
    "dr2(0.9, 0.1)",
    "dr2(1, 0.3)",
    "dr2(0.5, 0.5)",
    "dr2(1, 1.3)",
    "bdia",
)


@dataclass(frozen=True)
class Mode:
    """In which precision a model runs."""

    dtype: torch.dtype
    autocast: bool = False

    def __call__(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, self.autocast)


MODES = {
    "fp32": Mode(torch.float32),
    "bf16 autocast": Mode(torch.float32, autocast=True),
    "bf16 parameters": Mode(torch.bfloat16),
    "fp64": Mode(torch.float64),
}


# ---- networks ----------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """LayerNorm and attention in two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads)
        return self.out(y.transpose(1, 2).flatten(2))


def perceptron(width: int = WIDTH) -> nn.Module:
    """LayerNorm, Linear, GELU, Linear."""
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
    )


def convolutions(width: int = 8) -> nn.Module:
    """Conv, BatchNorm, ReLU, Conv, BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
    )


class DropPath(nn.Module):
    """Drops a branch for whole samples."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), *(1,) * (x.dim() - 1)).bernoulli_(0.7) / 0.7


class Stack(nn.Module):
    """x = T_i(x + F_i(x)) in the code of the root itself."""

    def __init__(self, stem: nn.Module, branches: Iterable[nn.Module], trunk: Any = None) -> None:
        super().__init__()
        self.stem, self.branches = stem, nn.ModuleList(branches)
        self.trunks = nn.ModuleList(trunk() if trunk else nn.Identity() for _ in self.branches)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch, trunk in zip(self.branches, self.trunks, strict=True):
            x = trunk(x + branch(x))
        return x


class Rescale(nn.Module):
    """Channels times a constant."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def transformer(depth: int, stem: nn.Module | None = None, norm: Any = None) -> nn.Module:
    """Attention and MLP in turn."""
    branches = [perceptron() if i % 2 else SelfAttention() for i in range(depth)]
    return Stack(stem or nn.Linear(WIDTH, WIDTH), branches, norm)


def dropping(depth: int) -> nn.Module:
    """Dropout in one half of the branches, drop path in the other."""
    drops = [DropPath, functools.partial(nn.Dropout, 0.3)]
    branches = [nn.Sequential(perceptron(), drops[i % 2]()) for i in range(depth)]
    return Stack(nn.Linear(WIDTH, WIDTH), branches)


def with_outliers(depth: int) -> nn.Module:
    """Two channels 50 times the rest."""
    factors = torch.ones(WIDTH)
    factors[[3, 11]] = 50.0
    return transformer(depth, Rescale(factors))


def residual_net(depth: int) -> nn.Module:
    """ReLU on the trunk."""
    stem = nn.Conv2d(3, 8, 3, padding=1)
    return Stack(stem, (convolutions() for _ in range(depth)), functools.partial(nn.ReLU, True))


def rows(batch: int = 2) -> Tensor:
    """[batch, 6, WIDTH]."""
    return torch.randn(batch, 6, WIDTH)


def pictures(batch: int = 3) -> Tensor:
    """[batch, 3, 5, 5]."""
    return torch.randn(batch, 3, 5, 5)


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Tensor]]] = {
    "pre-norm transformer": (transformer, rows),
    "post-norm transformer": (lambda depth: transformer(depth, norm=_layer_norm), rows),
    "conv-BatchNorm-ReLU": (residual_net, pictures),
    "outlier channels": (with_outliers, rows),
    "tiny stem": (lambda depth: transformer(depth, Rescale(torch.full((WIDTH,), 0.05))), rows),
    "dropout and drop path": (dropping, rows),
}


def _layer_norm() -> nn.Module:
    """With weights that are not one, and of both signs."""
    norm = nn.LayerNorm(WIDTH)
    nn.init.normal_(norm.weight, 1.0, 0.5)
    nn.init.normal_(norm.bias, 0.0, 0.5)
    return norm


# ---- running and comparing ---------------------------------------------------------------


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
    with mode():
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


# ---- the promise -------------------------------------------------------------------------


EVERYWHERE = (NETWORKS, MODES, COUPLINGS)


@spread("network, mode, coupling, depth", *EVERYWHERE, (3, 12), turns=2, rest=False)
def test_bits(network: str, mode: str, coupling: str, depth: int) -> None:
    prove(network, mode, depth, coupling)
    assert depth <= 12


@pytest.mark.slow
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_bits_at_depth_48(network: str, mode: str, coupling: str) -> None:
    prove(network, mode, 48, coupling)
    assert mode in MODES


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)", "dr2(0.9, 0.1)", "dr2(1, 1.3)"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_bits_at_depth_96(network: str, mode: str, coupling: str) -> None:
    prove(network, mode, 96, coupling)
    assert network in NETWORKS


@pytest.mark.parametrize("network", [*NETWORKS][:3])
def test_the_same_model_twice(network: str) -> None:
    """In ordinary nets the grid of the first batch stays: no copy is needed."""
    rev, x = rewired(network, 3, MODES["fp32"], "consistent(1/2)").eval(), NETWORKS[network][1]()
    first = run(rev, x)
    assert_same_bits(run(rev, x), first)
    with rewire.store_activations(rev):
        assert_same_bits(run(rev, x), first)


@spread("norm_first, mode, coupling", [True, False], [*MODES][1:], ["re2", "consistent(1/8)"])
def test_transformer_encoder(norm_first: bool, mode: str, coupling: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(MODES[mode].dtype)
    x = rows().to(MODES[mode].dtype)
    rev = rewire.make_reversible(model, x, coupling=coupling, check="raise")
    assert [len(course.sites) for course in courses(rev)] == [4]
    for training in (True, False):
        rev.train(training)
        for _ in range(2):
            assert_exact(rev, rows(), MODES[mode])


@spread("network, mode, coupling", [*NETWORKS][1::2], ("fp32", "bf16 autocast"), COUPLINGS[::5])
def test_weights_after_forty_steps(network: str, mode: str, coupling: str) -> None:
    """In float32 and bfloat16 the weights drift apart at once where one bit differs."""
    before = rewired(network, 3, MODES[mode], coupling)
    both = [copy.deepcopy(before) for _ in range(2)]
    torch.manual_seed(1)
    batches = [NETWORKS[network][1]().to(MODES[mode].dtype) for _ in range(40)]
    train(both[0], batches, MODES[mode])
    with rewire.store_activations(both[1]):
        train(both[1], batches, MODES[mode])
    pairs = zip(both[0].parameters(), before.parameters(), strict=True)
    assert not any(same(a, b) for a, b in pairs)
    assert_same_bits(*([*m.parameters(), *m.buffers()] for m in both))


def train(model: nn.Module, batches: Iterable[Tensor], mode: Mode) -> None:
    """A step of AdamW for each batch."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x in batches:
        optimizer.zero_grad()
        with mode():
            loss = (model(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
