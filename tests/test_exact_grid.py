"""The grid of the streams: outgrown, refined, moved between dtypes, and precisions to choose."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewire
from rewire import drift
from rewire.drift import watch_reconstruction
from rewire.grid import Grid, reach, rounded
from rewire.reversible import ReversibleSequential
from tests.exactness import assert_exact, plan_of, run, run_stored, same, spread
from tests.networks import COUPLINGS, MODES, WIDTH, perceptron, rows, transformer
from tests.test_exact_runs import BLOCKS, Net, blocks_of

every_block = pytest.mark.parametrize("block", BLOCKS)


class Scaled(nn.Module):
    """An MLP without a norm in front, times a number that may be changed."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


def chain(
    depth: int = 6, coupling: Any = "re2", branch: Callable[[], nn.Module] = Scaled, **options: Any
) -> ReversibleSequential:
    """A chain by hand; its self-check raises."""
    torch.manual_seed(depth)
    options = {"check": "raise", **options}
    return ReversibleSequential([branch() for _ in range(depth)], coupling=coupling, **options)


# ---- outgrown ----------------------------------------------------------------------------


@spread("scale, block, coupling", [1e3, 1e6, 1e15], BLOCKS, ["re2", "dr2(0.9, 0.1)"], turns=2)
def test_a_large_input_in_the_first_and_in_a_later_batch(
    scale: float, block: str, coupling: str
) -> None:
    rev, x = blocks_of(block, coupling)
    for factor in (scale, 1.0, scale, scale, 1 / scale, 1.0):
        assert_exact(rev, x * factor)


@spread("coupling, factor, mode", COUPLINGS, [100.0, 1e5], ["fp32", "bf16 autocast", "fp64"])
def test_branches_that_grow_in_a_later_batch(coupling: str, factor: float, mode: str) -> None:
    """The grid is coarsened in the middle of the chain: one stream is on the finer one still."""
    rev = chain(coupling=coupling).to(MODES[mode].dtype)
    for number, scale in ((0, 1.0), (2, factor), (5, factor), (3, 1.0), (0, factor**2)):
        rev.get_submodule(str(number)).scale = scale
        assert_exact(rev, rows(), MODES[mode])


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_streams_that_double_in_every_module(coupling: str) -> None:
    """Coarsened again and again within one run."""
    rev = chain(12, coupling)
    for number, branch in enumerate(rev.children()):
        branch.scale = 4.0**number
    for _ in range(3):
        assert_exact(rev, rows())


@spread("at, coupling", [0.25, 0.5, 0.99, 1.0, 1.01], ["re2", "consistent(1/4)", "dr2(1, 0.3)"])
def test_at_the_edge_of_the_reach(at: float, coupling: str) -> None:
    """Values at which sums stop being exact, and just below."""
    rev = chain(4, coupling)
    run(rev, rows())
    grid = rev.course.grid.current(torch.float32)
    edge = float(grid.step) * reach(torch.float32) * at
    x = torch.linspace(-edge, edge, 12 * WIDTH).view(2, 6, WIDTH)
    for _ in range(2):
        assert_exact(rev, x)


@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)"])
def test_streams_near_the_largest_number(coupling: str) -> None:
    rev = chain(4, coupling)
    for scale in (1e37, 1e38):
        assert_exact(rev, rows().clamp(-2, 2) * scale)


@pytest.mark.parametrize("block", ["pre-norm", "post-norm"])
def test_one_massive_activation(block: str) -> None:
    """As deep transformers have them: one element ten thousand times the rest."""
    rev, x = blocks_of(block, "consistent(1/4)")
    x[0, 0, 3] = 1e4
    for _ in range(2):
        assert_exact(rev, x)


# ---- refined -----------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)", "dr2(1, 0.3)"])
def test_small_streams_are_refined_in_the_next_step(coupling: str) -> None:
    rev = chain(4, coupling, lambda: nn.Linear(WIDTH, WIDTH, bias=False))
    x = rows() * 1e-6
    steps, errors = [], []
    for _ in range(3):
        assert_exact(rev, x)
        steps.append(float(rev.course.grid.current(torch.float32).step))
        errors.append(relative_error(rev, x))
    assert steps[0] > 1e-7
    assert steps[1] < 1e-10
    assert errors[-1] < 1e-4


def relative_error(net: ReversibleSequential, x: Tensor) -> float:
    """Of the output, against streams in float64."""
    exact = copy.deepcopy(net).double()
    with torch.no_grad(), rewire.store_activations(net):
        found, expected = net(x).double(), exact(x.double())
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e-44], ids="{:.0e}".format)
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)"])
def test_denormal_streams(scale: float, coupling: str) -> None:
    rev = chain(4, coupling, lambda: nn.Linear(WIDTH, WIDTH, bias=False))
    for _ in range(3):
        x = rows() * scale
        expected, found = run_stored(rev, x), run(rev, x)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("scale", "limit"), [(0.05, 4e-4), (1.0, 2e-5), (50.0, 2e-5)])
