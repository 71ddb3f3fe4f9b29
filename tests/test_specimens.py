"""Every specimen through every stage: plan, rewriting, gradients, memory left."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.structure import tensors_of
from tests.specimens import SPECIMENS

REVERSIBLE = [name for name, specimen in SPECIMENS.items() if specimen.chains]
# float64 with up to six modules: each inverse adds one rounding, 1e-16 of the stream.
TOLERANCE = 1e-12


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A specimen in train mode with its input."""
    torch.manual_seed(0)
    specimen = SPECIMENS[name]
    return specimen.make().double().train(), specimen.inputs().requires_grad_()


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of the input and all parameters, with a fixed seed and every output used."""
    torch.manual_seed(7)
    outputs = [t for t in tensors_of(model(x)) if t.is_floating_point()]
    loss = sum(((number + 1) * out.sin()).sum() for number, out in enumerate(outputs))
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros(()) if grad is None else grad for grad in found]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference relative to the largest gradient."""
    scale = max(float(b.abs().max()) for b in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale


@pytest.mark.parametrize("name", SPECIMENS)
def test_plan(name: str) -> None:
    model, x = made(name)
    plan = rewire.plan(model, x)
    assert tuple(len(chain) for chain in plan.chains) == SPECIMENS[name].chains
    assert set(SPECIMENS[name].reasons) <= {row.reason for row in plan.skipped}
    assert all(row.detail and row.line for row in plan.skipped)
    assert rewire.Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize("name", REVERSIBLE)
def test_gradients_equal_the_plain_twin(name: str) -> None:
    model, x = made(name)
    rev = rewire.make_reversible(model, x)
    found = gradients(rev, x)
    with rewire.store_activations(rev):
        expected = gradients(rev, x)
    assert distance(found, expected) < TOLERANCE


@pytest.mark.parametrize("name", REVERSIBLE)
def test_two_streams_by_hand(name: str) -> None:
    """The plain twin is the function the paper defines: here for the specimens F(x) is easy for."""
    if name not in ("plus", "dropout", "shared"):
        assert SPECIMENS[name].chains
        return
    model, x = made(name)
    rev = rewire.make_reversible(model, x)
    blocks = [model.block] * 3 if name == "shared" else list(model.blocks)  # type: ignore[union-attr, arg-type]
    torch.manual_seed(3)
    newest = older = x
    for block in blocks:
        newest, older = older + (block(newest) - newest), newest
    expected = (newest + older) / 2
    torch.manual_seed(3)
    assert torch.allclose(rev(x), expected, atol=1e-12)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_other_batch_and_length(name: str) -> None:
    model, x = made(name)
    rev = rewire.make_reversible(model, x)
    other = torch.cat([x, x[:1]]).detach()
    if name != "tuples and masks":  # its mask fixes the length
        other = other[:, :, :5] if other.dim() == 4 else other[:, :5]
    other.requires_grad_()
    found = gradients(rev, other)
    with rewire.store_activations(rev):
        assert distance(found, gradients(rev, other)) < TOLERANCE


@pytest.mark.parametrize("name", REVERSIBLE)
def test_the_original_is_left_alone(name: str) -> None:
    model, x = made(name)
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    rev = rewire.make_reversible(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert distance(gradients(model, x), gradients(before, x)) == 0.0
    assert list(rev.state_dict()) == list(model.state_dict())
    pairs = zip(rev.named_parameters(), model.named_parameters(), strict=True)
    assert all(a == b and p is q for (a, p), (b, q) in pairs)
    pairs = zip(rev.named_buffers(), model.named_buffers(), strict=True)
    assert all(a == b and p is q for (a, p), (b, q) in pairs)
    assert isinstance(rev, type(model))
    assert any(isinstance(module, rewire.ReversibleSequential) for module in rev.modules())


@pytest.mark.parametrize("name", REVERSIBLE)
def test_nothing_is_left(name: str) -> None:
    model, x = made(name)
    rev = rewire.make_reversible(model, x)
    gradients(rev, x)
    gc.collect()
    gc.disable()
    try:
        before = {id(t) for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)}
        gradients(rev, x)
        after = [t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)]
        assert [list(t.shape) for t in after if id(t) not in before] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("name", REVERSIBLE)
def test_eval_without_gradients(name: str) -> None:
    model, x = made(name)
    rev = rewire.make_reversible(model, x).eval()
    with torch.no_grad():
        expected = tensors_of(rev(x))
    with torch.inference_mode():
        found = tensors_of(rev(x))
    recorded = tensors_of(rev(x))
    for a, b, c in zip(found, expected, recorded, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(b, c, rtol=1e-12, atol=1e-12)
