"""Exact gradients: bit for bit those of plain autograd through the same forward.

Each model has a copy that runs with activations stored; both go through the same steps, so that
their grids stand alike. Networks x dtypes x depths x couplings.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.coupling import Coupling, coupling_from
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


def run_stored(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    """As `run`, by plain autograd."""
    with rewire.store_activations(model):
        return run(model, *args, **kwargs)


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


def assert_exact(model: nn.Module, twin: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """A model's run against that of its copy with activations stored."""
    with watch_reconstruction() as seen:
        found = run(model, x, *args, **kwargs)
    assert_same_bits(found, run_stored(twin, x, *args, **kwargs))
    assert seen, "backward did not come to the start of a chain"
    assert not any(difference for _, difference in seen), seen


@functools.cache
def _made(network: str, depth: int, mode: Mode) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(depth)
    make, inputs = NETWORKS[network]
    model = make(depth).to(mode.dtype)
    rev = rewire.make_reversible(model, inputs().to(mode.dtype), check="raise")
    assert [len(course.sites) for course in courses(rev)] == [depth]
    return rev, copy.deepcopy(rev)


def pair(
    network: str, depth: int, mode: Mode, coupling: str | Coupling = "re2"
) -> tuple[nn.Module, nn.Module]:
    """A rewired network and its copy, with fresh grids."""
    both = _made(network, depth, mode)
    for model in both:
        for course in courses(model):
            course.coupling, course.grid = coupling_from(coupling), Grid()
            course.drift.warned = False
    return both


def grid_of(
    depths: Iterable[int], modes: Iterable[str], couplings: Iterable[str]
) -> Iterator[Any]:
    """Cases with readable names."""
    for coupling in couplings:
        for depth in depths:
            for mode in modes:
                for network in NETWORKS:
                    name = f"{network}-{mode}-{depth}-{coupling}"
                    yield pytest.param(network, mode, depth, coupling, id=name)


def prove(network: str, mode: str, depth: int, coupling: str, steps: int = 2) -> None:
    """Two batches: the second one stands on the grid that the first one left."""
    rev, twin = pair(network, depth, MODES[mode], coupling)
    for _ in range(steps):
        assert_exact(rev, twin, NETWORKS[network][1](), MODES[mode])


# ---- the promise -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "mode", "depth", "coupling"), grid_of((2, 12), MODES, ("re2", "consistent(1/4)"))
)
def test_depths_and_dtypes(network: str, mode: str, depth: int, coupling: str) -> None:
    prove(network, mode, depth, coupling)
    assert mode in MODES


@pytest.mark.parametrize(
    ("network", "mode", "depth", "coupling"), grid_of((12,), ("fp32", "bf16 autocast"), COUPLINGS)
)
def test_couplings(network: str, mode: str, depth: int, coupling: str) -> None:
    prove(network, mode, depth, coupling)
    assert coupling in COUPLINGS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "mode", "depth", "coupling"), grid_of((2, 12, 48, 96), MODES, COUPLINGS)
)
def test_everything(network: str, mode: str, depth: int, coupling: str) -> None:
    prove(network, mode, depth, coupling)
    assert depth <= 96


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_model_twice(network: str) -> None:
    """In ordinary nets the grid of the first batch stays: no copy is needed."""
    torch.manual_seed(0)
    make, inputs = NETWORKS[network]
    x = inputs()
    rev = rewire.make_reversible(make(6).eval(), x, coupling="consistent(1/2)")
    first = run(rev, x)
    assert_same_bits(run(rev, x), first)
    assert_same_bits(run_stored(rev, x), first)


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/8)"])
def test_transformer_encoder(norm_first: bool, mode: str, coupling: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(MODES[mode].dtype)
    x = rows().to(MODES[mode].dtype)
    rev = rewire.make_reversible(model, x, coupling=coupling, check="raise")
    assert [len(course.sites) for course in courses(rev)] == [4]
    twin = copy.deepcopy(rev)
    for training in (True, False):
        rev.train(training), twin.train(training)
        for _ in range(2):
            assert_exact(rev, twin, rows(), MODES[mode])


@pytest.mark.parametrize("mode", ["fp32", "bf16 autocast", "bf16 parameters"])
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/8)"])
@pytest.mark.parametrize(
    "network", ["conv-BatchNorm-ReLU", "post-norm transformer", "dropout and drop path"]
)
def test_weights_after_forty_steps(network: str, mode: str, coupling: str) -> None:
    both = [copy.deepcopy(m) for m in pair(network, 6, MODES[mode], coupling)]
    inputs = NETWORKS[network][1]
    torch.manual_seed(1)
    batches = [inputs().to(MODES[mode].dtype) for _ in range(40)]
    train(both[0], batches, MODES[mode])
    with rewire.store_activations(both[1]):
        train(both[1], batches, MODES[mode])
    before = pair(network, 6, MODES[mode])[0]
    assert not same(next(both[0].parameters()), next(before.parameters()))
    weights = [[*m.parameters(), *m.buffers()] for m in both]
    assert_same_bits(*weights)


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
