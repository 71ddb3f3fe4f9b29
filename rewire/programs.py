"""The programs of a rewired home: traced as they are asked for, kept by what their code reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rewire.classes import original_class
from rewire.compiling import Compile, Compiled
from rewire.cutting import Cutting
from rewire.errors import CannotTrace
from rewire.extraction import Program
from rewire.holdings import Holdings
from rewire.isolation import ONE_AT_A_TIME, isolated, plain_homes
from rewire.links import Course
from rewire.marks import child_of, class_mark, function_marks, marks_of
from rewire.pieces import BranchCode
from rewire.planning import program_for
from rewire.plans import Residual
from rewire.replay import autocast_state
from rewire.reversible import ReversibleSequential
from rewire.running import NormBranch
from rewire.steps import Branch, Output
from rewire.structure import flatten, map_leaves
from rewire.tracing import CodeRaised
from rewire.watching import own_copy

_MOST_PROGRAMS = 64


class HomeBranch:
    """A residual branch of a home: the tape's view of its code."""

    def __init__(self, home: nn.Module, code: BranchCode, how: Compile = False) -> None:
        self.name = code.name
        self._function = code.function if how is False else Compiled(code.function, how)
        self.home = home
        self.code = code
        self.holdings = Holdings()
        self.cutting = Cutting()

    @property
    def training(self) -> bool:
        """Whether the home is in train mode."""
        return self.home.training

    def __call__(self, x: Tensor, sides: Sequence[Any]) -> Output:
        """Run the branch's code on its home."""
        return Output(*self._function(self.home, x, *sides))

    def refresh(self) -> None:
        """Look at the modules of the home again."""
        roots = [child_of(self.home, name) for name in self.code.modules]
        read = ((child_of(self.home, owner), name) for owner, name in self.code.attributes)
        self.holdings.refresh(roots, [(m, name) for m, name in read if m is not None])

    def __repr__(self) -> str:
        return f"{self.name}: {' → '.join(self.code.modules) or 'inline'}"


class HomeChain(ReversibleSequential):
    """The residual modules that one home has in a chain.

    Holds names only until the home has run; the branches then are its code's.
    """

    def __init__(self, course: Course, sites: Sequence[tuple[int, ...]], names: Sequence[str]):
        nn.Module.__init__(self)
        self.course = course
        self.sites = tuple(sites)
        self.names = tuple(names)
        self.branches = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "branches": []}

    def forward(self, x: Tensor, *sides: Any) -> Tensor:
        """Run these residual modules alone, as a chain of their own."""
        if not self.branches:
            raise CannotTrace(f"{self.names[0]}: run the model once, its branches are not traced")
        alone = ReversibleSequential([partial(_only_branch, b) for b in self.branches])
        result: Tensor = alone(x, *sides)
        return result

    def extra_repr(self) -> str:
        """Chain, coupling, and each module with its place in the chain."""
        rows = [super().extra_repr()]
        for sites, name in zip(self.sites, self.names, strict=True):
            places = ", ".join(str(site + 1) for site in sites)
            rows.append(f"({places} of {len(self.course.sites)}) {name}")
        return "\n".join(rows)


def _only_branch(branch: Branch, x: Tensor, *sides: Any) -> Tensor:
    return branch(x, sides).branch


@contextmanager
def _outside_transforms(home: nn.Module) -> Iterator[None]:
    """Leave torch.func's transforms, with which tracing has nothing to do, for a while.

    What `functional_call` has put in the place of parameters and buffers belongs to them.
    """
    hooks = torch._C._autograd
    message = hooks._saved_tensors_hooks_get_disabled_error_message()
    with ExitStack() as stack:
        stack.enter_context(temporarily_clear_interpreter_stack())
        for module in home.modules():
            for registry in (module._parameters, module._buffers):
                tensors = {name: t for name, t in registry.items() if t is not None}
                wrapped = {
                    name: _plain_twin(tensor)
                    for name, tensor in tensors.items()
                    if torch._C._functorch.is_functorch_wrapped_tensor(tensor)
                }
                stack.enter_context(mock.patch.dict(registry, wrapped))
        hooks._saved_tensors_hooks_enable()
        try:
            yield
        finally:
            if message is not None:
                hooks._saved_tensors_hooks_disable(message)


def _plain_twin(leaf: Any) -> Any:
    """A tensor of zeros for one that is inside of transforms."""
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


class Bound(NamedTuple):
    """A program's branches, and the normalisations of their sums, on a home."""

    branches: tuple[HomeBranch, ...]
    norms: tuple[NormBranch | None, ...]
    head_norms: tuple[NormBranch | None, ...]


