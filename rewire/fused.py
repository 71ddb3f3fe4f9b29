"""The operators `rewire::…`: one step of the two streams each.

On a GPU an operator is one Triton kernel (`rewire.kernels`), elsewhere the operations of
`rewire.integers`. `takes` says where the kernels stand in for the operations: both give the same
bits but for some divisions, so that one chain keeps to one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from rewire import integers
from rewire.corrections import WORD, Digits
from rewire.errors import StreamMismatch
from rewire.grid import OnGrid, largest_of, weighted
from rewire.integers import Coefficients, Weight, alike
from rewire.replay import transformed

try:
    from rewire import launching
except Exception:  # no Triton for this system, or a broken one
    launching = None  # type: ignore[assignment]

DEVICES = {"cuda"}
_assumed = [False]  # last: whether fake tensors, which have no values, are taken too


# ---- where kernels are used --------------------------------------------------------------


def takes(stream: Tensor, k: Sequence[Any] = ()) -> bool:
    """Whether a stream's arithmetic runs in kernels: on a GPU, with coefficients that are numbers.

    Args:
        stream: Any of the chain's streams.
        k: a, b, c.
    """
    return (
        (stream.device.type in DEVICES or _assumed[-1])
        and stream.dtype in (torch.float32, torch.float64)
        and not any(isinstance(weight, Tensor) for weight in k)
        and _is_plain(stream)
        and (_assumed[-1] or _works(stream.device))
    )


@contextmanager
def kernels_on_fakes() -> Iterator[None]:
    """Have the operators stand in on fake tensors of any device: they tell what would be made."""
    _assumed.append(True)
    try:
        yield
    finally:
        _assumed.pop()


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is memory that a kernel can go through: not sharded, not fake."""
    if _assumed[-1]:
        return isinstance(t, FakeTensor)
    return type(t) in (Tensor, torch.nn.Parameter)


_verdicts: dict[torch.device, bool] = {}


def _works(device: torch.device) -> bool:
    """Whether Triton compiles, runs and gives the right bits here; says once why not."""
    if device not in _verdicts:
        if launching is None or (
            device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        ):
            return False
        try:
            with _disable_current_modes():
                wrong = _probe(device)
        except torch.OutOfMemoryError:
            return False  # another time, perhaps
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        _verdicts[device] = not wrong
        if wrong:
            warnings.warn(
                f"rewire: Triton does not work on {device} ({wrong}). Steps of the streams run "
                "operation by operation instead: right, and slower.",
                stacklevel=2,
            )
    return _verdicts[device]


def _probe(device: torch.device) -> str:
    """What is wrong with a step there and back by kernels; empty where nothing is."""
    step = torch.tensor(0.25, device=device, dtype=torch.float32)
    x = torch.arange(-50.0, 50.0, device=device, dtype=torch.float32)
    terms = x, x.flip(0), x / 7, None
    k, inverse, out = (0.5, 0.5, 1.5), 1 / step, torch.empty_like(x)
    value, largest = launching.couple(*terms, k, step, inverse)
    expected = integers.couple(*terms, Coefficients(*k), OnGrid(step, inverse))
    words = launching.pack(terms[1], k[1], inverse, 1, 0)
    launching.uncouple(value, x, *terms[2:], k, step, inverse, words, 1, 0, out)
    right = value.equal(expected) and out.equal(terms[1]) and largest.equal(expected.abs().max())
    return "" if right else "its results are not those of torch"


# ---- operators ---------------------------------------------------------------------------


