"""torch.compile around, and inside, a rewired model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.reversible import ReversibleSequential
from tests.specimens import DIM, Loop, mlp, rows

TOLERANCE = 1e-12


class Block(nn.Module):
    """Pre-norm, two residual modules."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.body = nn.Linear(DIM, DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).tanh()
        return x + self.body(x)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(function: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = function(x).sin().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def rewired() -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A rewired model, its input, and its twin's gradients."""
    torch.manual_seed(0)
    x = rows().requires_grad_()
    rev = rewire.make_reversible(Loop(Block).double(), x)
    with rewire.store_activations(rev):
        expected = gradients(rev, rev, x)
    return rev, x, expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_model(backend: str) -> None:
    rev, x, expected = rewired()
    compiled = torch.compile(rev, backend=backend)
    assert distance(gradients(compiled, rev, x), expected) < TOLERANCE
    assert distance(gradients(compiled, rev, x), expected) < TOLERANCE
    longer = torch.cat([x, x], 1).detach().requires_grad_()
    with rewire.store_activations(rev):
        expected = gradients(rev, rev, longer)
    assert distance(gradients(compiled, rev, longer), expected) < TOLERANCE


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_place_of_the_model(backend: str) -> None:
    rev, x, expected = rewired()
    rev.compile(backend=backend)
    assert distance(gradients(rev, rev, x), expected) < TOLERANCE


def test_compiled_before_the_first_run_without_gradients() -> None:
    rev, x, _ = rewired()
    compiled = torch.compile(rev, backend="aot_eager")
    with torch.no_grad():
        expected = rev(x)
        assert torch.allclose(compiled(x), expected, atol=TOLERANCE)
    assert distance(gradients(compiled, rev, x), gradients(rev, rev, x)) < TOLERANCE


@pytest.mark.parametrize("whole", [False, True])
def test_a_chain_by_hand(whole: bool) -> None:
    torch.manual_seed(0)
    net, x = ReversibleSequential([mlp().double() for _ in range(3)]), rows().requires_grad_()
    with rewire.store_activations(net):
        expected = gradients(net, net, x)
    compiled = torch.compile(net, backend="aot_eager")
    if not whole:
        branches = [torch.compile(branch, backend="aot_eager") for branch in net.children()]
        compiled = ReversibleSequential(branches)
    assert distance(gradients(compiled, net, x), expected) < TOLERANCE


@pytest.mark.slow
def test_inductor() -> None:
    rev, x, expected = rewired()
    compiled = torch.compile(rev)
    assert distance(gradients(compiled, rev, x), expected) < 1e-10


def test_an_exported_model_computes_the_same_at_another_batch_size() -> None:
    rev = rewire.make_reversible(Loop(Block, 3).double(), rows()).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        exported = torch.export.export(rev, (rows(),), dynamic_shapes=shapes).module()
        more = torch.cat([rows(), rows()])
        assert torch.equal(exported(more), rev(more))


def test_a_jit_trace_is_refused_in_words() -> None:
    rev = rewire.make_reversible(Loop(Block, 3).double(), rows()).eval()
    with pytest.raises(rewire.RewireError, match=r"Use torch\.export"):
        torch.jit.trace(rev, rows())
