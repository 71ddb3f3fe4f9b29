"""Homes whose own code asks whether a tensor is true: `if not torch.isfinite(x).all(): ...`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rewire
from tests.specimens import DIM, mlp, rows


class Asking(nn.Module):
    """Pre-norm blocks of a form, one after another."""

    def __init__(self, block: Callable[[], nn.Module], depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor, flag: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if flag is None else block(x, flag)
        return x


class Clamped(nn.Module):
    """Clamps its sum where that is large, as encoders of the DETR family do in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.branch(x)
        if self.training and not (x.abs() < 2).all():
            bound = torch.finfo(x.dtype).eps * 2**53  # 2 in float64
            x = torch.clamp(x, min=-bound, max=bound)
        return x


class Switched(nn.Module):
    """Asks for a flag before its branch, which goes another way then."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = mlp(), mlp()

    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        return x + self.one(x) if flag.any() else x + self.other(x)


class Inner(nn.Module):
    """Asks for a value inside its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.branch(x)
        if (h > 0).any():
            h = h * 2
        return x + h


class Late(nn.Module):
    """Goes on with what its branch computed, if asked to, behind its sum."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.more = mlp(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.branch(x)
        x = x + torch.tanh(h)
        if not (x.abs() < 2).all():
            return x, self.more(h)
        return x, None


class Pairs(Asking):
    """Blocks that give two values."""

    def forward(self, x: Tensor, flag: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return x


def reference(net: Asking, x: Tensor, clamps: list[bool]) -> Tensor:
    """The two streams by hand: with T a clamp, x_{i+1} = x_{i-1} + F(T(x_i)) + T(x_i) - x_i."""
    newest, older, trunk = x, x, x
    for block, clamp in zip(net.blocks, clamps, strict=True):
        newest, older = older + block.branch(trunk) + (trunk - newest), newest
        bound = torch.finfo(x.dtype).eps * 2**53
        trunk = newest.clamp(-bound, bound) if clamp else newest
    merged = (newest + older) / 2
    return merged.clamp(-bound, bound) if clamps[-1] else merged


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_question_behind_the_sum(scale: float) -> None:
    """The code goes on as the tensor says, and the branches do not run again."""
    torch.manual_seed(0)
    net = Asking(Clamped).double()
    x = (torch.randn(4, DIM, dtype=torch.float64) * scale).requires_grad_()
    rev = rewire.make_reversible(net, rows(), check="raise")
    assert [len(chain) for chain in rewire.rewriting.plan_of(rev).chains] == [4]
    with torch.no_grad():  # which blocks clamp is seen on the streams
        calls: list[int] = []
        hooks = [b.branch.register_forward_hook(lambda *_: calls.append(1)) for b in rev.blocks]
        rev(x)
        assert len(calls) == 4
        for hook in hooks:
            hook.remove()
    result = rev(x)
    found = torch.autograd.grad(result.square().sum(), [x, *net.parameters()])
    expected = reference(net, x, [scale > 1] * 4)
    true = torch.autograd.grad(expected.square().sum(), [x, *net.parameters()])
    torch.testing.assert_close(result, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with rewire.store_activations(rev):
        stored = torch.autograd.grad(rev(x).square().sum(), [x, *net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(found, stored, strict=True))


def test_a_question_before_the_branch() -> None:
    """Either answer has its own branch, and a cached program of its own."""
    torch.manual_seed(0)
    net = Asking(Switched).double()
    x = rows()
    flags = [torch.tensor([False, True]), torch.tensor([False, False])]
    rev = rewire.make_reversible(net, (x, flags[0]), check="raise")
    for number in (0, 1, 0, 1):
        chain = [block.one if number == 0 else block.other for block in net.blocks]
        by_hand = rewire.ReversibleSequential(chain)
        leaves = [p for p in net.parameters() if p.requires_grad]
        found = torch.autograd.grad(rev(x, flags[number]).sum(), leaves, allow_unused=True)
        true = torch.autograd.grad(by_hand(x).sum(), leaves, allow_unused=True)
        for a, b in zip(found, true, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert sum(map(len, rev.blocks[0]._rewire.programs.values())) == 2


def test_a_question_inside_a_branch_is_refused() -> None:
    """A branch runs as a whole: the block is left alone, and the reason is told."""
    with pytest.raises(rewire.NothingToRewire, match="decides by the values of a tensor in the"):
        rewire.make_reversible(Asking(Inner).double(), rows())


def test_values_of_a_branch_are_not_computed_again() -> None:
    """A block that may ask for what is only computed inside its branch is left alone."""
    with pytest.raises(rewire.NothingToRewire, match="computed inside a residual branch"):
        rewire.make_reversible(Pairs(Late).double(), rows())


def test_infinite_values_go_on() -> None:
    """What overflows is no error: whoever scales the loss is to see it."""
    net = Asking(Clamped)
    rev = rewire.make_reversible(net, rows(), check="raise")
    x = rows().float()
    x[0, 0] = float("inf")
    rev(x).sum().backward()
    assert not all(p.grad.isfinite().all() for p in rev.parameters() if p.grad is not None)
