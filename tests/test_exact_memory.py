"""What a chain keeps, in bytes: the bits that its coupling states, and nothing that grows else."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.meters import LiveBytes
from rewire.profiling import no_collection, profile
from rewire.reversible import ReversibleSequential
from tests.exactness import courses, some, spread
from tests.networks import COUPLINGS, MODES, WIDTH, Stack, convolutions, perceptron, residual_net
from tests.test_exact_runs import Net, PostNorm, PreNorm

BATCH = 64
STREAM = BATCH * 6 * WIDTH  # elements


@pytest.fixture(scope="module", autouse=True)
def _young_garbage() -> Iterator[None]:
    """Collections look at what these tests make, not at all of torch."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def many_rows(dtype: torch.dtype = torch.float32) -> Tensor:
    """[BATCH, 6, WIDTH]."""
    return torch.randn(BATCH, 6, WIDTH, dtype=dtype)


def bits_per_module(build: Callable[[int], nn.Module], x: Tensor) -> tuple[float, float, float]:
    """Of each element of the stream: kept between forward and backward, at the peak, left."""
    found = [measured(build(depth), x) for depth in (6, 10)]
    per_module = [8 * (deep - flat) / 4 / x.numel() for flat, deep in zip(*found, strict=True)]
    return per_module[0], per_module[1], per_module[2]


def measured(model: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Bytes kept between forward and backward, at the peak and left, with the collector off."""
    model.requires_grad_(False)
    x = x.clone().requires_grad_()
    x.grad = torch.zeros_like(x)
    model(x).sum().backward()
    with no_collection(), LiveBytes() as meter:
        loss = model(x).sum()
        kept = meter.live
        loss.backward()
        del loss
        return kept, meter.peak, meter.live


def by_hand(coupling: str, **options: Any) -> Callable[[int], nn.Module]:
    """A chain of cheap branches: what it keeps is not hidden behind them."""

    def build(depth: int) -> nn.Module:
        torch.manual_seed(depth)
        return ReversibleSequential([Half() for _ in range(depth)], coupling=coupling, **options)

    return build


class Half(nn.Module):
    """sin(x) / 2: no parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() / 2


# "dr2(1, 1.3)" outgrows its grid on 12 modules and keeps whole streams there.
STEADY = [coupling for coupling in COUPLINGS if "1.3" not in coupling and "0.3" not in coupling]


@spread("coupling, precision", STEADY, ["exact", "float64"])
def test_bits_are_those_the_coupling_states(coupling: str, precision: str) -> None:
    build = by_hand(coupling, precision=precision)
    stated = build(1).course.coupling.bits
    kept, peak, left = bits_per_module(build, many_rows())
    itemsize = 64 if precision == "float64" else 32
    signs = 3 * itemsize / (6 * WIDTH) if coupling == "bdia" else 0.0  # a, b, c of each sample
    assert stated <= kept + 1e-3
    assert kept <= 1.2 * stated + signs + 0.05
    assert peak <= 1.2 * stated + signs + 0.05
    assert left == 0


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_nothing_is_left(coupling: str) -> None:
    for depth in (1, 4):
        assert measured(by_hand(coupling)(depth), many_rows())[2] == 0


def test_re2_keeps_nothing_at_all() -> None:
    """Beside the two streams and the output."""
    for depth in (2, 9):
        kept, _, _ = measured(by_hand("re2")(depth), many_rows())
        assert kept <= 3 * STREAM * 4 + 64


@pytest.mark.parametrize("mode", ["fp32", "bf16 autocast"])
@pytest.mark.parametrize("branch", [perceptron, convolutions])
def test_exactness_costs_no_bytes(branch: Callable[[], nn.Module], mode: str) -> None:
    """Beside plain float streams: two numbers, the grid."""
    x = torch.randn(4, 8, 20, 20) if branch is convolutions else many_rows()
    peaks = []
    for precision in ("fast", "exact"):
        branches = [branch() for _ in range(4)]
        model = ReversibleSequential(branches, precision=precision, check="off")
        with MODES[mode]():
            peaks.append(measured(model, x)[1])
    assert peaks[1] - peaks[0] <= 16


@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)", "bdia"])
def test_bits_in_eval_mode(coupling: str) -> None:
    """As in training; bdia keeps the older stream there."""
    build = by_hand(coupling)
    kept, _, left = bits_per_module(lambda depth: build(depth).eval(), many_rows())
    assert kept <= (32 if coupling == "bdia" else 1.2 * build(1).course.coupling.bits) + 0.05
    assert left == 0