@dataclass(eq=False)
class HomeState:
    """What a rewired home knows: plain data, and programs that can be traced again."""

    residuals: tuple[Residual, ...]
    inner: tuple[str, ...]
    trunk: str
    chains: tuple[HomeChain, ...]
    places: tuple[tuple[int, int], ...]  # for each residual: number of its chain, place in it
    programs: dict[Any, list[tuple[Program, Any]]] = field(default_factory=dict, repr=False)
    bound: dict[Program, Bound] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "programs": {}, "bound": {}}

    def program(
        self,
        home: nn.Module,
        arguments: Any,
        leaves: list[Any],
        spec: Any,
        answers: Sequence[bool] = (),
    ) -> Program:
        """The program for these arguments, traced where there is none yet.

        Args:
            home: The module.
            arguments: (args, kwargs).
            leaves: Those of the arguments.
            spec: Their structure.
            answers: To the first questions of the code whether a tensor is true.
        """
        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        modes = torch.is_grad_enabled(), autocast_state(device), torch.get_default_dtype()
        with ONE_AT_A_TIME:
            forward = original_class(type(home)).forward
            key = spec, modes, forward, self._flags(home)
            code = function_marks([forward])
            for program, marks in self.programs.get(key, ()):
                if marks == (code, _marks(home, program)) and program.suits(home, leaves, answers):
                    return program
            program = self._trace(home, arguments, answers)
            if sum(map(len, self.programs.values())) >= _MOST_PROGRAMS:
                warnings.warn(
                    f"{self.residuals[0].home or 'the model'} was traced for the "
                    f"{_MOST_PROGRAMS + 1}th time: its code decides by something that is new in "
                    "each call (a number, a shape, an attribute), and tracing takes longer than a "
                    "step. Hand it a tensor instead, or keep it out with `exclude=`.",
                    stacklevel=2,
                )
                self.programs.clear()
                self.bound.clear()
            marks = function_marks([forward]), _marks(home, program)
            self.programs.setdefault(key, []).append((program, marks))
            return program

    def _flags(self, home: nn.Module) -> tuple[Any, ...]:
        """In which mode modules are, and how many hooks those have whose code is the home's."""
        marks: list[Any] = [home.training]
        marks += [None if child is None else child.training for child in home._modules.values()]
        for name in self.residuals[0].inlined:
            module = home.get_submodule(name)
            marks += [module.training, len(module._forward_hooks) + len(module._forward_pre_hooks)]
            marks.append(class_mark(module))
        return tuple(marks)

    def _trace(self, home: nn.Module, arguments: Any, answers: Sequence[bool]) -> Program:
        if torch._C._are_functorch_transforms_active():
            with _outside_transforms(home):
                return self._trace(home, map_leaves(_plain_twin, arguments), answers)
        forward = original_class(type(home)).forward
        trace = partial(
            program_for,
            home,
            arguments,
            self.residuals,
            self.inner,
            self.trunk,
            forward=forward,
            answers=answers,
            in_part=True,
        )
        leaves = flatten(arguments)[0]
        fake = next((leaf for leaf in leaves if isinstance(leaf, FakeTensor)), None)
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake is None else fake.fake_mode
        with plain_homes(), hidden_chains(home):
            try:
                return trace(mode=mode)
            except CannotTrace as error:
                try:
                    return trace(mode=None)
                except CannotTrace as second:
                    if answers and isinstance(second, CodeRaised) and second.__cause__:
                        raise second.__cause__ from None  # the code's own error for that answer
                    if isinstance(second, CodeRaised):
                        _raise_own(home, arguments)
                    where = self.residuals[0].home or "the model"
                    raise CannotTrace(
                        f"{where}: called in a new way, its code cannot be rewired: {error}. "
                        "Keep it out with `exclude=`."
                    ) from error

    def branches(self, home: nn.Module, program: Program) -> Bound:
        """The program's branches and normalisations on this home."""
        bound = self.bound.get(program)
        if bound is None or (bound.branches and bound.branches[0].home is not home):
            owners = [self.places[number][0] for number in program.numbers]
            courses = [self.chains[owner].course for owner in owners]
            branches = tuple(
                HomeBranch(home, code, course.compile)
                for code, course in zip(program.branches, courses, strict=True)
            )
            norms, heads = (
                tuple(NormBranch(HomeBranch(home, code)) if code else None for code in codes)
                for codes in (program.norms, program.head_norms)
            )
            bound = Bound(branches, norms, heads)
            self.bound[program] = bound
            for number, chain in enumerate(self.chains):
                pairs = zip(owners, branches, strict=True)
                chain.branches = [branch for owner, branch in pairs if owner == number]
        return bound


def _marks(home: nn.Module, program: Program) -> list[Any]:
    """What the code of a program would see of its modules now."""
    marks = marks_of(home, program.reads, program.constants)
    if program.forms is not None:  # something that was computed decided: by its dtype, perhaps
        marks += [(p.dtype, p.device, p.requires_grad) for p in home.parameters()]
    return marks


def _raise_own(home: nn.Module, arguments: Any) -> None:
    """Raise what the original raises on these arguments, if it does: `ValueError("too long")`."""
    args, kwargs = map_leaves(own_copy, arguments)
    with isolated(home), torch.no_grad():
        original_class(type(home)).forward(home, *args, **kwargs)


@contextmanager
def hidden_chains(home: nn.Module) -> Iterator[None]:
    """Hide the chains among a home's children from code that goes through its children."""
    children = dict(home._modules)
    chains = {name for name, child in children.items() if isinstance(child, HomeChain)}
    for name in chains:
        del home._modules[name]
    try:
        yield
    finally:
        for name in chains:
            home._modules[name] = children[name]
