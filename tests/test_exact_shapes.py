"""Exact gradients whatever a branch returns, and for each way to write a residual module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire import integers
from rewire.reversible import ReversibleSequential
from tests.exactness import assert_as_stored, assert_exact, courses, run, some, spread
from tests.networks import COUPLINGS, MODES, WIDTH, Mode, convolutions, perceptron, rows
from tests.specimens import SPECIMENS


class Returning(nn.Module):
    """An MLP whose result goes through a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.function = perceptron(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.body(x.float()))


_held: list[Tensor] = []


def hold(y: Tensor) -> Tensor:
    """Somebody keeps the branch's result: it may not be overwritten."""
    _held[:] = [y.detach()]
    return y


RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number": lambda y: y.mean(),
    "a vector": lambda y: y.mean((0, 1)),
    "a column": lambda y: y[..., :1],
    "a row": lambda y: y.mean(1, keepdim=True),
    "expanded": lambda y: y[:, :1].expand(-1, 6, -1),
    "transposed": lambda y: y.transpose(0, 1).contiguous().transpose(0, 1),
    "a part of a storage": lambda y: torch.cat([y, y], -1)[..., WIDTH:],
    "held": hold,
    "double": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "half": Tensor.half,
    "zero": lambda y: y * 0,
    "integers": lambda y: (y * 3).round(),
    "its input's size": lambda y: y * 1e-9,
}


@spread("result, coupling", RESULTS, COUPLINGS)
def test_what_a_branch_returns(result: str, coupling: str) -> None:
    torch.manual_seed(1)
    branches = [Returning(RESULTS[result]) for _ in range(4)]
    net = ReversibleSequential(branches, coupling=coupling, check="raise")
    for _ in range(2):
        assert_exact(net, rows())


def test_an_expanded_result_is_not_written_to() -> None:
    torch.manual_seed(1)
    net = ReversibleSequential([Returning(RESULTS["expanded"]) for _ in range(3)], check="raise")
    assert_exact(net, rows())


@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)"])
def test_shared_weights_under_autocast(coupling: str) -> None:
    torch.manual_seed(1)
    shared = perceptron()
    branches = [nn.Sequential(nn.Dropout(0.1), shared) for _ in range(4)]
    net = ReversibleSequential(branches, coupling=coupling, check="raise")
    assert_exact(net, rows(), MODES["bf16 autocast"])


@spread("coupling, mode", ["re2", "consistent(1/4)", "dr2(1, 0.3)", "bdia"], MODES)
def test_branches_of_mixed_dtypes(coupling: str, mode: str) -> None:
    torch.manual_seed(1)
    kinds = [Tensor.double, Tensor.bfloat16, Tensor.float, Tensor.half, Tensor.double]
    branches = [Returning(kind) for kind in kinds]
    for branch, dtype in zip(branches, (torch.float64, torch.bfloat16), strict=False):
        branch.body = nn.Sequential(Cast(dtype), branch.body.to(dtype))
    net = ReversibleSequential(branches, coupling=coupling, check="raise")
    for _ in range(2):
        assert_exact(net, rows(), MODES[mode])


class Cast(nn.Module):
    """To another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(3, 8, 5, 7),
    "channels_last": lambda: torch.randn(3, 8, 5, 7).to(memory_format=torch.channels_last),
    "turned": lambda: torch.randn(3, 8, 7, 5).transpose(2, 3),
    "batch of one": lambda: torch.randn(1, 8, 5, 7),
    "batch last": lambda: torch.randn(8, 5, 7, 3).permute(3, 0, 1, 2),
}


@spread("coupling, layout, slices", COUPLINGS, LAYOUTS, [1, 50, 1 << 18], turns=1)
def test_inverses_in_slices(
    coupling: str, layout: str, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams larger than a cache are walked back in parts where the branch may not be reused."""
    monkeypatch.setattr(integers, "_SLICE", slices)
    torch.manual_seed(1)
    branches = [nn.Sequential(convolutions(), Held()) for _ in range(4)]
    net = ReversibleSequential(branches, coupling=coupling, check="raise")
    assert_exact(net, LAYOUTS[layout]())


class Held(nn.Module):
    """Keeps what goes through it."""

    def forward(self, x: Tensor) -> Tensor:
        return hold(x)


def test_a_stream_larger_than_a_slice() -> None:
    torch.manual_seed(1)
    branches = [nn.Sequential(nn.Tanh(), Held()) for _ in range(3)]
    net = ReversibleSequential(branches, coupling="consistent(1/4)", check="raise")
    for shape in ((1, 2**19 + 3), (3, 2**18), (2**18 + 1, 3)):
        assert_exact(net, torch.randn(shape))


# ---- each way to write a residual module -------------------------------------------------

REVERSIBLE = [name for name, specimen in SPECIMENS.items() if specimen.chains]
FAST = [
    "three terms",
    "parallel",
    "handed skip",
    "post-norm, permuting",
    "bottlenecks",
    "pre-activation",
    "windows",
    "shared",
]
OTHERS = [name for name in REVERSIBLE if name not in FAST]


@some("name", [*FAST, *OTHERS], slow=OTHERS)
def test_specimens(name: str) -> None:
    """In single precision, where a wrong bit is not hidden by a tolerance."""
    numbered = REVERSIBLE.index(name)
    mode = (MODES["fp32"], MODES["bf16 autocast"])[numbered % 2]
    prove(name, mode, COUPLINGS[numbered % len(COUPLINGS)])


@pytest.mark.slow
@spread("name, coupling, mode", REVERSIBLE, COUPLINGS, MODES, turns=4, rest=False)
def test_specimens_in_other_couplings(name: str, coupling: str, mode: str) -> None:
    prove(name, MODES[mode], coupling)
    assert name in SPECIMENS


@pytest.mark.parametrize("option", [{"granularity": "block"}, {"trunk": "inside"}], ids=str)
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/8)"])
def test_other_forms(option: dict[str, Any], coupling: str) -> None:
    name = "parallel" if "granularity" in option else "bottlenecks"
    prove(name, MODES["fp32"], coupling, **option)
    assert name in FAST


def prove(name: str, mode: Mode, coupling: str, **options: Any) -> None:
    """Two batches."""
    torch.manual_seed(0)
    model = SPECIMENS[name].make().to(mode.dtype)
    x = SPECIMENS[name].inputs().to(mode.dtype)
    rev = rewire.make_reversible(model, x, coupling=coupling, check="raise", **options)
    assert courses(rev)

    for _ in range(2):
        assert_as_stored(rev, lambda: run(rev, x, mode, seed=2))
