"""ReversibleSequential by hand: values and gradients against two streams written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.reversible import ReversibleSequential

WIDTH = 4
TOLERANCE = 1e-12
Function = Callable[..., Tensor]


def mlp(width: int = WIDTH) -> nn.Module:
    """A small branch in float64."""
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, width)).double()


def chain(depth: int, branch: Callable[[], nn.Module] = mlp) -> ReversibleSequential:
    """A chain with fixed parameters."""
    torch.manual_seed(depth)
    return ReversibleSequential([branch() for _ in range(depth)])


def rows(*shape: int) -> Tensor:
    """A leaf [*shape, WIDTH] that asks for gradients."""
    generator = torch.Generator().manual_seed(1)
    size = (*(shape or (3,)), WIDTH)
    return torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()


def two_streams(branches: Iterable[Function], x: Tensor, *sides: Any) -> Tensor:
    """The paper's definition."""
    newest = older = x
    for branch in branches:
        newest, older = older + branch(newest, *sides), newest
    return (newest + older) / 2


def by_hand(net: nn.Module) -> Function:
    """The definition, on the branches of a chain."""
    return lambda x, *sides: two_streams(net.children(), x, *sides)  # type: ignore[arg-type]


def gradients(function: Function, wrt: Sequence[Tensor], *args: Any, seed: int = 3) -> list[Tensor]:
    """The output's values, then the gradients."""
    torch.manual_seed(seed)
    out = function(*args)
    found = torch.autograd.grad(out.sin().sum(), list(wrt), allow_unused=True)
    return [out.detach(), *(torch.zeros(()) if grad is None else grad for grad in found)]


def stored(net: nn.Module) -> Function:
    """The chain's plain twin."""

    def run(*args: Any) -> Any:
        with rewire.store_activations(net):
            return net(*args)

    return run


def distance(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest difference."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).detach().abs().max()) for a, b in pairs)


# ---- the function and its gradients ------------------------------------------------------


@pytest.mark.parametrize("depth", range(1, 10))
def test_depths(depth: int) -> None:
    net, x = chain(depth), rows()
    wrt = [x, *net.parameters()]
    expected = gradients(by_hand(net), wrt, x)
    assert distance(gradients(net, wrt, x), expected) < TOLERANCE
    assert distance(gradients(stored(net), wrt, x), expected) < TOLERANCE
    start = net.inverse(*net.streams(x))
    assert distance(start, [x, x]) < TOLERANCE


def test_plain_functions_as_branches() -> None:
    functions = [torch.sin, lambda x: 0.5 * x.cos(), torch.tanh]
    net, x = ReversibleSequential(functions), rows()
    expected = gradients(lambda x: two_streams(functions, x), [x], x)
    assert distance(gradients(net, [x], x), expected) < TOLERANCE


def test_no_branches_is_an_error() -> None:
    with pytest.raises(ValueError, match="no branches"):
        ReversibleSequential([])


def test_inverse_of_two_shapes_is_an_error() -> None:
    with pytest.raises(rewire.StreamMismatch, match=r"\[3, 4\].*\[2, 4\]"):
        chain(2).inverse(rows(3), rows(2))


class Sided(nn.Module):
    """A branch with a scale and a shift from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, scale: Tensor, shifts: dict[str, Tensor]) -> Tensor:
        return self.body(x * scale) + shifts["add"]


def test_side_inputs_need_gradients() -> None:
    net, x = chain(5, Sided), rows()
    base, add = rows(1), rows(3).detach().requires_grad_()
    wrt = [x, base, add, *net.parameters()]

    def run(function: Function) -> list[Tensor]:
        return gradients(lambda x: function(x, base.exp(), {"add": add.sin()}), wrt, x)

    # The dict is copied for the rerun; the gradient goes to the tensors in it all the same.
    assert distance(run(net), run(by_hand(net))) < TOLERANCE


class Cast(nn.Module):
    """A branch of its own precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = mlp().to(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.to(self.dtype))


def test_branches_of_mixed_dtypes() -> None:
    dtypes = iter([torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64])
    net, x = chain(5, lambda: Cast(next(dtypes))), rows().detach().float().requires_grad_()
    wrt = [x, *net.parameters()]
    found = gradients(net, wrt, x)
    assert found[0].dtype == x.dtype
    assert [g.dtype for g in found[2:]] == [p.dtype for p in net.parameters()]
    # A reconstructed stream may round otherwise and move a bfloat16 branch by one unit.
    assert distance(found, gradients(stored(net), wrt, x)) < 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_in_float32_streams(dtype: torch.dtype) -> None:
    net = chain(6).to(dtype)
    x = rows().detach().to(dtype).requires_grad_()
    newer, older = net.streams(x)
    assert newer.dtype == older.dtype == torch.float32
    wrt = [x, *net.parameters()]
    found, expected = gradients(net, wrt, x), gradients(stored(net), wrt, x)
    assert {grad.dtype for grad in found} == {dtype}
    assert distance(found[:1], expected[:1]) == 0.0
    assert distance(found, expected) < 5e-2
    exact = copy.deepcopy(net).double()
    assert distance([net(x)], [exact(x.double())]) < 5e-2


def test_integers_are_no_streams() -> None:
    with pytest.raises(rewire.StreamMismatch, match="int64"):
        chain(2)(torch.ones(2, WIDTH, dtype=torch.int64))


# ---- layouts -----------------------------------------------------------------------------


def convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)).double()


