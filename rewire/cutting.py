"""Which branches may be cut, along what and into how many parts: found once for each form of input.

A branch is cut along dimensions of the stream that its operations keep apart (`rewire.following`),
the outermost in memory first, so that each part lies in one piece. It is run on fake tensors for
that: whole, and on a part, which must run the same operations.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rewire.attributes import restored_attributes
from rewire.cuts import COUNT, UNCUT, Chunks, Cuts, Found, Place, Span, at
from rewire.following import Following, Seen, Shapes
from rewire.mixing import Coarser, Label, Mixed
from rewire.replay import autocast_state, transformed
from rewire.steps import Branch

Tail = Callable[[Tensor], Tensor] | None
_STREAMS = 2  # "auto": a part's activations take as much as so many streams
_LEAST = 1 << 20  # bytes of activations below which a part costs more time than it is worth
_MOST_FORMS = 64


class _Axis(NamedTuple):
    dim: int
    unit: int  # indices that stay together
    sides: dict[int, int]


class Cutting:
    """The cuts of one branch.

    Attributes:
        last: Those of its last run.
    """

    def __init__(self) -> None:
        self.last: Found | None = None
        self._found: dict[Any, Found] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "_found": {}}

    def cuts(
        self,
        chunks: Chunks,
        branch: Branch,
        x: Tensor,
        sides: Sequence[Any],
        tail: Tail = None,
    ) -> Cuts:
        """How the branch is run on `x`.

        Args:
            chunks: "auto", or the number of parts.
            branch: Whose cuts these are.
            x: Its input, [*S].
            sides: Its side inputs.
            tail: The activation on the trunk that has given `x`; it is run part by part too.
        """
        if chunks == 1 or transformed():
            return UNCUT
        key = (
            chunks,
            torch.is_grad_enabled(),
            autocast_state(x.device.type),
            branch.holdings.flags(),
            *map(_form, (x, *sides)),
        )
        found = self._found.get(key)
        if found is None:
            if len(self._found) >= _MOST_FORMS:
                self._found.clear()
            found = self._found[key] = self._find(chunks, branch, x, sides, tail)
        self.last = found
        return found.cuts

    def _find(
        self, chunks: Chunks, branch: Branch, x: Tensor, sides: Sequence[Any], tail: Tail
    ) -> Found:
        with restored_attributes(branch.holdings.modules) as changed:
            try:
                found = _Search(branch, x, sides, tail).found(chunks)
            except Mixed as mixed:
                found = Found(UNCUT, (), 0, str(mixed))
        return Found(UNCUT, (), 0, f"it sets {changed[0]!r}") if changed else found


def _form(value: Any) -> Any:
    """What of an argument decides about cuts."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device, value.requires_grad
    return value if isinstance(value, (int, float, str, type(None))) else id(value)


