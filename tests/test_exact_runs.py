"""Exact gradients however a model is run: early stops, skipped blocks, second backwards, copies."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rewire
from tests.exactness import (
    assert_as_stored,
    assert_exact,
    assert_same_bits,
    by_autograd,
    courses,
    renewed,
    run,
    run_stored,
    same,
    spread,
)
from tests.networks import MODES, WIDTH, Mode, Rescale, convolutions, perceptron, rows

KINDS = ("re2", "re2(sum)", "consistent(1/4)", "dr2(0.9, 0.1)", "bdia")


class PreNorm(nn.Module):
    """x + F(x), with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(perceptron(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class PostNorm(PreNorm):
    """T(x + F(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Rectified(nn.Module):
    """relu(x + F(x)) on pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.body = convolutions(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.body(x)).relu()


class Net(nn.Module):
    """Blocks that a user may leave out, stop at, or look into."""

    def __init__(self, block: Callable[[], nn.Module], depth: int = 6) -> None:
        super().__init__()
        self.stem, self.head = Rescale(torch.ones(())), nn.Identity()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(
        self, x: Tensor, keep: Iterable[int] | None = None, hidden: Sequence[int] = ()
    ) -> Any:
        x = self.stem(x)
        states = []
        for number in range(len(self.blocks)) if keep is None else keep:
            x = self.blocks[number](x)
            if number in hidden:
                states.append(x)
        return (self.head(x), *states) if states else self.head(x)


def turned() -> Tensor:
    """[3, WIDTH, 4, 4]."""
    return torch.randn(3, WIDTH, 4, 4)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "pre-norm": (PreNorm, rows),
    "post-norm": (PostNorm, rows),
    "relu": (Rectified, turned),
}
every_block = pytest.mark.parametrize("block", BLOCKS)


@functools.cache
def _made(block: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    make, inputs = BLOCKS[block]
    model, x = Net(make).to(dtype), inputs().to(dtype)
    rev = rewire.make_reversible(model, x, check="raise")
    assert [len(course.sites) for course in courses(rev)] == [6]
    return rev


def blocks_of(block: str, coupling: str = "re2", mode: Mode = MODES["fp32"]) -> tuple[Any, Tensor]:
    """A rewired net of six blocks, and an input."""
    return renewed(_made(block, mode.dtype), coupling), BLOCKS[block][1]().to(mode.dtype)


# ---- parts of a chain --------------------------------------------------------------------


KEPT = [(0, 1, 2), (0, 2, 5), (1, 2, 3, 4, 5), (0, 1, 2, 3, 4), (5,), (0,), (2, 4)]


@spread("keep, block, mode", KEPT, BLOCKS, ("fp32", "bf16 parameters"), turns=2)
def test_early_stop_and_layer_drop(keep: tuple[int, ...], block: str, mode: str) -> None:
    coupling = KINDS[sum(keep) % len(KINDS)]
    rev, x = blocks_of(block, coupling, MODES[mode])
    for kept in (keep, None, keep):  # whole runs between them leave no trace
        expected = run_stored(rev, x, MODES[mode], keep=kept)
        assert_same_bits(run(rev, x, MODES[mode], keep=kept), expected)


@spread("block, how", BLOCKS, ["no_grad", "inference_mode", "stored"])
def test_an_early_stop_without_a_tape_leaves_no_trace(block: str, how: str) -> None:
    """Evaluate up to block 2, then train without the first three blocks."""
    rev, x = blocks_of(block)
    if how == "stored":
        run_stored(rev, x, keep=(0, 1, 2))
    else:
        with getattr(torch, how)():
            rev(x, keep=(0, 1, 2))
    expected = run_stored(rev, x, keep=(3, 5))
    assert_same_bits(run(rev, x, keep=(3, 5)), expected)


@spread("coupling, block", KINDS, BLOCKS)
def test_hidden_states_in_the_loss(coupling: str, block: str) -> None:
    rev, x = blocks_of(block, coupling)
    for hidden in ((2,), (0, 1, 2, 3, 4, 5), (1, 5)):
        assert_exact(rev, x, hidden=hidden)


@spread("mode, block", MODES, BLOCKS)
def test_a_loss_on_an_intermediate_only(mode: str, block: str) -> None:
    rev, x = blocks_of(block, "consistent(1/2)", MODES[mode])

    def grads() -> list[Tensor]:
        torch.manual_seed(4)
        with MODES[mode]():
            state = rev(x, hidden=(2,))[1]
        wrt = list(rev.blocks[:3].parameters())
        return list(torch.autograd.grad(state.double().sin().sum(), wrt))

    assert_as_stored(rev, grads)


# ---- several forwards and backwards ------------------------------------------------------


@spread("coupling, block", KINDS, BLOCKS)
def test_second_and_third_backward(coupling: str, block: str) -> None:
    rev, x = blocks_of(block, coupling)

    def grads() -> list[Tensor]:
        torch.manual_seed(6)
        wrt = list(rev.parameters())
        loss = rev(x).sin().sum()
        rev(x * 2)  # another run in between
        return [g for _ in range(3) for g in torch.autograd.grad(loss, wrt, retain_graph=True)]

    assert_as_stored(rev, grads)


ORDERS = list(itertools.permutations(range(3)))[1::2]


@spread("block, coupling, order", BLOCKS, ["re2", "dr2(0.9, 0.1)"], ORDERS)
def test_interleaved_micro_batches(block: str, coupling: str, order: tuple[int, ...]) -> None:
    """Each on its own grid: the second is a thousand times as large."""
    rev, _ = blocks_of(block, coupling)
    torch.manual_seed(8)
    inputs = [BLOCKS[block][1]() * scale for scale in (1.0, 1e3, 1e-3)]

    def grads() -> list[Tensor]:
        torch.manual_seed(6)
        losses = [rev(x).sin().sum() for x in inputs]
        return [g for n in order for g in torch.autograd.grad(losses[n], list(rev.parameters()))]

    assert_as_stored(rev, grads)


@every_block
def test_accumulation(block: str) -> None:
    rev, _ = blocks_of(block, "consistent(1/4)")
    torch.manual_seed(8)
    batches = [BLOCKS[block][1]() for _ in range(4)]

    def grads() -> list[Tensor]:
        torch.manual_seed(6)
        rev.zero_grad()
        for x in batches:
            rev(x).sin().sum().backward()
        return [p.grad for p in rev.parameters()]

    assert_as_stored(rev, grads)
    rev.zero_grad()


@spread("block, coupling", BLOCKS, ["re2", "consistent(1/4)", "bdia"])
def test_double_backward(block: str, coupling: str) -> None:
    rev, x = blocks_of(block, coupling, MODES["fp64"])
    x.requires_grad_()

    def second() -> list[Tensor]:
        torch.manual_seed(6)
        (first,) = torch.autograd.grad(rev(x).sin().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, *rev.blocks[0].parameters()]))

    expected = by_autograd(rev, second)
    found = second()
    largest = max(float(g.abs().max()) for g in expected)
    pairs = zip(found, expected, strict=True)
    # The graph of the first gradient is another one: sums are made in another order.
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 1e-10 * largest


