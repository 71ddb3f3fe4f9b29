"""Reversible chains: running residual branches on two streams.

Source: Re2TAL, arXiv 2211.14053, section 3. Memory comes from recomputation through
saved-tensor hooks, see `rewire.tape`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewire.arithmetic import Coupled
from rewire.compiling import Compile, Compiled, copied
from rewire.coupling import Coupling, coupling_from
from rewire.cuts import Chunks, dense
from rewire.cutting import Cutting
from rewire.errors import RewireError, StreamMismatch
from rewire.holdings import Holdings
from rewire.links import Course
from rewire.running import advance, open_chain
from rewire.steps import Branch, Output
from rewire.stretches import Stretch, stretches_in


class ModuleBranch:
    """A branch that is one module or function of the stream and the side inputs."""

    def __init__(
        self,
        name: str,
        owner: nn.Module,
        key: str,
        function: Callable[..., Tensor],
        how: Compile = False,
    ) -> None:
        self.name = name
        self._how = how
        self._compiled: Compiled | None = None
        self.holdings = Holdings()
        self.cutting = Cutting()
        self._owner, self._key = owner, key
        self._function = None if isinstance(function, nn.Module) else function

    @property
    def function(self) -> Callable[..., Tensor]:
        """The function, or the module that is the owner's child now."""
        return self._function or getattr(self._owner, self._key)

    @property
    def training(self) -> bool:
        """Whether the owner is in train mode."""
        return self._owner.training

    def __call__(self, x: Tensor, sides: Sequence[Any]) -> Output:
        """F(x, *sides)."""
        if self._how is False:
            return Output(self.function(x, *sides), None, ())
        if self._compiled is None:
            kind: Any = type(self.function)
            self._compiled = Compiled(_calling(kind), self._how)
        return Output(self._compiled(self.function, x, *sides), None, ())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def refresh(self) -> None:
        """Look at the module again."""
        function = self.function
        self.holdings.refresh([function] if isinstance(function, nn.Module) else [])

    def __repr__(self) -> str:
        return repr(self.function)


@functools.lru_cache(maxsize=256)
def _calling(_: object) -> Callable[..., Tensor]:
    """A function that calls its first argument: one for each class of these, to be compiled."""
    return copied(_call)


def _call(function: Callable[..., Tensor], x: Tensor, *sides: Any) -> Tensor:
    return function(x, *sides)


