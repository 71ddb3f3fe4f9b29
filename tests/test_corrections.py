"""Corrections: packed integers come back, cost what they say, and make any norm's inverse exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rewire
from rewire import norms
from rewire.corrections import Columns, Digits, pack, unpack
from rewire.grid import Grid, OnGrid
from rewire.norms import Affine, Normed
from tests.exactness import assert_exact, courses, spread
from tests.networks import MODES, WIDTH, Stack, perceptron, rows
from tests.specimens import ChannelNorm

WIDTHS = range(1, 17)


# ---- packing -----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(width=st.sampled_from(WIDTHS), count=st.integers(0, 300), seed=st.integers(0, 99))
def test_packing_round_trip(width: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    digits = torch.randint(0, 1 << width, (count,), generator=generator)
    for dtype in (torch.float32, torch.float64):
        words = pack(digits.to(dtype), width)
        assert words.numel() == math.ceil(count / (64 // width))
        assert torch.equal(unpack(words, width, count, dtype), digits.to(dtype))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_largest_digits_in_every_place(width: int) -> None:
    """All ones, the sign bit of the words among them."""
    for count in (1, 63, 64, 65, 127, 128, 129, 640):
        digits = torch.full((count,), float((1 << width) - 1))
        assert torch.equal(unpack(pack(digits, width), width, count), digits)


@spread("width, bad", WIDTHS, [math.nan, math.inf, -math.inf, -1.0, 1e9, -1e30], turns=2)
def test_a_digit_that_does_not_fit_spoils_no_other(width: int, bad: float) -> None:
    """A lost sample must not reach its neighbours in the word."""
    for place in (0, 1, 17, 639):
        digits = torch.arange(640.0) % (1 << width)
        spoilt = digits.clone()
        spoilt[place] = bad
        found = unpack(pack(spoilt, width), width, 640)
        found[place] = digits[place]
        assert torch.equal(found, digits)


SHAPES = {
    "contiguous": lambda: torch.zeros(3, 5, 7),
    "channels_last": lambda: torch.zeros(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.zeros(5, 3).t(),
    "part of a storage": lambda: torch.zeros(9, 4)[3:5],
    "empty": lambda: torch.zeros(0, 4),
    "a number": lambda: torch.zeros(()),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width", [1, 3, 7, 10, 16])
def test_digits_of_a_stream(shape: str, width: int) -> None:
    stream = SHAPES[shape]()
    digits = torch.randint_like(stream, 0, 1 << width)
    found = Digits.of(digits, width)
    assert torch.equal(found.add_(stream), digits)
    slack = 64 // width * width  # bits of a word that are used
    assert found.nbytes <= 8 * math.ceil(stream.numel() * width / slack)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16])
def test_digits_cost_what_their_width_says(width: int) -> None:
    """To a fifth: words of 64 bits hold whole digits only."""
    stream = torch.zeros(100, 100)
    found = Digits.of(stream, width).nbytes * 8 / stream.numel()
    assert width <= found <= 1.2 * width


# ---- columns -----------------------------------------------------------------------------


def spans(generator: torch.Generator, channels: int, kind: str) -> Tensor:
    """Integers [11, channels, 3]: what a norm's guess may be off by."""
    size = (11, channels, 3)
    wide = 2.0 ** torch.randint(0, 20, (channels, 1), generator=generator)
    offset = torch.randint(-500, 500, (channels, 1), generator=generator)
    table = {
        "zero": torch.zeros(size),
        "constant": offset.expand(size).float(),
        "two values": torch.randint(0, 2, size, generator=generator) + offset,
        "narrow": torch.randint(-3, 4, size, generator=generator) + offset,
        "of many widths": (torch.rand(size, generator=generator) * wide).round() + offset,
        "wide": torch.randint(-(2**22), 2**22, size, generator=generator),
    }
    return table[kind].float()


KINDS = ("zero", "constant", "two values", "narrow", "of many widths", "wide")


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    channels=st.integers(1, 9),
    lost=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 3e7]), max_size=3),
    dim=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_columns_round_trip(
    kind: str, channels: int, lost: list[float], dim: int, seed: int
) -> None:
    """Whatever the guess, the stream comes back: by digits, or kept whole."""
    generator = torch.Generator().manual_seed(seed)
    digits = spans(generator, channels, kind)
    units = torch.randint(-(2**20), 2**20, digits.shape, generator=generator).float()
    guess = units - digits
    for bad in lost:
        place = tuple(int(torch.randint(0, n, (), generator=generator)) for n in digits.shape)
        guess[place] = bad
    digits, units, guess = (t.transpose(1, dim).contiguous() for t in (units - guess, units, guess))
    step = 2.0**-12
    found = Columns.of(digits, units * step, dim)
    back = found.restore_(found.add_(guess).mul_(step))
    assert torch.equal(back, units * step)


def test_columns_keep_what_is_cheapest() -> None:
    """A constant costs nothing, a channel out of reach costs itself, the others their width."""
    digits = torch.zeros(1000, 4)
    digits[:, 1] = 7
    digits[:, 2] = torch.arange(1000) % 8
    digits[:, 3] = torch.arange(1000) * 2.0**18
    found = Columns.of(digits.clone(), torch.randn(1000, 4), 1)
    assert found.low.tolist()[:3] == [0, 7, 0]
    assert [(index.tolist(), width) for index, width, _ in found.packed] == [([2], 3)]
    assert found.whole.tolist() == [3]
    assert found.nbytes <= 1000 * (3 / 8 * 1.2 + 4) + 100


@settings(max_examples=80, deadline=None)
@given(
    scale=st.floats(-12, 12).map(lambda e: 10.0**e),
    weight=st.sampled_from(["ones", "normal", "tiny", "zeros", "some zeros", "huge", "negative"]),
    shape=st.sampled_from([(1, WIDTH), (2, 3, WIDTH), (40, WIDTH)]),
    seed=st.integers(0, 999),
)
def test_a_normed_step_is_exact_and_never_more_than_the_stream(
    scale: float, weight: str, shape: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    w, bias = weights(weight), torch.randn(WIDTH)
    z, grid = on_grid(torch.randn(shape) * scale)
    with norms.Watching() as seen:
        x = F.layer_norm(z, (WIDTH,), w, bias)
    undo = Normed(grid, seen.affine(z))
    value = undo.forward(x, z)
    undo.keep(value, z)
    assert torch.equal(undo.inverse(value), z)
    kept = z.nbytes if undo.correction is None else undo.correction.nbytes
    assert kept <= z.nbytes


def on_grid(z: Tensor) -> tuple[Tensor, OnGrid]:
    """A stream on the grid that is made for it."""
    grid = Grid().open(torch.cat([z.flatten(), torch.full((1,), 4.0)]))
    return (z / grid.step).round() * grid.step, grid


def weights(kind: str) -> Tensor:
    """Weights that make a norm easy, hard or impossible to undo."""
    w = torch.ones(WIDTH)
    some = torch.arange(WIDTH) % 3 == 0
    return {
        "ones": w,
        "normal": torch.randn(WIDTH),
        "tiny": w * 1e-6,
        "zeros": w * 0,
        "some zeros": w.masked_fill(some, 0),
        "huge": w * 1e4,
        "negative": -w,
    }[kind]


# ---- norms of every kind on the trunk ----------------------------------------------------


def image() -> Tensor:
    """[3, 8, 5, 5]."""
    return torch.randn(3, 8, 5, 5)


def signal() -> Tensor:
    """[4, 8, 7]."""
    return torch.randn(4, 8, 7)


class Spelled(nn.Module):
    """RMSNorm in Python, as in T5 and Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


class WithWeights(nn.LayerNorm):
    """LayerNorm with given weights."""

    def __init__(self, kind: str) -> None:
        super().__init__(WIDTH)
        self.weight.data.copy_(weights(kind))
        nn.init.normal_(self.bias)


def bodies(x: Tensor) -> list[nn.Module]:
    """Three branches for a stream like `x`."""
    if x.dim() == 4:
        return [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(3)]
    if x.shape[-1] == WIDTH:
        return [perceptron() for _ in range(3)]
    return [nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(3)]


NORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "LayerNorm": (lambda: WithWeights("normal"), rows),
    "LayerNorm without affine": (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), rows),
    "LayerNorm without bias": (lambda: nn.LayerNorm(WIDTH, bias=False), rows),
    "LayerNorm, weights zero": (lambda: WithWeights("zeros"), rows),
    "LayerNorm, some weights zero": (lambda: WithWeights("some zeros"), rows),
    "LayerNorm, weights tiny": (lambda: WithWeights("tiny"), rows),
    "LayerNorm, weights huge": (lambda: WithWeights("huge"), rows),
    "LayerNorm over two dimensions": (lambda: nn.LayerNorm((6, WIDTH)), rows),
    "LayerNorm2d, permuting": (lambda: ChannelNorm(8), image),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH), rows),
    "RMSNorm without affine": (lambda: nn.RMSNorm(WIDTH, elementwise_affine=False), rows),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), image),
    "GroupNorm of one group": (lambda: nn.GroupNorm(1, 8), signal),
    "GroupNorm without affine": (lambda: nn.GroupNorm(4, 8, affine=False), image),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(8), image),
    "InstanceNorm, affine": (lambda: nn.InstanceNorm2d(8, affine=True), image),
    "InstanceNorm, statistics": (
        lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
        signal,
    ),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), signal),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), image),
    "BatchNorm without affine": (lambda: nn.BatchNorm2d(8, affine=False), image),
    "BatchNorm without statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), image),
    "BatchNorm, cumulative": (lambda: nn.BatchNorm2d(8, momentum=None), image),
}


FAST = (
    "LayerNorm",
    "LayerNorm without affine",
    "LayerNorm, some weights zero",
    "LayerNorm, weights tiny",
    "LayerNorm2d, permuting",
    "RMSNorm",
    "GroupNorm",
    "InstanceNorm, statistics",
    "BatchNorm2d",
    "BatchNorm without affine",
)


@spread("name, mode", FAST, MODES)
def test_norms_on_the_trunk(name: str, mode: str) -> None:
    prove(name, mode)
    assert name in FAST


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in NORMS if name not in FAST])
def test_more_norms_on_the_trunk(name: str, mode: str) -> None:
    prove(name, mode)
    assert name in NORMS


def prove(name: str, mode: str) -> None:
    """Two batches in train mode, one in eval mode."""
    torch.manual_seed(0)
    norm, inputs = NORMS[name]
    x = inputs().to(MODES[mode].dtype)
    model = Stack(nn.Identity(), bodies(x), norm).to(MODES[mode].dtype)
    rev = rewire.make_reversible(model, x, coupling="consistent(1/2)", check="raise")
    assert [len(course.sites) for course in courses(rev)] == [3]
    for training in (True, True, False):
        assert_exact(rev.train(training), inputs() * 3, MODES[mode])


CASES = ["zeros", "constant", "scaled up", "scaled down", "one sample"]


@spread("case, name", CASES, ["LayerNorm", "BatchNorm2d", "GroupNorm"])
def test_norms_of_odd_inputs(case: str, name: str) -> None:
    torch.manual_seed(0)
    norm, inputs = NORMS[name]
    x = inputs()
    odd = {
        "zeros": x * 0,
        "constant": torch.full_like(x, 2.5),
        "scaled up": x * 1e6,
        "scaled down": x * 1e-7,
        "one sample": x[:1],
    }[case]
    rev = rewire.make_reversible(Stack(nn.Identity(), bodies(x), norm), x, check="raise")
    for given_ in (odd, x, odd):
        assert_exact(rev, given_)


def test_a_norm_in_channels_last() -> None:
    torch.manual_seed(0)
    model = Stack(nn.Identity(), bodies(image()), lambda: nn.BatchNorm2d(8))
    model = model.to(memory_format=torch.channels_last)
    rev = rewire.make_reversible(model, image(), check="raise")
    for x in (image(), image().to(memory_format=torch.channels_last), image()):
        assert_exact(rev, x)


def test_a_norm_spelled_out_in_python_is_left_alone() -> None:
    """No operation of torch's that is known to be affine: no chain, and the reason is told."""
    model = Stack(nn.Identity(), bodies(rows()), Spelled)
    plan = rewire.plan(model, rows())
    assert plan.chains == []
    assert [row.reason for row in plan.skipped] == ["too short", *["post-norm"] * 2]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm2d"])
def test_a_wrong_guess_costs_bits_and_never_bits_of_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever mean and deviation were read, the inverse stays exact."""
    torch.manual_seed(0)
    guess = norms.Watching.affine

    def wrong(self: norms.Watching, z: Tensor) -> Affine | None:
        found = guess(self, z)
        return None if found is None else found._replace(mean=found.mean + 1, dev=found.dev * 1.7)

    monkeypatch.setattr(norms.Watching, "affine", wrong)
    norm, inputs = NORMS[name]
    x = inputs()
    rev = rewire.make_reversible(Stack(nn.Identity(), bodies(x), norm), x, check="raise")
    assert_exact(rev, x)
