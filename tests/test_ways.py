"""What backward does at each residual module: reverse, checkpoint or store."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rewire
from rewire.integers import Coefficients
from rewire.links import Course
from rewire.plans import WAYS
from rewire.reversible import ReversibleSequential, store_activations
from rewire.rewriting import plan_of

RAN: Counter[str] = Counter()  # a branch's own attributes are restored after it ran again


class Mlp(nn.Module):
    """A branch that draws; it is counted how often it runs, and how far."""

    def __init__(self, dim: int = 8, hidden: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(dim), nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        RAN["begun"] += 1
        hidden = F.dropout(F.gelu(self.up(self.norm(x))), self.dropout)
        result: Tensor = self.down(hidden)
        RAN["ended"] += 1
        return result


def chain(ways: tuple[str, ...], dropout: float = 0.3, **options: Any) -> ReversibleSequential:
    torch.manual_seed(0)
    branches = [Mlp(dropout=dropout) for _ in ways]
    return ReversibleSequential(branches, check="raise", ways=ways, **options)


def gradients(net: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()]))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(2))
ways = st.lists(st.sampled_from(WAYS), min_size=1, max_size=6).map(tuple)


@settings(deadline=None, max_examples=25)
@given(ways, st.sampled_from(["re2", "bdia(1/2)", "dr2(0.9, 0.1)"]), st.sampled_from([1, 3]))
def test_gradients_are_those_of_the_stored_twin(
    ways: tuple[str, ...], coupling: str, chunks: int
) -> None:
    net = chain(ways, coupling=coupling, chunks=chunks)
    if chunks > 1:  # parts draw by themselves, in backward as in forward
        net.eval()
    found = gradients(net, X)
    with store_activations(net):
        assert same(found, gradients(net, X))


def test_the_function_does_not_depend_on_the_ways() -> None:
    nets = [chain(ways) for ways in itertools.product(WAYS, repeat=3)]
    first = gradients(nets[0], X)
    assert all(same(first, gradients(net, X)) for net in nets[1:])


@pytest.mark.parametrize(
    ("way", "begun", "ended"),
    [("reverse", 2, 2), ("checkpoint", 2, 1), ("select", 2, 1), ("store", 1, 1)],
)
def test_a_branch_runs_again_as_far_as_it_must(way: str, begun: int, ended: int) -> None:
    net = chain((way,) * 4)
    RAN.clear()
    gradients(net, X)
    assert {"begun": 4 * begun, "ended": 4 * ended} == RAN


@pytest.mark.parametrize("ways", [("store", "reverse", "store"), ("reverse", "checkpoint") * 2])
def test_double_backward_and_a_graph_kept(ways: tuple[str, ...]) -> None:
    net = chain(ways, dropout=0.0)

    def second() -> list[Tensor]:
        x = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).tanh().sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), [x, *net.parameters()]))

    found = second()
    with store_activations(net):
        assert same(found, second())
    loss = net(X).square().sum()
    once, again = (
        torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for _ in range(2)
    )
    assert same(list(once), list(again))


def test_a_kept_stream_changed_after_forward_is_told() -> None:
    net = chain(("reverse", "checkpoint", "reverse", "reverse"))
    seen: list[Tensor] = []
    net.get_submodule("0").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss = net(X.clone().requires_grad_()).sum()
    with torch.no_grad():
        seen[0].add_(1)  # what the second module has kept
    with pytest.raises(rewire.StreamMismatch, match="input of 1 was changed in place"):
        loss.backward()


@pytest.mark.parametrize("depth", [4, 12])
def test_what_each_way_keeps(depth: int) -> None:
    """Beyond the two streams of a reversed chain: a stream for each module, or its activations."""
    x = torch.randn(4, 64, 64)

    def costs(*ways: str) -> rewire.Profile:
        torch.manual_seed(0)
        net = ReversibleSequential([Mlp(64, 512) for _ in ways], ways=ways)
        return rewire.profile(net, x)

    reverse, checkpoint, select, store = (costs(*[way] * depth) for way in WAYS)
    kept = (depth - 1) * x.nbytes  # the first module's older stream is its input
    assert abs(checkpoint.saved_bytes - reverse.saved_bytes - kept) < 2 * x.nbytes
    assert store.saved_bytes > checkpoint.saved_bytes + depth * 8 * x.nbytes
    products = depth * 8 * x.nbytes  # of `up`; that of `down` is needed by nobody
    assert abs(select.saved_bytes - checkpoint.saved_bytes - products) < 2 * x.nbytes
    last = costs(*["reverse"] * (depth - 1), "store")
    # Its activations are needed at once anyway; its older stream is not rebuilt in place.
    assert last.peak_bytes <= reverse.peak_bytes + x.nbytes
    assert max(one.left_bytes for one in (reverse, checkpoint, store, last)) == 0


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_models_take_ways_in_their_plan(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=3).train()
    plan = rewire.plan(model)
    chains = [
        replace(chain, ways=tuple(itertools.islice(itertools.cycle(WAYS[::-1]), len(chain))))
        for chain in plan.chains
    ]
    rev = rewire.make_reversible(model, plan=replace(plan, chains=chains), check="raise")
    assert plan_of(rev).chains == chains
    x = torch.randn(2, 3, 64 if name == "resnet18" else 224, 64 if name == "resnet18" else 224)
    found = gradients(rev, x)
    with store_activations(rev):
        assert same(found, gradients(rev, x))
    rewire.save(rev, tmp_path / "rev.pt")
    assert plan_of(rewire.load(tmp_path / "rev.pt")).chains == chains


class Activated(nn.Module):
    """relu(x + F(x)), twice: the activation is on the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return x


