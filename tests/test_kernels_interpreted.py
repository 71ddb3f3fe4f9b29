"""The kernels in Triton's interpreter give the bits of torch's operations.

Triton looks at TRITON_INTERPRET when it is imported, so that these run in a process of their own:
`tests/test_kernels.py` starts it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rewire import fused, integers
from rewire.corrections import Digits
from rewire.coupling import slack_of, width_of
from rewire.grid import OnGrid
from rewire.integers import Coefficients
from tests.exactness import MODES, assert_exact, rewired
from tests.networks import NETWORKS

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_kernels.py, in the interpreter"
)

K = {
    "re2": (0.0, 1.0, 1.0),
    "consistent(1/4)": (0.75, 0.25, 1.25),
    "dr2(0.9, 0.1)": (0.9, 0.1, 1.0),
    "b = -1/2": (1.5, -0.5, 0.5),
    "b = 0": (1.0, 0.0, 1.0),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "empty": (0, 4),
    "one": (1,),
    "block": (2, 512),
    "blocks and a rest": (3, 701),
    "five": (2, 3, 2, 5, 7),
}


if os.environ.get("TRITON_INTERPRET") == "1":
    fused.kernels_for("cpu")
    fused.DEVICES.add("cpu")


def grid(dtype: torch.dtype, step: float = 2.0**-17) -> OnGrid:
    g = torch.tensor(step, dtype=dtype)
    return OnGrid(g, 1 / g)


def stream(shape: tuple[int, ...], on: OnGrid) -> Tensor:
    return (torch.randn(shape, dtype=on.step.dtype) * on.inverse).round_() * on.step


def operands(
    shape: tuple[int, ...], dtype: torch.dtype, branch: torch.dtype, trunk: bool
) -> tuple[OnGrid, list[Any]]:
    """newest, older, branch, trunk."""
    torch.manual_seed(len(shape))
    on = grid(dtype)
    t = torch.randn(shape).to(branch) if trunk else None
    return on, [stream(shape, on), stream(shape, on), torch.randn(shape).to(branch), t]


# ---- values ------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", [False, True], ids=["", "trunk"])
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", K)
def test_a_step_is_that_of_the_operations(
    k: str, dtype: torch.dtype, branch: torch.dtype, trunk: bool
) -> None:
    on, (newest, older, f, t) = operands((3, 701), dtype, branch, trunk)
    value, largest = fused.couple(newest, older, f, t, Coefficients(*K[k]), on)
    expected = integers.couple(newest, older, f.clone(), t, Coefficients(*K[k]), on)
    assert torch.equal(value, expected)
    assert torch.equal(largest, expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [k for k in K if k != "b = 0"])
def test_the_inverse_gives_the_older_stream(k: str, shape: str) -> None:
    on, (newest, older, f, _) = operands(SHAPES[shape], torch.float32, torch.bfloat16, False)
    b, slack = K[k][1], slack_of(abs(K[k][1]))
    width = width_of(abs(b), slack)
    digits = fused.pack(older, b, on, width, slack) if width else None
    if digits is not None and older.numel():
        rest = integers.remainder(older, b, on).add_(slack)
        assert torch.equal(digits.words, Digits.of(rest, width).words)
    value, _ = fused.couple(newest, older, f, None, Coefficients(*K[k]), on)
    for out in (torch.empty_like(value), value):
        fused.uncouple(value, newest, f, None, Coefficients(*K[k]), on, digits, slack, out)
        assert torch.equal(out, older)


def test_layouts_and_broadcasting() -> None:
    on = grid(torch.float32)
    newest, older = (
        stream((2, 4, 5, 6), on).to(memory_format=torch.channels_last) for _ in range(2)
    )
    for f in (torch.randn(2, 4, 5, 6), torch.randn(4, 1, 1), torch.randn(2, 5, 6, 4).movedim(3, 1)):
        value, _ = fused.couple(newest, older, f, None, Coefficients(0.5, 0.5, 1.5), on)
        expected = integers.couple(newest, older, f, None, Coefficients(0.5, 0.5, 1.5), on)
        assert torch.equal(value, expected)
        assert value.stride() == older.stride()


def test_halves_large_numbers_and_nan() -> None:
    on = grid(torch.float32, 1.0)
    edge = 2.0**23
    f = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5, edge - 0.5, edge, 2 * edge + 2, -edge + 0.5])
    zero = torch.zeros_like(f)
    value, largest = fused.couple(zero, zero, f, None, Coefficients(0.0, 1.0, 1.0), on)
    assert torch.equal(value, f.round())
    assert largest == 2 * edge + 2
    f[3] = float("nan")
    value, largest = fused.couple(zero, zero, f, None, Coefficients(0.0, 1.0, 1.0), on)
    assert largest.isnan()
    assert value.isnan().sum() == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_merge_and_self_check(shape: str) -> None:
    _, (newest, older, first, _) = operands(SHAPES[shape], torch.float32, torch.float32, False)
    assert torch.equal(fused.merge(newest, older, None), (newest + older) * 0.5)
    assert torch.equal(fused.merge(newest, older, first), newest + older - first)
    if newest.numel():
        size, difference = fused.apart(newest, older)
        assert torch.equal(size, newest.abs().max())
        assert torch.equal(difference, (newest - older).abs().max())


# ---- the whole runtime ------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fp32", "bf16 autocast"])
@pytest.mark.parametrize(
    "coupling", ["re2", "re2(sum)", "consistent(1/4)", "dr2(0.9, 0.1)", "bdia"]
)
@pytest.mark.parametrize("network", ["pre-norm transformer", "conv-BatchNorm-ReLU"])
def test_gradients_are_those_of_autograd(
    network: str, coupling: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    step = fused.couple
    monkeypatch.setattr(fused, "couple", lambda *terms: calls.append(1) or step(*terms))
    rev = rewired(network, 3, MODES[mode], coupling)
    for _ in range(2):
        assert_exact(rev, NETWORKS[network][1](), MODES[mode])
    assert bool(calls) == (coupling != "bdia")  # whose coefficients are tensors
