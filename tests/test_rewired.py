"""Rewired models against their plain twins: the user's own loops, hooks, copies and errors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewire
from tests.specimens import DIM, SPECIMENS, Dropped, Loop, Positions, Shared, mlp, rows

TOLERANCE = 1e-11
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": torch.clone,
    "cast": lambda x: x.float().double(),
    "scale": lambda x: x * 1.0,
    "in place": lambda x: x.mul_(2),
    "flip": lambda x: x.flip(0),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 1),
    "flattened": lambda x: x.reshape(-1, DIM),
    "there and back": lambda x: x.transpose(0, 1).transpose(1, 0).view(-1, DIM).view(x.shape),
    "unsqueezed": lambda x: x.unsqueeze(0),
}


class Net(nn.Module):
    """A user's loop with the liberties that users take."""

    def __init__(self, block: Callable[[], nn.Module] = Dropped, depth: int = 4) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 2)
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(
        self,
        x: Tensor,
        keep: Iterable[int] | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
        hidden: bool = False,
    ) -> Any:
        x = self.stem(x)
        states = [x]
        for number in range(len(self.blocks)) if keep is None else keep:
            x = self.blocks[number](x)
            if between is not None and number == 1:
                x = between(x)
            states.append(x)
        return (self.head(x), states) if hidden else self.head(x)

    def describe(self) -> str:
        return f"{len(self.blocks)} blocks"


def rewired(model: nn.Module | None = None) -> tuple[Any, Tensor]:
    """A rewired model and its input."""
    torch.manual_seed(0)
    model = (Net() if model is None else model).double()
    x = rows().requires_grad_()
    return rewire.make_reversible(model, x), x


