"""Links: how the next residual module finds the older stream.

Modules of a chain hand plain tensors, the newest stream, to each other through the
user's own code. The older stream and the tape hang on that tensor in a weak table, so
that they live exactly as long as it does.
"""

from __future__ import annotations

import math
import re
import threading
import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from rewire import drift
from rewire.compiling import Compile
from rewire.compiling import checked as compilable
from rewire.coupling import Coupling, Re2
from rewire.cuts import Chunks, checked
from rewire.errors import RewireError, StreamMismatch
from rewire.grid import Grid, OnGrid
from rewire.plans import WAYS
from rewire.replay import version
from rewire.steps import Layout, Tail
from rewire.tape import Tape

_MOST_GAIN = 2.0**10
PRECISIONS = ("exact", "float64", "fast")


class _Run(threading.local):
    """In each thread, the site of a chain that ran last; -1 when the chain is complete.

    `tape` tells whether that run can still be going on. `visible` keeps the site's result alive
    without gradients, where nothing else does: what comes next must be that tensor or a view of it.
    """

    site = -1
    tape: weakref.ref[Any] | None = None
    visible: Tensor | None = None


@dataclass(eq=False)
class Course:
    """A chain at run time: shared by the modules of one model, never by two models.

    Attributes:
        name: Qualified name of the chain.
        sites: Names of its residual modules in order.
        coupling: The equation of its steps.
        precision: "exact", "float64" or "fast"; see `rewire.make_reversible`.
        check: What to do where the rebuilt streams are not right: "warn", "raise" or "off".
        stored: Run by ordinary autograd, with activations stored.
        chunks: Into how many parts its branches are cut; see `rewire.make_reversible`.
        ways: What backward does at each site, see `rewire.Chain`; empty: all are reversed.
        compile: Whether, and how, its branches are compiled; see `rewire.make_reversible`.
        grid: Where its streams stand, from run to run.
    """

    name: str
    sites: tuple[str, ...]
    coupling: Coupling = field(default_factory=Re2)
    precision: str = "exact"
    check: InitVar[str] = "warn"
    stored: bool = False
    chunks: Chunks = 1
    ways: tuple[str, ...] = ()
    compile: Compile = False
    run: _Run = field(default_factory=_Run, repr=False)
    drift: drift.Chain = field(init=False, repr=False)
    grid: Grid = field(default_factory=Grid, repr=False)

    def __post_init__(self, check: str) -> None:
        for what, given, known in (
            ("precision", self.precision, PRECISIONS),
            ("check", check, drift.CHECKS),
        ):
            if given not in known:
                raise ValueError(f"{what}={given!r}; choose one of {', '.join(map(repr, known))}.")
        self.chunks = checked(self.chunks)
        if self.ways and (len(self.ways) != len(self.sites) or not set(self.ways) <= set(WAYS)):
            words = ", ".join(map(repr, WAYS))
            raise ValueError(f"ways={self.ways!r}: one of {words} for each of {len(self.sites)}.")
        self.compile = compilable(self.compile)
        self.drift = drift.Chain(self.name, check)
        self._refuse_gain()
        if self.precision == "fast":
            self._refuse_growth()

    def _refuse_gain(self) -> None:
        """Where streams grow, float32 holds the first modules' share to ever fewer digits."""
        gain = self.coupling.gain
        if self.precision == "float64" or gain <= 1:
            return
        safe = int(math.log(_MOST_GAIN) / math.log(gain))
        if len(self.sites) > safe:
            raise RewireError(
                f"chain {self.name or '(model)'}: under {self.coupling} the streams grow "
                f"{gain:.3g} times in each module. float32 holds them up to {safe} modules, and "
                f"these are {len(self.sites)}: use "
                'precision="float64", or a coupling with a + b = 1.'
            )

    def _refuse_growth(self) -> None:
        """Without a grid an error of the inverse grows from module to module."""
        growth, unit = self.coupling.growth, torch.finfo(torch.float32).eps
        if growth <= 1:
            return
        safe = int(math.log(drift.limit(torch.float32) / unit) / math.log(growth))
        if len(self.sites) > safe:
            raise RewireError(
                f"chain {self.name or '(model)'}: with {self.coupling} an error of the inverse "
                f'grows {growth:.3g} times in each module. precision="fast" is safe up to {safe} '
                f'modules, and these are {len(self.sites)}: use precision="exact".'
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "run": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, run=_Run())

    def way(self, site: int) -> str:
        """What backward does at a site."""
        return self.ways[site] if site < len(self.ways) else WAYS[0]

    def ran(self, site: int, alive: Tape | Tensor) -> None:
        """Note which residual module ran last in this thread, and what lives while it goes on."""
        self.run.site = -1 if site == len(self.sites) - 1 else site
        self.run.tape = weakref.ref(alive)
        self.run.visible = None

    def last(self) -> int:
        """The site that ran last in a run that can still be going on; else -1.

        A run that stopped early and whose graph is gone has ended.
        """
        left = self.run.visible is not None and torch.is_grad_enabled()
        if left or (self.run.tape is not None and self.run.tape() is None):
            self.run.site = -1
        return self.run.site

    def stream_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the streams, for tensors of `dtype`: never the model's by accident."""
        wide = self.precision == "float64" or dtype == torch.float64
        return torch.float64 if wide else torch.float32


