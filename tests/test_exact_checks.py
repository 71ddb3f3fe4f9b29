"""The self-check: each planted fault is told, in the way that was asked for; NaN is no fault."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire import tape
from rewire.corrections import Columns, Digits
from rewire.drift import DriftWarning
from tests.exactness import (
    assert_as_stored,
    assert_same_bits,
    by_autograd,
    courses,
    run,
    run_stored,
    same,
    some,
    spread,
)
from tests.faults import Noise
from tests.networks import COUPLINGS, WIDTH, Stack, perceptron, rows, transformer
from tests.test_exact_grid import Scaled

DEPTH = 4
Plant = Callable[[nn.Module], AbstractContextManager[Any]]


def model_of(coupling: str = "re2", norm: bool = False, check: str = "warn") -> nn.Module:
    """A rewired stack with dropout and BatchNorm in its branches."""
    torch.manual_seed(0)
    plan = _plan(_noted, norm)
    return rewire.make_reversible(_noted(norm), plan=plan, coupling=coupling, check=check)


@functools.cache
def _plan(make: Callable[[bool], nn.Module], norm: bool) -> rewire.Plan:
    return rewire.plan(make(norm), rows())


def _noted(norm: bool) -> nn.Module:
    layers = (lambda: nn.BatchNorm1d(6)), (lambda: nn.Dropout(0.2))
    branches = [nn.Sequential(perceptron(), *(make() for make in layers)) for _ in range(DEPTH)]
    return Stack(nn.Identity(), branches, layer_norm if norm else None)


def layer_norm() -> nn.Module:
    """With weights one."""
    return nn.LayerNorm(WIDTH)


def one_step(model: nn.Module, plant: Plant) -> None:
    """A forward, and a backward with the fault."""
    loss = model(rows().requires_grad_()).sin().sum()
    with plant(model):
        loss.backward()


# ---- faults ------------------------------------------------------------------------------


def noisy(place: int) -> Plant:
    """A branch that does not repeat itself in backward."""

    @contextmanager
    def plant(model: nn.Module) -> Iterator[None]:
        layer = model.branches[place][0]
        with patch.object(layer[3], "forward", lambda x: nn.Linear.forward(layer[3], x) * 1.01):
            yield

    return plant


@contextmanager
def hidden_change(model: nn.Module) -> Iterator[None]:
    """A parameter written to behind autograd's back: its version counter stays."""
    model.branches[2][0][1].weight.data.mul_(1.5)
    yield


@contextmanager
def moved_statistics(model: nn.Module) -> Iterator[None]:
    """A buffer written to behind autograd's back."""
    model.branches[1][1].running_mean.data.add_(1)
    yield


def lost_generators(_: nn.Module) -> AbstractContextManager[Any]:
    """Dropout draws other masks."""
    return patch.object(tape, "replayed_rng", lambda _: nullcontext())


def lost_digits(_: nn.Module) -> AbstractContextManager[Any]:
    """The coupling's correction is not added back."""
    return patch.object(Digits, "add_", lambda self, stream: stream)


def lost_columns(_: nn.Module) -> AbstractContextManager[Any]:
    """The normalisation's correction is not added back."""
    return patch.object(Columns, "add_", lambda self, stream: stream)


FAULTS: dict[str, tuple[Plant, dict[str, Any]]] = {
    "first branch": (noisy(0), {}),
    "middle branch": (noisy(2), {}),
    "last branch": (noisy(DEPTH - 1), {}),
    "branch, consistent": (noisy(2), {"coupling": "consistent(1/4)"}),
    "branch, dr2": (noisy(2), {"coupling": "dr2(0.9, 0.1)"}),
    "branch, bdia": (noisy(2), {"coupling": "bdia"}),
    "branch, post-norm": (noisy(2), {"norm": True}),
    "parameter.data": (hidden_change, {}),
    "generators": (lost_generators, {}),
    "digits, consistent(1/2)": (lost_digits, {"coupling": "consistent(1/2)"}),
    "digits, consistent(1/8)": (lost_digits, {"coupling": "consistent(1/8)"}),
    "digits, dr2": (lost_digits, {"coupling": "dr2(0.9, 0.1)"}),
    "digits, bdia": (lost_digits, {"coupling": "bdia"}),
    "columns": (lost_columns, {"norm": True}),
    "columns, consistent": (lost_columns, {"norm": True, "coupling": "consistent(1/4)"}),
}


