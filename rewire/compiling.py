"""Branches compiled by `torch.compile`: one compilation for all branches of the same code.

A rerun in backward must give the bits of the run in forward, so both run the same compiled code:
each shape has its own, and the update of the streams, which differs between forward and inverse,
is not fused into it (a kernel that is fused otherwise rounds otherwise).
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from rewire.errors import RewireError
from rewire.replay import transformed

# What `compile=` may be: False, True, or keyword arguments of `torch.compile`.
Compile = bool | Mapping[str, Any]


def checked(given: Compile) -> Compile:
    """What was given, if it can be.

    Raises:
        ValueError: It is neither a boolean nor a mapping.
    """
    if isinstance(given, (bool, Mapping)):
        return given
    raise ValueError(f"compile={given!r}: True, False, or keyword arguments of torch.compile.")


def compiled(function: Callable[..., Any], how: Compile) -> Callable[..., Any]:
    """A function as compiled code; the same for the same function and options."""
    if how is False:
        return function
    options = {} if how is True else how
    return _compiled(function, tuple(sorted(options.items(), key=lambda item: item[0])))


def copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with code of its own: compilations are kept by code, and so many for each."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__)


@functools.lru_cache(maxsize=1024)
def _compiled(function: Callable[..., Any], options: tuple[tuple[str, Any], ...]) -> _Compiled:
    return _Compiled(function, dict(options))


class _Compiled:
    """A function and its compiled twin.

    Where nothing can be compiled, on tensors without values and in transforms, it runs as it is. So
    it does for ever, with a warning, where its first compilation fails.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._plain = function
        how = {"fullgraph": True, "dynamic": False, **options}
        self._compiled: Callable[..., Any] | None = torch.compile(function, **how)
        self._ran = False

    def __call__(self, *args: Any) -> Any:
        """The function of these arguments."""
        if self._compiled is None or transformed() or _any_fake(args):
            return self._plain(*args)
        try:
            result = self._compiled(*args)
        except Exception as error:
            if not _of_compiler(error):
                raise
            self._failed(error)
            return self._plain(*args)
        self._ran = True
        return result

    def _failed(self, error: Exception) -> None:
        """Give up compiling, unless a run in forward waits for its rerun by compiled code."""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if self._ran:
            raise RewireError(
                f"a branch that ran compiled cannot be compiled for what it is given now: {reason} "
                "Every shape, dtype and mode takes a compilation; torch._dynamo.config."
                "recompile_limit says how many there may be. Rewire without compile=, or raise it."
            ) from error
        self._compiled = None
        warnings.warn(
            f"a residual branch runs as it is, for it cannot be compiled: {reason}", stacklevel=2
        )


def _of_compiler(error: Exception) -> bool:
    """Whether an error is the compiler's own; importing its classes would take seconds."""
    return any(one.__module__ == "torch._dynamo.exc" for one in type(error).__mro__)


def _any_fake(args: tuple[Any, ...]) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args))
