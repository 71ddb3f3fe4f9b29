"""Reversible chains: running residual branches on two streams.

Source: Re2TAL, arXiv 2211.14053, section 3. Memory comes from recomputation through
saved-tensor hooks, see `rewire.tape`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rewire import drift
from rewire.arithmetic import Coupled
from rewire.coupling import Coupling, coupling_from
from rewire.errors import RewireError, StreamMismatch
from rewire.grid import OnGrid, rounded, straight
from rewire.links import Course, Link, choose_site, find, version
from rewire.norms import Normed, Watching
from rewire.replay import Holdings, autocast_state, uncached_autocast
from rewire.steps import Branch, Layout, Output, Record, Step, Tail
from rewire.tape import Tape


class ModuleBranch:
    """A branch that is one module or function of the stream and the side inputs."""

    def __init__(
        self, name: str, owner: nn.Module, key: str, function: Callable[..., Tensor]
    ) -> None:
        self.name = name
        self.holdings = Holdings()
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
        return Output(self.function(x, *sides), None, ())

    def refresh(self) -> None:
        """Look at the module again."""
        function = self.function
        self.holdings.refresh([function] if isinstance(function, nn.Module) else [])

    def __repr__(self) -> str:
        return repr(self.function)


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
            self.branches.append(ModuleBranch(full, self, str(index), function))
        sites = tuple(branch.name for branch in self.branches)
        self.course = Course(name, sites, coupling_from(coupling), precision, check)

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
    """Run the reversible chains of `model` by ordinary autograd, activations stored.

    The same function, and the same arithmetic in the same order: the plain twin for
    tests and debugging.
    """
    before = {id(course): (course, course.stored) for course in courses(model)}.values()
    try:
        for course, _ in before:
            course.stored = True
        yield
    finally:
        for course, stored in before:
            course.stored = stored


@contextmanager
def kept_grids(model: nn.Module) -> Iterator[None]:
    """Leave the grids of a model's chains as they are, whatever runs inside."""
    before = [(course, course.grid) for course in courses(model)]
    try:
        for course, grid in before:
            course.grid = copy.copy(grid)
        yield
    finally:
        for course, grid in before:
            course.grid = grid


def exact(model: nn.Module) -> bool:
    """Whether all chains of a model promise gradients bit for bit."""
    return all(course.precision != "fast" for course in courses(model))


def courses(model: nn.Module) -> Iterator[Course]:
    """The chains of a model at run time; one that has modules in several homes comes again."""
    for module in model.modules():
        chains = [module, *module.__dict__.get("_chains", ())]
        yield from (chain.course for chain in chains if isinstance(chain, ReversibleSequential))


# ---- one module of a chain ---------------------------------------------------------------


def recording(course: Course) -> bool:
    """Whether activations are to be dropped and recomputed.

    Not where there is no graph, where the user asked for storage, or where saved-tensor
    hooks are not allowed (torch.func transforms).
    """
    return (
        torch.is_grad_enabled()
        and not course.stored
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )


def open_chain(course: Course, x: Tensor) -> Link:
    """The link at the start of a chain: both streams are `x`, rounded to the chain's grid."""
    if not x.is_floating_point():
        raise StreamMismatch(f"a stream must be of a floating dtype, not {x.dtype}.")
    stream, grid = x.to(course.stream_dtype(x.dtype)), None
    if course.precision == "fast":
        _warn_of_half(course, x)
    elif not _transformed():  # nothing is inverted
        grid = course.grid.open(stream)
        stream = straight(rounded(stream, grid), (1.0, stream))
    tape = Tape(course.drift, stream, stream) if recording(course) else None
    first = stream if course.coupling.merges_input else None
    return Link(course, -1, stream, stream, tape, 0, version(x), grid=grid, first=first)


def _transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is going on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _warn_of_half(course: Course, x: Tensor) -> None:
    if course.drift.warned or course.drift.check == "off":
        return
    half = x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type)
    if half and recording(course):
        course.drift.warned = True
        warnings.warn(
            f'chain {course.name or "(model)"}: precision="fast" in half precision: one rounding '
            "that falls otherwise in backward grows along the chain, and gradients can be wrong "
            'by half their size. precision="exact" costs a few per cent of time and no memory.',
            drift.DriftWarning,
            stacklevel=2,
        )