def layouts() -> dict[str, Tensor]:
    plain = torch.randn(2, WIDTH, 5, 6, dtype=torch.float64)
    return {
        "contiguous": plain,
        "channels_last": plain.to(memory_format=torch.channels_last),
        "transposed": plain.transpose(2, 3),
        "with gaps": torch.randn(2, WIDTH, 5, 12, dtype=torch.float64)[..., ::2],
        "expanded": plain[:1].expand(2, -1, -1, -1),
        "one channel": plain[:, :1].expand(2, WIDTH, 5, 6),
        "batch of one": plain[:1],
        "permuted": plain.permute(3, 1, 0, 2),
    }


@pytest.mark.parametrize("name", layouts())
def test_layouts(name: str) -> None:
    torch.manual_seed(0)
    x = layouts()[name].detach()
    x.requires_grad_()
    net = chain(4, convolution)
    wrt = [x, *net.parameters()]
    found = gradients(net, wrt, x)
    assert distance(found, gradients(by_hand(net), wrt, x)) < TOLERANCE
    if name == "channels_last":
        assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_branches_in_another_layout() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(WIDTH, WIDTH, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x).contiguous(memory_format=torch.channels_last)

    net, x = chain(5, Turned), layouts()["contiguous"].requires_grad_()
    wrt = [x, *net.parameters()]
    assert distance(gradients(net, wrt, x), gradients(by_hand(net), wrt, x)) < TOLERANCE


def test_a_branch_of_another_shape_is_an_error() -> None:
    net = ReversibleSequential([mlp(), nn.Linear(WIDTH, 5).double()], name="body")
    with pytest.raises((rewire.StreamMismatch, RuntimeError)) as caught:
        net(rows())
    assert isinstance(caught.value, rewire.StreamMismatch)
    assert "body.1" in str(caught.value)
    assert "[3, 5]" in str(caught.value)


def test_a_branch_that_broadcasts() -> None:
    net, x = chain(3, lambda: nn.Linear(WIDTH, 1).double()), rows()
    wrt = [x, *net.parameters()]
    assert distance(gradients(net, wrt, x), gradients(by_hand(net), wrt, x)) < TOLERANCE


# ---- what autograd is asked for ----------------------------------------------------------


@pytest.mark.parametrize("frozen", ["first", "middle", "last", "weights", "all"])
@pytest.mark.parametrize("leaf", [True, False])
def test_frozen_parts(frozen: str, leaf: bool) -> None:
    net, x = chain(4), rows().detach().requires_grad_(leaf)
    parts = {"first": ("0.",), "middle": ("1.", "2."), "last": ("3.",), "all": ("",)}
    for name, parameter in net.named_parameters():
        chosen = name.endswith("weight") if frozen == "weights" else name.startswith(parts[frozen])
        parameter.requires_grad_(not chosen)
    wrt = [t for t in (x, *net.parameters()) if t.requires_grad]
    if not wrt:
        assert not net(x).requires_grad
        return
    assert distance(gradients(net, wrt, x), gradients(by_hand(net), wrt, x)) < TOLERANCE


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    net, x = chain(5), rows()
    expected = net(x).detach()
    with mode():
        found = net(x)
    assert not found.requires_grad
    assert distance([found], [expected]) < TOLERANCE
    wrt = [x, *net.parameters()]
    assert distance(gradients(net, wrt, x), gradients(by_hand(net), wrt, x)) < TOLERANCE