class _Search:
    """The search for cuts of one branch, on fake tensors."""

    def __init__(self, branch: Branch, x: Tensor, sides: Sequence[Any], tail: Tail) -> None:
        self._branch, self._tail = branch, tail
        fake = next((t for t in (x, *sides) if isinstance(t, FakeTensor)), None)
        self._mode = (
            FakeTensorMode(allow_non_fake_inputs=True)
            if not isinstance(fake, FakeTensor)
            else fake.fake_mode
        )
        with self._mode:
            self._x = self._faked(x)
            self._sides = [self._faked(s) if isinstance(s, Tensor) else s for s in sides]

    def _faked(self, tensor: Tensor) -> Tensor:
        made = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        return made.requires_grad_(tensor.requires_grad)

    def found(self, chunks: Chunks) -> Found:
        """The cuts.

        Raises:
            Mixed: There are none.
        """
        saved = self._saved_bytes()
        count = chunks if isinstance(chunks, int) else self._worth(saved)
        if count == 1:
            size = f"{saved / 1e6:.1f} MB of activations"
            return Found(UNCUT, (), saved, f"{size} are too few for it to pay")
        axes: list[_Axis] = []
        parts: list[int] = []
        reason = ""
        for dim in self._outermost_first():
            try:
                axis = self._axis(dim)
            except Mixed as mixed:
                reason = reason or str(mixed)
                continue
            part = min(-(-count // math.prod(parts)), self._x.shape[dim] // axis.unit)
            if part > 1:
                axes.append(axis)
                parts.append(part)
            if math.prod(parts) >= count:
                break
        if not axes:
            raise Mixed(reason or "there is nothing along which it can be cut")
        count, gradients = math.prod(parts), self._gradients()
        if chunks == "auto" and saved * (count - 1) <= count * gradients:
            size = f"{gradients / 1e6:.1f} MB of its weights' gradients"
            return Found(UNCUT, (), saved, f"a second {size} would outweigh what it saves")
        cuts = self._cuts(axes, parts)
        self._try(cuts)
        return Found(cuts, tuple(zip((a.dim for a in axes), parts, strict=True)), saved, reason)

    def _worth(self, saved: int) -> int:
        """Into how many parts cutting pays."""
        stream = max(1, self._x.numel() * max(4, self._x.element_size()))
        return max(1, min(-(-saved // (_STREAMS * stream)), saved // _LEAST))

    def _gradients(self) -> int:
        """Bytes of the branch's own gradients, which a part has beside the sum of those before."""
        return sum(t.numel() * t.element_size() for t in self._own() if t.requires_grad)

    def _own(self) -> list[Tensor]:
        return [registry.tensor for registry in self._branch.holdings.held()]

    def _outermost_first(self) -> list[int]:
        strides = self._x.stride()
        dims = [dim for dim, size in enumerate(self._x.shape) if size > 1]
        return sorted(dims, key=lambda dim: -strides[dim])

    # ---- runs ----------------------------------------------------------------------------

    def _run(self, x: Tensor, sides: Sequence[Any]) -> list[Tensor]:
        """What the branch gives, and what goes on along the trunk."""
        try:
            with _quiet():
                x = x if self._tail is None else self._tail(x)
                output = self._branch(x, sides)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise Mixed(f"its code cannot be run on fake tensors or a part: {said}") from error
        if output.sideways:
            raise Mixed("it gives other values beside the branch's")
        return [output.branch, x if output.trunk is None else output.trunk]

    def _saved_bytes(self) -> int:
        """What autograd saves in a run of the whole branch, each storage once."""
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            seen[storage._cdata] = storage.nbytes()
            return tensor.detach()

        own = self._own()
        # What stands for them in the run. The mode makes the same again only while they live.
        fakes = [t if isinstance(t, FakeTensor) else self._mode.from_tensor(t) for t in own]
        with self._mode, torch.enable_grad():
            x = self._x if self._x.requires_grad else self._x.detach().requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                self._run(x * 1, self._sides)
        held = {tensor.untyped_storage()._cdata for tensor in (*own, *fakes)}
        return sum(size for storage, size in seen.items() if storage not in held)

    def _shapes(self, x: Tensor, sides: Sequence[Any]) -> list[Seen]:
        with self._mode, Shapes() as shapes:
            results = self._run(x, sides)
        for result in results:
            if result.shape != x.shape:
                raise Mixed(f"it gives {list(result.shape)} for a stream of {list(x.shape)}")
        seen: list[Seen] = shapes.seen
        return seen

    def _axis(self, dim: int) -> _Axis:
        """A dimension along which the branch may be cut."""
        first: Mixed | None = None
        for sides in self._companions(dim):
            try:
                return self._following(dim, sides)
            except Mixed as mixed:
                first = first or mixed
        assert first is not None, "there is always a first attempt"
        raise first

    def _companions(self, dim: int) -> Iterator[dict[int, int]]:
        """Which side inputs may have to be cut with the stream: none, or those as long there."""
        yield {}
        length = self._x.shape[dim]
        fit = {n: _as_long(side, dim, length, self._x) for n, side in enumerate(self._sides)}
        if found := {number: own for number, own in fit.items() if own is not None}:
            yield found

    def _following(self, dim: int, sides: dict[int, int]) -> _Axis:
        unit, size, compared = 1, self._x.shape[dim], False
        while size % unit == 0 and size > unit:
            try:
                self._follow(dim, unit, sides, compared)
            except Coarser as coarser:
                unit *= coarser.factor
            except Mixed:
                if compared:
                    raise
                compared = True
            else:
                if compared:
                    return _Axis(dim, unit, sides)
                compared = True
        raise Mixed(f"its views take all of dimension {dim} together")

    def _follow(self, dim: int, unit: int, sides: dict[int, int], compared: bool) -> None:
        """Follow the blocks of `unit` indices through a run, compared with one on a part."""
        length = self._x.shape[dim] // unit
        part = Cuts(((Span(dim, 0, (length - 1) * unit),),), _by_number({dim: sides}))
        seen = self._shapes(*self._part(part, part.places[0])) if compared else None
        run = Following(length, length - 1, seen)
        x, given = self._part(part, ())
        run.mark(x, Label(dim, 1, unit))
        for number, own in sides.items():
            if own != COUNT:
                run.mark(given[number], Label(own, 1, unit))
        with self._mode, run:
            results = self._run(x, given)
        run.finish()
        here = Label(dim, 1, unit)
        if any(run.label(result) != here or result.shape != x.shape for result in results):
            raise Mixed(f"what it gives does not lie along dimension {dim} as the stream does")

    def _part(self, cuts: Cuts, place: Place) -> tuple[Tensor, Sequence[Any]]:
        with self._mode:
            whole = [s.detach() if isinstance(s, Tensor) else s for s in self._sides]
            given = cuts.sides_at(place, whole)
            pairs = zip(given, self._sides, strict=True)
            sides = [
                g.detach().requires_grad_(s.requires_grad) if isinstance(g, Tensor) else g
                for g, s in pairs
            ]
            x = at(place, self._x.detach()).clone().requires_grad_(self._x.requires_grad)
        return x, sides

    def _try(self, cuts: Cuts) -> None:
        """Run every form of part once."""
        forms = {tuple((span.dim, span.length) for span in place): place for place in cuts.places}
        for place in forms.values():
            self._shapes(*self._part(cuts, place))

    def _cuts(self, axes: Sequence[_Axis], parts: Sequence[int]) -> Cuts:
        places: list[Place] = [()]
        for axis, count in zip(axes, parts, strict=True):
            spans = list(_spans(axis, self._x.shape[axis.dim], count))
            places = [(*place, span) for place in places for span in spans]
        return Cuts(tuple(places), _by_number({axis.dim: axis.sides for axis in axes}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log of fake tensors, which tells of every error that code raises on a part."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _as_long(side: Any, dim: int, length: int, x: Tensor) -> int | None:
    """Along which of its dimensions a side input may go with dimension `dim` of the stream."""
    if isinstance(side, int) and not isinstance(side, bool):
        return COUNT if side == length else None
    if not isinstance(side, Tensor):
        return None
    own = dim if side.dim() == x.dim() else 0
    return own if side.dim() > own and side.shape[own] == length else None


def _spans(axis: _Axis, size: int, count: int) -> Iterator[Span]:
    """A dimension in `count` parts of whole units, as equal as can be."""
    units, start = size // axis.unit, 0
    for number in range(count):
        length = (units // count + (number < units % count)) * axis.unit
        yield Span(axis.dim, start, length)
        start += length


def _by_number(sides: dict[int, dict[int, int]]) -> tuple[tuple[int, dict[int, int]], ...]:
    """By the number of the side input what was by dimension of the stream."""
    found: dict[int, dict[int, int]] = {}
    for dim, along in sides.items():
        for number, own in along.items():
            found.setdefault(number, {})[dim] = own
    return tuple(found.items())
