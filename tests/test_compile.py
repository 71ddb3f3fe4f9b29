"""torch.compile around, and inside, a rewired model."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.compiling import checked
from rewire.meters import LiveBytes
from rewire.plans import WAYS
from rewire.reversible import ReversibleSequential
from tests.specimens import DIM, Loop, mlp, rows

TOLERANCE = 1e-12


class Block(nn.Module):
    """Pre-norm, two residual modules."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.body = nn.Linear(DIM, DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x).tanh()
        return x + self.body(x)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(function: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = function(x).sin().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *model.parameters()])]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def rewired() -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A rewired model, its input, and its twin's gradients."""
    torch.manual_seed(0)
    x = rows().requires_grad_()
    rev = rewire.make_reversible(Loop(Block).double(), x)
    with rewire.store_activations(rev):
        expected = gradients(rev, rev, x)
    return rev, x, expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_whole_model(backend: str) -> None:
    rev, x, expected = rewired()
    compiled = torch.compile(rev, backend=backend)
    assert distance(gradients(compiled, rev, x), expected) < TOLERANCE
    assert distance(gradients(compiled, rev, x), expected) < TOLERANCE
    longer = torch.cat([x, x], 1).detach().requires_grad_()
    with rewire.store_activations(rev):
        expected = gradients(rev, rev, longer)
    assert distance(gradients(compiled, rev, longer), expected) < TOLERANCE


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_in_place_of_the_model(backend: str) -> None:
    rev, x, expected = rewired()
    rev.compile(backend=backend)
    assert distance(gradients(rev, rev, x), expected) < TOLERANCE


def test_compiled_before_the_first_run_without_gradients() -> None:
    rev, x, _ = rewired()
    compiled = torch.compile(rev, backend="aot_eager")
    with torch.no_grad():
        expected = rev(x)
        assert torch.allclose(compiled(x), expected, atol=TOLERANCE)
    assert distance(gradients(compiled, rev, x), gradients(rev, rev, x)) < TOLERANCE


@pytest.mark.parametrize("whole", [False, True])
def test_a_chain_by_hand(whole: bool) -> None:
    torch.manual_seed(0)
    net, x = ReversibleSequential([mlp().double() for _ in range(3)]), rows().requires_grad_()
    with rewire.store_activations(net):
        expected = gradients(net, net, x)
    compiled = torch.compile(net, backend="aot_eager")
    if not whole:
        branches = [torch.compile(branch, backend="aot_eager") for branch in net.children()]
        compiled = ReversibleSequential(branches)
    assert distance(gradients(compiled, net, x), expected) < TOLERANCE


@pytest.mark.slow
def test_inductor() -> None:
    rev, x, expected = rewired()
    compiled = torch.compile(rev)
    assert distance(gradients(compiled, rev, x), expected) < 1e-10


def test_an_exported_model_computes_the_same_at_another_batch_size() -> None:
    rev = rewire.make_reversible(Loop(Block, 3).double(), rows()).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        exported = torch.export.export(rev, (rows(),), dynamic_shapes=shapes).module()
        more = torch.cat([rows(), rows()])
        assert torch.equal(exported(more), rev(more))


def test_a_jit_trace_is_refused_in_words() -> None:
    rev = rewire.make_reversible(Loop(Block, 3).double(), rows()).eval()
    with pytest.raises(rewire.RewireError, match=r"Use torch\.export"):
        torch.jit.trace(rev, rows())


# ---- compiled branches -------------------------------------------------------------------

AOT = {"backend": "aot_eager"}


def graphs() -> int:
    """Graphs compiled since dynamo was reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_equal_branches_are_compiled_once(precision: str) -> None:
    torch.manual_seed(0)
    model, x = Loop(Block).double(), rows().requires_grad_()
    rev = rewire.make_reversible(model, x, precision=precision)
    expected = gradients(rev, rev, x)
    torch._dynamo.utils.counters.clear()
    built = rewire.make_reversible(model, x, precision=precision, check="raise", compile=AOT)
    assert distance(gradients(built, built, x), expected) < TOLERANCE
    assert graphs() == 2  # for two residual modules in each of the blocks
    assert not torch._dynamo.utils.counters["graph_break"]
    assert distance(gradients(built, built, x), expected) < TOLERANCE
    assert graphs() == 2
    with rewire.store_activations(built):
        stored = gradients(built, built, x)
    assert distance(stored, gradients(built, built, x)) <= TOLERANCE * (precision == "fast")


def test_a_sequential_of_compiled_branches() -> None:
    torch.manual_seed(0)
    x = rows().requires_grad_()
    branches = [branch.double() for n in range(5) for branch in (mlp(), nn.Linear(DIM, DIM))]
    plain = ReversibleSequential(branches)
    torch._dynamo.utils.counters.clear()
    net = ReversibleSequential(branches, compile=AOT, check="raise")
    assert distance(gradients(net, net, x), gradients(plain, plain, x)) < TOLERANCE
    assert graphs() == 2
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert distance(gradients(twin, twin, x), gradients(plain, plain, x)) < TOLERANCE


def test_dropout_is_drawn_again_by_compiled_branches() -> None:
    torch.manual_seed(0)
    x = rows().requires_grad_()
    net = ReversibleSequential(
        [nn.Sequential(mlp(), nn.Dropout(0.5)).double() for _ in range(4)],
        compile=AOT,
        check="raise",
    )
    torch.manual_seed(1)
    found = gradients(net, net, x)
    torch.manual_seed(1)
    with rewire.store_activations(net):
        assert distance(gradients(net, net, x), found) == 0


def test_inductor_repeats_its_bits() -> None:
    """What is compiled for good, with streams in parts and stored modules between."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 32, requires_grad=True)
    block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    ways = ("reverse", "store", "checkpoint", "reverse")
    net = ReversibleSequential([block] * 4, compile=True, chunks=2, check="raise", ways=ways)
    found = gradients(net, net, x)
    with rewire.store_activations(net):
        assert distance(gradients(net, net, x), found) == 0
    plain = ReversibleSequential([block] * 4)
    assert distance(gradients(plain, plain, x), found) < 1e-4