def test_the_forward_is_that_of_float_streams_but_for_rounding(scale: float, limit: float) -> None:
    """The limit for a tiny stem is what design.md allows in the worst nets."""
    torch.manual_seed(0)
    net = chain(12, branch=perceptron)
    assert relative_error(net, rows() * scale) < limit
    assert relative_error(net, rows() * scale) < limit


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    wide=st.booleans(),
)
def test_a_grid_holds_what_it_is_opened_for(values: Sequence[float], wide: bool) -> None:
    """Within the reach with three bits of headroom, spaced by a power of two, idempotent."""
    x = torch.tensor(values, dtype=torch.float64 if wide else torch.float32)
    grid = Grid().open(x)
    assert math.frexp(float(grid.step))[0] == 0.5
    assert float(grid.step * grid.inverse) == 1.0
    largest = float(x.abs().max())
    assert 4 * largest <= float(grid.step) * reach(x.dtype)
    on = rounded(x, grid)
    assert torch.equal(rounded(on, grid), on)
    assert bool(((on - x).abs() <= grid.step / 2).all())


# ---- odd inputs --------------------------------------------------------------------------

ODD: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(2, 6, WIDTH),
    "empty batch": lambda: torch.zeros(0, 6, WIDTH),
    "batch of one": lambda: torch.randn(1, 6, WIDTH),
    "a vector": lambda: torch.randn(WIDTH),
    "five dimensions": lambda: torch.randn(2, 1, 3, 1, WIDTH),
    "expanded": lambda: torch.randn(1, 1, WIDTH).expand(2, 6, WIDTH),
    "transposed": lambda: torch.randn(6, 2, WIDTH).transpose(0, 1),
    "strided": lambda: torch.randn(2, 6, 2 * WIDTH)[..., ::2],
    "constant": lambda: torch.full((2, 6, WIDTH), 3.14159),
    "negative zeros": lambda: -torch.zeros(2, 6, WIDTH),
}


@spread("name, coupling", ODD, ["re2", "re2(sum)", "consistent(1/4)", "bdia"])
def test_odd_inputs(name: str, coupling: str) -> None:
    rev = chain(3, coupling)
    for _ in range(2):
        x = ODD[name]()
        expected, found = run_stored(rev, x), run(rev, x)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert_exact(rev, rows())


@pytest.mark.parametrize("coupling", ["re2", "re2(sum)", "consistent(1/4)", "bdia"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,)], ids=str)
def test_streams_of_few_dimensions(coupling: str, shape: tuple[int, ...]) -> None:
    rev = chain(3, coupling, nn.Tanh)
    x = torch.full(shape, 0.3)
    expected, found = run_stored(rev, x), run(rev, x)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@spread("block, batch", BLOCKS, [0, 1])
def test_small_batches_of_a_model(block: str, batch: int) -> None:
    rev, x = blocks_of(block, "consistent(1/4)")
    rev.eval()
    expected, found = run_stored(rev, x[:batch]), run(rev, x[:batch])
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert_exact(rev, x)


@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)"])
def test_the_sign_of_a_zero_is_rebuilt(coupling: str) -> None:
    """Small negative values round to -0, and a branch may look at the sign."""

    def angle(x: Tensor) -> Tensor:
        return torch.atan2(x, -torch.ones_like(x))

    net = ReversibleSequential([angle, torch.sin, angle], coupling=coupling, check="raise")
    x = torch.full((4, WIDTH), -1e-9)
    assert_exact(net, x)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["NaN", "Inf"])
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_batch_that_is_lost_leaves_a_sound_grid(bad: float, when: str) -> None:
    rev = chain(4, branch=perceptron)
    x = rows()
    if when == "later":
        assert_exact(rev, x)
    spoilt = x.clone()
    spoilt[1, 2, 3] = bad
    run(rev, spoilt)
    assert relative_error(rev, x) < 1e-5
    assert_exact(rev, x)
    assert relative_error(rev, x) < 1e-5


# ---- dtypes and state --------------------------------------------------------------------


@every_block
def test_moved_between_dtypes_after_a_run(block: str) -> None:
    rev, x = blocks_of(block, "consistent(1/4)")
    rev = copy.deepcopy(rev)
    for mode in ("fp32", "fp64", "bf16 parameters", "fp64", "fp32"):
        rev.to(MODES[mode].dtype)
        assert_exact(rev, x, MODES[mode])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_are_never_the_models_by_accident(dtype: torch.dtype) -> None:
    net = chain(4, branch=perceptron).to(dtype)
    newer, older = net.streams(rows().to(dtype))
    assert newer.dtype == older.dtype == torch.float32
    assert net(rows().to(dtype)).dtype == dtype
    wide = chain(4, branch=perceptron, precision="float64").to(dtype)
    assert {s.dtype for s in wide.streams(rows().to(dtype))} == {torch.float64}
    fast = chain(4, branch=perceptron, precision="fast", check="off").to(dtype)
    assert {s.dtype for s in fast.streams(rows().to(dtype))} == {torch.float32}


