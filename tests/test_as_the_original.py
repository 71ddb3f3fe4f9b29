"""With x_{i+1} = x_i + F_i(x_i) as the coupling, a rewired network is the original.

An oracle for the compiler: the stored twin runs the same programs, the original does not.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from benchmarks.outcomes import AsOriginal
from rewire.meters import LiveBytes
from rewire.profiling import no_collection
from tests.specimens import DIM, mlp, rows

Body = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """A residual module whose code is a function."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()
        self.lin = nn.Linear(DIM, DIM)
        self.body = body
        self.flag = True

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class Parts(nn.Module):
    """A child whose result has as many parts as the sequence is long, and a truth value."""

    def forward(self, x: Tensor) -> tuple[list[Tensor], bool]:
        return list(x.unbind(1)), x.shape[1] > 5


def relu_then_question(block: Block, x: Tensor) -> Tensor:
    x = torch.relu(x + block.f(x))
    if (x > 1).any():
        x = torch.tanh(x)
    return x


def zeroed(block: Block, x: Tensor) -> Tensor:
    x = torch.relu(x + block.f(x))
    if x.isinf().any():
        x = torch.zeros_like(x)
    return x


def clamped_between(block: Block, x: Tensor) -> Tensor:
    x = x + block.f(x)
    if not (x.abs() < 2).all():
        x = x.clamp(-2, 2)
    return x + block.g(x)


def clamped_behind(block: Block, x: Tensor) -> Tensor:
    x = x + block.f(x)
    if (x > 2).any():
        x = x.clamp(max=2)
    return x


def two_questions(block: Block, x: Tensor) -> Tensor:
    y = x + block.f(x) if (x > 1).any() else x + block.g(x)
    if (y.abs() > 2).any():
        y = y.clamp(-2, 2)
    return y


def dropped_around(block: Block, x: Tensor) -> Tensor:
    h = nn.functional.dropout(x, 0.2, block.training)
    if (x > 1).any():
        h = h * 2
    return x + nn.functional.dropout(block.f(h), 0.2, block.training)


def asserting(block: Block, x: Tensor) -> Tensor:
    x = x + block.f(x)
    assert not x.isnan().any(), "a number was expected"
    return x


def unbound(block: Block, x: Tensor) -> Tensor:
    parts = [part * number for number, part in enumerate(x.unbind(1))]
    return x + block.lin(torch.stack(parts).mean(0)).unsqueeze(1)


def split_inside(block: Block, x: Tensor) -> Tensor:
    parts = block.f(x).split(2, 1)
    return x + torch.cat([part * (number + 1) for number, part in enumerate(parts)], 1)


def chunked(block: Block, x: Tensor) -> Tensor:
    first, second = block.f(x).chunk(2, -1)
    return x + torch.cat([second, first], -1)


FORMS: dict[str, Body] = {
    form.__name__: form
    for form in (
        relu_then_question,
        zeroed,
        clamped_between,
        clamped_behind,
        two_questions,
        dropped_around,
        asserting,
        unbound,
        split_inside,
        chunked,
    )
}


def rewired(body: Body, example: Tensor) -> tuple[nn.Module, nn.Module]:
    """A model of three blocks, and what rewiring makes of it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(body) for _ in range(3))).double()
    try:
        return model, rewire.make_reversible(model, example, coupling=AsOriginal(), check="raise")
    except rewire.NothingToRewire:
        return model, model  # left alone is right, too


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = model(x)
    wrt = [x, *model.parameters()]
    found = torch.autograd.grad(y.sin().sum(), wrt, allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in found)]


@pytest.mark.parametrize("scale", [0.1, 3.0], ids=["small first", "large first"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_function(form: str, scale: float) -> None:
    """Whatever the values and sizes, in whatever order they come."""
    torch.manual_seed(2)
    model, rev = rewired(FORMS[form], rows() * scale)
    for training in (True, False):
        model.train(training)
        rev.train(training)
        for size, length in ((0.1, 6), (3.0, 6), (30.0, 6), (1.0, 9), (0.1, 2), (3.0, 5)):
            x = torch.randn(4, length, DIM, dtype=torch.float64) * size
            for a, b in zip(outputs(rev, x), outputs(model, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("form", sorted(FORMS.keys() - {"relu_then_question", "zeroed"}))
def test_is_rewired(form: str) -> None:
    """The others are refused: their activation is in two halves, one of them conditional."""
    model, rev = rewired(FORMS[form], rows() * 0.1)
    assert rev is not model


def test_the_codes_own_error() -> None:
    """An assertion on values is the user's, and fails as the user wrote it."""
    _, rev = rewired(asserting, rows())
    rev(rows())
    with pytest.raises(AssertionError, match="a number was expected"):
        rev(rows() * torch.nan)