@torch.library.custom_op("rewire::couple", mutates_args=(), device_types="cpu")
def _couple(
    newest: Tensor,
    older: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    a: float,
    b: float,
    c: float,
    step: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_{i+1}, and its largest absolute value."""
    k, grid = Coefficients(a, b, c), OnGrid(step, inverse)
    value = integers.couple(newest, older, branch, trunk, k, grid)
    return value, largest_of(value)


@torch.library.custom_op("rewire::uncouple", mutates_args=("out",), device_types="cpu")
def _uncouple(
    newer: Tensor,
    newest: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    a: float,
    b: float,
    c: float,
    step: Tensor,
    inverse: Tensor,
    words: Tensor | None,
    width: int,
    slack: int,
    out: Tensor,
) -> None:
    """x_{i-1} into `out`."""
    k, grid = Coefficients(a, b, c), OnGrid(step, inverse)
    digits = None if words is None else Digits(words, width)
    integers.uncouple(newer, newest, branch, trunk, k, grid, digits, slack, out)


@torch.library.custom_op("rewire::pack", mutates_args=(), device_types="cpu")
def _pack(older: Tensor, b: float, step: Tensor, inverse: Tensor, width: int, slack: int) -> Tensor:
    """What the inverse cannot know of x_{i-1}, in words."""
    return integers.pack(older, b, OnGrid(step, inverse), width, slack).words


@torch.library.custom_op("rewire::merge", mutates_args=(), device_types="cpu")
def _merge(newest: Tensor, older: Tensor, first: Tensor | None) -> Tensor:
    """(x_n + x_{n-1}) / 2, or x_n + x_{n-1} - x_0."""
    return integers.merge(newest, older, first)


@torch.library.custom_op("rewire::apart", mutates_args=(), device_types="cpu")
def _apart(newest: Tensor, older: Tensor) -> Tensor:
    """[2]: the largest absolute values of x_0 and of x_0 - x_{-1}."""
    if not newest.numel():
        return newest.new_zeros(2)
    return torch.stack(integers.apart(newest, older))


# ---- on a GPU ----------------------------------------------------------------------------


def _couple_kernel(
    newest: Tensor,
    older: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    a: float,
    b: float,
    c: float,
    step: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor]:
    return launching.couple(newest, older, branch, trunk, (a, b, c), step, inverse)


def _uncouple_kernel(
    newer: Tensor,
    newest: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    a: float,
    b: float,
    c: float,
    step: Tensor,
    inverse: Tensor,
    words: Tensor | None,
    width: int,
    slack: int,
    out: Tensor,
) -> None:
    streams, k, lost = (newer, newest, branch, trunk), (a, b, c), (words, width, slack)
    launching.uncouple(*streams, k, step, inverse, *lost, out)


def _pack_kernel(
    older: Tensor, b: float, step: Tensor, inverse: Tensor, width: int, slack: int
) -> Tensor:
    return launching.pack(older, b, inverse, width, slack)


def kernels_for(device: str) -> None:
    """Have the operators run in kernels on a kind of device."""
    _couple.register_kernel(device)(_couple_kernel)
    _uncouple.register_kernel(device)(_uncouple_kernel)
    _pack.register_kernel(device)(_pack_kernel)
    _merge.register_kernel(device)(launching.merge)
    _apart.register_kernel(device)(launching.apart)


if launching is not None:
    kernels_for("cuda")


# ---- shapes and gradients ----------------------------------------------------------------


@_couple.register_fake
def _(newest: Tensor, older: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(older), older.new_empty(())


@_uncouple.register_fake
def _(*_: Any) -> None:
    return None


@_pack.register_fake
def _(older: Tensor, b: float, step: Tensor, inverse: Tensor, width: int, slack: int) -> Tensor:
    each = WORD // width
    return older.new_empty((older.numel() + each - 1) // each, dtype=torch.int64)


@_merge.register_fake
def _(newest: Tensor, older: Tensor, first: Tensor | None) -> Tensor:
    return torch.empty_like(newest)


@_apart.register_fake
def _(newest: Tensor, older: Tensor) -> Tensor:
    return newest.new_empty(2)


def _couple_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    newest, older, branch, trunk, ctx.a, ctx.b, ctx.c, *_ = inputs
    ctx.forms = [None if t is None else (t.shape, t.dtype) for t in (newest, older, branch, trunk)]
    ctx.mark_non_differentiable(output[1])


def _couple_backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """That of a x_i + b x_{i-1} + c (F + T - x_i): rounding is straight-through."""
    a = ctx.a if ctx.forms[3] is None else ctx.a - ctx.c
    weights = (a, ctx.b, ctx.c, ctx.c)
    rows = zip(ctx.needs_input_grad[:4], weights, ctx.forms, strict=True)
    found = [weighted(gradient, w, *form) if needed and form else None for needed, w, form in rows]
    return *found, None, None, None, None, None


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mean = inputs[2] is None


def _merge_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.mean:
        half = gradient * 0.5
        return half, half, None
    return gradient, gradient, -gradient


_couple.register_autograd(_couple_backward, setup_context=_couple_setup)
_merge.register_autograd(_merge_backward, setup_context=_merge_setup)


# ---- for the runtime ---------------------------------------------------------------------


def couple(
    newest: Tensor,
    older: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: Coefficients,
    grid: OnGrid,
) -> tuple[Tensor, Tensor]:
    """As `integers.couple`, and the largest absolute value of the result."""
    terms = _laid_out(newest, branch, trunk, k, older)
    value, largest = _couple(terms[0], older, *terms[1:], *k, grid.step, grid.inverse)
    return value, largest


def uncouple(
    newer: Tensor,
    newest: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: Coefficients,
    grid: OnGrid,
    digits: Digits | None,
    slack: int,
    out: Tensor,
) -> None:
    """As `integers.uncouple`."""
    terms = _laid_out(newest, branch, trunk, k, newer)
    lost = (None, 0) if digits is None else (digits.words, digits.width)
    _uncouple(newer, *terms, *k, grid.step, grid.inverse, *lost, slack, out)


def pack(older: Tensor, b: Weight, grid: OnGrid, width: int, slack: int) -> Digits:
    """As `integers.pack`."""
    return Digits(_pack(older, float(b), grid.step, grid.inverse, width, slack), width)


def merge(newest: Tensor, older: Tensor, first: Tensor | None) -> Tensor:
    """(x_n + x_{n-1}) / 2, or x_n + x_{n-1} - x_0 where x_0 is given."""
    streams = [t for t in (newest, older, first) if t is not None]
    if not transformed() and all(takes(t) and _twins(newest, t) for t in streams):
        merged: Tensor = _merge(newest, older, first)
        return merged
    return integers.merge(newest, older, first)


def apart(newest: Tensor, older: Tensor) -> tuple[Tensor, Tensor]:
    """The largest absolute values of x_0 and of x_0 - x_{-1}, 0-dimensional; NaN where one is."""
    if takes(newest) and takes(older) and _twins(newest, older):
        size, difference = _apart(newest, older)
        return size, difference
    return integers.apart(newest, older)


def _twins(a: Tensor, b: Tensor) -> bool:
    """Whether a kernel may go through both at once: dense, of one layout, dtype and device."""
    form = (a.dtype, a.device) == (b.dtype, b.device)
    return form and alike(a, b) and a.stride() == torch.empty_like(a, device="meta").stride()


def _laid_out(
    newest: Tensor, branch: Tensor, trunk: Tensor | None, k: Coefficients, stream: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands that are read in the shape and layout of a stream."""

    def lay(t: Tensor) -> Tensor:
        if t.device != stream.device:
            raise StreamMismatch(
                f"a branch is on {t.device} and its stream on {stream.device}: move its result."
            )
        return (
            t
            if _is_plain(t) and alike(t, stream)
            else torch.empty_like(stream, dtype=t.dtype).copy_(t)
        )

    read = trunk is not None or k.a != 0.0
    return lay(newest) if read else stream, lay(branch), None if trunk is None else lay(trunk)