@some("fault", FAULTS, slow=[*FAULTS][1::2])
def test_a_fault_is_told_once_with_the_chains_name(fault: str) -> None:
    plant, options = FAULTS[fault]
    model = model_of(**options)
    with pytest.warns(DriftWarning, match=r"chain \(model\): the streams.*did not repeat") as told:
        one_step(model, plant)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model, plant)


@pytest.mark.parametrize("fault", [*FAULTS][1::4])
def test_a_fault_raises(fault: str) -> None:
    plant, options = FAULTS[fault]
    with pytest.raises(rewire.NotRepeatable, match=r"chain \(model\): the streams"):
        one_step(model_of(check="raise", **options), plant)


@pytest.mark.parametrize("fault", [*FAULTS][2::6])
def test_a_fault_is_let_pass(fault: str) -> None:
    plant, options = FAULTS[fault]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_step(model_of(check="off", **options), plant)
    assert courses(model_of(check="off"))[0].drift.check == "off"


@spread("coupling, norm", COUPLINGS, [False, True])
def test_no_fault_no_word(coupling: str, norm: bool) -> None:
    model = model_of(coupling, norm, check="raise")
    for _ in range(2):
        one_step(model, lambda _: nullcontext())
    assert not courses(model)[0].drift.warned


def test_statistics_changed_between_forward_and_backward() -> None:
    model = model_of(check="raise").eval()
    with pytest.raises(rewire.NotRepeatable, match="did not repeat"):
        one_step(model, moved_statistics)


def test_bdia_in_eval_mode_tells_an_unrepeatable_branch() -> None:
    model = model_of("bdia", check="raise").eval()
    with pytest.raises(rewire.NotRepeatable, match="did not repeat"):
        one_step(model, noisy(2))


@spread("check, where", ["warn", "raise", "off"], ["branch", "norm"])
def test_a_parameter_changed_in_place_raises_always(check: str, where: str) -> None:
    model = model_of(norm=True, check=check)
    weight = model.branches[2][0][1].weight if where == "branch" else model.trunks[2].weight

    @contextmanager
    def stepped(_: nn.Module) -> Iterator[None]:
        with torch.no_grad():
            weight.mul_(1.5)
        yield

    with pytest.raises(rewire.NotRepeatable, match="'weight' was changed in place"):
        one_step(model, stepped)


@spread("check, coupling", ["warn", "raise", "off"], ["re2", "consistent(1/4)", "bdia"])
def test_flags_that_were_switched(check: str, coupling: str) -> None:
    """Told; the gradients are those of forward's mode."""
    model, x = model_of(coupling, norm=True, check=check), rows()
    wrt = list(model.parameters())

    def loss_of() -> Tensor:
        torch.manual_seed(1)
        return model(x).sin().sum()

    expected = by_autograd(model, lambda: list(torch.autograd.grad(loss_of(), wrt)))
    loss = loss_of()
    model.eval()
    if check == "raise":
        with pytest.raises(rewire.NotRepeatable, match="was in train mode in forward"):
            torch.autograd.grad(loss, wrt)
        return
    told = pytest.warns(DriftWarning, match="was in train mode") if check == "warn" else silence()
    with told:
        found = torch.autograd.grad(loss, wrt)
    assert_same_bits(found, expected)
    assert not any(m.training for m in model.modules())


@contextmanager
def silence() -> Iterator[None]:
    """Nothing may be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_second_of_two_chains_is_named() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({k: Stack(nn.Linear(WIDTH, WIDTH), _branches()) for k in ("one", "two")})
    rev = rewire.make_reversible(nn.Sequential(*model.values()), rows())
    rev[1].branches[1].append(Noise())
    with pytest.warns(DriftWarning, match="chain 1: the streams") as told:
        rev(rows()).sin().sum().backward()
    assert len(told) == 1


def _branches() -> list[nn.Sequential]:
    return [nn.Sequential(perceptron()) for _ in range(3)]


# ---- NaN and infinity --------------------------------------------------------------------


class Spoiling(Scaled):
    """Puts a value into the first element of the batch when told to."""

    value: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.value is None:
            return y
        place = torch.zeros_like(y)
        place[0, 0, 0] = 1
        return torch.where(place.bool(), torch.full_like(y, self.value), y)


BAD = {"NaN": math.nan, "Inf": math.inf, "-Inf": -math.inf, "huge": 3e38}


def spoiling(coupling: str, norm: bool) -> nn.Module:
    """A rewired stack whose branches can be spoilt, and that raises at any drift."""
    torch.manual_seed(0)
    plan = _plan(_spoiling, norm)
    return rewire.make_reversible(_spoiling(norm), plan=plan, coupling=coupling, check="raise")


def _spoiling(norm: bool) -> nn.Module:
    return Stack(nn.Identity(), (Spoiling() for _ in range(4)), layer_norm if norm else None)


@spread(
    "coupling, bad, norm, where",
    ["re2", "re2(sum)", "consistent(1/4)", "dr2(1, 0.3)", "bdia"],
    BAD,
    [False, True],
    ["input", "branch"],
    turns=2,
)
def test_nan_and_infinity_pass_on(coupling: str, bad: str, norm: bool, where: str) -> None:
    """Nothing is raised or said, the gradients are lost as in plain autograd, and only they."""
    rev = spoiling(coupling, norm)
    clean = rows()
    for x in (clean, spoilt(clean, BAD[bad]) if where == "input" else clean, clean):
        value = BAD[bad] if where == "branch" and x is clean else None
        rev.branches[2].value = value
        expected = run_stored(rev, x)
        with silence():
            found = run(rev, x)
        lost = [not bool(t.isfinite().all()) for t in expected]
        assert [not bool(t.isfinite().all()) for t in found] == lost
        assert same(found[0], expected[0])


def spoilt(x: Tensor, value: float) -> Tensor:
    """One element of the first sample replaced."""
    x = x.clone()
    x[0, 0, 0] = value
    return x


@spread(
    "coupling, bad, norm",
    ["re2", "consistent(1/2)", "consistent(1/4)", "dr2(0.9, 0.1)"],
    ["NaN", "Inf"],
    [False, True],
    turns=2,
)
def test_one_lost_sample_leaves_the_others_right(coupling: str, bad: str, norm: bool) -> None:
    """A user who masks the loss of a broken sample gets the gradients of the rest."""
    rev = spoiling(coupling, norm)
    torch.manual_seed(4)
    x = torch.randn(8, 4, WIDTH)  # whole words of digits
    x[0, 0, 0] = BAD[bad]

    def grads() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        return [torch.autograd.grad(rev(leaf)[1:].sin().sum(), leaf)[0][1:]]

    assert_as_stored(rev, grads)


@spread("norm, coupling", [False, True], ["re2", "consistent(1/4)"])
def test_a_gradient_scaler_skips_the_step(norm: bool, coupling: str) -> None:
    """Half-precision overflow in a branch; the step after it trains."""
    torch.manual_seed(0)
    trunk = layer_norm if norm else None
    model = Stack(nn.Identity(), (Overflowing() for _ in range(4)), trunk)
    rev = rewire.make_reversible(model, rows(), coupling=coupling, check="raise")
    optimizer = torch.optim.SGD(rev.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, moves in ((1.0, True), (1e6, False), (1.0, True)):
        rev.branches[1].factor = factor
        before = [p.detach().clone() for p in rev.parameters()]
        optimizer.zero_grad()
        with silence():
            scaler.scale(rev(rows()).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = any(not same(p.detach(), b) for p, b in zip(rev.parameters(), before, strict=True))
        assert moved == moves
    assert scaler.get_scale() == 2.0**9


class Overflowing(Scaled):
    """Multiplies in half precision."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x).half() * self.factor).float()


def test_a_spoilt_network_is_not_vacuous() -> None:
    model = transformer(2)
    rev = rewire.make_reversible(model, rows(), check="raise")
    found = run(rev, spoilt(rows(), math.nan))
    assert all(bool(g.isnan().any()) for g in found[-4:])