@pytest.mark.parametrize("ways", list(itertools.product(WAYS, repeat=4))[::9])
def test_activations_on_the_trunk_and_several_backwards(ways: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x = Activated().double(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    plan = rewire.plan(model, x)
    (found,) = plan.chains
    plan = replace(plan, chains=[replace(found, ways=ways[: len(found)])])
    rev = rewire.make_reversible(model, plan=plan, check="raise")
    with store_activations(rev):
        expected = gradients(rev, x.detach())
    loss = rev(x).square().sum()
    leaves = [x, *rev.parameters()]
    for _ in range(3):
        assert same(list(torch.autograd.grad(loss, leaves, retain_graph=True)), expected)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("kept", [("store", "store"), ("checkpoint", "store")])
def test_a_branch_that_does_not_repeat_itself_is_told_where_streams_are_kept(
    precision: str, kept: tuple[str, ...]
) -> None:
    class Forgetful(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            RAN["forgetful"] += 1
            return super().forward(x) * (1 + 0.1 * RAN["forgetful"])

    torch.manual_seed(0)
    RAN.clear()
    branches = [Mlp(), Mlp(), Mlp(), Forgetful(), Mlp()]
    ways = (*kept, "reverse", "reverse", "reverse")
    net = ReversibleSequential(branches, check="raise", ways=ways, precision=precision)
    with pytest.raises(rewire.NotRepeatable, match="rebuilt in backward"):
        net(X.clone().requires_grad_()).sum().backward()


def test_the_input_may_be_written_to_behind_a_first_module_that_is_kept() -> None:
    net = chain(("checkpoint", "reverse", "reverse"), precision="fast")
    x = X.clone().requires_grad_()
    start = x * 1
    loss = net(start).sum()
    with torch.no_grad():
        start.zero_()
    loss.backward()


def test_coefficients_are_of_the_stream() -> None:
    seen = []

    class Watching(rewire.Re2):
        def coefficients(self, x: Tensor, training: bool) -> Coefficients:
            seen.append((x.dtype, float(x.detach().min()) < 0))
            return super().coefficients(x, training)

    model, x = Activated().bfloat16(), torch.randn(9, 6, dtype=torch.bfloat16)
    rewire.make_reversible(model, x, coupling=Watching())(x)
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert any(negative for _, negative in seen)  # sums, not what the activation makes of them


def test_products_are_computed_once() -> None:
    net = chain(("reverse", "select"), dropout=0.0).eval()

    def products(net: ReversibleSequential) -> int:
        with FlopCounterMode(display=False) as counter:
            net(X).square().sum().backward()
        return counter.get_total_flops()

    with store_activations(net):
        least = products(net)
    forward = 4 * X.numel() * 32  # of both linear layers of one branch
    assert products(net) == least + forward


@pytest.mark.parametrize("inplace", [False, True])
def test_products_that_are_written_to_or_drawn(inplace: bool) -> None:
    """What is changed in place is computed again, and attention's dropout is drawn again."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            qkv = F.relu(self.qkv(x), inplace=inplace)
            q, k, v = qkv.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
            plain = F.scaled_dot_product_attention(q, k, v)
            return self.out((mixed + plain).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    net = ReversibleSequential([Attention() for _ in range(3)], check="raise", ways=("select",) * 3)
    found = gradients(net, X)
    with store_activations(net):
        assert same(found, gradients(net, X))


def test_ways_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="ways="):
        Course("", ("0", "1"), ways=("reverse",))
    with pytest.raises(ValueError, match="ways="):
        Course("", ("0",), ways=("forget",))