def test_gradients_accumulate() -> None:
    net, x = chain(4), rows()
    once = gradients(by_hand(net), [x, *net.parameters()], x)[1:]
    for _ in range(3):
        net(x).sin().sum().backward()
    assert distance([x.grad, *(p.grad for p in net.parameters())], [3 * g for g in once]) < 1e-11


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_second_and_third_backward(depth: int) -> None:
    net, x = chain(depth), rows()
    wrt = [x, *net.parameters()]
    expected = gradients(by_hand(net), wrt, x)[1:]
    loss = net(x).sin().sum()
    for _ in range(3):
        assert distance(torch.autograd.grad(loss, wrt, retain_graph=True), expected) < TOLERANCE


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_double_backward(depth: int) -> None:
    net, x = chain(depth), rows()
    wrt = [x, *net.parameters()]

    def second(function: Function) -> list[Tensor]:
        first = torch.autograd.grad(function(x).sin().sum(), wrt, create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        return list(torch.autograd.grad(penalty, wrt))

    expected = second(by_hand(net))
    assert distance(second(stored(net)), expected) < 1e-11
    assert distance(second(net), expected) < 1e-11


def test_double_backward_on_a_part_then_backward_on_all() -> None:
    net, x = chain(6), rows()
    late, wrt = list(net.parameters())[-8:], [x, *net.parameters()]

    def second(function: Function) -> list[Tensor]:
        loss = function(x).sin().sum()
        first = torch.autograd.grad(loss, late, create_graph=True)
        whole = torch.autograd.grad(loss, wrt, retain_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        return [*whole, *torch.autograd.grad(penalty, wrt)]

    assert distance(second(net), second(by_hand(net))) < 1e-11


def test_gradient_of_a_part() -> None:
    net, x = chain(6), rows()
    names = dict(net.named_parameters())
    whole = dict(zip(names, gradients(by_hand(net), list(names.values()), x)[1:], strict=True))
    loss = net(x).sin().sum()
    for name in ("5.0.weight", "0.2.bias", "3.0.weight", "3.2.weight", "5.0.weight"):
        (found,) = torch.autograd.grad(loss, [names[name]], retain_graph=True)
        assert distance([found], [whole[name]]) < TOLERANCE


class Gated(nn.Module):
    """A term that gives no gradient to the stream, but saves it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.gate = nn.Parameter(torch.rand(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + x.detach() * self.gate


def test_parts_asked_for_in_turn() -> None:
    net, x = chain(6, Gated), rows()
    names = dict(net.named_parameters())
    order = ["0.gate", "4.body.0.weight", "5.gate", "2.gate", "1.body.0.weight", "3.gate"]
    whole = dict(zip(names, gradients(by_hand(net), list(names.values()), x)[1:], strict=True))
    loss = net(x).sin().sum()
    for name in order:
        (found,) = torch.autograd.grad(loss, [names[name]], retain_graph=True)
        assert distance([found], [whole[name]]) < TOLERANCE, name


def test_several_forwards_before_a_backward() -> None:
    net, x = chain(5), rows()
    wrt = [x, *net.parameters()]

    def run(function: Function) -> list[Tensor]:
        return gradients(lambda x: function(x) + function(function(x)) * function(x.cos()), wrt, x)

    assert distance(run(net), run(by_hand(net))) < TOLERANCE


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_interleaved_micro_batches(order: tuple[int, ...]) -> None:
    net = chain(4)
    inputs = [(number + 1) * rows().detach() for number in range(3)]
    losses = [net(x).sin().sum() for x in inputs]
    for number in order:
        found = torch.autograd.grad(losses[number], list(net.parameters()))
        expected = gradients(by_hand(net), list(net.parameters()), inputs[number])[1:]
        assert distance(found, expected) < TOLERANCE