def resume(course: Course, sites: Sequence[int], x: Tensor) -> tuple[int, Link]:
    """Which module of the chain runs on `x` now, and the link it goes on from."""
    site, link = choose_site(course, sites, find(x, course))
    return site, open_chain(course, x) if link is None else link


def advance(
    link: Link,
    site: int,
    x: Tensor,
    branch: Branch,
    sides: Sequence[Any],
    *,
    complete: bool = True,
) -> tuple[Tensor, Link, tuple[Any, ...]]:
    """Run one residual module.

    Args:
        link: Where the chain stands.
        site: The module's number in the chain.
        x: The visible tensor: the newest stream, or T of it, in the model's dtype.
        branch: The residual branch.
        sides: Its side inputs.
        complete: No normalisation of the sum follows.

    Returns:
        The visible result ([*S] in the dtype of `x`: the newest stream, or the merge after the
        chain's last module), its link (not attached yet), and what else leaves the branch.
    """
    course = link.course
    newest, older, relayout = link.streams(x)
    if link.site < 0 and link.grid is not None:
        x = newest.to(x.dtype)  # the branch sees the stream as backward will rebuild it
    tape = _tape_for(link, newest, older)
    following, grid, output = _couple(link, tape, x, (newest, older), relayout, branch, sides)
    course.ran(site, following if tape is None else tape)
    dtype = torch.promote_types(x.dtype, output.branch.dtype)
    made = replace(link, site=site, newest=following, older=newest, tape=tape, grid=grid, tail=None)
    return *_shown(made, dtype, complete), output.sideways


def normalise(link: Link, x: Tensor, norm: NormBranch) -> tuple[Tensor, Link]:
    """Run the normalisation T of a sum: T(z) is the newest stream then.

    Args:
        link: Where the chain stands.
        x: The visible sum, or a view of all of it.
        norm: The normalisation.

    Returns:
        As of `advance`.
    """
    z, older, relayout = link.streams(x)
    tape = link.tape
    if tape is not None and len(tape.steps) != link.position:
        tape = _tape_for(link, z, older)
    stream, grid = _normalise(link.course, tape, z, older, link.grid, norm, relayout)
    made = replace(link, newest=stream, older=older, tape=tape, grid=grid)
    return _shown(made, x.dtype, True)


def _shown(link: Link, dtype: torch.dtype, complete: bool) -> tuple[Tensor, Link]:
    """What the user's code sees of a link: the newest stream, or the merge at the chain's end."""
    course, newest = link.course, link.newest
    last = complete and link.site == len(course.sites) - 1
    visible = newest
    if last:
        first = newest if link.first is None else link.first
        visible = course.coupling.merge(newest, link.older, first)
    visible = visible.to(dtype)
    if last and visible is newest:
        visible = newest.clone()  # the user's own; backward needs the stream
    position = 0 if link.tape is None else len(link.tape.steps)
    stream = alias(newest) if visible is newest else newest
    return visible, replace(link, newest=stream, position=position, version=version(visible))


def _couple(
    link: Link,
    tape: Tape | None,
    x: Tensor,
    streams: tuple[Tensor, Tensor],
    relayout: tuple[Layout, Layout] | None,
    branch: Branch,
    sides: Sequence[Any],
) -> tuple[Tensor, OnGrid | None, Output]:
    """Run a branch and couple the streams: x_{i+1} with its graph, and the grid it is on."""
    newest, older = streams
    course, grid = link.course, link.grid
    undo = Coupled(course.coupling, course.coupling.coefficients(newest, branch.training), grid)
    step = _step(branch, undo, x, link.tail, relayout)
    output = _ran(tape, step, x, sides)
    terms = output.branch, x if output.trunk is None and link.tail is not None else output.trunk
    _check_shape(branch.name, output.branch, newest)
    following = undo.forward(newest, older, *terms)
    if grid is not None:
        coarser = course.grid.watch(following, grid)
        if coarser is not None:
            undo.grid = coarser
            following = undo.forward(newest, older, *terms)
        if tape is not None:
            undo.keep(older)
        following = undo.attached(following, newest, older, *terms)
        grid = coarser or grid._replace(behind=False)
    if tape is not None:
        tape.commit(step, following, newest)
    return following, grid, output