@dataclass(slots=True, eq=False)
class Link:
    """What hangs on a visible tensor.

    Attributes:
        course: The chain.
        site: Number of the residual module that made the tensor; -1 before the first.
        newest: The newest stream, with its graph; never the visible tensor itself, which a link
            would keep alive for ever.
        shown: The visible tensor is the newest stream: the graph is its, and `newest` has none.
        older: The older stream, with its graph.
        tape: None where nothing is recorded.
        position: Number of steps on the tape when the tensor was made.
        version: Version counter of the visible tensor.
        tail: The activation between `newest` and the visible tensor.
        requires_grad: Whether the visible tensor does.
        grid: Where the streams stand; None for plain floats.
        first: x_0, where the coupling's merge reads it.
    """

    course: Course
    site: int
    newest: Tensor
    older: Tensor
    tape: Tape | None
    position: int
    version: int
    tail: Tail | None = None
    grid: OnGrid | None = None
    first: Tensor | None = None
    requires_grad: bool = False
    shown: bool = False

    def streams(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Layout, Layout] | None]:
        """Both streams in the layout of `x`, the visible tensor or a view of all of it."""
        newest, older = self.newest, self.older
        before, inside = layout(newest), layout(x)
        if before == inside:
            return x if self.shown else newest, older, None
        if x.numel() != newest.numel():
            raise StreamMismatch(
                f"{self.course.name}: the tensor handed on is {list(x.shape)}, the stream "
                f"{list(newest.shape)}. Hand on the whole stream, or rewire with `exclude=`."
            )
        newest = x if self.shown else relaid(newest, inside)
        return newest, relaid(older, inside), (before, inside)


def layout(stream: Tensor) -> Layout:
    """Shape and strides."""
    return stream.shape, stream.stride()


def relaid(stream: Tensor, inside: Layout) -> Tensor:
    """All of a stream in another layout, as a view."""
    shape, stride = inside
    if stream.is_contiguous() and torch.empty(shape, device="meta").stride() == stride:
        return stream.view(shape)
    return stream.as_strided(shape, stride, stream.storage_offset())


# Typed as the mapping it is: torch gives it no annotations.
_links: MutableMapping[Tensor, Link] = WeakTensorKeyDictionary()


def attach(x: Tensor, link: Link) -> None:
    """Hang a link on a visible tensor."""
    _links[x] = link
    link.requires_grad = x.requires_grad
    link.course.run.visible = None if torch.is_grad_enabled() else x