@every_block
def test_parameters_asked_for_one_by_one(block: str) -> None:
    rev, x = blocks_of(block, "consistent(1/4)")
    names = [name for name, _ in rev.named_parameters()][::5]

    def grads() -> list[Tensor]:
        torch.manual_seed(6)
        loss, named = rev(x).sin().sum(), dict(rev.named_parameters())
        order = [*names[::2], *reversed(names)]
        return [torch.autograd.grad(loss, named[n], retain_graph=True)[0] for n in order]

    assert_as_stored(rev, grads)


@spread("block, frozen", BLOCKS, [(0, 1), (3,), (5,)])
def test_frozen_blocks(block: str, frozen: tuple[int, ...]) -> None:
    rev, x = blocks_of(block, "consistent(1/4)")
    for number in frozen:
        rev.blocks[number].requires_grad_(False)

    def grads() -> list[Tensor]:
        torch.manual_seed(6)
        wrt = [p for p in rev.parameters() if p.requires_grad]
        return list(torch.autograd.grad(rev(x).sin().sum(), wrt))

    try:
        assert_as_stored(rev, grads)
    finally:
        rev.requires_grad_()


@pytest.mark.parametrize("block", ["pre-norm", "post-norm"])
def test_inside_checkpoint(block: str) -> None:
    rev, x = blocks_of(block, "consistent(1/4)")
    x.requires_grad_()

    def grads() -> list[Tensor]:
        torch.manual_seed(6)
        loss = checkpoint(rev, x, use_reentrant=False).sin().sum()
        return list(torch.autograd.grad(loss, [x, *rev.parameters()]))

    assert_as_stored(rev, grads)


# ---- without gradients -------------------------------------------------------------------


@spread("mode, block, coupling", MODES, BLOCKS, ["re2", "consistent(1/8)"])
def test_forward_without_gradients_has_the_same_bits(mode: str, block: str, coupling: str) -> None:
    """Eval mode: nothing is drawn and no statistics move."""
    rev, x = blocks_of(block, coupling, MODES[mode])
    rev.eval()
    with MODES[mode]():
        outputs = [rev(x)]
        for how in (torch.no_grad(), torch.inference_mode(), rewire.store_activations(rev)):
            with how:
                outputs.append(rev(x).clone())
    assert outputs[0].requires_grad
    assert all(same(out.detach(), outputs[0].detach()) for out in outputs)


# ---- copies carry the grid ---------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    """Through torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@spread("block, how", BLOCKS, COPIES)
def test_a_copy_goes_on_with_the_same_bits(block: str, how: str) -> None:
    """The grid of a large batch is coarser than a fresh one, and travels with the copy."""
    rev, x = blocks_of(block, "consistent(1/4)")
    run(rev, x * 3e3)
    other = COPIES[how](rev)
    steps = [
        [course.grid.current(torch.float32).step for course in courses(m)] for m in (rev, other)
    ]
    assert steps[0] == steps[1]
    assert_same_bits(run(other, x * 3e3), run(rev, x * 3e3))
    assert_same_bits(run_stored(other, x), run(rev, x))
    assert list(other.state_dict()) == list(rev.state_dict())
