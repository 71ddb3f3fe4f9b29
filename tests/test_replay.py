"""What surrounds a branch, found again in its rerun; what is left; what is refused."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rewire
from rewire import drift
from rewire.meters import LiveBytes
from rewire.reversible import ReversibleSequential
from tests.test_reversible import (
    TOLERANCE,
    WIDTH,
    by_hand,
    chain,
    distance,
    gradients,
    mlp,
    rows,
    stored,
)


def dropping() -> nn.Module:
    return nn.Sequential(mlp(), nn.Dropout(0.5))


# ---- random generators -------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_dropout_is_replayed(depth: int) -> None:
    net, x = chain(depth, dropping), rows(50)
    wrt = [x, *net.parameters()]
    assert distance(gradients(net, wrt, x), gradients(by_hand(net), wrt, x)) < TOLERANCE


def test_generators_afterwards_are_as_if_nothing_was_recomputed() -> None:
    net, x = chain(4, dropping), rows(50)
    states = []
    for function in (net, by_hand(net)):
        torch.manual_seed(11)
        loss = function(x).sum()
        states.append(torch.get_rng_state())
        torch.rand(5)
        between = torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), between)
    assert torch.equal(*states)


def test_dropout_in_two_forwards_and_two_backwards() -> None:
    net, x = chain(3, dropping), rows(50)
    wrt = [x, *net.parameters()]

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(5)
        losses = [function(x).sin().sum(), function(x.cos()).sin().sum()]
        keep = {"retain_graph": True}
        found = [torch.autograd.grad(loss, wrt, **keep) for loss in losses]
        return [g for grads in (*found, torch.autograd.grad(losses[0], wrt)) for g in grads]

    assert distance(run(net), run(by_hand(net))) < TOLERANCE


# ---- autocast ----------------------------------------------------------------------------


class Probe(nn.Module):
    """Notes autocast's state whenever it runs, outside of itself: what it sets is put back."""

    def __init__(self) -> None:
        super().__init__()
        self.body, notes = nn.Linear(WIDTH, WIDTH), []
        self.note, self.seen = notes.append, lambda: notes

    def forward(self, x: Tensor) -> Tensor:
        enabled, cached = torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()
        self.note((enabled, cached, torch.get_autocast_dtype("cpu")))
        return self.body(x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_is_entered_again_without_its_weight_cache(inside: bool, enabled: bool) -> None:
    net, x = chain(3, Probe), rows().detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled):
        loss = net(x).sum()
        assert torch.is_autocast_cache_enabled()
    with torch.autocast("cpu", torch.bfloat16, inside):
        loss.backward()
    seen = {row for branch in net.children() for row in branch.seen()}
    assert all(len(branch.seen()) == 2 for branch in net.children())
    assert {row[0] for row in seen} == {enabled}
    assert not enabled or seen == {(True, False, torch.bfloat16)}