class NormBranch:
    """A normalisation on the trunk, as the tape sees it."""

    def __init__(self, branch: Branch) -> None:
        self.name = f"{branch.name} (normalisation)"
        self.holdings = branch.holdings
        self._branch = branch

    @property
    def training(self) -> bool:
        """Whether its owner is in train mode."""
        return self._branch.training

    def __call__(self, x: Tensor, sides: Sequence[Any]) -> Output:
        """T(x), and how it ran."""
        with Watching() as seen:
            return Output(self._branch(x, sides).branch, None, (seen,))

    def refresh(self) -> None:
        """Look at its modules again."""
        self._branch.refresh()


def _normalise(
    course: Course,
    tape: Tape | None,
    z: Tensor,
    older: Tensor,
    grid: OnGrid | None,
    norm: NormBranch,
    relayout: tuple[Layout, Layout] | None,
) -> tuple[Tensor, OnGrid | None]:
    """T(z) as the newest stream, and the grid it is on."""
    if grid is None:  # nothing is inverted: a torch.func transform
        return norm(z, ()).branch, None
    undo = Normed(grid, None)
    step = _step(norm, undo, z, None, relayout)
    output = _ran(tape, step, z, ())
    x = undo.forward(output.branch, z)
    coarser = course.grid.watch(x, grid)
    if coarser is not None:
        undo.grid = coarser
        x = undo.forward(output.branch, z)
    if tape is not None:
        undo.affine = output.sideways[0].affine(z)
        undo.keep(x, z, unfit=coarser is not None)
    x = straight(x, (1.0, output.branch))
    if tape is not None:
        tape.commit(step, x, older)
    return x, coarser or grid


def _step(
    branch: Branch,
    undo: Coupled | Normed,
    x: Tensor,
    tail: Tail | None,
    relayout: tuple[Layout, Layout] | None,
) -> Step:
    autocast = autocast_state(x.device.type)
    record = Record(branch.name)
    return Step(branch, record, undo, x.dtype, x.requires_grad, tail, relayout, autocast)


def _ran(tape: Tape | None, step: Step, x: Tensor, sides: Sequence[Any]) -> Output:
    """Run a step's branch, on the tape if there is one."""
    step.branch.refresh()
    if tape is not None:
        return tape.run(step, x, sides)
    with uncached_autocast():  # as on a tape: its cache adds up gradients of shared weights
        return step.branch(x, sides)


def _check_shape(name: str, branch: Tensor, stream: Tensor) -> None:
    """A branch has the stream's shape, or one that broadcasts to it."""
    sizes = zip(reversed(branch.shape), reversed(stream.shape), strict=False)
    if branch.dim() > stream.dim() or any(a not in (1, b) for a, b in sizes):
        raise StreamMismatch(
            f"{name}: the branch gives {list(branch.shape)}, the stream is {list(stream.shape)}. "
            "`rewire inspect` shows the plan; keep the module out with `exclude=`."
        )


def follow(link: Link, x: Tensor, call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Link]:
    """Run an activation T on the trunk; the next module has x_i and T(x_i)."""
    record = Record(f"{link.course.sites[link.site]} (trunk)")
    tail = Tail(call, record, x.dtype, autocast_state(x.device.type))
    if link.tape is None or len(link.tape.steps) != link.position:
        result = call(x)
    else:
        result = link.tape.follow(tail, x)
    made = replace(link, version=version(result), tail=tail)
    return result, made


class _Alias(torch.autograd.Function):
    """The same values and the same place in the graph, as another tensor that is no view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def alias(x: Tensor) -> Tensor:
    """`x` under another tensor object.

    Links hang on visible tensors and hold streams. Were these the same objects, each link
    would keep the one before it, and with it the whole past; a view would keep its base.
    """
    if torch._C._are_functorch_transforms_active():
        return x.view_as(x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.detach()
    result: Tensor = _Alias.apply(x)
    return result


def _tape_for(link: Link, newest: Tensor, older: Tensor) -> Tape | None:
    """The link's tape, or a new one that begins here where another run has gone on with it."""
    if not recording(link.course):
        return None
    if link.tape is not None and len(link.tape.steps) == link.position:
        return link.tape
    tape = Tape(link.course.drift, newest, older)
    tape.begins_equal = False
    return tape


def dense(x: Tensor) -> Tensor:
    """`x` with every element its own and no gaps between them: streams are laid out so."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x
