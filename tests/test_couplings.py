"""Couplings against their equations, written out by hand in plain float64 autograd."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewire
from rewire.coupling import Coefficients, Coupling, coupling_from
from rewire.reversible import ReversibleSequential
from tests.exactness import assert_exact, courses, run, run_stored, spread
from tests.networks import (
    COUPLINGS,
    MODES,
    WIDTH,
    SelfAttention,
    Stack,
    convolutions,
    perceptron,
    pictures,
    residual_net,
    rows,
    transformer,
)

# Rounding to the grid of float64 is 1e-15 of the stream, in each module.
TOLERANCE = 1e-10
Function = Callable[[Tensor], Tensor]


# ---- the oracle --------------------------------------------------------------------------


def equation(
    x: Tensor,
    branches: Iterable[Function],
    coefficients: Iterable[Sequence[Any]],
    merge: str = "last",
    norm: Callable[[int, Tensor], Tensor] = lambda _, z: z,
    act: Function | None = None,
) -> Tensor:
    """x_{i+1} = T_i(a x_i + b x_{i-1} + c F_i(x_i)), x_{-1} = x_0; an activation A on the trunk
    makes it a x_i + b x_{i-1} + c (F_i(A(x_i)) + A(x_i) - x_i)."""
    first = newest = older = x
    for number, (branch, (a, b, c)) in enumerate(zip(branches, coefficients, strict=False)):
        seen = newest if act is None or number == 0 else act(newest)
        change = branch(seen) + (seen - newest)
        newest, older = norm(number, a * newest + b * older + c * change), newest
    out = {"last": newest, "mean": (newest + older) / 2, "sum": newest + older - first}[merge]
    return out if act is None else act(out)


def numbers(coupling: str) -> tuple[tuple[float, float, float], str]:
    """a, b, c and the merge, by the papers."""
    table = {
        "re2": ((0, 1, 1), "mean"),
        "re2(sum)": ((0, 1, 1), "sum"),
        "re2(last)": ((0, 1, 1), "last"),
        "consistent(1/2)": ((1 / 2, 1 / 2, 3 / 2), "last"),
        "consistent(1/4)": ((3 / 4, 1 / 4, 5 / 4), "last"),
        "consistent(1/8)": ((7 / 8, 1 / 8, 9 / 8), "last"),
        "dr2(0.9, 0.1)": ((0.9, 0.1, 1), "last"),
        "dr2(1, 0.3)": ((1, 0.3, 1), "last"),
        "dr2(0.5, 0.5)": ((0.5, 0.5, 1), "last"),
        "dr2(1, 1.3)": ((1, 1.3, 1), "last"),
    }
    return table[coupling]


FIXED = [coupling for coupling in COUPLINGS if coupling != "bdia"]


def grads(function: Function, x: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Output and gradients."""
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [leaf, *parameters])]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Each tensor up to the tolerance, relative to its size and to the largest gradient's."""
    assert len(found) == len(expected)
    floor = 1e-3 * max(float(t.abs().max()) for t in expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a - b).abs().max()) / max(float(b.abs().max()), floor)
        assert error <= TOLERANCE, f"tensor {number}: {error:.1e}"


def double_rows() -> Tensor:
    """[2, 6, WIDTH] in float64."""
    return rows().double()


@spread("coupling, depth", FIXED, [1, 2, 3, 6])
def test_the_equation(coupling: str, depth: int) -> None:
    torch.manual_seed(depth)
    net = ReversibleSequential(
        [perceptron() if i % 2 else SelfAttention() for i in range(depth)], coupling=coupling
    ).double()
    (a, b, c), merge = numbers(coupling)
    x, parameters = double_rows(), list(net.parameters())
    expected = grads(
        lambda x: equation(x, net.children(), [(a, b, c)] * depth, merge), x, parameters
    )
    for _ in range(2):
        assert_close(grads(net, x, parameters), expected)
    with rewire.store_activations(net):
        assert_close(grads(net, x, parameters), expected)


