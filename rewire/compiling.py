"""Branches compiled by `torch.compile`: one compilation for all branches of the same code.

A rerun in backward must give the bits of the run in forward, so both run the same compiled code:
each shape has its own, and the update of the streams, which differs between forward and inverse,
is not fused into it (a kernel that is fused otherwise rounds otherwise).
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from rewire.errors import RewireError
from rewire.replay import transformed

# What `compile=` may be: False, True, or keyword arguments of `torch.compile`.
Compile = bool | Mapping[str, Any]

_MOST = 256  # compilations of one code
_PAIRS, _ITEMS = object(), object()


def checked(given: Compile) -> Compile:
    """What was given, if it can be.

    Raises:
        ValueError: It is neither a boolean nor a mapping.
    """
    if isinstance(given, bool) or (isinstance(given, Mapping) and _is_plain(given)):
        return given
    raise ValueError(
        f"compile={given!r}: True, False, or keyword arguments of torch.compile, by name."
    )


def _is_plain(options: Mapping[Any, Any]) -> bool:
    """Whether options can be told from others."""
    try:
        hash(_frozen(options))
    except TypeError:
        return False
    return all(isinstance(name, str) for name in options)


def copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with code of its own: compilations are kept by code, and so many for each."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__)


class _Choice(threading.local):
    """In each thread: whether compiled functions run as they are; None: it is not decided."""

    plain: bool | None = None


_choice = _Choice()


def runs_plain() -> bool:
    """Whether compiled functions run as they are now: by choice, or as a mode watches them."""
    return _watched() if _choice.plain is None else _choice.plain


@contextmanager
def running_plain(plain: bool) -> Iterator[None]:
    """Have them run as they are, or compiled whoever watches: as in the run that is repeated."""
    before, _choice.plain = _choice.plain, plain
    try:
        yield
    finally:
        _choice.plain = before


class Compiled:
    """A function of one branch, and its compiled twin, which branches of the same code share.

    Where nothing can be compiled, on tensors without values, in transforms, and while somebody
    watches the operations (a meter), it runs as it is; a rerun goes as its run went. So it does
    for ever, with a warning, where its first compilation fails.

    Args:
        function: Of the branch.
        how: What `compile=` was; not False.
    """

    def __init__(self, function: Callable[..., Any], how: Compile) -> None:
        self._plain = function
        options = dict(how) if isinstance(how, Mapping) else {}
        self._compiled: Callable[..., Any] | None = _shared(function, _frozen(options))
        self._ran = False

    def __call__(self, *args: Any) -> Any:
        """The function of these arguments."""
        if self._compiled is None or transformed() or runs_plain() or _any_fake(args):
            return self._plain(*args)
        try:
            with _disable_current_modes() if _watched() else nullcontext():
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
        lines = str(error.__cause__ or error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        if self._ran:
            raise RewireError(
                "a branch that ran compiled cannot be compiled for what it is given now, and its "
                f"reruns need the code of their runs: {reason}. Rewire without compile=, or with "
                'compile={"dynamic": True} where shapes are many.'
            ) from error
        self._compiled = None
        warnings.warn(
            f"a residual branch runs as it is, for it cannot be compiled: {reason}", stacklevel=2
        )


@functools.lru_cache(maxsize=1024)
def _shared(function: Callable[..., Any], options: Any) -> Callable[..., Any]:
    """The compiled twin of a function, with frozen options: the same for the same code."""
    how = {"fullgraph": True, "dynamic": False, **_thawed(options)}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # One code serves all branches of a kind, in every shape and mode.
        how.setdefault("recompile_limit", _MOST)
    made: Callable[..., Any] = torch.compile(function, **how)
    return made


def _frozen(value: Any) -> Any:
    """A mapping as a tuple of pairs, a list as a tuple, and so inside."""
    if isinstance(value, list):
        return _ITEMS, *map(_frozen, value)
    if not isinstance(value, Mapping):
        return value
    return _PAIRS, *((key, _frozen(item)) for key, item in sorted(value.items()))


def _thawed(value: Any) -> Any:
    if isinstance(value, tuple) and value and value[0] is _PAIRS:
        return {key: _thawed(item) for key, item in value[1:]}
    if isinstance(value, tuple) and value and value[0] is _ITEMS:
        return [_thawed(item) for item in value[1:]]
    return value


def _of_compiler(error: Exception) -> bool:
    """Whether an error is the compiler's own; importing its classes would take seconds."""
    return any(one.__module__ == "torch._dynamo.exc" for one in type(error).__mro__)


def _watched() -> bool:
    """Whether a dispatch mode is on, which compiled code would pass by."""
    return _get_current_dispatch_mode() is not None


def _any_fake(args: tuple[Any, ...]) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args))
