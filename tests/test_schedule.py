"""Couplings that move while training, and couplings of one's own in plans and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import rewire
from rewire.rewriting import plan_of


@dataclass(frozen=True)
class Damped(rewire.Coupling):
    """x_{i+1} = (1 - k) x_i + k x_{i-1} + F_i(x_i)."""

    name = "damped"
    keep: float = 0.75

    def coefficients(self, x: Tensor, training: bool) -> rewire.Coefficients:
        return rewire.Coefficients(1 - self.keep, self.keep, 1.0)


def vit() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, depth=3), torch.randn(2, 3, 32, 32)


def gradients(rev: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(rev(x).sum(), list(rev.parameters())))


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_from_the_original_towards_re2(shape: str) -> None:
    net, x = vit()
    rev = rewire.make_reversible(net, x, coupling=rewire.Dr2(0.9, 0.1))
    schedule = rewire.Dr2Schedule(rev, 4, shape=shape)
    seen = [schedule.step() for _ in range(5)]
    betas = [0.1, *(coupling.beta for coupling in seen)]
    assert betas == sorted(betas)
    assert seen[3] == seen[4] == rewire.Dr2(0.0, 1.0)
    assert plan_of(rev).chains[0].coupling == "dr2(0, 1)"
    assert plan_of(rev).chains[0].bits == 0
    twin = rewire.make_reversible(net, x, coupling="re2(last)")
    assert torch.equal(rev(x), twin(x))


def test_a_step_between_forward_and_backward() -> None:
    """The coupling of the forward is on the tape."""
    net, x = vit()
    rev = rewire.make_reversible(net, x, coupling="dr2(0.9, 0.1)", check="raise")
    expected = gradients(rev, x)
    loss = rev(x).sum()
    rewire.Dr2Schedule(rev, 2).step()
    found = torch.autograd.grad(loss, list(rev.parameters()))
    assert all(map(torch.equal, found, expected))


def test_going_on_from_a_checkpoint(tmp_path: Path) -> None:
    net, x = vit()
    rev = rewire.make_reversible(net, x, coupling="dr2(0.9, 0.1)")
    schedule = rewire.Dr2Schedule(rev, 4)
    schedule.step()
    rewire.save(rev, tmp_path / "rev.pt")
    other = rewire.load(tmp_path / "rev.pt")
    again = rewire.Dr2Schedule(other, 4)
    again.load_state_dict(schedule.state_dict())
    assert again.step() == schedule.step()
    assert torch.equal(other.eval()(x), rev.eval()(x))


def test_another_coupling_has_no_schedule() -> None:
    net, x = vit()
    with pytest.raises(rewire.RewireError, match="coupling is re2"):
        rewire.Dr2Schedule(rewire.make_reversible(net, x), 4)
    with pytest.raises(ValueError, match="steps=0"):
        rewire.Dr2Schedule(rewire.make_reversible(net, x, coupling="dr2"), 0)


def test_a_coupling_of_ones_own(tmp_path: Path) -> None:
    net, x = vit()
    rev = rewire.make_reversible(net, x, coupling=Damped(0.5), check="raise")
    assert plan_of(rev).chains[0].coupling == "damped(1/2)"
    assert plan_of(rev).chains[0].bits == 1
    with rewire.store_activations(rev):
        expected = gradients(rev, x)
    assert all(map(torch.equal, gradients(rev, x), expected))
    rewire.save(rev, tmp_path / "rev.pt")
    with pytest.raises(rewire.RewireError, match="'damped\\(1/2\\)' is not known"):
        rewire.load(tmp_path / "rev.pt")
    loaded = rewire.load(tmp_path / "rev.pt", coupling=Damped(0.5))
    assert torch.equal(loaded.eval()(x), rev.eval()(x))


def test_a_plan_with_another_coupling() -> None:
    net, x = vit()
    plan = rewire.plan(net, x)
    rev = rewire.make_reversible(net, plan=plan, coupling="consistent(1/8)", precision="float64")
    assert [(c.coupling, c.bits, c.precision) for c in plan_of(rev).chains] == [
        ("consistent(1/8)", 3, "float64")
    ]
    assert [(c.coupling, c.precision) for c in plan.chains] == [("re2", "exact")]


def test_a_wrapped_model_is_saved_with_the_coupling_of_now() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
    x = torch.randn(2, 3, 8)
    rev = rewire.make_reversible(model, x, coupling="dr2(0.9, 0.1)")
    now = rewire.Dr2Schedule(nn.Sequential(rev), steps=2).step()
    assert {chain.coupling for chain in rewire.rewriting.plan_of(rev).chains} == {str(now)}