class ReversibleSequential(nn.Module):
    """Residual modules x_i = F_i(x_{i-1}) + x_{i-2}, whose activations are not stored.

    Both streams begin as the input, and the output is their mean. Backward rebuilds each
    module's input from its output; parameters are those of the branches.

    Args:
        branches: F_1, F_2, ...: modules or functions of (x, *sides), each giving a tensor of
            the shape of x, [*S] (or one that broadcasts to it).
        coupling: A `rewire.Coupling` or its spelling; "re2" is Re2TAL's.
        precision: As for `rewire.make_reversible`.
        check: As for `rewire.make_reversible`.
        chunks: As for `rewire.make_reversible`.
        compile: As for `rewire.make_reversible`.
        ways: What backward does at each branch, see `rewire.Chain`; all are reversed by default.
        name: The chain's name in messages.

    Shape: input [*S], output [*S]. The streams are float32 or float64; input and output are
        of one dtype.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = ReversibleSequential([nn.Linear(4, 4), nn.Linear(4, 4)])
        >>> x = torch.ones(2, 4)
        >>> newer, older = net.streams(x)
        >>> [bool(torch.allclose(x, start)) for start in net.inverse(newer, older)]
        [True, True]

    Source: Re2TAL, arXiv 2211.14053, section 3.
    """

    def __init__(
        self,
        branches: Iterable[Callable[..., Tensor]],
        *,
        coupling: str | Coupling = "re2",
        precision: str = "exact",
        check: str = "warn",
        chunks: Chunks = 1,
        compile: Compile = False,
        ways: Sequence[str] = (),
        name: str = "",
    ) -> None:
        super().__init__()
        functions = list(branches)
        if not functions:
            raise ValueError("ReversibleSequential: no branches; give at least one.")
        self.branches: list[Branch] = []
        for index, function in enumerate(functions):
            if isinstance(function, nn.Module):
                self.add_module(str(index), function)
            full = f"{name}.{index}".lstrip(".")
            self.branches.append(ModuleBranch(full, self, str(index), function, compile))
        sites = tuple(branch.name for branch in self.branches)
        how: Any = {"chunks": chunks, "compile": compile, "ways": tuple(ways)}
        self.course = Course(name, sites, coupling_from(coupling), precision, check, **how)

    def forward(self, x: Tensor, *sides: Any) -> Tensor:
        """The mean of both streams after the last module.

        Args:
            x: [*S], floating point.
            sides: Handed to every branch: masks, embeddings, ...
        """
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._run)(x, *sides)  # type: ignore[no-any-return, no-untyped-call]
        return self._run(x, *sides)

    def _run(self, x: Tensor, *sides: Any) -> Tensor:
        dtype, x = x.dtype, dense(x)
        link = open_chain(self.course, x)
        for site, branch in enumerate(self.branches):
            x, link, _ = advance(link, site, x, branch, sides)
        return x.to(dtype)

    def streams(self, x: Tensor, *sides: Any) -> tuple[Tensor, Tensor]:
        """Both streams after the last module, newest first; activations are stored."""
        with store_activations(self):
            x = dense(x)
            link = open_chain(self.course, x)
            for site, branch in enumerate(self.branches):
                x, link, _ = advance(link, site, x, branch, sides)
        return link.newest, link.older

    def inverse(
        self, newer: Tensor, older: Tensor, *sides: Any, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Recover the streams before the first module from those after the last.

        Exact on the grid of the last run; with `precision="fast"` up to one rounding of each
        subtraction, and along a chain the roundings add.

        Args:
            newer: Newest stream, [*S].
            older: Older stream; shape, dtype and device of `newer`.
            sides: As in `forward`.
            dtype: Of the branches' inputs, where it is not that of the streams.

        Returns:
            (newest, older) at the start, both the chain's input on its grid.

        Raises:
            RewireError: The coupling's inverse needs corrections that only backward has.

        Source: Re2TAL, arXiv 2211.14053, section 3.
        """
        if newer.shape != older.shape:
            raise StreamMismatch(
                f"inverse: the newer stream is {list(newer.shape)}, the older "
                f"{list(older.shape)}; both must be what `streams` returned."
            )
        coupling = self.course.coupling
        if coupling.bits:
            raise RewireError(
                f"inverse: {coupling} needs {coupling.bits} bits of correction per element and "
                "module, which only a backward has. Use re2 here, or backward."
            )
        grid = None if self.course.precision == "fast" else self.course.grid.current(newer.dtype)
        newer, older = newer.detach(), older.detach()
        for branch in reversed(self.branches):
            output = branch(older.to(dtype or older.dtype), sides)
            trunk = None if output.trunk is None else output.trunk.detach()
            undo = Coupled(coupling, coupling.coefficients(older, branch.training), grid)
            newer, older = older, undo.inverse(newer, older, output.branch.detach(), trunk)
        return newer, older

    def extra_repr(self) -> str:
        """Name and coupling."""
        name = f"chain={self.course.name!r}, " if self.course.name else ""
        return f"{name}coupling='{self.course.coupling}', precision={self.course.precision!r}"


@contextmanager
def store_activations(model: nn.Module) -> Iterator[None]:
    """Run `model` by ordinary autograd: activations of its chains, and outside of them, stored.

    The same function, and the same arithmetic in the same order: the plain twin for
    tests and debugging.
    """
    found: list[Course | Stretch] = [*courses(model), *stretches_in(model)]
    with _lent(found, "stored", lambda _: True):
        yield


@contextmanager
def whole_branches(model: nn.Module) -> Iterator[None]:
    """Run the branches of `model` whole, whatever `chunks` says: the plain twin of their parts."""
    with _lent(courses(model), "chunks", lambda _: 1):
        yield


@contextmanager
def kept_grids(model: nn.Module) -> Iterator[None]:
    """Leave the grids of a model's chains as they are, whatever runs inside."""
    with _lent(courses(model), "grid", copy.copy):
        yield


@contextmanager
def _lent(
    owners: Iterable[Course | Stretch], name: str, other: Callable[[Any], Any]
) -> Iterator[None]:
    """Run with an attribute of each owner as `other` makes it of what it is."""
    before = [(one, getattr(one, name)) for one in owners]
    try:
        for one, value in before:
            setattr(one, name, other(value))
        yield
    finally:
        for one, value in before:
            setattr(one, name, value)


def exact(model: nn.Module) -> bool:
    """Whether all chains of a model promise gradients bit for bit."""
    return all(course.precision != "fast" for course in courses(model))


def courses(model: nn.Module) -> Iterator[Course]:
    """The chains of a model at run time, each once."""
    return iter(dict.fromkeys(chain.course for chain in chains(model)))


def chains(model: nn.Module) -> Iterator[ReversibleSequential]:
    """What each home has of a chain."""
    for module in model.modules():
        found = (module, *module.__dict__.get("_chains", ()))
        yield from (chain for chain in found if isinstance(chain, ReversibleSequential))