# Design's measurements of norms on the sum: 3 to 8 bits and the statistics.
@some("blocks", [False, True], slow=[True])
@some("coupling", ["re2", "consistent(1/4)"], slow=["consistent(1/4)"])
def test_bits_of_post_norm_chains(coupling: str, blocks: bool) -> None:
    def build(depth: int) -> nn.Module:
        torch.manual_seed(0)
        branches = [perceptron() for _ in range(depth)]
        model = Stack(nn.Identity(), branches, lambda: nn.LayerNorm(WIDTH))
        if blocks:
            model = Net(PostNorm, depth).eval()
        return rewire.make_reversible(model, many_rows()[:2], coupling=coupling, check="raise")

    stated = courses(build(2))[0].coupling.bits
    kept, peak, left = bits_per_module(build, many_rows())
    statistics = 2 * 32 / WIDTH + 1
    assert kept <= 1.2 * stated + 8 + statistics
    assert peak <= 1.2 * stated + 8 + statistics
    assert left == 0


@some("kind", ["pre-norm blocks", "relu on the trunk"], slow=["pre-norm blocks"])
def test_re2_is_flat_in_depth(kind: str) -> None:
    def build(depth: int) -> nn.Module:
        torch.manual_seed(0)
        relu = kind.startswith("relu")
        model = residual_net(depth) if relu else Net(PreNorm, depth)
        return rewire.make_reversible(model.eval(), inputs()[:2], check="raise")

    def inputs() -> Tensor:
        return torch.randn(16, 3, 5, 5) if kind.startswith("relu") else many_rows()

    kept, peak, left = bits_per_module(build, inputs())
    assert kept <= 0.01
    assert peak <= 0.01
    assert left == 0


@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)", "bdia"])
def test_profile_says_the_same(coupling: str) -> None:
    x = many_rows().requires_grad_()
    peaks = []
    for depth in (6, 10):
        model = by_hand(coupling)(depth)
        found = profile(model, x)
        assert found.left_bytes == 0
        peaks.append(found.peak_bytes)
    bits = 8 * (peaks[1] - peaks[0]) / 4 / x.numel()
    stated = by_hand(coupling)(1).course.coupling.bits
    assert bits <= 1.2 * stated + 1.1


@pytest.mark.parametrize("coupling", ["re2(sum)", "consistent(1/4)", "bdia"])
def test_the_tape_is_no_cycle(coupling: str) -> None:
    """A forward whose result is dropped frees everything, with the collector off."""
    net, x = by_hand(coupling)(5), many_rows().requires_grad_()
    net(x)
    gc.collect()
    with no_collection(), LiveBytes() as meter:
        out = net(x)
        held = meter.live
        del out
        assert meter.live == 0
    assert held > 0


@pytest.mark.parametrize("coupling", ["consistent(1/4)", "dr2(0.9, 0.1)"])
def test_never_more_than_the_stream(coupling: str) -> None:
    """Not even where the streams outgrow their grid in every module."""

    def build(depth: int) -> nn.Module:
        torch.manual_seed(0)
        return ReversibleSequential([Growing(4.0**n) for n in range(depth)], coupling=coupling)

    kept, _, left = bits_per_module(build, many_rows())
    assert kept <= 32.1
    assert left == 0


class Growing(Half):
    """Four times the branch before it."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale
