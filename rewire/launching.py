"""Launching `rewire.kernels` on tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from rewire import kernels
from rewire.corrections import WORD
from rewire.grid import reach

P = ParamSpec("P")
R = TypeVar("R")

_BLOCK = 1024
_WARPS = 4
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _on_its_device(
    launch: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(launch)
    def launched(first: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return launch(first, *args, **kwargs)

    return launched  # type: ignore[return-value]


@_on_its_device
def couple(
    newest: Tensor,
    older: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: tuple[float, float, float],
    step: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_{i+1}, and its largest absolute value (0-dimensional).

    All of one shape and layout, dense; `branch` and `trunk` of any floating dtype, the streams,
    `step` and `inverse` of one, float32 or float64.
    """
    a, b, c = k
    value = torch.empty_like(older)
    bits = torch.zeros((), dtype=_BITS[older.dtype], device=older.device)
    if older.numel():
        kernels.couple_kernel[_programs(older.numel())](
            value,
            bits,
            newest,
            older,
            branch,
            branch if trunk is None else trunk,
            step,
            inverse,
            older.numel(),
            a,
            b,
            c,
            TRUNK=trunk is not None,
            A=a != 0.0,
            B=b != 1.0,
            C=c != 1.0,
            WHOLE=reach(older.dtype) / 2,
            INTEGER=tl.int64 if older.dtype == torch.float64 else tl.int32,
            **_options(older.numel()),
        )
    return value, bits.view(older.dtype)


@_on_its_device
def uncouple(
    newer: Tensor,
    newest: Tensor,
    branch: Tensor,
    trunk: Tensor | None,
    k: tuple[float, float, float],
    step: Tensor,
    inverse: Tensor,
    words: Tensor | None,
    width: int,
    slack: int,
    out: Tensor,
) -> None:
    """x_{i-1} into `out`, which may be `newer`. Operands as of `couple`.

    Args:
        words: Digits of `width` bits as `pack` gives them; None where nothing is lost.
        slack: What was added to the digits.
    """
    a, b, c = k
    if newer.numel():
        kernels.uncouple_kernel[_programs(newer.numel())](
            out,
            newer,
            newest,
            branch,
            branch if trunk is None else trunk,
            newer if words is None else words,
            step,
            inverse,
            newer.numel(),
            1 if words is None else words.numel(),
            slack,
            a,
            b,
            c,
            TRUNK=trunk is not None,
            A=a != 0.0,
            B=b != 1.0,
            C=c != 1.0,
            WIDTH=0 if words is None else width,
            WHOLE=reach(newer.dtype) / 2,
            DOUBLE=newer.dtype == torch.float64,
            **_options(newer.numel()),
        )


@_on_its_device
def pack(older: Tensor, b: float, inverse: Tensor, width: int, slack: int) -> Tensor:
    """The digits of x_{i-1}, `width` bits each: int64 words in the order of its memory."""
    each = WORD // width
    count = -(-older.numel() // each)
    words = torch.empty(count, dtype=torch.int64, device=older.device)
    if count:
        kernels.pack_kernel[_programs(count)](
            words,
            older,
            inverse,
            older.numel(),
            count,
            slack,
            b,
            WIDTH=width,
            EACH=each,
            DOUBLE=older.dtype == torch.float64,
            **_options(older.numel()),
        )
    return words


@_on_its_device
def merge(newest: Tensor, older: Tensor, first: Tensor | None) -> Tensor:
    """(x_n + x_{n-1}) / 2, or x_n + x_{n-1} - x_0 where x_0 is given."""
    out = torch.empty_like(newest)
    if out.numel():
        kernels.merge_kernel[_programs(out.numel())](
            out,
            newest,
            older,
            newest if first is None else first,
            out.numel(),
            MEAN=first is None,
            **_options(out.numel()),
        )
    return out


@_on_its_device
def apart(newest: Tensor, older: Tensor) -> Tensor:
    """[2]: the largest absolute values of x_0 and of x_0 - x_{-1}; NaN where there is one."""
    bits = torch.zeros(2, dtype=_BITS[newest.dtype], device=newest.device)
    if newest.numel():
        kernels.apart_kernel[_programs(newest.numel())](
            bits,
            newest,
            older,
            newest.numel(),
            INTEGER=tl.int64 if newest.dtype == torch.float64 else tl.int32,
            **_options(newest.numel()),
        )
    return bits.view(newest.dtype)


def _programs(size: int) -> tuple[int]:
    return (-(-size // _BLOCK),)


def _options(size: int) -> dict[str, int | bool]:
    wide = size + _BLOCK >= 2**31
    return {"BLOCK": _BLOCK, "WIDE": wide, "num_warps": _WARPS, "enable_fp_fusion": False}