def run(model: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    """The output and all gradients, from a fixed seed."""
    torch.manual_seed(5)
    out = model(x, **kwargs)
    tensors = [out] if isinstance(out, Tensor) else [out[0], *out[1]]
    loss = sum((number + 1) * t.sin().sum() for number, t in enumerate(tensors))
    wrt = [x, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(loss, wrt, allow_unused=True)
    return [tensors[0].detach(), *(torch.zeros(()) if g is None else g for g in grads)]


def twin(model: nn.Module, x: Tensor, **kwargs: Any) -> list[Tensor]:
    with rewire.store_activations(model):
        return run(model, x, **kwargs)


def distance(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max((float((a.double() - b.double()).abs().max()) for a, b in pairs), default=0.0)


# ---- the user's own loop -----------------------------------------------------------------


@pytest.mark.parametrize("keep", [(0,), (0, 1), (0, 2, 3), (1, 2, 3), (0, 1, 2), (3,), (), (0, 3)])
def test_layer_drop_and_early_stop(keep: tuple[int, ...]) -> None:
    rev, x = rewired()
    for before in (None, (0, 1), (0,)):  # a run that ended early leaves no trace
        rev(x, keep=before)
        assert distance(run(rev, x, keep=keep), twin(rev, x, keep=keep)) < TOLERANCE


def test_hidden_states_in_the_loss() -> None:
    rev, x = rewired()
    assert distance(run(rev, x, hidden=True), twin(rev, x, hidden=True)) < TOLERANCE


@pytest.mark.parametrize("name", BETWEEN)
def test_no_stream_between_homes(name: str) -> None:
    rev, x = rewired()
    with pytest.raises(rewire.StreamMismatch) as caught:
        rev(x, between=BETWEEN[name])
    assert "blocks.1.body" in str(caught.value)
    assert name == "in place" or "blocks.2.body" in str(caught.value)
    assert distance(run(rev, x), twin(rev, x)) < TOLERANCE


def test_swapped_blocks() -> None:
    rev, x = rewired()
    with pytest.raises(rewire.StreamMismatch, match=r"blocks\.\d.*blocks\.\d"):
        rev(x, keep=(0, 2, 1, 3))


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_the_whole_stream(name: str) -> None:
    rev, x = rewired()
    view = VIEWS[name]
    assert distance(run(rev, x, between=view), twin(rev, x, between=view)) < TOLERANCE


@pytest.mark.parametrize("block", [0, 1])
def test_a_state_changed_in_place_after_it_was_read(block: int) -> None:
    rev, x = rewired()
    out, states = rev(x, keep=(0, 1, 2), hidden=True)
    states[block + 1].mul_(3)
    if block == 0:  # not held: it is computed again, and right
        out.sum().backward()
        assert x.grad is not None
        return
    with pytest.raises(rewire.RewireError, match=rf"blocks\.{block}.*changed in place"):
        out.sum().backward()


def test_an_exception_between_homes_and_a_retry() -> None:
    rev, x = rewired()

    def fail(_: Tensor) -> Tensor:
        raise RuntimeError("planted")

    expected = twin(rev, x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="planted"):
            rev(x, between=fail)
        assert distance(run(rev, x), expected) < TOLERANCE


def test_interleaved_forwards() -> None:
    rev, x = rewired(Net(Plain))
    other = x.detach().cos().requires_grad_()

    def both() -> list[Tensor]:
        a, b = rev.stem(x), rev.stem(other)
        for block in rev.blocks:
            a, b = block(a), block(b)
        wrt = [x, other, *rev.blocks.parameters()]
        return list(torch.autograd.grad((a * 2 + b).sin().sum(), wrt))

    found = both()
    with rewire.store_activations(rev):
        assert distance(found, both()) < TOLERANCE


class Plain(nn.Module):
    """x + F(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Normed(nn.Module):
    """With statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.body(x)).tanh()


def test_two_threads_from_the_first_run_on() -> None:
    rev, x = rewired(Net(Plain))
    expected = twin(rev, x)
    rev = copy.deepcopy(rev)  # no program is traced yet
    wrt = [x, *rev.parameters()]
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        for _ in range(3):
            found[number] = list(torch.autograd.grad(rev(x).sin().sum(), wrt))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert max(distance(grads, expected[1:]) for grads in found.values()) < TOLERANCE


@pytest.mark.parametrize("when", ["before rewiring", "after"])
def test_hooks_on_blocks(when: str) -> None:
    model, seen = Net().double(), []

    def hook(model: Any) -> None:
        for block in model.blocks:
            block.register_forward_hook(lambda *_: seen.append("forward"))
            block.register_forward_pre_hook(lambda *_: seen.append("pre"))
            block.register_full_backward_hook(lambda *_: seen.append("backward"))

    if when == "before rewiring":
        hook(model)
    rev, x = rewired(model)
    if when == "after":
        hook(rev)
    assert not seen
    found = run(rev, x)
    assert [seen.count(kind) for kind in ("pre", "forward", "backward")] == [4, 4, 4]
    assert distance(found, twin(rev, x)) < TOLERANCE


def test_nothing_leads_from_a_side_input_back_to_the_tape() -> None:
    """What leaves one branch and enters the next must not keep its own graph alive."""
    from rewire.meters import LiveBytes

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.bias = mlp(), nn.Linear(DIM, DIM)

        def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x)
            return x + y * bias, self.bias(y).tanh()

    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            bias = torch.ones_like(x)
            for block in self.blocks:
                x, bias = block(x, bias)
            return x + bias.mean()

    rev, x = rewired(Passing())
    assert distance(run(rev, x), twin(rev, x)) < TOLERANCE
    with LiveBytes() as meter:
        rev(x)  # and no backward
        assert meter.live == 0


# ---- plans and refusals ------------------------------------------------------------------


def test_a_plan_is_good_for_another_model_of_the_class() -> None:
    first, x = rewired()
    plan = first.__dict__["_rewire_plan"]
    second = rewire.make_reversible(Net().double(), plan=plan)
    assert distance(run(second, x), twin(second, x)) < TOLERANCE
    with pytest.raises(rewire.RewireError, match=r"blocks\.2.*Make a plan"):
        rewire.make_reversible(Net(depth=2).double(), plan=plan)


def test_globs() -> None:
    x, model = rows(), Net().double()
    lengths = [len(c) for c in rewire.plan(model, x, exclude="blocks.0*").chains]
    assert lengths == [3]
    lengths = [len(c) for c in rewire.plan(model, x, include=["blocks.[01]*"]).chains]
    assert lengths == [2]
    reasons = {row.reason for row in rewire.plan(model, x, exclude="*").skipped}
    assert reasons == {"excluded"}


def test_refusals() -> None:
    rev, x = rewired()
    with pytest.raises(rewire.RewireError, match="rewired already"):
        rewire.make_reversible(rev, x)
    with pytest.raises(rewire.NothingToRewire, match="nearest miss"):
        rewire.make_reversible(Positions().double(), x)
    with pytest.raises(ValueError, match="identity"):
        rewire.plan(Net().double(), x, trunk="outside")


@pytest.mark.parametrize("name", ["bottlenecks", "plus"])
def test_trunk_inside(name: str) -> None:
    torch.manual_seed(0)
    model, x = SPECIMENS[name].make().double(), SPECIMENS[name].inputs().requires_grad_()
    rev = rewire.make_reversible(model, x, trunk="inside")
    other = copy.deepcopy(rev)
    assert distance(run(rev, x), twin(other, x)) < TOLERANCE
    assert distance(rev.buffers(), other.buffers()) < TOLERANCE


class Tailed(nn.Module):
    """An activation after the add."""

    def __init__(self, width: int, dropout: float, activation: str | None) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(DIM, width), nn.Linear(width, DIM)
        self.dropout, self.activation = nn.Dropout(dropout), activation

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.narrow(torch.tanh(self.wide(x))))
        return x if self.activation is None else getattr(torch, self.activation)(x)


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(2, 7),
    width=st.integers(1, 9),
    dropout=st.sampled_from([0.0, 0.3]),
    shared=st.booleans(),
    activation=st.sampled_from([None, "relu", "tanh", "sigmoid"]),
)
def test_random_nets(
    depth: int, width: int, dropout: float, shared: bool, activation: str | None
) -> None:
    torch.manual_seed(depth * 10 + width)
    block = Tailed(width, dropout, activation)
    net = Loop((lambda: block) if shared else (lambda: Tailed(width, dropout, activation)), depth)
    rev, x = rewired(net)
    assert distance(run(rev, x), twin(rev, x)) < TOLERANCE


def test_a_module_used_several_times() -> None:
    rev, x = rewired(Shared())
    assert distance(run(rev, x), twin(rev, x)) < TOLERANCE
