"""Cuts of a stream: the parts that a branch is run on one after the other.

The activations of one branch are the peak of a reversible network's memory. A branch that works
on parts of its input independently (a sample, a token, a window) gives the same run part by part,
and then only one part's activations are there at a time. `rewire.cutting` finds which branches
may be cut, and along what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Chunks = int | str


class Span(NamedTuple):
    """A stretch of one dimension."""

    dim: int
    start: int
    length: int


Place = tuple[Span, ...]
ALL: Place = ()


COUNT = -1
"""In place of a dimension: the side input is a number, how many indices there are."""


@dataclass(frozen=True)
class Cuts:
    """How a branch is run part by part.

    Attributes:
        places: The parts of the stream, in the order in which they run.
        sides: By number of the side input: by dimension of the stream its own, or `COUNT`.
    """

    places: tuple[Place, ...]
    sides: tuple[tuple[int, dict[int, int]], ...] = ()

    def sides_at(self, place: Place, sides: Sequence[Any]) -> Sequence[Any]:
        """The side inputs of one part."""
        if not self.sides:
            return sides
        cut = list(sides)
        for number, dims in self.sides:
            for span in place:
                own = dims.get(span.dim)
                if own == COUNT:
                    cut[number] = span.length
                elif own is not None:
                    cut[number] = cut[number].narrow(own, span.start, span.length)
        return cut


class Found(NamedTuple):
    """How a branch is cut, or why not.

    Attributes:
        cuts: The parts.
        axes: Of the stream's dimensions those along which it is cut, with the number of parts.
        saved_bytes: What the whole branch saves for backward.
        reason: Why it is not cut, or not further.
    """

    cuts: Cuts
    axes: tuple[tuple[int, int], ...]
    saved_bytes: int
    reason: str


UNCUT = Cuts((ALL,))


def checked(chunks: Chunks) -> Chunks:
    """`chunks`, where it is what `make_reversible` takes.

    Raises:
        ValueError: It is not.
    """
    whole = isinstance(chunks, int) and not isinstance(chunks, bool)
    if chunks == "auto" or (whole and int(chunks) >= 1):
        return chunks
    raise ValueError(f"chunks={chunks!r}; choose 'auto' or a number of parts from 1 on.")


def dense(x: Tensor) -> Tensor:
    """`x` with every element its own and no gaps between them: streams are laid out so."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def view_at(place: Place, stream: Tensor) -> Tensor:
    """The part of a stream that is at a place: a view."""
    for span in place:
        stream = stream.narrow(*span)
    return stream


def at(place: Place, stream: Tensor) -> Tensor:
    """The part of a stream that is at a place: a view where that lies in one piece, else a copy."""
    return stream if place is ALL else dense(view_at(place, stream))


def at_broadcast(place: Place, value: Any, dims: int) -> Any:
    """The part of a number or of a tensor that broadcasts to a stream of `dims` dimensions."""
    if not isinstance(value, Tensor):
        return value
    for dim, start, length in place:
        own = dim - dims + value.dim()
        if own >= 0 and value.shape[own] > 1:
            value = value.narrow(own, start, length)
    return value


def joined(cuts: Cuts, parts: Sequence[Tensor], stream: Tensor) -> Tensor:
    """What a branch gives, from what it gives for each part; laid out as the stream is."""
    if cuts is UNCUT:
        return parts[0]
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        whole: Tensor = _Joined.apply(cuts.places, stream.detach(), *parts)
        return whole
    return _put_together(cuts.places, stream, parts)


def _put_together(places: Sequence[Place], stream: Tensor, parts: Sequence[Tensor]) -> Tensor:
    whole = torch.empty_like(stream, dtype=parts[0].dtype)
    for place, part in zip(places, parts, strict=True):
        view_at(place, whole).copy_(part)
    return whole


class _Joined(torch.autograd.Function):
    """Parts put together; the gradient is handed to each as a view."""

    @staticmethod
    def forward(ctx: Any, places: Sequence[Place], stream: Tensor, *parts: Tensor) -> Tensor:
        ctx.places = places
        return _put_together(places, stream, parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(view_at(place, gradient) for place in ctx.places)


def add_up_in_place(part: Tensor, inputs: Sequence[Any]) -> None:
    """Have autograd add the gradients that the parts give for one parameter in one place.

    The engine adds in place only to what is no view. The gradient of a transposed weight is one,
    and two parts' and their sum would be there at a time.

    Args:
        part: What the branch gave for one part.
        inputs: What it was handed, whose past is not its own.
    """
    todo = [part.grad_fn]
    seen = {x.grad_fn for x in inputs if isinstance(x, Tensor)} | {None}
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [after for after, _ in node.next_functions]
        todo += following
        if any(after is not None and not after.next_functions for after in following):
            node.register_hook(_as_no_view)


def _as_no_view(gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...] | None:
    if torch.is_grad_enabled():  # a graph is made of this backward
        return None
    return tuple(g.detach() if isinstance(g, Tensor) and g._is_view() else g for g in gradients)
