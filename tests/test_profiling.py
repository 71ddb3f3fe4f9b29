"""The meter against sums done by hand, and profiles of nets whose costs are known."""

from __future__ import annotations

import doctest
import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import rewire
import rewire.meters
from benchmarks.costs import _cpu_bytes
from rewire.accounting import optimizer_bytes, saved_inside
from rewire.errors import RewireError
from rewire.meters import LiveBytes
from rewire.profiling import Profile, floating_tensors, profile, scalar_loss

KB = 1024
ROW = 256  # floats in 1 KB


class Stack(nn.Module):
    """Residual blocks, plain or checkpointed."""

    def __init__(self, depth: int, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(depth)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_doctest() -> None:
    assert doctest.testmod(rewire.meters).failed == 0


def test_counts_new_storages_and_forgets_freed_ones() -> None:
    with LiveBytes() as meter:
        a = torch.zeros(ROW)
        b = a + 1
        assert meter.live == 2 * KB
        del a
        assert (meter.live, meter.peak) == (KB, 2 * KB)
        meter.reset_peak()
        assert meter.peak == KB
    del b
    assert meter.live == 0


def test_what_was_there_before_does_not_count() -> None:
    before = torch.zeros(ROW)
    with LiveBytes() as meter:
        view = before.view(16, 16).t()
        before.add_(1)
        kept = (before.detach(), view, before[3:])
        assert (meter.live, meter.peak) == (0, 0)
    assert len(kept) == 3


def test_views_in_place_and_out_do_not_count_twice() -> None:
    with LiveBytes() as meter:
        a = torch.zeros(ROW)
        views = [a.view(2, -1), a[1:], a.detach(), a.unbind(0)[0]]
        a.mul_(2)
        torch.add(a, 1, out=a)
        assert meter.live == KB
        del a
        assert meter.live == KB, "the views hold it"
        del views
        assert meter.live == 0


def test_resized_storages_count_at_their_new_size() -> None:
    with LiveBytes() as meter:
        a = torch.zeros(ROW)
        a.resize_(3 * ROW)
        assert meter.live == 3 * KB
        out = torch.empty(0)
        torch.add(a, 1, out=out)
        assert meter.live == 6 * KB
        a.untyped_storage().resize_(0)
        a.detach()
        assert meter.live == 3 * KB
        assert meter.peak == 6 * KB


def test_constants_and_several_results_count() -> None:
    with LiveBytes() as meter:
        constant = torch.tensor([1.0] * ROW)
        assert meter.live == KB
        values, indices = constant.sort()
    assert meter.live == 2 * KB + 2 * KB, "float32 values and int64 indices"
    assert values.shape == indices.shape


def test_step_by_hand() -> None:
    """y = exp(exp(x)) keeps both results; backward holds one gradient and makes the next."""
    x = torch.zeros(ROW, requires_grad=True)
    x.grad = torch.zeros(ROW)
    with LiveBytes() as meter:
        y = x.exp().exp()
        assert meter.live == 2 * KB
        y.backward(torch.ones(ROW))
        # Both saved results, the gradients of y and exp(x), and that of x.
        assert meter.peak <= 5 * KB
        assert meter.live == KB, "y alone"
    del y
    assert meter.live == 0


def test_sees_what_unpack_hooks_recompute_in_backward() -> None:
    x = torch.zeros(ROW, requires_grad=True)
    x.grad = torch.zeros(ROW)

    def unpack(_: None) -> Tensor:
        return torch.cat([x.detach().exp()] * 8)[:ROW]

    with LiveBytes() as meter:
        with saved_tensors_hooks(lambda _: None, unpack):
            loss = x.exp().sum()
        assert meter.live == 4, "the loss alone"
        loss.backward()
    assert 8 * KB <= meter.peak <= 12 * KB
    del loss
    assert meter.live == 0


def test_a_cycle_shows_as_left() -> None:
    gc.disable()
    try:
        with LiveBytes() as meter:
            holder: list[Any] = [torch.zeros(ROW)]
            holder.append(holder)
            del holder
        assert meter.live == KB
        gc.collect()
        assert meter.live == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_saves_the_boundaries_only(reentrant: bool) -> None:
    x = torch.randn(64, 16, requires_grad=True)
    boundary = 64 * 16 * 4
    plain, short = profile(Stack(8), x), profile(Stack(4, reentrant), x)
    deep = profile(Stack(8, reentrant), x)
    per_block = (deep.saved_bytes - short.saved_bytes) / 4
    assert boundary <= per_block <= 1.1 * boundary
    assert deep.peak_bytes < plain.peak_bytes / 2
    assert deep.left_bytes == plain.left_bytes == 0


def test_plain_saved_bytes_by_hand() -> None:
    """Linear keeps its input; tanh its result; the loss keeps the output and makes scalars."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    result = profile(model, torch.randn(32, 16))
    hidden, out = 32 * 64 * 4, 32 * 16 * 4
    assert result.saved_bytes == hidden + out + 4
    # mean's backward expands a scalar; then 2 · y (and its product with that) are alive.
    assert hidden + 2 * out <= result.peak_bytes <= 3 * hidden + 4 * out
    assert result.left_bytes == 0
    assert result.step_seconds > 0


def test_saved_inside_counts_what_is_kept_while_something_runs() -> None:
    """exp keeps its result: while a name is there, without one, and under hooks."""
    running: list[str] = []

    def named(x: Tensor) -> Tensor:
        running.append("named")
        result = x.exp()
        running.pop()
        return result

    with saved_inside(running) as kept:
        y = named(torch.zeros(ROW, requires_grad=True)).exp()
        assert kept == {"named": KB}
        checkpoint(named, y, use_reentrant=False)
        with saved_tensors_hooks(lambda _: None, lambda _: y):
            named(y)
        assert kept == {"named": KB}, "the innermost hooks have the rest"


def test_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    x = torch.randn(8, 4, requires_grad=True)
    grad = torch.ones(4, 4)
    model[0].weight.grad = grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert isinstance(profile(model, x), Profile)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model[0].weight.grad is grad
    assert torch.equal(grad, torch.ones(4, 4))
    assert model[0].bias.grad is None
    assert x.grad is None
    assert model.training


def test_garbage_collector_is_as_before() -> None:
    profile(nn.Linear(2, 2), torch.randn(2, 2))
    assert gc.isenabled()
    gc.disable()
    try:
        profile(nn.Linear(2, 2), torch.randn(2, 2))
        assert not gc.isenabled()
    finally:
        gc.enable()


# ---- where memory goes -------------------------------------------------------------------


def test_saved_bytes_by_module_by_hand() -> None:
    """Tanh keeps its result, ReLU too and that is the output; exp in no module is the model's."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(16, 64), nn.Tanh())
            self.last = nn.Linear(64, 16)
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.relu(self.last(self.first(x)).exp())
            return result

    found = profile(Net(), torch.randn(32, 16))
    hidden, out = 32 * 64 * 4, 32 * 16 * 4
    assert dict(found.outside) == {"first.1": hidden, "": out}
    assert found.output_bytes == out
    assert found.chain_bytes == 4, "the loss"
    assert found.saved_bytes == hidden + 2 * out + 4


def test_all_saved_bytes_are_somebodys() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), Mixed(8), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    for one in (model, rewire.make_reversible(model, x)):
        found = profile(one, x)
        outside = sum(size for _, size in found.outside)
        assert found.saved_bytes == outside + found.output_bytes + found.chain_bytes
    stream = 4 * 8 * 8 * 8 * 4
    assert 2 * stream <= found.chain_bytes <= 2 * stream + 300, "two streams and small change"
    assert not [name for name, _ in found.outside if name.startswith("2.")]


