"""Tracing the one module that owns a residual add, without leaving a mark on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rewire.errors import CannotTrace
from rewire.interception import intercepted
from rewire.isolation import (
    NEEDS_VALUES,
    ONE_AT_A_TIME,
    isolated,
    lend_fakes,
    plain_homes,
    uncompiled,
)
from rewire.marks import function_marks
from rewire.places import is_model_code, line_of
from rewire.structure import Spec, flatten
from rewire.tracer import Tracer
from rewire.traces import Trace
from rewire.watching import as_fake, own_copy

_IS_FIXED, _IS_HEAP_TYPE = 1 << 8, 1 << 9  # CPython's flags: only a class made by code is patched


def trace_home(
    home: nn.Module,
    forward: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    inlined: Sequence[str],
    mode: FakeTensorMode | None,
    answers: Sequence[bool] = (),
    *,
    lend: bool = False,
) -> Trace:
    """Trace `forward` of a home on one call's arguments.

    Args:
        home: The module.
        forward: Its forward as its author wrote it, unbound.
        arguments: (args, kwargs) of a call, real or fake.
        inlined: Names, relative to the home, of children to look into.
        mode: Run on fake tensors of this mode; None: on the real ones.
        answers: To the code's first questions whether a tensor is true; later ones: True.
        lend: Lend the home fake parameters meanwhile: faster, where no other thread runs it.

    Raises:
        CannotTrace: With the reason.
    """
    if lend and mode is not None:
        try:
            return _traced_alone(home, forward, arguments, inlined, mode, answers, lend=True)
        except CannotTrace as error:
            if not isinstance(error.__cause__, NEEDS_VALUES):
                raise  # else it is the value of a parameter that is wanted
    return _traced_alone(home, forward, arguments, inlined, mode, answers, lend=False)


def _traced_alone(
    home: nn.Module,
    forward: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    inlined: Sequence[str],
    mode: FakeTensorMode | None,
    answers: Sequence[bool],
    *,
    lend: bool,
) -> Trace:
    """Trace a home without leaving a mark, with fake parameters if they are to be lent."""
    leaves, spec = flatten(arguments)
    with ExitStack() as stack:
        stack.enter_context(ONE_AT_A_TIME)
        stack.enter_context(plain_homes())
        stack.enter_context(isolated(home, home.parameters() if mode is None else ()))
        stack.enter_context(uncompiled())
        if mode is not None:
            stack.enter_context(mode)
            _gather_shards(home)
            if lend:
                lend_fakes(home, mode)
        scope = {home.get_submodule(name) for name in inlined} | {home}
        given, made = (leaves, spec), set[type]()
        run = functools.partial(_traced, home, forward, given, scope, mode, answers, made)
        code = [forward, *(type(module).forward for module in scope)]
        before = function_marks(code)
        tracer = run()
        if function_marks(code) != before:
            raise CannotTrace("its forward changes what it reads of its file or of code around it")
        if tracer.strangers:
            made |= _made(tracer.trace, run().trace)
            tracer = run() if made else tracer
        if tracer.numbers:  # what the next call would find
            for (path, name), value in tracer.numbers.items():
                home.get_submodule(path).__dict__[name] = value
            again = {name for _, name in tracer.numbers.keys() & run().numbers.keys()}
            if again:
                said = f"its forward sets the attribute {min(again)!r} anew in every call"
                raise CannotTrace(said)
        return tracer.trace


def _made(trace: Trace, again: Trace) -> set[type]:
    """Classes of the objects that code makes and hands on: in another run they are others."""
    pairs = zip(trace.constants.values(), again.constants.values(), strict=True)
    made = {type(one) for one, other in pairs if one is not other}
    for cls in made:
        if cls.__flags__ & _IS_FIXED or not cls.__flags__ & _IS_HEAP_TYPE:
            what = f"an object of class {cls.__qualname__}"
            raise CannotTrace(f"its forward makes {what} and hands it on")
    return made


def _traced(
    home: nn.Module,
    forward: Callable[..., Any],
    arguments: tuple[list[Any], Spec],
    scope: set[nn.Module],
    mode: FakeTensorMode | None,
    answers: Sequence[bool],
    made: set[type],
) -> Tracer:
    """A tracer that has run; where an assumed answer leads to an error, with the other one."""
    leaves, spec = arguments
    while True:
        tracer = Tracer(home, scope, answers, made)
        fresh = [_fresh(leaf, mode) for leaf in leaves]
        try:
            with intercepted(tracer, made):
                tracer.run(forward, fresh, spec)
        except CannotTrace as error:
            raise CannotTrace(f"{error}{_place(error)}") from error
        except Exception as error:
            assumed = list(tracer.trace.asked.values())
            if len(assumed) <= len(answers) or not assumed[-1]:
                said = f"its forward cannot be traced{_place(error)}: {_text(error)}"
                raise CodeRaised(said) from error
            answers = (*assumed[:-1], False)  # `assert not x.isnan().any()`
        else:
            return tracer


def _fresh(leaf: Any, mode: FakeTensorMode | None) -> Any:
    """An argument for one run of the code, which may write to it (a decoder's cache)."""
    return own_copy(leaf) if mode is None else as_fake(mode, leaf)


def _place(error: Exception) -> str:
    """Where in the model's code an error came up."""
    line, step = "", error.__traceback__
    while step is not None:
        if is_model_code(step.tb_frame):
            line = f" at {line_of(step.tb_frame, step.tb_lineno)}"
        step = step.tb_next
    return line


def _text(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class CodeRaised(CannotTrace):
    """The traced code itself raised an error, which is the cause of this one."""


def _gather_shards(home: nn.Module) -> None:
    """Put fake tensors of full shape in the place of sharded parameters (FSDP2's DTensors).

    The trace runs without the hooks that would gather them; `isolated` puts the shards back.
    """
    for module in home.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and hasattr(parameter, "full_tensor"):
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                module._parameters[name] = nn.Parameter(whole, parameter.requires_grad)