def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    class Breaks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    torch.manual_seed(0)
    x = rows().requires_grad_()
    kinds = [nn.Tanh, lambda: Breaks(DIM, DIM), nn.Tanh, nn.Sigmoid]
    branches = [nn.Sequential(nn.Linear(DIM, DIM), kind()).double() for kind in kinds]
    torch._dynamo.utils.counters.clear()
    net = ReversibleSequential(branches, compile=AOT, check="raise")
    with pytest.warns(UserWarning, match="runs as it is, for it cannot be compiled"):
        found = gradients(net, net, x)
    assert graphs() == 2  # the others of its class
    plain = ReversibleSequential(branches)
    assert distance(found, gradients(plain, plain, x)) == 0


def test_too_many_compilations_are_an_error_not_other_bits() -> None:
    how = {**AOT, "recompile_limit": 1}
    net = ReversibleSequential([nn.Linear(DIM, DIM).double()] * 2, compile=how)
    inputs = [torch.randn(n, DIM, dtype=torch.float64, requires_grad=True) for n in (2, 3)]
    net(inputs[0])
    with pytest.raises(rewire.RewireError, match="reruns need the code of their runs"):
        net(inputs[1])


def test_many_shapes_and_modes() -> None:
    torch.manual_seed(0)
    widths = range(3, 15)
    branches = [nn.Sequential(nn.Linear(DIM, n), nn.Linear(n, DIM)).double() for n in widths]
    how = {"backend": "aot_eager", "options": {}}
    net, plain = ReversibleSequential(branches, compile=how), ReversibleSequential(branches)
    for batch in (2, 3):
        x = torch.randn(batch, DIM, dtype=torch.float64, requires_grad=True)
        assert distance(gradients(net, net, x), gradients(plain, plain, x)) < TOLERANCE
        with torch.no_grad():
            assert torch.allclose(net.eval()(x), plain.eval()(x))
        net.train()


def test_a_compiled_model_around_compiled_branches() -> None:
    rev, x, expected = rewired()
    built = rewire.make_reversible(Loop(Block).double(), x, compile=AOT, check="raise")
    built.load_state_dict(rev.state_dict())
    around = torch.compile(built, backend="aot_eager")
    assert distance(gradients(around, built, x), expected) < TOLERANCE


def test_estimates_compile_nothing() -> None:
    torch._dynamo.utils.counters.clear()
    x = rows()
    built = rewire.make_reversible(Loop(Block).double(), x, compile=AOT)
    assert rewire.estimate(built, x).peak_bytes > 0
    assert graphs() == 0
    with pytest.raises(ValueError, match="compile="):
        ReversibleSequential([nn.Linear(DIM, DIM)], compile="yes")


class Square(nn.Module):
    """Saves several tensors of one shape and dtype, so that their order tells runs apart."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(DIM, DIM, dtype=torch.float64) / 3)
        self.b = nn.Parameter(torch.randn(DIM, DIM, dtype=torch.float64) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(torch.mm(torch.sin(torch.mm(x, self.a)), self.b))
        return x * torch.mm(x, self.b).sigmoid()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("watched", ["forward", "backward", "neither"])
def test_a_rerun_is_compiled_as_its_run_was(way: str, watched: str) -> None:
    torch.manual_seed(0)
    branches = [Square() for _ in range(3)]
    x = torch.randn(DIM, DIM, dtype=torch.float64, requires_grad=True)
    expected = gradients(ReversibleSequential(branches), nn.ModuleList(branches), x)
    how = {"backend": "aot_eager"}
    rev = ReversibleSequential(branches, compile=how, ways=(way,) * 3, check="raise")
    with LiveBytes() if watched == "forward" else nullcontext():
        loss = rev(x).sin().sum()
    for _ in range(2):
        with LiveBytes() if watched == "backward" else nullcontext():
            found = torch.autograd.grad(loss, [x, *rev.parameters()], retain_graph=True)
        assert distance([loss.detach(), *found], expected) < TOLERANCE


def test_options_may_hold_lists_and_must_be_told_apart() -> None:
    branches = [Square()]
    x = torch.randn(DIM, DIM, dtype=torch.float64)
    backend = {"backend": "aot_eager", "options": None}
    assert ReversibleSequential(branches, compile=backend)(x).shape == x.shape
    checked({"options": {"names": ["a", "b"]}})
    for wrong in ({"options": {1, 2}}, {1: 2}, "yes"):
        with pytest.raises(ValueError, match="keyword arguments"):
            checked(wrong)  # type: ignore[arg-type]