def find(x: Tensor, course: Course) -> Link | None:
    """The link of a tensor, or of the tensor it is another name or a whole view of.

    Raises:
        StreamMismatch: The tensor was changed in place since its link was made.
    """
    link = _links.get(x)
    if link is None and x._base is not None and _same_graph(x, x._base):
        link = _links.get(x._base)
    if link is None or link.course is not course:
        link = _find_alias(x, course)
    if link is not None and x.requires_grad != link.requires_grad:
        raise StreamMismatch(
            f"{course.sites[link.site]}: autograd has been told another past of its result than "
            "the one it has, as a reentrant checkpoint does. Checkpoint with use_reentrant=False, "
            "or the whole chain, or not at all: its activations are not stored anyway."
        )
    if link is not None and version(x) != link.version:
        raise StreamMismatch(
            f"{course.sites[link.site]}: its result was changed in place before the next module "
            f"of chain {course.name} read it. Write the operation out of place, or keep "
            "the module out with `exclude=`."
        )
    return link


def _find_alias(x: Tensor, course: Course) -> Link | None:
    """By storage: FSDP2 wraps tensors, user code takes views."""
    place = _place(x)
    if place is None:
        return None
    for tensor, link in list(_links.items()):
        if link.course is course and _place(tensor) == place and _same_graph(x, tensor):
            return link
    return None


# What stands in the graph between a tensor and a view of all of it, or FSDP2's and backward
# hooks' other names for it.
_VIEWS = frozenset(
    """View ReshapeAlias UnsafeView Transpose Permute Unsqueeze Squeeze Alias T Unflatten AsStrided
    Slice Select Swapaxes Movedim RegisterPostBackwardFunction BackwardHookFunction""".split()
)


def _same_graph(x: Tensor, visible: Tensor) -> bool:
    """Whether `x` is all of `visible` for autograd too, not a gradient-changing alias of it."""
    if x.numel() != visible.numel() or x.requires_grad != visible.requires_grad:
        return False
    node, goal = x.grad_fn, visible.grad_fn
    while node is not None and node is not goal:
        if re.sub(r"Backward\d*$", "", node.name()) not in _VIEWS:
            return False
        node = node.next_functions[0][0]
    return node is goal


def _continues(course: Course, x: Tensor) -> bool:
    """Whether a tensor without a link may be a copy of the result that it stands for.

    Without gradients that result is kept alive, and nothing else tells whether its run goes on.
    """
    visible = course.run.visible
    if visible is None or torch.is_grad_enabled():
        return True
    if visible.numel() != x.numel() or visible.device != x.device:
        return False
    return torch.equal(visible.flatten().to(x.dtype), x.flatten())


def _place(x: Tensor) -> tuple[int, int] | None:
    """Storage and offset; None where a tensor has no storage to look at."""
    try:
        return int(x.untyped_storage()._cdata), int(x.storage_offset())
    except (RuntimeError, NotImplementedError):
        return None


def choose_site(
    course: Course, sites: Sequence[int], link: Link | None, x: Tensor
) -> tuple[int, Link | None]:
    """Which module of the chain runs now, and the link to go on with (None: the chain opens).

    Layer drop leaves modules out: the next one is the first of this home's sites behind
    the link's, wherever it is.

    Raises:
        StreamMismatch: A module in the middle of a chain is handed something that is no stream.
    """
    if link is not None:
        following = [site for site in sites if site > link.site]
        if following:
            return following[0], link
    if link is None and sites[0] and torch._C._current_graph_task_id() != -1:
        raise StreamMismatch(
            f"{course.sites[sites[0]]}: it runs again in backward without the modules before it, "
            "as in a reentrant checkpoint of a part of a chain. Checkpoint with "
            "use_reentrant=False, or the whole chain, or not at all."
        )
    last = course.last() if link is None else link.site
    if link is None and sites[0] == 0 and not _continues(course, x):
        last = -1  # a run that stopped early; another one begins
    again = link is None and 0 <= last < sites[-1] and len(sites) > 1
    if (sites[0] == 0 and not again) or last < 0 or (link is None and sites[-1] <= last):
        return sites[0], None
    raise StreamMismatch(
        f"{course.sites[sites[0]]}: its input does not come next after {course.sites[last]}, which "
        f"ran before it in chain {course.name or '(model)'}. Between two modules of a "
        "chain only views of the whole tensor are allowed (no copy, cast, scale, change of order, "
        "nor a checkpoint but with use_reentrant=False); keep one of them out with `exclude=` to "
        "cut the chain there."
    )