@every_block
def test_keys_of_the_state_dict(block: str) -> None:
    rev, x = blocks_of(block)
    model, plan = Net(BLOCKS[block][0]), rewire.rewriting.plan_of(rev)
    run(rev, x * 1e3)
    assert list(rev.state_dict()) == list(model.state_dict())
    fresh = rewire.make_reversible(model, plan=plan)
    fresh.load_state_dict(rev.state_dict())
    assert {n for n, _ in rev.named_buffers()} == {n for n, _ in model.named_buffers()}
    # The grid is not in it: the first batch builds it anew.
    for _ in range(2):
        assert_exact(fresh, x)


# ---- precision ---------------------------------------------------------------------------


@spread(
    "mode, coupling, norm",
    ["fp32", "bf16 autocast", "bf16 parameters"],
    ["re2", "consistent(1/4)"],
    ["pre-norm", "post-norm"],
)
def test_float64_streams(mode: str, coupling: str, norm: str) -> None:
    torch.manual_seed(0)
    dtype = MODES[mode].dtype
    make = (lambda: nn.LayerNorm(WIDTH)) if norm == "post-norm" else None
    model = transformer(4, norm=make).to(dtype)
    options: dict[str, Any] = {"coupling": coupling, "precision": "float64", "check": "raise"}
    rev = rewire.make_reversible(model, rows().to(dtype), **options)
    for _ in range(2):
        assert_exact(rev, rows(), MODES[mode])
    with MODES[mode]():
        assert rev(rows().to(dtype)).dtype == model(rows().to(dtype)).dtype


def test_fast_is_right_up_to_rounding_and_has_no_grid() -> None:
    rev = chain(6, precision="fast", branch=perceptron)
    x = rows()
    expected = run_stored(rev, x)
    with watch_reconstruction() as seen:
        found = run(rev, x)
    assert same(found[0], expected[0])
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < 1e-5
    assert all(difference < 1e-5 for _, difference in seen)
    assert rev.course.grid.current(torch.float32) is None


@pytest.mark.parametrize("mode", ["bf16 autocast", "bf16 parameters"])
def test_fast_warns_once_in_half_precision(mode: str) -> None:
    net = chain(4, branch=perceptron, precision="fast", check="warn").to(MODES[mode].dtype)
    with pytest.warns(drift.DriftWarning, match='precision="fast" in half precision'):
        run(net, rows(), MODES[mode])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(net, rows(), MODES[mode])
        run(chain(4, precision="fast", check="off"), rows(), MODES["bf16 autocast"])


@pytest.mark.parametrize(
    ("coupling", "safe"),
    [
        ("consistent(1/2)", 11),
        ("consistent(1/4)", 5),
        ("consistent(1/8)", 3),
        ("dr2(0.9, 0.1)", 3),
        ("bdia", 11),
    ],
)
def test_fast_is_refused_beyond_the_safe_number(coupling: str, safe: int) -> None:
    chain(safe, coupling, precision="fast")
    with pytest.raises(rewire.RewireError, match=f"safe up to {safe} modules.*are {safe + 1}"):
        chain(safe + 1, coupling, precision="fast")
    chain(96, "re2", precision="fast", branch=nn.Tanh)


def test_fast_is_refused_with_norms_on_the_trunk() -> None:
    model = transformer(4, norm=lambda: nn.LayerNorm(WIDTH))
    with pytest.raises(rewire.RewireError, match=r"4 normalisations.*safe: 0"):
        rewire.make_reversible(model, rows(), precision="fast")


@pytest.mark.parametrize(
    ("given_", "choices"),
    [
        ({"precision": "exakt"}, "'exact', 'float64', 'fast'"),
        ({"precision": "float32"}, "'exact', 'float64', 'fast'"),
        ({"check": "error"}, "'warn', 'raise', 'off'"),
        ({"coupling": "leapfrog"}, "re2, consistent.*dr2.*bdia"),
        ({"coupling": "re2(max)"}, "'mean', 'sum' or 'last'"),
        ({"coupling": "consistent(0)"}, "0 < γ <= 1"),
        ({"coupling": "consistent(2)"}, "0 < γ <= 1"),
        ({"coupling": "dr2(1, 0)"}, "divides by it"),
        ({"coupling": "dr2(1, 2, 3)"}, "dr2"),
        ({"coupling": "dr2(a)"}, "dr2"),
        ({"coupling": "consistent(1/0)"}, "consistent"),
        ({"coupling": ""}, "Choose one of"),
        ({"coupling": "bdia(nan)"}, "bdia"),
        ({"coupling": "dr2(nan, 0.1)"}, "dr2"),
        ({"coupling": "dr2(1, inf)"}, "dr2"),
    ],
    ids=str,
)
def test_wrong_names_are_told_the_choices(given_: dict[str, Any], choices: str) -> None:
    with pytest.raises((ValueError, rewire.RewireError), match=choices):
        chain(2, **given_)
    plan = plan_of("pre-norm transformer", 3)
    with pytest.raises((ValueError, rewire.RewireError), match=choices):
        rewire.make_reversible(transformer(3), plan=plan, **given_)
