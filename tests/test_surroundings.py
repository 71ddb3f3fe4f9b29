"""ReversibleSequential around, inside and under other machinery of torch."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from rewire.reversible import ReversibleSequential
from tests.test_reversible import (
    TOLERANCE,
    Function,
    by_hand,
    chain,
    distance,
    gradients,
    mlp,
    rows,
    stored,
    two_streams,
)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_checkpoint_around(reentrant: bool, drop: float) -> None:
    net, x = chain(3, lambda: nn.Sequential(mlp(), nn.Dropout(drop))), rows()
    wrt = [x, *net.parameters()]
    seen = []

    def run(x: Tensor) -> Tensor:
        out = checkpoint(net, x.cos(), use_reentrant=reentrant)
        seen.append(out)
        return out * 2

    torch.manual_seed(3)
    run(x).sin().sum().backward()
    found = [seen[0].detach() * 2, *(t.grad for t in wrt)]
    assert distance(found, gradients(lambda x: 2 * by_hand(net)(x.cos()), wrt, x)) < TOLERANCE


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside(reentrant: bool) -> None:
    parts = [mlp() for _ in range(4)]

    def checkpointed(part: nn.Module) -> Function:
        return lambda x: checkpoint(part, x, use_reentrant=reentrant)

    net, x = ReversibleSequential([checkpointed(part) for part in parts]), rows()
    wrt = [x, *(p for part in parts for p in part.parameters())]

    def run(function: Function) -> list[Tensor]:
        for t in wrt:
            t.grad = None
        function(x).sin().sum().backward()
        return [t.grad for t in wrt]

    assert distance(run(net), run(lambda x: two_streams(parts, x))) < TOLERANCE


def test_a_chain_inside_a_chain() -> None:
    net, x = chain(3, lambda: nn.Sequential(chain(3), mlp())), rows()
    wrt = [x, *net.parameters()]
    assert distance(gradients(net, wrt, x), gradients(stored(net), wrt, x)) < TOLERANCE


def test_saved_tensor_hooks_outside_and_forbidden() -> None:
    net, x = chain(3), rows()
    wrt = [x, *net.parameters()]
    expected = gradients(by_hand(net), wrt, x)
    for context in (
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        contextlib.nullcontext(),
    ):
        with context:
            assert distance(gradients(net, wrt, x), expected) < TOLERANCE


def test_functional_transforms() -> None:
    net, batch = chain(4), rows(5, 3).detach()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(function: Function) -> Any:
        return torch.func.vmap(torch.func.grad(function), (None, 0))(parameters, batch)

    found = loss(lambda p, x: torch.func.functional_call(net, p, (x,)).sin().sum())
    for number, x in enumerate(batch):
        expected = gradients(by_hand(net), list(net.parameters()), x)[1:]
        assert distance([g[number] for g in found.values()], expected) < TOLERANCE
    assert distance(torch.func.vmap(net)(batch), map(net, batch)) < TOLERANCE
    jacobians = torch.func.jacrev(net)(batch[0]), torch.func.jacfwd(net)(batch[0])
    assert distance(jacobians[:1], jacobians[1:]) < TOLERANCE


def test_functional_call_outside_transforms() -> None:
    net, x = chain(4), rows()
    fast = {name: (1.3 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    out = torch.func.functional_call(net, fast, (x,))
    found = torch.autograd.grad(out.sin().sum(), [x, *fast.values()])
    other = copy.deepcopy(net)
    other.load_state_dict(fast)
    assert distance(found, gradients(by_hand(other), [x, *other.parameters()], x)[1:]) < TOLERANCE


def test_forward_mode() -> None:
    net, x = chain(3), rows()
    expected = torch.func.jvp(net, (x.detach(),), (torch.ones_like(x),))[1]
    with forward_ad.dual_level():
        out = net(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        assert distance([forward_ad.unpack_dual(out).tangent], [expected]) < TOLERANCE