def test_gradients_under_autocast() -> None:
    net, x = chain(4).float(), rows().detach().float().requires_grad_()
    wrt = [x, *net.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        twin = stored(net)(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, twin)
    found = torch.autograd.grad(out.sin().sum(), wrt)
    expected = torch.autograd.grad(twin.sin().sum(), wrt)
    # A reconstructed stream may move a bfloat16 rounding (the exact modes are another story).
    assert distance(found, expected) < 5e-2


# ---- buffers -----------------------------------------------------------------------------


class Counter(nn.Module):
    """A branch that counts its runs, by value or by a new tensor, and uses the count."""

    def __init__(self, start: int = 0, fresh: bool = False) -> None:
        super().__init__()
        self.body, self.start, self.fresh = mlp(), start, fresh
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("late", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.fresh:
            self.calls = self.calls + 1
        else:
            self.calls += 1
        if self.calls > self.start:
            self.late.add_(1)
        return self.body(x) / (1 + self.calls + self.late)


def spectral() -> nn.Module:
    body = mlp()
    parametrizations.spectral_norm(body[0])
    return body


def normed() -> nn.Module:
    return nn.Sequential(mlp(), nn.BatchNorm1d(WIDTH).double())


STATEFUL = {
    "BatchNorm": normed,
    "cumulative BatchNorm": lambda: nn.BatchNorm1d(WIDTH, momentum=None).double(),
    "counter": Counter,
    "counter, new tensor": lambda: Counter(fresh=True),
    "counter that begins late": lambda: Counter(start=2),
    "spectral norm": spectral,
}


def assert_as_the_twin(net: nn.Module, x: Tensor, steps: int = 4) -> None:
    """Several training steps, then one in eval and one in train mode."""
    twin = copy.deepcopy(net)
    for training in (True,) * steps + (False, True):
        net.train(training), twin.train(training)
        found = gradients(net, [x, *net.parameters()], x)
        with rewire.store_activations(twin):
            expected = gradients(twin, [x, *twin.parameters()], x)
        assert distance(found, expected) < 1e-10
        assert distance(net.buffers(), twin.buffers()) < 1e-10


@pytest.mark.parametrize("name", STATEFUL)
def test_buffers_are_updated_once(name: str) -> None:
    assert_as_the_twin(chain(3, STATEFUL[name]), rows(6))


def test_buffers_with_several_forwards_before_a_backward() -> None:
    net, x = chain(3, Counter), rows()
    twin = copy.deepcopy(net)

    def run(function: Callable[..., Tensor], model: nn.Module) -> list[Tensor]:
        losses = [function(x).sin().sum() for _ in range(3)]
        wrt = [x, *model.parameters()]
        return [g for loss in reversed(losses) for g in torch.autograd.grad(loss, wrt)]

    found = run(net, net)
    with rewire.store_activations(twin):
        assert distance(found, run(twin, twin)) < TOLERANCE
    assert distance(net.buffers(), twin.buffers()) == 0.0


@pytest.mark.parametrize("change", ["spectral norm", "another child", "a child inside"])
def test_branches_may_change_between_steps(change: str) -> None:
    net, x = chain(3), rows(6)
    gradients(net, [x], x)
    if change == "spectral norm":
        parametrizations.spectral_norm(net.get_submodule("1.0"))
    elif change == "another child":
        setattr(net, "1", normed())
    else:
        net.get_submodule("1")[1] = nn.BatchNorm1d(6).double()
    wrt, twin = [x, *net.parameters()], copy.deepcopy(net)
    found = gradients(net, wrt, x)
    assert distance(found, gradients(by_hand(twin), [x, *twin.parameters()], x)) < TOLERANCE
    assert distance(net.buffers(), twin.buffers()) < TOLERANCE


# ---- what cannot be repeated -------------------------------------------------------------


@pytest.mark.parametrize("branch", [dropping, normed])
def test_changed_training_flags(branch: Callable[[], nn.Module]) -> None:
    """It is told, and the rerun is in forward's modes: the gradients are right all the same."""
    net, x = chain(3, branch), rows(6)
    torch.manual_seed(7)
    expected = torch.autograd.grad(net(x).sum(), x)[0]
    torch.manual_seed(7)
    loss = net(x).sum()
    net.eval()
    with pytest.warns(drift.DriftWarning, match="was in train mode in forward"):
        found = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(found, expected)
    assert not any(module.training for module in net.modules())
    net.course.drift.check = "raise"
    with pytest.raises(rewire.NotRepeatable, match="call train"):
        loss.backward()


def test_changed_parameters() -> None:
    net, x = chain(4), rows()
    loss = net(x).sum()
    with torch.no_grad():
        net.get_submodule("2.0").weight.mul_(2)
    with pytest.raises(rewire.NotRepeatable, match="2: its parameter 'weight'"):
        loss.backward()


def test_changed_requires_grad() -> None:
    net, x = chain(3), rows()
    loss = net(x).sum()
    net.get_submodule("1").requires_grad_(False)
    with pytest.raises(rewire.NotRepeatable, match="1: run again in backward"):
        loss.backward()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, side: Any) -> Tensor:
        return self.body(x) * (side if isinstance(side, Tensor) else side["inner"][0])


@pytest.mark.parametrize("nested", [False, True])
def test_changed_side_input(nested: bool) -> None:
    net, x, scale = chain(3, Scaled), rows(), torch.ones(WIDTH, dtype=torch.float64)
    loss = net(x, {"inner": (scale,)} if nested else scale).sum()
    scale.mul_(2)
    with pytest.raises(rewire.NotRepeatable, match="side inputs was changed in place"):
        loss.backward()


def test_changed_input() -> None:
    net, x = chain(1), rows()
    expected = torch.autograd.grad(net(x * 1).sum(), x)[0]
    given = x * 1
    loss = net(given).sum()
    given.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_changed_input_of_plain_floats() -> None:
    net, x = ReversibleSequential([mlp()], precision="fast"), rows()
    given = x * 1
    loss = net(given).sum()
    given.zero_()
    with pytest.raises(rewire.RewireError, match="changed in place"):
        loss.backward()


def test_a_branch_that_writes_to_its_input() -> None:
    net, x = ReversibleSequential([lambda x: x.mul_(2)], name="body"), rows()
    with pytest.raises(rewire.NotRepeatable, match=r"body\.0.*in place"):
        net(x * 1)


def test_drift_is_told_once_with_the_chains_name() -> None:
    draws = iter(range(100))
    x = rows()
    net = ReversibleSequential([lambda x: x.sin() * next(draws)] * 3, name="told once")
    with pytest.warns(drift.DriftWarning, match="told once") as caught:
        net(x).sum().backward()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x).sum().backward()