@spread("coupling, norm", FIXED[1::2], ["LayerNorm", "RMSNorm", "none"])
def test_the_equation_in_a_model(coupling: str, norm: str) -> None:
    torch.manual_seed(1)
    kind = None if norm == "none" else lambda: varied(getattr(nn, norm)(WIDTH))
    model = transformer(4, norm=kind).double()
    rev = rewire.make_reversible(model, double_rows(), coupling=coupling, check="raise")
    coefficients, merge = numbers(coupling)
    x, parameters = double_rows(), list(model.parameters())

    def by_hand(x: Tensor) -> Tensor:
        trunks = model.trunks
        return equation(
            model.stem(x), model.branches, [coefficients] * 4, merge, lambda i, z: trunks[i](z)
        )

    assert_close(grads(rev, x, parameters), grads(by_hand, x, parameters))


def varied(norm: nn.Module) -> nn.Module:
    """Weights and biases of many sizes and both signs."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.3, 1.0)
    return norm


@spread("coupling, training", FIXED[::2], [True, False])
def test_the_equation_with_relu_on_the_trunk(coupling: str, training: bool) -> None:
    torch.manual_seed(1)
    model = residual_net(4).double().train(training)
    x, parameters = pictures().double(), list(model.parameters())
    rev = rewire.make_reversible(model, x, coupling=coupling, check="raise")
    twin, (coefficients, merge) = copy.deepcopy(model), numbers(coupling)

    def by_hand(x: Tensor) -> Tensor:
        return equation(twin.stem(x), twin.branches, [coefficients] * 4, merge, act=torch.relu)

    found = [*grads(rev, x, parameters), *rev.buffers()]
    expected = [*grads(by_hand, x, twin.parameters()), *twin.buffers()]
    assert_close([t.double() for t in found], [t.double() for t in expected])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_of_a_norm_on_the_trunk_move_once(training: bool) -> None:
    torch.manual_seed(1)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    model = Stack(stem, (convolutions() for _ in range(4)), lambda: nn.BatchNorm2d(8)).double()
    model.train(training)
    x, twin = pictures().double(), copy.deepcopy(model)
    rev = rewire.make_reversible(model, x, check="raise")

    def by_hand(x: Tensor) -> Tensor:
        coefficients, norms = [(0, 1, 1)] * 4, twin.trunks
        return equation(twin.stem(x), twin.branches, coefficients, "mean", lambda i, z: norms[i](z))

    found = [*grads(rev, x, model.parameters()), *rev.buffers()]
    expected = [*grads(by_hand, x, twin.parameters()), *twin.buffers()]
    assert_close([t.double() for t in found], [t.double() for t in expected])


@pytest.mark.parametrize(
    "coupling", [c for c in COUPLINGS if "re2" not in c and "1.3" not in c and c != "bdia"]
)
def test_what_the_inverse_amplifies(coupling: str) -> None:
    """The growth of an error in the inverse alone, measured against the root of its equation."""
    (a, b, _), _ = numbers(coupling)
    state = torch.tensor([1.0, 0.0], dtype=torch.float64)
    step = torch.tensor([[0.0, 1.0], [1 / b, -a / b]], dtype=torch.float64)
    for _ in range(200):
        state = step @ (state / state.norm())
    assert coupling_from(coupling).growth == pytest.approx(float(state.norm()), rel=1e-2)


# ---- bdia --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noted(rewire.Bdia):
    """Bdia that keeps the coefficients it gave."""

    seen: list[Coefficients] = field(default_factory=list, compare=False)

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        found = super().coefficients(x, training)
        if x.dim() > 1:
            self.seen.append(found)
        return found


@pytest.mark.parametrize("norm", [False, True], ids=["pre-norm", "post-norm"])
def test_bdia_in_training(norm: bool) -> None:
    """Signs for each sample and module, and the equation with these."""
    torch.manual_seed(1)
    model = transformer(6, norm=(lambda: nn.LayerNorm(WIDTH)) if norm else None).double()
    coupling = Noted()
    rev = rewire.make_reversible(model, double_rows(), coupling=coupling, check="raise")
    x, parameters = rows(16).double(), list(model.parameters())
    coupling.seen.clear()
    found = grads(rev, x, parameters)
    drawn = coupling.seen
    assert len(drawn) == 6
    assert {tuple(k.a.shape) for k in drawn} == {(16, 1, 1)}
    signs = torch.stack([k.b.flatten() for k in drawn])
    assert signs.unique().tolist() == [-0.5, 0.5]
    assert len(signs.unique(dim=0)) == 6
    assert len(signs.unique(dim=1)[0]) > 6
    assert all(torch.equal(k.a, 1 - k.b) and torch.equal(k.c, 1 + k.b) for k in drawn)

    def by_hand(x: Tensor) -> Tensor:
        return equation(
            model.stem(x), model.branches, drawn, "last", lambda i, z: model.trunks[i](z)
        )

    assert_close(found, grads(by_hand, x, parameters))


@spread("mode, network", ["fp32", "fp64"], ["post-norm", "relu", "pre-norm"])
def test_bdia_in_eval_mode_is_the_original(mode: str, network: str) -> None:
    limit = {"fp32": 1e-5, "fp64": 1e-12}[mode]
    torch.manual_seed(1)
    norm = (lambda: nn.LayerNorm(WIDTH)) if network == "post-norm" else None
    model = residual_net(6) if network == "relu" else transformer(6, norm=norm)
    model = model.to(MODES[mode].dtype).eval()
    x = (pictures() if network == "relu" else rows()).to(MODES[mode].dtype)
    rev = rewire.make_reversible(model, x, coupling="bdia", check="raise")
    found, expected = (grads(m, x, model.parameters()) for m in (rev, model))
    floor = 1e-3 * max(float(t.abs().max()) for t in expected[1:])
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 100 * limit * max(float(b.abs().max()), floor)
    assert float((found[0] - expected[0]).abs().max()) <= limit * float(expected[0].abs().max())
    assert_exact(rev, x, MODES[mode])
    with torch.no_grad():
        assert torch.equal(rev(x), found[0])


def test_bdia_gives_the_original_on_average() -> None:
    """To first order in the branches: +γ and -γ cancel."""
    torch.manual_seed(1)
    model = transformer(2).double()
    for branch in model.branches:
        nn.init.normal_(list(branch.parameters())[-2], 0, 1e-3)
    rev = rewire.make_reversible(model, double_rows(), coupling="bdia")
    x = rows(1).double()
    with torch.no_grad():
        mean = rev(x.expand(4000, -1, -1)).mean(0)
        error = float((mean - model(x)[0]).abs().max())
        assert error < 0.05 * float((model(x) - model.stem(x)).abs().max())


# ---- a coupling of one's own -------------------------------------------------------------


@dataclass(frozen=True)
class Momentum(Coupling):
    """x_{i+1} = (1 + m) x_i - m x_{i-1} + F_i(x_i), the heavy ball."""

    name: ClassVar[str] = "momentum"
    m: float = 0.25

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        return Coefficients(1 + self.m, -self.m, 1.0)


@dataclass(frozen=True)
class Gated(Coupling):
    """Of another weight in each sample, by a tensor."""

    name: ClassVar[str] = "gated"

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        b = torch.linspace(0.25, 1.0, len(x)).to(x).view(-1, *(1,) * (x.dim() - 1))
        return Coefficients(1 - b, b, 1.0)

    @property
    def factor(self) -> float:
        return 0.25


@dataclass(frozen=True)
class Backwards(Coupling):
    """b = -1: nothing is lost, and the sign turns."""

    name: ClassVar[str] = "backwards"

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        return Coefficients(1.5, -1.0, 0.5)


@dataclass(frozen=True)
class OtherInEval(Coupling):
    """Another equation in eval mode, with a smaller b."""

    name: ClassVar[str] = "other in eval"
    training: float = 1.0
    evaluating: float = 0.25

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        b = self.training if training else self.evaluating
        return Coefficients(1 - b, b, 1.0)


OWN = {
    "momentum": Momentum(),
    "a weight for each sample": Gated(),
    "b = -1": Backwards(),
    "other in eval": OtherInEval(),
    "other in eval, by a factor that is no power": OtherInEval(0.5, 0.3),
    "tiny b": Momentum(1e-6),
    "b = 3": Momentum(-3.0),
    "b = -0.7": Momentum(0.7),
}


@spread("name, training, mode", OWN, [True, False], ["fp32", "bf16 autocast", "fp64"], turns=2)
def test_a_coupling_of_ones_own_is_exact(name: str, training: bool, mode: str) -> None:
    torch.manual_seed(1)
    net = ReversibleSequential(
        [perceptron() for _ in range(5)], coupling=OWN[name], check="raise"
    ).to(MODES[mode].dtype)
    net.train(training)
    for _ in range(2):
        assert_exact(net, rows(), MODES[mode])


def test_a_coupling_of_ones_own_trains() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(transformer(4, norm=lambda: nn.LayerNorm(WIDTH)), nn.Linear(WIDTH, 1))
    rev = rewire.make_reversible(model, rows(), coupling=Momentum(), check="raise")
    assert "momentum" in str(rev)
    optimizer = torch.optim.AdamW(rev.parameters(), lr=3e-3)
    x = rows(8)
    target, losses = x.mean((1, 2), keepdim=True).tanh(), []
    for _ in range(40):
        loss = (rev(x).mean(1, keepdim=True) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 5
    again = pickle.loads(pickle.dumps(rev))
    assert courses(again)[0].coupling == Momentum()
    assert torch.equal(again(x), rev(x))


# ---- numbers and spellings ---------------------------------------------------------------

_floats = st.floats(allow_nan=False, allow_infinity=False)
_couplings = st.one_of(
    st.sampled_from(["mean", "sum", "last"]).map(rewire.Re2),
    st.floats(1e-6, 1.0).map(rewire.Consistent),
    st.floats(1e-6, 1.0).map(rewire.Bdia),
    st.builds(rewire.Dr2, _floats, _floats.filter(lambda b: abs(b) > 1e-300)),
)


@settings(max_examples=200, deadline=None)
@given(coupling=_couplings)
def test_a_spelling_names_the_same_coupling(coupling: Coupling) -> None:
    """Plans keep couplings by their spelling: another number would be another function."""
    assert coupling_from(str(coupling)) == coupling
    assert coupling_from(coupling) is coupling
    assert dataclasses.replace(coupling) == coupling


@pytest.mark.parametrize(
    ("spelling", "bits"),
    [
        ("re2", 0),
        ("re2(sum)", 0),
        ("consistent(1)", 0),
        ("consistent(1/2)", 1),
        ("consistent(1/4)", 2),
        ("consistent(1/8)", 3),
        ("bdia", 1),
        ("dr2(0.9, 0.1)", 4),
        ("dr2(1, 0.125)", 3),
        ("dr2(1, 2)", 0),
        ("dr2(0, -1)", 0),
    ],
)
def test_bits(spelling: str, bits: int) -> None:
    coupling = coupling_from(spelling)
    assert coupling.bits == bits
    assert bits >= math.log2(1 / abs(coupling.factor))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_two_copies_draw_alike(coupling: str) -> None:
    """The generators are as after a plain run, whatever the coupling draws."""
    torch.manual_seed(1)
    net = ReversibleSequential([perceptron(), nn.Dropout(0.5), perceptron()], coupling=coupling)
    states = []
    for runner in (run, run_stored):
        runner(net, rows())
        states.append(torch.get_rng_state())
    torch.manual_seed(5)
    net(torch.ones(2, 6, WIDTH))
    assert torch.equal(*states)
    assert torch.equal(torch.get_rng_state(), states[0])


# ---- what cannot be carried out is said ---------------------------------------------------


@dataclass(frozen=True)
class Sampled(rewire.Coupling):
    """b is drawn for each sample; the smallest is not said."""

    name: ClassVar[str] = "sampled"

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        b = torch.rand(len(x), *(1,) * (x.dim() - 1)) / 2 + 0.25
        return Coefficients(1 - b, b, 1.0)


@dataclass(frozen=True)
class Said(Sampled):
    """The same, with what its class must say."""

    name: ClassVar[str] = "said"

    @property
    def factor(self) -> float:
        return 0.25


def test_a_tensor_b_needs_its_smallest() -> None:
    with pytest.raises(rewire.RewireError, match="Add a property `factor`"):
        Sampled().bits  # noqa: B018
    net = ReversibleSequential([perceptron() for _ in range(4)], coupling=Said(), check="raise")
    for _ in range(2):
        assert_exact(net, rows(8))


@dataclass(frozen=True)
class Weighted(rewire.Coupling):
    """c is a tensor: one number for each sample, or one that is learnt."""

    name: ClassVar[str] = "weighted"
    c: Any = None

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        return Coefficients(0.0, 1.0, self.c)


def test_weights_of_samples_on_a_stream_that_is_cut() -> None:
    """Streams above 2^18 elements are undone in slices."""
    branches = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2)]
    c = torch.tensor([0.5, 1.0, 1.5]).view(3, 1, 1)
    net = ReversibleSequential(branches, coupling=Weighted(c), check="raise")
    assert_exact(net, torch.randn(3, 2**13, WIDTH))


def test_a_learnt_coefficient_is_refused_on_the_grid() -> None:
    c = nn.Parameter(torch.ones(()))
    net = ReversibleSequential([perceptron(), perceptron()], coupling=Weighted(c))
    with pytest.raises(rewire.RewireError, match="a coefficient requires a gradient"):
        net(rows())


@pytest.mark.parametrize("b", [0.0, 3e-8, 1e-30])
def test_where_too_little_goes_on_the_stream_is_kept(b: float) -> None:
    """Bits say so, gradients are exact, and there is no inverse without what is kept."""
    if b == 0:
        coupling: Any = NoOlder()
    else:
        coupling = f"dr2({1 - b}, {b})"
    net = ReversibleSequential([perceptron() for _ in range(3)], coupling=coupling, check="raise")
    assert net.course.coupling.bits == 32
    assert_exact(net, rows())
    with pytest.raises(rewire.RewireError, match="32 bits of correction"):
        net.inverse(rows(), rows())


@dataclass(frozen=True)
class NoOlder(rewire.Coupling):
    """x_{i+1} = x_i + F_i(x_i)."""

    name: ClassVar[str] = "no older"

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        return Coefficients(1.0, 0.0, 1.0)


@pytest.mark.parametrize("how", ["no_grad", "stored"])
def test_a_branch_that_writes_to_the_stream_is_refused(how: str) -> None:
    """Without a tape as with one: the twin would be no twin."""
    branches = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)) for _ in range(3)]
    net = ReversibleSequential(branches)
    surroundings = torch.no_grad() if how == "no_grad" else rewire.store_activations(net)
    with surroundings, pytest.raises(rewire.NotRepeatable, match="changes its input"):
        net(rows())


@dataclass(frozen=True)
class Impostor(rewire.Coupling):
    """Named as another one."""

    name: ClassVar[str] = "consistent"

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        return Coefficients(0.5, 0.5, 1.0)


@dataclass(frozen=True)
class Careless(rewire.Coupling):
    """Gives a bare tuple."""

    name: ClassVar[str] = "careless"

    def coefficients(self, x: Tensor, training: bool) -> Any:
        return (0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("coupling", "says"),
    [
        (Impostor(), "is that of another coupling"),
        (Careless(), r"must be rewire.Coefficients\(a, b, c\)"),
        (rewire.Re2, r"is a class; pass an object, Re2\(\)"),
        ("consistent(gamma=1/4)", r"its numbers alone, as in 'consistent\(1/2\)'"),
        ("dr2(3, 0.5)", "the streams grow 3.16 times in each module. float32 holds them up to 6"),
    ],
)
def test_couplings_that_are_refused(coupling: Any, says: str) -> None:
    with pytest.raises(rewire.RewireError, match=says):
        ReversibleSequential([perceptron() for _ in range(7)], coupling=coupling)


def test_bdia_in_eval_mode_in_plain_floats() -> None:
    """b is 0 there: the older stream is kept."""
    torch.manual_seed(0)
    branches = [perceptron().double() for _ in range(4)]
    grads = []
    for precision in ("fast", "exact"):
        net = ReversibleSequential(branches, coupling="bdia", precision=precision).eval()
        torch.manual_seed(1)
        x = rows().double().requires_grad_()
        grads.append(torch.autograd.grad(net(x).sin().sum(), [x, *net.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_plan_that_was_made_fast_by_hand_is_refused() -> None:
    """Whoever carries the plan out asks for nothing; the plan itself says what it wants."""
    torch.manual_seed(0)
    model = transformer(2, norm=lambda: nn.LayerNorm(WIDTH))
    plan = rewire.plan(model, rows())
    chains = [dataclasses.replace(chain, precision="fast") for chain in plan.chains]
    with pytest.raises(rewire.RewireError, match="2 normalisations stand on its trunk"):
        rewire.make_reversible(model, plan=dataclasses.replace(plan, chains=chains))