def test_a_result_built_otherwise_is_refused() -> None:
    """What a child gave when its caller was traced is relied on, and said so."""

    def body(block: Block, x: Tensor) -> Tensor:
        parts, long = block.parts(x)
        total = sum(parts[1:], parts[0])
        return x + block.lin(total * 2 if long else total).unsqueeze(1)

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(body) for _ in range(2))).double()
    for block in model:
        block.parts = Parts()
    rev = rewire.make_reversible(model, rows(), coupling=AsOriginal())
    torch.testing.assert_close(rev(rows()[:2]).shape, (2, 6, DIM))
    with pytest.raises(rewire.CannotTrace, match="built otherwise"):
        rev(torch.randn(2, 4, DIM, dtype=torch.float64))


def test_a_child_handed_to_another() -> None:
    """It is looked up by its name when the code runs: replaced ones count."""

    class Mix(nn.Module):
        def forward(self, child: nn.Module, x: Tensor) -> Tensor:
            return torch.tanh(child(x))

    def body(block: Block, x: Tensor) -> Tensor:
        return x + block.mix(block.lin, x)

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(body) for _ in range(2))).double()
    for block in model:
        block.mix = Mix()
    rev = rewire.make_reversible(model, rows(), coupling=AsOriginal(), check="raise")
    x = rows()
    for _ in range(2):
        for a, b in zip(outputs(rev, x), outputs(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
        new = nn.Linear(DIM, DIM).double()
        model[0].lin = rev[0].lin = new


class Reading(nn.Module):
    """A child that reads a number of whoever calls it."""

    def forward(self, caller: nn.Module, x: Tensor) -> Tensor:
        return x * caller.scale


def test_a_home_that_hands_itself_to_a_child() -> None:
    def body(block: Block, x: Tensor) -> Tensor:
        return x + block.reading(block, block.f(x))

    torch.manual_seed(0)
    model = nn.Sequential(*(Block(body) for _ in range(2))).double()
    for block in model:
        block.reading, block.scale = Reading(), 0.5
    rev = rewire.make_reversible(model, rows(), coupling=AsOriginal(), check="raise")
    x = rows()
    for a, b in zip(outputs(rev, x), outputs(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


class Looped(nn.Module):
    """The residual loop in the root's own code, with a question in the middle or without."""

    def __init__(self, depth: int, asks: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.asks = asks

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x + layer(x).sin()
            if self.asks and number == len(self.layers) // 2 and x.isnan().any():
                x = torch.zeros_like(x)
        return x


def test_a_question_keeps_nothing_alive() -> None:
    """Only what the code behind it reads, or its variables hold, goes on."""

    def peak(depth: int, asks: bool) -> int:
        model: Any = Looped(depth, asks).requires_grad_(False)
        x = torch.randn(256, 64).requires_grad_()
        rev = rewire.make_reversible(model, x, check="raise")
        rev(x).sum().backward()
        gc.collect()
        with no_collection(), LiveBytes() as meter:
            rev(x)
        return meter.peak // x.nbytes

    assert peak(24, True) <= peak(8, True)
    assert peak(8, True) <= peak(8, False) + 2
