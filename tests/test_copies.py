"""Copies of rewired models, and changes made to them: all stay equal to their plain twins."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rewire
from tests.specimens import DIM, mlp, rows
from tests.test_rewired import TOLERANCE, Net, Normed, Plain, distance, rewired, run, twin


def saved(rev: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(rev, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda rev: pickle.loads(pickle.dumps(rev)),
    "torch.save": saved,
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("fresh", [False, True])
def test_copies(name: str, fresh: bool) -> None:
    rev, x = rewired()
    expected = twin(rev, x)
    if not fresh:
        run(rev, x)
    other = COPIES[name](rev)
    assert {id(p) for p in other.parameters()}.isdisjoint(id(p) for p in rev.parameters())
    assert distance(run(other, x), expected) < TOLERANCE
    with torch.no_grad():
        other.head.weight.zero_()
    assert distance(run(rev, x), expected) < TOLERANCE
    with rewire.store_activations(other):
        assert not any(c.course.stored for c in reversibles(rev))


def reversibles(model: nn.Module) -> list[rewire.ReversibleSequential]:
    return [m for m in model.modules() if isinstance(m, rewire.ReversibleSequential)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.half])
def test_other_dtypes(dtype: torch.dtype) -> None:
    rev, x = rewired(Net(Plain))
    rev = copy.deepcopy(rev).to(dtype).to("cpu")
    found = run(rev, x := x.detach().to(dtype).requires_grad_())
    assert {grad.dtype for grad in found} == {dtype}
    assert distance(found[:1], twin(rev, x)[:1]) == 0.0
    scale = max(float(g.abs().max()) for g in found)
    assert distance(found, twin(rev, x)) < scale * (1e-4 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrizations(when: str) -> None:
    model = Net(Plain).double()
    rev, x = (model, rows().requires_grad_()) if when == "before" else rewired(model)
    if when == "after":
        run(rev, x)
    for name in ("blocks.0.body.1", "blocks.2.body.3"):
        parametrizations.weight_norm(rev.get_submodule(name))
    parametrizations.spectral_norm(rev.get_submodule("blocks.1.body.1"))
    rev = rewire.make_reversible(rev, x) if when == "before" else rev
    other = copy.deepcopy(rev)
    assert distance(run(rev, x), twin(other, x)) < TOLERANCE
    assert distance(rev.buffers(), other.buffers()) < TOLERANCE


def test_tied_weights_and_replaced_children() -> None:
    model = Net(Normed).double()
    model.blocks[2].body.weight = model.blocks[0].body.weight
    rev, x = rewired(model)
    assert rev.blocks[2].body.weight is rev.blocks[0].body.weight is model.blocks[0].body.weight
    assert distance(run(rev, x), twin(rev, x)) < TOLERANCE
    for block in rev.blocks:
        block.norm = nn.BatchNorm1d(6).double()
    other = copy.deepcopy(rev)
    assert distance(run(rev, x), twin(other, x)) < TOLERANCE
    assert distance(rev.buffers(), other.buffers()) < TOLERANCE


class Scaled(nn.Module):
    """With a parameter of its own, as layer scale has."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gamma = mlp(), nn.Parameter(torch.rand(DIM))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.body(x).tanh()


@pytest.mark.parametrize("lent", ["tensors", "parameters", "scales only"])
def test_functional_call(lent: str) -> None:
    rev, x = rewired(Net(Scaled))
    fast = {n: (1.2 * p).detach().requires_grad_() for n, p in rev.named_parameters()}
    if lent == "parameters":  # an average of weights, say
        fast = {name: nn.Parameter(p.detach()) for name, p in fast.items()}
    if lent == "scales only":
        fast = {name: p for name, p in fast.items() if "gamma" in name}

    def outer() -> list[Tensor]:
        out = torch.func.functional_call(rev, fast, (x,))
        return list(torch.autograd.grad(out.sin().sum(), list(fast.values())))

    found = outer()
    with rewire.store_activations(rev):
        assert distance(found, outer()) < TOLERANCE


@pytest.mark.parametrize("name", ["blocks.1.gamma", "blocks.1.body.1.weight"])
def test_a_parameter_changed_before_backward(name: str) -> None:
    rev, x = rewired(Net(Scaled))
    loss = rev(x).sum()
    with torch.no_grad():
        rev.get_parameter(name).mul_(2)
    with pytest.raises(rewire.NotRepeatable, match=r"blocks\.1.*changed in place"):
        loss.backward()


@pytest.mark.parametrize("held", [False, True])
def test_a_graph_cut_between_homes(held: bool) -> None:
    """The older stream would still lead behind the cut."""
    rev, x = rewired(Net(Scaled))
    kept: list[Tensor] = []

    def cut(x: Tensor) -> Tensor:
        kept.append(x if held else x.detach())
        return x.detach()

    with pytest.raises(rewire.StreamMismatch, match=r"blocks\.2.*blocks\.1"):
        rev(x, between=cut)


def test_double_backward() -> None:
    rev, x = rewired()

    def second() -> list[Tensor]:
        torch.manual_seed(5)
        wrt = [x, *rev.blocks.parameters()]
        first = torch.autograd.grad(rev(x).sin().sum(), wrt, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), wrt))

    found = second()
    with rewire.store_activations(rev):
        assert distance(found, second()) < 1e-10


def test_neither_model_reaches_the_other() -> None:
    model = Net(Normed).double()
    rev, x = rewired(model)
    assert rev.describe() == "4 blocks"
    rev.eval()
    assert all(m.training for m in model.modules())
    model.eval(), rev.train()
    assert not any(m.training for m in model.modules())
    seen: list[Any] = []
    rev.blocks[0].body.register_forward_hook(lambda *_: seen.append(1))
    rev.blocks[1].extra = True
    model(x)
    assert not seen
    assert not hasattr(model.blocks[1], "extra")
    rev(x).sum().backward()
    assert model.head.weight.grad is rev.head.weight.grad is not None
