"""State that modules keep from call to call, and what they write into: backward leaves no mark."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaModel, StaticCache

import rewire
from benchmarks.outcomes import AsOriginal
from rewire.errors import NotRepeatable
from tests.specimens import DIM, Loop, mlp, rows


def sequence() -> Tensor:
    """[2, 5, DIM]."""
    return torch.randn(2, 5, DIM, dtype=torch.float64)


# ---- what a branch keeps -----------------------------------------------------------------


class Recurrent(nn.Module):
    """Its state is a new tensor in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.state = mlp(), None

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x) if self.state is None else self.state
        self.state = (0.5 * before + x).tanh()
        return self.f(x + self.state)


class Leaky(nn.Module):
    """Its state is a tensor that is written into, and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.state = mlp(), torch.zeros(DIM, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x + self.state)
        self.state.mul_(0.5).add_(x.detach().mean((0, 1)))
        return y * self.state.sum().clone().tanh()


class Listing(nn.Module):
    """Its state is a list, a counter, and what was not there before the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.seen, self.calls = mlp(), [], 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach())
        self.calls += 1
        self.last = x.detach().mean()
        return self.f(x) * len(self.seen) + sum(self.seen).mean() / self.calls


def around(body: Callable[[], nn.Module]) -> nn.Module:
    """x + F(x), the state being F's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x)

    return Loop(Block).double()


def twice(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients through two calls, and the state afterwards."""
    loss = model(x).sin().sum() + model(x.cos()).sin().sum()
    found = torch.autograd.grad(loss, list(model.parameters()))
    kept = [value for m in model.modules() for value in vars(m).values()]
    tensors = [v for v in kept if isinstance(v, Tensor)]
    lists = [t for v in kept if isinstance(v, list) for t in v if isinstance(t, Tensor)]
    numbers = [torch.tensor(v) for v in kept if type(v) is int]
    for module in model.modules():
        if isinstance(module, Recurrent):
            module.state = module.state.detach()
    return [*found, *(t.detach() for t in (*tensors, *lists)), *numbers]


@pytest.mark.parametrize("body", [Recurrent, Leaky, Listing])
def test_a_state_is_for_the_rerun_as_it_was_and_afterwards_as_forward_left_it(body: Any) -> None:
    model, x = around(body), sequence()
    rev = rewire.make_reversible(copy.deepcopy(model), x, check="raise")
    twin = rewire.make_reversible(copy.deepcopy(model), x)
    for _ in range(3):  # what is learnt in the first run holds in the others
        found = twice(rev, x)
        with rewire.store_activations(twin):
            wanted = twice(twin, x)
        assert len(found) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class Late(nn.Module):
    """Begins to write into its state in the third call."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.calls, self.state = mlp(), 0, torch.zeros(DIM, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.f(x + self.state)
        if self.calls > 2:
            self.state.add_(x.detach().mean((0, 1)))
        return y


def test_a_state_that_begins_to_be_written_into_late_is_loud() -> None:
    x = sequence()
    rev = rewire.make_reversible(around(Late), x, check="raise")
    for _ in range(2):
        rev(x).sum().backward()
    with pytest.raises(NotRepeatable):
        rev(x).sum().backward()


def test_a_tensor_that_a_branch_reads_may_not_be_changed_before_backward() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.scale = mlp(), torch.ones(DIM, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x) * self.scale

    x = sequence()
    rev = rewire.make_reversible(Loop(Reading).double(), x)
    rev(x).sum().backward()
    loss = rev(x).sum()
    rev.get_submodule("blocks.1").scale.mul_(2)
    with pytest.raises(NotRepeatable, match="'scale', an attribute"):
        loss.backward()


# ---- what a branch writes into -----------------------------------------------------------


class Writer(nn.Module):
    """Reads a running mean that it is handed, and writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor, means: list[Tensor], layer: int) -> Tensor:
        y = self.f(x + means[layer].clone())
        means[layer].mul_(0.5).add_(x.detach().mean((0, 1)))
        return y


class Written(nn.Module):
    """Three blocks, each of which writes into a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WriterBlock(layer) for layer in range(3))

    def forward(self, x: Tensor, means: list[Tensor]) -> Tensor:
        for block in self.blocks:
            x = block(x, means)
        return x


class WriterBlock(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.body = layer, Writer()

    def forward(self, x: Tensor, means: list[Tensor]) -> Tensor:
        return x + self.body(x, [means[self.layer]], 0)


def test_tensors_that_a_branch_writes_into() -> None:
    model, x = Written().double(), sequence()
    rev = rewire.make_reversible(model, (x, zeros()), check="raise")
    rev(x, zeros())  # the grid settles
    for _ in range(2):
        ours, theirs = zeros(), zeros()
        found = torch.autograd.grad(rev(x, ours).sin().sum(), list(rev.parameters()))
        with rewire.store_activations(rev):
            wanted = torch.autograd.grad(rev(x, theirs).sin().sum(), list(rev.parameters()))
        pairs = zip((*found, *ours), (*wanted, *theirs), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def zeros() -> list[Tensor]:
    return [torch.zeros(DIM, dtype=torch.float64) for _ in range(3)]


def test_two_tensors_that_share_their_memory_cannot_both_be_written_into() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            a.add_(1)
            b.add_(1)
            return x.tanh()

    shared = torch.zeros(4)
    with pytest.raises(NotRepeatable, match="share their memory"):
        rewire.ReversibleSequential([Both()])(
            torch.ones(4, requires_grad=True), shared[:2], shared[2:]
        )


def test_a_static_cache_with_gradients() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=20,
    )
    model, ids = LlamaModel(config).eval(), torch.arange(8).view(2, 4)
    rev = rewire.make_reversible(model, {"input_ids": ids}, check="raise")

    def run() -> tuple[list[Tensor], list[Tensor]]:
        cache = StaticCache(config=config, max_cache_len=4)  # a second write would not fit
        loss = rev(ids, past_key_values=cache).last_hidden_state.sin().sum()
        grads = torch.autograd.grad(loss, list(rev.parameters()), allow_unused=True)
        state = [v for layer in cache.layers for v in vars(layer).values() if isinstance(v, Tensor)]
        return [g for g in grads if g is not None], state

    run()
    found, ours = run()
    with rewire.store_activations(rev):
        wanted, theirs = run()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class Saved(nn.Module):
    """Writes into a tensor that autograd has saved: its backward fails."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x).exp()
        return x + y.mul_(2)


