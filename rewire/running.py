"""One module of a chain as it runs: its branch, the coupling, and what the user's code sees."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rewire import drift
from rewire.arithmetic import Coupled
from rewire.cuts import UNCUT, Cuts, at
from rewire.errors import RewireError, StreamMismatch
from rewire.grid import OnGrid, rounded, straight
from rewire.links import Course, Link, choose_site, find
from rewire.norms import Normed, Watching
from rewire.observers import observing, tell
from rewire.replay import autocast_state, hooks_apply, transformed, uncached_autocast, version
from rewire.steps import Branch, Layout, Output, Record, Step, Tail
from rewire.surroundings import Surroundings
from rewire.tape import Tape, written_input

_observers: list[list[str]] = []


def watch_branches() -> AbstractContextManager[list[str]]:
    """Have the name of the residual module at the list's end while its branch runs in forward."""
    return observing(_observers)


def recording(course: Course) -> bool:
    """Whether activations are to be dropped and recomputed.

    Not where there is no graph, where the user asked for storage, or where saved-tensor
    hooks are not allowed (torch.func transforms).
    """
    return not course.stored and hooks_apply()


def open_chain(course: Course, x: Tensor) -> Link:
    """The link at the start of a chain: both streams are `x`, rounded to the chain's grid."""
    if not x.is_floating_point():
        raise StreamMismatch(f"a stream must be of a floating dtype, not {x.dtype}.")
    stream, grid = x.to(course.stream_dtype(x.dtype)), None
    if course.precision == "fast":
        _warn_of_half(course, x)
    elif not transformed():  # nothing is inverted
        grid = course.grid.open(stream)
        stream = straight(rounded(stream, grid), (1.0, stream))
    tape = Tape(course.drift, stream, stream) if recording(course) else None
    first = stream if course.coupling.merges_input else None
    return Link(course, -1, stream, stream, tape, 0, version(x), grid=grid, first=first)


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
    site, link = choose_site(course, sites, find(x, course), x)
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
    step = _coupled_step(link, site, newest, x, branch, sides, relayout)
    following, grid, output = _couple(link, site, tape, step, x, (newest, older), sides)
    course.ran(site, following if tape is None else tape)
    dtype = torch.promote_types(x.dtype, output.branch.dtype)
    # Made behind the branch: backward runs it first, and the branch's gradient is added to the
    # trunk's where that is.
    older = alias(newest) if link.shown else newest
    made = replace(link, site=site, newest=following, older=older, tape=tape, grid=grid, tail=None)
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
    shown = visible is newest
    made = replace(
        link,
        newest=newest.detach() if shown else newest,
        position=position,
        version=version(visible),
        shown=shown,
    )
    return visible, made


def _coupled_step(
    link: Link,
    site: int,
    newest: Tensor,
    x: Tensor,
    branch: Branch,
    sides: Sequence[Any],
    relayout: tuple[Layout, Layout] | None,
) -> Step:
    """The step that runs a residual module."""
    course, grid = link.course, link.grid
    k = course.coupling.coefficients(newest, branch.training)
    if grid is not None and any(isinstance(w, Tensor) and w.requires_grad for w in k):
        raise RewireError(
            f"coupling {course.coupling}: a coefficient requires a gradient, and the grid has none "
            'for it. Detach it, or use precision="fast".'
        )
    step = _step(branch, Coupled(course.coupling, k, grid), x, link.tail, relayout)
    step.way = course.way(site)
    step.cuts = _cuts(link, step, x, sides)
    return step


def _couple(
    link: Link,
    site: int,
    tape: Tape | None,
    step: Step,
    x: Tensor,
    streams: tuple[Tensor, Tensor],
    sides: Sequence[Any],
) -> tuple[Tensor, OnGrid | None, Output]:
    """Run a branch and couple the streams: x_{i+1} with its graph, and the grid it is on."""
    newest, older = streams
    course, grid, undo = link.course, link.grid, step.undo
    assert isinstance(undo, Coupled)
    tell("begins", step.branch.name)
    output = _ran(tape, step, x, sides)
    tell("ends", step.branch.name)
    terms = output.branch, x if output.trunk is None and link.tail is not None else output.trunk
    _check_shape(step.branch.name, output.branch, newest)
    following, largest = undo.measured(newest, older, *terms)
    if grid is not None:
        coarser = course.grid.watch(following, grid, largest)
        if coarser is not None:
            undo.grid = coarser
            following = undo.forward(newest, older, *terms)
        following = undo.attached(following, newest, older, *terms)
        grid = coarser or grid._replace(behind=False)
    if tape is not None:
        step.keep(undo, older)
        if step.way != "reverse":
            rebuilt = course.way(site + 1) == "reverse" and site + 1 < len(course.sites)
            tape.hold(step, newest, older, marked=rebuilt)
        tape.commit(step, following, newest)
    return following, grid, output


def _cuts(link: Link, step: Step, x: Tensor, sides: Sequence[Any]) -> Cuts:
    """How the branch is run part by part."""
    chunks = link.course.chunks
    if chunks == 1 or step.way == "store":
        return UNCUT
    tail = None if step.tail is None else step.tail.call
    if tail is not None and step.relayout is not None:
        return UNCUT  # an activation of channels would not know its dimension
    return step.branch.cutting.cuts(chunks, step.branch, x, sides, tail)


class NormBranch:
    """A normalisation on the trunk, as the tape sees it."""

    def __init__(self, branch: Branch) -> None:
        self.name = f"{branch.name} (normalisation)"
        self.holdings = branch.holdings
        self.cutting = branch.cutting
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
    branch.refresh()
    around = Surroundings(autocast_state(x.device.type))
    return Step(branch, undo, x.dtype, x.requires_grad, tail, relayout, around)


def _ran(tape: Tape | None, step: Step, x: Tensor, sides: Sequence[Any]) -> Output:
    """Run a step's branch, on the tape if there is one."""
    if not _observers:
        return _run(tape, step, x, sides)
    for observer in _observers:
        observer.append(step.branch.name)
    try:
        return _run(tape, step, x, sides)
    finally:
        for observer in _observers:
            observer.pop()


def _run(tape: Tape | None, step: Step, x: Tensor, sides: Sequence[Any]) -> Output:
    if tape is not None:
        return tape.run(step, x, sides)
    before = version(x)
    with uncached_autocast():  # as on a tape: its cache adds up gradients of shared weights
        outputs = [
            step.branch(at(place, x), step.cuts.sides_at(place, sides))
            for place in step.cuts.places
        ]
    if version(x) != before:
        raise written_input(step.branch.name)
    return step.output(outputs, x)


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
    newest = alias(x) if link.shown else link.newest
    made = replace(link, newest=newest, version=version(result), tail=tail, shown=False)
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
    if transformed():
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
