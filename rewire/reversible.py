"""Reversible chains: running residual branches on two streams.

Source: Re2TAL, arXiv 2211.14053, section 3. Memory comes from recomputation through
saved-tensor hooks, see `rewire.tape`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rewire.errors import StreamMismatch
from rewire.links import Course, Link, choose_site, find, version
from rewire.replay import Holdings, autocast_state
from rewire.tape import Branch, Output, Record, Step, Tail, Tape


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
        coupling: Name of the coupling; "re2" is Re2TAL's.
        name: The chain's name in messages.

    Shape: input [*S], output [*S]. The streams are at least float32; input and output are
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
        coupling: str = "re2",
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
        self.course = Course(name, sites, coupling)

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
        newest = older = _stream(dense(x))
        for branch in self.branches:
            output = branch(newest.to(x.dtype), sides)
            newest, older = self.course.arithmetic.forward(newest, older, *output[:2]), newest
        return newest, older

    def inverse(
        self, newer: Tensor, older: Tensor, *sides: Any, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Recover the streams before the first module from those after the last.

        Exact up to one rounding of each subtraction; along a chain the roundings add.

        Args:
            newer: Newest stream, [*S].
            older: Older stream; shape, dtype and device of `newer`.
            sides: As in `forward`.
            dtype: Of the branches' inputs, where it is not that of the streams.

        Returns:
            (newest, older) at the start, both the chain's input.

        Source: Re2TAL, arXiv 2211.14053, section 3.
        """
        if newer.shape != older.shape:
            raise StreamMismatch(
                f"inverse: the newer stream is {list(newer.shape)}, the older "
                f"{list(older.shape)}; both must be what `streams` returned."
            )
        for branch in reversed(self.branches):
            output = branch(older.to(dtype or older.dtype), sides)
            newer, older = older, self.course.arithmetic.inverse(newer, older, *output[:2])
        return newer, older

    def extra_repr(self) -> str:
        """Name and coupling."""
        name = f"chain={self.course.name!r}, " if self.course.name else ""
        return f"{name}coupling={self.course.coupling!r}"


@contextmanager
def store_activations(model: nn.Module) -> Iterator[None]:
    """Run the reversible chains of `model` by ordinary autograd, activations stored.

    The same function, and the same arithmetic in the same order: the plain twin for
    tests and debugging.
    """
    courses = {id(course): course for course in _courses(model)}.values()
    before = [(course, course.stored) for course in courses]
    try:
        for course in courses:
            course.stored = True
        yield
    finally:
        for course, stored in before:
            course.stored = stored


def _courses(model: nn.Module) -> Iterator[Course]:
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
    """The link at the start of a chain: both streams are `x`."""
    stream = _stream(x)
    tape = Tape(course.drift, course.arithmetic, stream, stream) if recording(course) else None
    return Link(course, -1, stream, stream, tape, 0, version(x))


def resume(course: Course, sites: Sequence[int], x: Tensor) -> tuple[int, Link]:
    """Which module of the chain runs on `x` now, and the link it goes on from."""
    site, link = choose_site(course, sites, find(x, course))
    return site, open_chain(course, x) if link is None else link


def advance(
    link: Link, site: int, x: Tensor, branch: Branch, sides: Sequence[Any]
) -> tuple[Tensor, Link, tuple[Any, ...]]:
    """Run one residual module.

    Returns:
        The visible result ([*S] in the dtype of `x`: the newest stream, or the merge after the
        chain's last module), its link (not attached yet), and what else leaves the branch.
    """
    course = link.course
    newest, older, relayout = link.streams(x)
    branch.refresh()
    tape = _tape_for(link, newest, older)
    if tape is None:
        output = branch(x, sides)
    else:
        step = Step(
            branch,
            Record(branch.name),
            x.dtype,
            x.requires_grad,
            link.tail,
            relayout,
            autocast_state(x.device.type),
        )
        output = tape.run(step, x, sides)
    trunk = x if output.trunk is None and link.tail is not None else output.trunk
    _check_shape(branch.name, output.branch, newest)
    following = course.arithmetic.forward(newest, older, output.branch, trunk)
    last = site == len(course.sites) - 1
    if tape is not None:
        tape.commit(step, following, newest)
    course.ran(site, tape)
    visible = course.arithmetic.merge(following, newest) if last else following
    visible = visible.to(torch.promote_types(x.dtype, output.branch.dtype))
    position = 0 if tape is None else len(tape.steps)
    stream = alias(following) if visible is following else following
    made = Link(course, site, stream, newest, tape, position, version(visible))
    return visible, made, output.sideways


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
    made = Link(
        link.course,
        link.site,
        link.newest,
        link.older,
        link.tape,
        link.position,
        version(result),
        tail,
    )
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
    tape = Tape(link.course.drift, link.course.arithmetic, newest, older)
    tape.begins_equal = False
    return tape


def _stream(x: Tensor) -> Tensor:
    """`x` as a stream: at least float32."""
    if not x.is_floating_point():
        raise StreamMismatch(f"a stream must be of a floating dtype, not {x.dtype}.")
    return x.to(x.dtype if x.dtype.itemsize >= 4 else torch.float32)


def dense(x: Tensor) -> Tensor:
    """`x` with every element its own and no gaps between them: streams are laid out so."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x