class Failing(nn.Module):
    """Raises in mid-branch when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fails = mlp(), dropping(), False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.fails:
            raise RuntimeError("planted")
        return self.second(x)


def fail_in_backward(net: nn.Module, branch: Any, x: Tensor) -> None:
    loss = net(x).sum()
    branch.fails = True
    loss.backward()


def test_an_exception_in_mid_branch_and_a_retry() -> None:
    net, x = chain(4, Failing), rows(20)
    wrt = [x, *net.parameters()]
    expected = gradients(by_hand(net), wrt, x)
    branch = net.get_submodule("2")
    for when in ("forward", "backward"):
        branch.fails = when == "forward"
        with pytest.raises(RuntimeError, match="planted"):
            fail_in_backward(net, branch, x)
        assert torch.is_autocast_cache_enabled()
        branch.fails = False
        assert distance(gradients(net, wrt, x), expected) < TOLERANCE
        for t in wrt:
            t.grad = None


def test_two_threads() -> None:
    net = chain(5)
    inputs = [(number + 1) * rows().detach() for number in range(4)]
    parameters = list(net.parameters())
    found: dict[int, list[Tensor]] = {}

    def work(number: int) -> None:
        for _ in range(5):
            loss = net(inputs[number]).sin().sum()
            found[number] = list(torch.autograd.grad(loss, parameters))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(inputs):
        expected = gradients(by_hand(net), parameters, x)[1:]
        assert distance(found[number], expected) < TOLERANCE


# ---- memory ------------------------------------------------------------------------------


def spent(depth: int, rows_: int = 400) -> tuple[int, int]:
    """Peak bytes of a step without parameters' gradients, and what is left."""
    net, x = chain(depth, lambda: nn.Sequential(mlp(), dropping())), rows(rows_)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.grad = torch.zeros_like(x)
    net(x).sum().backward()
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as meter:
            net(x).sum().backward()
            left = meter.live
    finally:
        gc.enable()
    return meter.peak, left


def test_memory_does_not_grow_with_depth() -> None:
    shallow, deep = spent(4), spent(16)
    states = 16 * len(torch.get_rng_state()) * 2  # one per branch that draws
    assert deep[0] - shallow[0] <= states
    assert shallow[1] == deep[1] == 0


@pytest.mark.parametrize("ending", ["backward", "second", "none", "part", "double"])
def test_nothing_is_left(ending: str) -> None:
    net, x = chain(4, dropping), rows()

    def step() -> None:
        loss = net(x).sin().sum()
        if ending == "none":
            return
        wrt = list(net.parameters())[-1:] if ending == "part" else [x]
        if ending == "second":
            torch.autograd.grad(loss, wrt, retain_graph=True)
        grads = torch.autograd.grad(loss, wrt, create_graph=ending == "double")
        if ending == "double":
            torch.autograd.grad(grads[0].square().sum(), [x])

    step()
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as meter:
            step()
            assert meter.live == 0
    finally:
        gc.enable()


class Awakening(nn.Module):
    """Normalises by the batch, and counts, from some step on."""

    def __init__(self, size: int, norm: bool = True) -> None:
        super().__init__()
        self.norm, self.on = nn.BatchNorm1d(8) if norm else nn.Identity(), False
        self.register_buffer("seen", torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if not self.on:
            return x.sin()
        self.seen += 1
        return self.norm(x) * self.seen[0]


def test_buffers_that_begin_to_change_later() -> None:
    """Delayed statistics: updated once, and the gradients are right in the first such step too."""
    torch.manual_seed(0)
    net = ReversibleSequential([Awakening(4) for _ in range(3)], check="raise")
    twin = copy.deepcopy(net)
    x = torch.randn(4096, 8, requires_grad=True)
    for on in (False, True, True):
        for branch in (*net.modules(), *twin.modules()):
            branch.on = on
        grads = [torch.autograd.grad(net(x).sin().sum(), x)]
        with rewire.store_activations(twin):
            grads.append(torch.autograd.grad(twin(x).sin().sum(), x))
        assert torch.equal(grads[0][0], grads[1][0])
        for a, b in zip(net.buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b)


def test_a_large_buffer_that_begins_to_change_is_told() -> None:
    net = ReversibleSequential([Awakening(10**5, norm=False) for _ in range(2)])
    x = torch.randn(64, 8, requires_grad=True)
    net(x).sum().backward()
    for module in net.modules():
        module.on = True
    with pytest.raises(rewire.NotRepeatable, match="'seen' changed for the first time"):
        net(x)
