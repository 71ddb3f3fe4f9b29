"""The bytes that a training step holds from part to part, as a survey foresees them.

A step is taken apart into parts in the order in which they run: stretches that can be
checkpointed, chains, and the code around them. When backward comes to a part, all that the parts
before it keep is there, and all that the part itself needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rewire.membership import Membership, follows, may_begin
from rewire.plans import Chain
from rewire.survey import Survey, Visit


@dataclass(eq=False)
class Part:
    """A part of a step.

    Attributes:
        visits: Of a stretch, the calls that are its members.
        order: Storages that autograd keeps of it, as they come; one may come again.
        begins: Storages that it begins with, which are kept if it is checkpointed.
        extra: Bytes that it keeps besides (a chain's streams).
        need: Bytes that its backward needs besides (the gradient of the older stream).
        rebuilt: It is a residual branch of a chain: nothing of it is kept.
        result: Bytes of what it gives, where that is known.
    """

    visits: tuple[Visit, ...] = ()
    order: list[int] = field(default_factory=list)
    begins: set[int] = field(default_factory=set)
    extra: int = 0
    need: int = 0
    rebuilt: bool = False
    result: int = 0

    @cached_property
    def saved(self) -> set[int]:
        """Storages that autograd keeps of it."""
        return set(self.order)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of its members: what a stretch is told by."""
        return tuple(visit.name for visit in self.visits)

    @cached_property
    def operations(self) -> int:
        """What running it again takes."""
        return sum(inner.operations for visit in self.visits for inner in visit.inside())


class Timeline:
    """The parts of one step, and what they hold.

    Args:
        surveyed: The run.
        chains: The chains of the plan.
        refuse: Whether a module of this name is to be left as it is.
        is_free: Whether a module of this name has no parameters.
    """

    def __init__(
        self,
        surveyed: Survey,
        chains: Sequence[Chain],
        refuse: Callable[[str], bool],
        is_free: Callable[[str], bool],
    ) -> None:
        self.sizes, self._weights = surveyed.sizes, surveyed.weights
        self._members = Membership(surveyed.root, chains, refuse, is_free)
        self._streams = {home: _stream_bytes(chain) for chain in chains for home in chain.homes}
        self._firsts = {chain.homes[0] for chain in chains}
        self._owners = {
            f"{residual.home}.{name}".lstrip("."): residual.add
            for chain in chains
            for residual in chain
            for name in residual.branch
        }
        self.parts = list(self._parts_of(surveyed.root))

    def peak(self, checkpointed: Collection[tuple[str, ...]], *, weights: bool = False) -> int:
        """Most bytes that are there at once in backward.

        Args:
            checkpointed: Names of the stretches whose activations are not stored.
            weights: Count the gradient of a weight before it is added to what is there. It does
                not grow with the batch.
        """
        return self.highest(checkpointed, weights=weights)[0]

    def highest(
        self, checkpointed: Collection[tuple[str, ...]], *, weights: bool = False
    ) -> tuple[int, Part]:
        """The same, with the part in whose backward it is."""
        kept: set[int] = set()
        below, found = 0, (0, self.parts[0])
        for part in self.parts:
            there = below + self._inside(part, kept, weights)
            found = max(found, (there, part), key=lambda row: row[0])
            dropped = part.rebuilt or part.names in checkpointed
            stay = part.begins if dropped else part.saved
            below += self._bytes(stay - kept) + part.extra
            kept |= stay
        return found

    def freed(self, part: Part) -> int:
        """Bytes that checkpointing a stretch frees between its forward and its backward."""
        others = [one for one in self.parts if one.names != part.names and not one.rebuilt]
        elsewhere = set().union(*(other.saved | other.begins for other in others))
        return self._bytes(part.saved - part.begins - elsewhere)

    def saved_bytes(self, part: Part) -> int:
        """Bytes that autograd keeps of a part."""
        return self._bytes(part.saved)

    def opened(self, part: Part) -> Iterator[list[Part]]:
        """Ways to put several parts in the place of a stretch."""
        single = [self._stretch(visit) for visit in part.visits]
        if len(single) == 1:
            yield from self._opened_call(part.visits[0])
            return
        for cut in range(1, len(part.visits)):
            if may_begin(part.visits[cut]):
                yield [self._stretch(*part.visits[:cut]), self._stretch(*part.visits[cut:])]
        large = max(single, key=lambda one: self._bytes(one.saved))
        before, _, after = _around(part.visits, large.visits[0])
        if not after or may_begin(after[0]):
            inner = self._parts_inside(large.visits[0])
            sides = [[self._stretch(*some)] if some else [] for some in (before, after)]
            yield [*sides[0], *inner, *sides[1]]

    def _opened_call(self, visit: Visit) -> Iterator[list[Part]]:
        """The parts of a call's own code; then with the largest of them taken apart as well."""
        inner = list(self._parts_inside(visit))
        yield inner
        largest = max(inner, key=lambda part: self._bytes(part.saved), default=Part())
        for ways in self.opened(largest) if largest.visits else ():
            yield [one for part in inner for one in (ways if part is largest else [part])]

    def _bytes(self, storages: Collection[int]) -> int:
        return sum(self.sizes.get(storage, 0) for storage in storages)

    def _inside(self, part: Part, kept: set[int], weights: bool) -> int:
        """Most bytes of a part's own while backward is in it.

        Backward goes from what was saved last to what was saved first. At each there are what was
        saved before it, its own gradient, that of what was saved next, and perhaps a weight's.
        """
        there = self._bytes(part.begins - kept) + part.need
        met = kept | part.begins
        most = there
        sizes = [self.sizes.get(storage, 0) for storage in part.order]
        own = 0
        for storage, size, after in zip(
            part.order, sizes, _next_sizes(sizes, part.result), strict=True
        ):
            there += 0 if storage in met else size
            met.add(storage)
            own = size or own
            weight = self._weights.get(storage, 0) * weights
            most = max(most, there + own + after + weight)
        return most

    # ---- taking apart ----------------------------------------------------------------

    def _parts_of(self, visit: Visit) -> Iterator[Part]:
        """Of a call with a chain in it, or of code around one."""
        if visit.name in self._streams:
            yield from self._home(visit)
        else:
            yield from self._parts_inside(visit)

    def _parts_inside(self, visit: Visit) -> Iterator[Part]:
        """The parts of a call's own code: runs of calls, and what lies between them."""
        run: list[Visit] = []
        own = Part()
        for event in visit.events:
            if isinstance(event, int):
                own.order.append(event)
                continue
            if own.order:
                yield own
                own = Part()
            if not self._members.stretchable(event, alone=False):
                yield from self._ended(run)
                run = []
                yield from self._single(event)
            elif run and follows(run[-1], event):
                run.append(event)
            else:
                yield from self._ended(run)
                run = [event]
        yield from self._ended(run)
        if own.order:
            yield own

    def _single(self, visit: Visit) -> Iterator[Part]:
        if self._members.stretchable(visit, alone=True) and may_begin(visit):
            yield self._stretch(visit)
        else:
            yield from self._parts_of(visit)

    def _ended(self, run: Sequence[Visit]) -> Iterator[Part]:
        """A run of calls as a stretch; what it cannot begin with stands before it."""
        run = list(run)
        while run and not may_begin(run[0]):
            yield Part(order=_saved(run.pop(0)))
        if run:
            yield self._stretch(*run)

    def _stretch(self, *visits: Visit) -> Part:
        order = [storage for visit in visits for storage in _saved(visit)]
        begins = {given.storage for given in visits[0].given}
        for before, visit in itertools.pairwise(visits):
            linked = before.result and before.result[0]
            begins |= {given.storage for given in visit.given if given.tensor != linked}
        return Part(visits, order, begins)

    def _home(self, home: Visit) -> Iterator[Part]:
        """A home: what stands around its branches, and a part for each branch."""
        branches: list[list[int]] = [[]]
        owner: int | None = None
        for event in home.events:
            if isinstance(event, int):
                branches[-1].append(event)
            elif self._members.holds_home(event):
                yield from self._parts_of(event)
            elif self._members.of_branch(event):
                found = self._owners.get(event.name)
                if found is not None and owner is not None and found != owner:
                    branches.append([])
                owner = owner if found is None else found
                branches[-1] += _saved(event)
            else:
                yield from self._single(event)
        stream = self._streams.get(home.name, 0)
        for branch in branches:
            extra = 2 * stream if home.name in self._firsts else 0
            self._firsts.discard(home.name)
            yield Part((), branch, set(), extra, stream, rebuilt=True, result=stream)


def _around(visits: Sequence[Visit], one: Visit) -> tuple[Sequence[Visit], Visit, Sequence[Visit]]:
    at = next(n for n, visit in enumerate(visits) if visit is one)
    return visits[:at], one, visits[at + 1 :]


def _saved(visit: Visit) -> list[int]:
    """Storages that are saved in a call, as they come."""
    found = []
    for event in visit.events:
        found += [event] if isinstance(event, int) else _saved(event)
    return found


def _next_sizes(sizes: Sequence[int], last: int) -> list[int]:
    """For each the size behind it that is not zero; for the last this, or its own."""
    found, after = [], last
    for size in reversed(sizes):
        found.append(after or size)
        after = size or after
    return found[::-1]


def _stream_bytes(chain: Chain) -> int:
    return math.prod(chain.shape) * (8 if chain.precision == "float64" else 4)


def stretches(parts: Sequence[Part]) -> Mapping[tuple[str, ...], list[Part]]:
    """Parts that are stretches, by the names of their members."""
    found: dict[tuple[str, ...], list[Part]] = {}
    for part in parts:
        if part.visits:
            found.setdefault(part.names, []).append(part)
    return found
