"""The modules that own residual adds, running in two-stream form.

A rewired home is an instance of a subclass of its own class, whose forward looks up (or
traces) the program for the arguments at hand and runs it. Everything else of it stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from rewire.classes import Replacing, original_class, subclass_of
from rewire.cuts import dense
from rewire.errors import CannotTrace, RewireError, StreamMismatch
from rewire.extraction import Program
from rewire.isolation import plain
from rewire.links import Course, attach, find
from rewire.programs import HomeState, hidden_chains
from rewire.running import advance, follow, normalise, resume
from rewire.structure import flatten, unflatten
from rewire.traces import Made


class HomeRun:
    """One call of a home: what its program calls back."""

    def __init__(self, home: nn.Module, state: HomeState, program: Program) -> None:
        self._home, self._state, self._program = home, state, program
        self._branches, self._norms, self._head_norms = state.branches(home, program)

    def _place(self, number: int) -> tuple[Course, tuple[int, ...]]:
        chain, place = self._state.places[self._program.numbers[number]]
        found = self._state.chains[chain]
        return found.course, found.sites[place]

    def step(self, number: int, x: Tensor, *sides: Any) -> tuple[Any, ...]:
        """Run the home's residual module `number`; its visible result and sideways values."""
        course, sites = self._place(number)
        x = dense(x)
        site, link = resume(course, sites, x)
        more = self._norms[number] is not None
        visible, link, sideways = advance(
            link, site, x, self._branches[number], sides, complete=not more
        )
        if more or site < len(course.sites) - 1:
            attach(visible, link)
        return (visible, *sideways)

    def normalise(self, number: int, x: Tensor) -> Tensor:
        """Run the normalisation of sum `number`."""
        norm, course = self._norms[number], self._place(number)[0]
        assert norm is not None, "a program normalises only sums that have a norm"
        link = find(x, course)
        if link is None:
            raise StreamMismatch(
                f"{norm.name}: what it is handed is not the sum of {self._branches[number].name}. "
                "Keep the module out with `exclude=`."
            )
        visible, link = normalise(link, x, norm)
        if link.site < len(course.sites) - 1:
            attach(visible, link)
        else:
            course.run.visible = None  # the chain is complete
        return visible

    def enter(self, number: int, x: Tensor) -> Tensor:
        """Run the normalisation that leads to residual module `number` on the sum before it."""
        norm, course = self._head_norms[number], self._place(number)[0]
        assert norm is not None, "a program enters only modules that begin with a norm"
        link = find(x, course)
        if link is None:  # no sum of this chain: the module itself says whether that may be
            result: Tensor = norm(x, ()).branch
            return result
        visible, link = normalise(link, x, norm)
        attach(visible, link)
        return visible

    def follow(self, number: int, x: Tensor) -> Tensor:
        """Run the activation behind sum `number`."""
        code = self._program.tails[number]
        assert code is not None, "a program follows only sums that have an activation"
        tail: Callable[[Tensor], Tensor] = partial(code, self._home)
        link = find(x, self._place(number)[0])
        if link is None:  # the chain has ended: the activation follows its merge
            return tail(x)
        result, link = follow(link, x, tail)
        attach(result, link)
        return result


def run_home(home: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a rewired home."""
    state: HomeState = home.__dict__["_rewire"]
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RewireError(
            f"{type(home).__qualname__} is rewired, and torch.jit.trace cannot follow its streams. "
            "Use torch.export.export, or trace `rewire.rewriting.restored(model)`."
        )
    if plain.active:
        with hidden_chains(home):
            return original_class(type(home)).forward(home, *args, **kwargs)
    leaves, spec = flatten((args, kwargs))
    for leaf in leaves:
        if isinstance(leaf, fx.Proxy):  # somebody traces what is around: homes are leaves
            tracer: Any = leaf.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(home), args, kwargs)
    programs = partial(state.program, home, (args, kwargs), leaves, spec)
    program = programs()
    constants = _for_this_run(program)
    known: dict[str, Any] = {}
    answers: list[bool] = []
    while True:
        known = _left(home, program, len(answers), known)
        stretch = program.outer[len(answers)]
        results = stretch.function(
            home,
            HomeRun(home, state, program),
            *constants,
            *leaves,
            *(known[name] for name in stretch.takes),
        )
        if stretch.answer is None:
            result, values = unflatten(program.result, results, (args, kwargs))
            _assign(home, program.assigned, values)
            return result
        known.update(zip(stretch.gives, results, strict=True))
        answers.append(results[-1])
        if answers[-1] != stretch.answer:
            program = programs(answers)
            met = stretch.constants
            constants[met:] = _for_this_run(program)[met:]


def _for_this_run(program: Program) -> list[Any]:
    """The objects that the code reads, those that it makes anew."""
    return [one.anew() if isinstance(one, Made) else one for one in program.constants]


def _assign(home: nn.Module, places: Sequence[tuple[str, str]], values: Sequence[Any]) -> None:
    """Set the attributes that the traced code sets; properties and the like have run in it."""
    for (path, name), value in zip(places, values, strict=True):
        module = home.get_submodule(path)
        place = module._buffers if name in module._buffers else module.__dict__
        place[name] = value


def _left(home: nn.Module, program: Program, number: int, known: dict[str, Any]) -> dict[str, Any]:
    """Of what is known, all that the stretches from `number` on read; the rest is let go."""
    wanted = program.left(number) if len(program.outer) > 1 else set()
    if missing := wanted.difference(known):
        raise CannotTrace(
            f"{type(home).__qualname__}: decides by the values of a tensor, and goes on with "
            f"{sorted(missing)[0]}, which is not there any more. Keep it out with `exclude=`."
        )
    return {name: known[name] for name in wanted}


# ---- classes -----------------------------------------------------------------------------


def is_home(module: Any) -> bool:
    """Whether a module runs in two-stream form."""
    return "_rewire" in module.__dict__


class RewiredHome(Replacing):
    """What a rewired home adds to its class: a forward, and pickling by plan."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward in two-stream form."""
        if not is_home(self):  # made anew by this class, e.g. by its `from_pretrained`
            return original_class(type(self)).forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            return torch.compiler.disable(run_home)(self, args, kwargs)  # type: ignore[no-untyped-call]
        return run_home(self, args, kwargs)  # type: ignore[arg-type]


def rewired_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` that runs in two-stream form; it bears the same name."""
    return subclass_of(original, RewiredHome)
