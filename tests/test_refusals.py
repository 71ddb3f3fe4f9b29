"""What must be refused, or rewired right, where a rewired model could silently be another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import rewire
from tests.specimens import DIM, Loop, mlp, rows
from tests.test_specimens import TOLERANCE, distance, gradients


class Block(nn.Module):
    """x + F(x), with whatever `forward` a test needs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.drop, self.options = mlp(), nn.Dropout(0.4), {"scale": 1.0}
        self.register_buffer("count", torch.zeros(DIM))
        self.generator = torch.Generator().manual_seed(3)


class Swish(torch.autograd.Function):
    """x * sigmoid(x), with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        y = x.sigmoid()
        return gradient * (y + x * y * (1 - y))


def custom_function(self: Any, x: Tensor) -> Tensor:
    return x + Swish.apply(self.body(x))


class Halving(torch.autograd.Function):
    """x / 2, by a sum; half the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + -(x.abs() * x.sign() / 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def function_with_a_sum(self: Any, x: Tensor) -> Tensor:
    return x + Halving.apply(self.body(x))


def tail_that_draws(self: Any, x: Tensor) -> Tensor:
    return self.drop(functional.relu(x + self.body(x)))


def own_generator(self: Any, x: Tensor) -> Tensor:
    return x + self.drop(self.body(x)) * torch.rand(DIM, generator=self.generator).to(x)


def option(self: Any, x: Tensor) -> Tensor:
    return x + self.options["scale"] * self.body(x)


def reads_after_change(self: Any, x: Tensor) -> Tensor:
    h = self.body(x) + self.count
    self.count.add_(1)
    return x + h


def decides_by_values(self: Any, x: Tensor) -> Tensor:
    h = self.body(x)
    return x + (h * 2 if h.mean().item() > 0 else h)


def dropout_behind(self: Any, x: Tensor) -> Tensor:
    return self.drop(x + self.body(x))


def keeps_a_list(self: Any, x: Tensor) -> Tensor:
    self.options["last"] = x
    return x + self.body(x)


def net(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Three blocks with this forward, in train mode."""
    torch.manual_seed(0)
    kind = type("Block", (Block,), {"forward": forward})
    return Loop(kind).double().train()


RIGHT = [custom_function, function_with_a_sum, tail_that_draws, own_generator, option]
REFUSED = [reads_after_change, decides_by_values, dropout_behind, keeps_a_list]


@pytest.mark.parametrize("forward", RIGHT)
def test_rewired_right(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = net(forward), rows().requires_grad_()
    rev = rewire.make_reversible(model, x)
    found = gradients(rev, x)
    for block in rev.modules():
        if isinstance(block, Block):
            block.generator.manual_seed(3)
    with rewire.store_activations(rev):
        first = gradients(rev, x)
    assert distance(found, first) < TOLERANCE or forward is own_generator
    if forward is own_generator:
        for block in rev.modules():
            if isinstance(block, Block):
                block.generator.manual_seed(3)
        assert distance(gradients(rev, x), first) < TOLERANCE


@pytest.mark.parametrize("forward", REFUSED)
def test_refused(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = net(forward), rows()
    plan = rewire.plan(model, x)
    assert plan.chains == []
    assert any(row.reason == "cannot trace" or "stands" in row.detail for row in plan.skipped)
    assert float(model.get_buffer("blocks.0.count").abs().max()) == 0.0
    with pytest.raises(rewire.NothingToRewire, match="nearest miss"):
        rewire.make_reversible(model, x)


def test_an_option_that_changes_is_seen() -> None:
    model, x = net(option), rows()
    rev = rewire.make_reversible(model, x)
    before = rev(x)
    for block in (*model.blocks, *rev.blocks):  # type: ignore[union-attr, misc]
        block.options["scale"] = 3.0
    fresh = rewire.make_reversible(model, x)
    assert torch.allclose(rev(x), fresh(x))
    assert not torch.allclose(rev(x), before)


class Group(nn.Module):
    """A residual module whose branch is a chain itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(net(option).get_submodule(f"blocks.{n}") for n in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


def test_residual_of_residual() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Group() for _ in range(3))).double(), rows().requires_grad_()
    rev = rewire.make_reversible(model, x)
    assert [len(chain) for chain in rewire.rewriting.plan_of(rev).chains] == [3, 3, 3]
    found = gradients(rev, x)
    with rewire.store_activations(rev):
        assert distance(found, gradients(rev, x)) < TOLERANCE


def test_a_sum_inside_an_autograd_function_is_in_the_list() -> None:
    torch.manual_seed(0)
    block = type("Block", (Block,), {"forward": function_with_a_sum})
    plan = rewire.plan(nn.Sequential(*(block() for _ in range(3))), rows())
    assert [len(chain) for chain in plan.chains] == [3]
    assert [row.reason for row in plan.skipped] == ["own backward"] * 3
    assert all("test_refusals.py" in row.line for row in plan.skipped)


class Reverse(torch.autograd.Function):
    """The same values, and the gradient's opposite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Adversarial(Loop):
    """Reverses the gradient between the first two blocks, where it is told to."""

    reverses = False

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 0 and self.reverses:
                x = Reverse.apply(x)
        return x


def adversarial() -> nn.Module:
    torch.manual_seed(0)
    return Adversarial(type("Block", (Block,), {"forward": option})).double()


def test_a_gradient_changed_between_homes_cuts_the_chain() -> None:
    model, x = adversarial(), rows().requires_grad_()
    model.reverses = True  # type: ignore[assignment]
    rev = rewire.make_reversible(model, x)
    assert [len(chain) for chain in rewire.rewriting.plan_of(rev).chains] == [2]
    found = gradients(rev, x)
    with rewire.store_activations(rev):
        assert distance(found, gradients(rev, x)) < TOLERANCE


def test_a_gradient_changed_between_homes_after_planning_is_refused() -> None:
    rev, x = rewire.make_reversible(adversarial(), rows()), rows().requires_grad_()
    rev.reverses = True  # type: ignore[assignment]
    with pytest.raises(rewire.StreamMismatch):
        rev(x)


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_glob_that_matches_nothing(name: str) -> None:
    with pytest.raises(rewire.RewireError, match=r"'block\.3\.\*' matches no residual module"):
        rewire.plan(net(option), rows(), **{name: ["block.3.*"]})


def test_what_is_no_module_or_wraps_one() -> None:
    with pytest.raises(TypeError, match="not str"):
        rewire.make_reversible("model.pt")  # type: ignore[arg-type]
    with pytest.raises(rewire.RewireError, match=r"model\.module"):
        rewire.make_reversible(nn.DataParallel(net(option)), rows())


def test_a_class_that_cannot_be_found_again(tmp_path: Any) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = net(option)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(x)

    rev = rewire.make_reversible(Inner().double(), rows())
    with pytest.raises(rewire.BadFile, match="top level of a module"):
        rewire.save(rev, tmp_path / "rev.pt")
    assert not (tmp_path / "rev.pt").exists()


def test_a_complex_sum_is_in_the_list() -> None:
    spectrum = type("Block", (Block,), {"forward": lambda self, x: x + x.abs() * self.count})
    plan = rewire.plan(nn.Sequential(*(spectrum() for _ in range(2))), rows().to(torch.complex128))
    assert {row.reason for row in plan.skipped} == {"complex"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_a_hook_makes_before_each_run(norm: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(type("Block", (Block,), {"forward": option})() for _ in range(3)))
    for block in model:
        norm(block.body[0])
    rev = rewire.make_reversible(model.double(), rows())
    verdict = rewire.verify(rev, rows(), original=model)
    assert verdict.passed, str(verdict)