class Mixed(nn.Module):
    """Two residual modules."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x).relu()
        return x + self.two(x).sigmoid()


def test_what_stands_by_hand() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model[0].requires_grad_(False)
    x = torch.randn(8, 16, requires_grad=True)
    found = profile(model, x)
    frozen, trained = 4 * 17 * 16, 4 * (32 + 17 * 4)
    assert found.parameter_bytes == frozen + trained
    assert found.gradient_bytes == trained + x.nbytes
    assert found.optimizer_bytes == 2 * trained
    assert found.buffer_bytes == 2 * 16 * 4 + 8
    assert found.input_bytes == x.nbytes
    assert found.total_bytes == found.standing_bytes + found.peak_bytes
    assert profile(model, x, optimizer=None).optimizer_bytes == 0


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(
    "make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, momentum]
)
def test_optimizer_state_is_that_of_a_real_one(make: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).to(torch.bfloat16)
    real = make(model.parameters())
    model(torch.randn(2, 16, dtype=torch.bfloat16)).sum().backward()
    real.step()
    states = [value for state in real.state.values() for value in state.values()]
    expected = sum(v.nbytes for v in states if isinstance(v, Tensor) and v.dim())
    assert optimizer_bytes(make, model.parameters()) == expected


def test_an_optimizer_that_needs_values_says_so() -> None:
    with pytest.raises(RewireError, match=r"LBFGS: its first step.*optimizer=None"):
        optimizer_bytes(torch.optim.LBFGS, nn.Linear(2, 2).parameters())


def test_trace_has_the_peak_and_ends_at_the_end() -> None:
    found = profile(Stack(4), torch.randn(64, 16))
    middle = found.trace.index(max(found.trace))
    assert len(found.trace) > 20
    assert 0.8 * found.peak_bytes <= found.trace[middle] <= found.peak_bytes
    assert found.trace[0] < found.trace[middle]
    assert found.trace[-1] < found.trace[middle]


def test_finds_inputs_itself() -> None:
    assert profile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).peak_bytes > 0


def test_says_what_it_measured() -> None:
    assert str(Profile(2_000_000, 1_000_000, 0, 0.5, "cpu")) == (
        "peak 2.0 MB, 1.0 MB saved for backward, 0.0 MB left, 0.500 s a step (cpu)"
    )


@dataclass
class Output:
    first: Tensor
    rest: dict[str, Any]


def test_loss_of_any_structure() -> None:
    one, two, three = (torch.full((2,), float(n), requires_grad=True) for n in (1, 2, 3))
    output = Output(one, {"b": (two, [three]), "ids": torch.ones(2, dtype=torch.int64), "n": None})
    assert [t is u for t, u in zip(floating_tensors(output), (one, two, three), strict=True)]
    assert scalar_loss(output).item() == 1 + 4 + 9


def test_loss_of_half_precision_does_not_overflow() -> None:
    assert scalar_loss(torch.full((4,), 300.0, dtype=torch.float16, requires_grad=True)) == 90000


def test_no_gradient_is_an_error_with_the_fix() -> None:
    with pytest.raises(RewireError, match="Unfreeze a parameter"):
        profile(nn.Linear(2, 2).requires_grad_(False), torch.randn(2, 2))


@pytest.mark.parametrize("name", ["tied", "twice a product", "twice an embedding", "scaled"])
def test_sums_of_gradients_are_counted_as_autograd_makes_them(name: str) -> None:
    """In place, but where the first to come is a view: a weight's gradient is a transpose."""
    embedding = nn.Embedding(2000, 64)
    weight = embedding.weight
    weight.grad = torch.zeros_like(weight)
    x = torch.randint(0, 2000, (8,))
    losses = {
        "tied": lambda: F.linear(embedding(x), weight).sum(),
        "twice a product": lambda: sum(F.linear(torch.ones(8, 64), weight).sum() for _ in range(2)),
        "twice an embedding": lambda: embedding(x).sum() + embedding(x.flip(0)).sum(),
        "scaled": lambda: (weight * 2).sum() + (weight * 3).sum(),
    }

    def backward() -> None:
        losses[name]().backward()  # type: ignore[union-attr, no-untyped-call]

    backward()
    with LiveBytes() as meter:
        backward()
    assert meter.peak == pytest.approx(_cpu_bytes(backward).peak, rel=0.02)