def test_what_ordinary_autograd_refuses_is_refused() -> None:
    model, x = Loop(Saved).double(), rows()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x).sum().backward()
    rev = rewire.make_reversible(model, x)
    with pytest.raises(NotRepeatable, match="changed in place after autograd had saved it"):
        rev(x).sum().backward()


class OnlyInTraining(nn.Module):
    """The same in eval mode only, as of a network whose cache is written in place there."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x).exp()
        return x + (y if self.training else y.mul_(2))


def test_a_network_without_gradients_in_eval_mode_is_verified_in_train_mode() -> None:
    model, x = Loop(OnlyInTraining).double(), rows()
    verdict = rewire.verify(rewire.make_reversible(model, x), x)
    assert verdict.passed, str(verdict)
    named = {check.name: check for check in verdict.checks}
    assert "no gradients in eval mode" in named["reconstruction"].detail


# ---- what a home's own code sets ---------------------------------------------------------


class Setting(nn.Module):
    """Sets attributes and a buffer in the code that adds."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.window, self.last = mlp(), mlp(), 4, None
        self.register_buffer("mean", torch.zeros(DIM))

    def forward(self, x: Tensor) -> Tensor:
        self.window = min(x.shape[1], self.window)
        f = self.f(x[:, : self.window]).mean(1, keepdim=True)
        self.last = f.detach()
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        x = x + f + self.mean
        return x + self.g(x)


def test_attributes_and_buffers_that_the_code_sets() -> None:
    model, x = Loop(Setting).double(), sequence()
    rev = rewire.make_reversible(copy.deepcopy(model), x, coupling=AsOriginal())
    verdict = rewire.verify(rev, x)
    assert verdict.passed, str(verdict)
    for length in (5, 3, 4):
        x = torch.randn(2, length, DIM, dtype=torch.float64)
        assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-9)
        for ours, theirs in zip(rev.blocks, model.blocks, strict=True):
            assert ours.window == theirs.window == min(4, 3 if length < 5 else 4)
            assert torch.allclose(ours.last, theirs.last, rtol=0, atol=1e-9)
            assert torch.allclose(ours.mean, theirs.mean, rtol=0, atol=1e-9)
            assert list(ours._buffers) == ["mean"]


class Remembered(nn.Module):
    """Decides by the form of a tensor that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.kept = mlp(), None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.kept.shape[0] != x.shape[0]:
            self.kept = torch.zeros_like(x)
        y = self.f(x + self.kept[:, -1:])
        self.kept = x.detach()
        return x + y


def test_a_state_of_another_form_is_another_program() -> None:
    model = Loop(Remembered).double()
    rev = rewire.make_reversible(copy.deepcopy(model), sequence(), coupling=AsOriginal())
    for batch in (2, 2, 3, 3, 1):
        x = torch.randn(batch, 4, DIM, dtype=torch.float64)
        assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-9)


class CallCounter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.calls = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.f(x)


class Appending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.seen = mlp(), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        return x + self.f(x)


class Forgetting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.once = mlp(), 1

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "once"):
            del self.once
        return x + self.f(x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (CallCounter, "sets the attribute 'calls' anew in every call"),
        (Appending, "changes the attribute 'seen'"),
        (Forgetting, "changes the attribute 'once'"),
    ],
)
def test_what_code_cannot_do_to_its_own_module(block: Any, reason: str) -> None:
    with pytest.raises(rewire.NothingToRewire, match=reason):
        rewire.make_reversible(Loop(block), rows().float())


# ---- what planning leaves ----------------------------------------------------------------


class Notebook:
    """An object of a user's class, with another inside."""

    def __init__(self, inner: Notebook | None = None) -> None:
        self.pages: dict[str, Any] = {}
        self.last: Tensor | None = None
        self.inner = inner


class Noting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.notes = mlp(), Notebook(Notebook())

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        self.notes.pages["y"] = self.notes.last = y.detach()
        assert self.notes.inner is not None
        self.notes.inner.pages["x"] = x.detach()
        return y


def test_planning_leaves_no_fake_tensor_in_a_users_objects() -> None:
    model, x = around(Noting), rows()
    rev = rewire.make_reversible(model, x)
    for module in model.modules():
        if isinstance(module, Noting):
            assert module.notes.pages == {}
            assert module.notes.last is None
            assert module.notes.inner is not None
            assert module.notes.inner.pages == {}
    rev(x).sum().backward()
    kept = [m.notes.last for m in rev.modules() if isinstance(m, Noting)]
    assert all(isinstance(t, Tensor) and not isinstance(t, FakeTensor) for t in kept)
