"""The bytes that a training step holds from part to part, as a survey foresees them.

A step is taken apart into parts in the order in which they run: stretches that can be
checkpointed, chains, and the code around them. When backward comes to a part, all that the parts
before it keep is there, and all that the part itself needs.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
        need: Bytes that its backward needs besides (a branch's activations, and their gradients).
        branch: Of a home, storages that autograd keeps of its branches.
    """

    visits: tuple[Visit, ...] = ()
    order: list[int] = field(default_factory=list)
    begins: set[int] = field(default_factory=set)
    extra: int = 0
    need: int = 0
    branch: frozenset[int] = frozenset()

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
        self._places = _Places(surveyed.root, chains, refuse, is_free)
        self._streams = {chain.homes[0]: _stream_bytes(chain) for chain in chains}
        adds = {(residual.home, residual.add) for chain in chains for residual in chain}
        self._residuals = Counter(home for home, _ in adds)
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
            stay = part.begins if part.names in checkpointed else part.saved
            below += self._bytes(stay - kept) + part.extra
            kept |= stay
        return found

    def freed(self, part: Part) -> int:
        """Bytes that checkpointing a stretch frees between its forward and its backward."""
        others = [other for other in self.parts if other.names != part.names]
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
            if _may_begin(part.visits[cut]):
                yield [self._stretch(*part.visits[:cut]), self._stretch(*part.visits[cut:])]
        large = max(single, key=lambda one: self._bytes(one.saved))
        before, _, after = _around(part.visits, large.visits[0])
        if not after or _may_begin(after[0]):
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
        weight = max((self._weights.get(s, 0) for s in part.branch), default=0) * weights
        most = there + weight
        sizes = [self.sizes.get(storage, 0) for storage in part.order]
        own = 0
        for storage, size, after in zip(part.order, sizes, _next_sizes(sizes), strict=True):
            there += 0 if storage in met else size
            met.add(storage)
            own = size or own
            weight = self._weights.get(storage, 0) * weights
            most = max(most, there + own + after + weight)
        return most

    # ---- taking apart ----------------------------------------------------------------

    def _parts_of(self, visit: Visit) -> Iterator[Part]:
        """Of a call with a chain in it, or of code around one."""
        if visit.name in self._residuals:
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
            if not self._places.stretchable(event, alone=False):
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
        if self._places.stretchable(visit, alone=True) and _may_begin(visit):
            yield self._stretch(visit)
        else:
            yield from self._parts_of(visit)

    def _ended(self, run: Sequence[Visit]) -> Iterator[Part]:
        """A run of calls as a stretch; what it cannot begin with stands before it."""
        run = list(run)
        while run and not _may_begin(run[0]):
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
        """A home: the calls of its branches are one part, what stands around them others."""
        branch: set[int] = set()
        for event in home.events:
            if isinstance(event, int):
                branch.add(event)
            elif self._places.holds_home(event):
                yield from self._parts_of(event)
            elif self._places.of_branch(event):
                branch.update(_saved(event))
            else:
                yield from self._single(event)
        need = math.ceil(self._bytes(branch) / self._residuals[home.name])
        need += max((self.sizes.get(storage, 0) for storage in branch), default=0)
        extra = 2 * self._streams.pop(home.name, 0)
        yield Part(extra=extra, need=need, branch=frozenset(branch))


def _around(visits: Sequence[Visit], one: Visit) -> tuple[Sequence[Visit], Visit, Sequence[Visit]]:
    at = next(n for n, visit in enumerate(visits) if visit is one)
    return visits[:at], one, visits[at + 1 :]


def _saved(visit: Visit) -> list[int]:
    """Storages that are saved in a call, as they come."""
    found = []
    for event in visit.events:
        found += [event] if isinstance(event, int) else _saved(event)
    return found


def _next_sizes(sizes: Sequence[int]) -> list[int]:
    """For each the size behind it that is not zero; for the last its own."""
    found, after = [], 0
    for size in reversed(sizes):
        found.append(after or size)
        after = size or after
    return found[::-1]


def _may_begin(visit: Visit) -> bool:
    """Whether what a call is handed stays as it is: it is what a stretch begins with."""
    return all(given.before == given.after == given.late for given in visit.given)


def follows(before: Visit, visit: Visit) -> bool:
    """Whether a call is handed the very result of the one before it."""
    links = [(given.tensor, given.before) for given in visit.given]
    others = [given for given in visit.given if (given.tensor, given.before) != before.result]
    fixed = all(given.before == given.after == given.late for given in others)
    return before.result in links and fixed


def _stream_bytes(chain: Chain) -> int:
    return math.prod(chain.shape) * (8 if chain.precision == "float64" else 4)


class _Places:
    """Which calls lie outside of the chains, and can be in a stretch."""

    def __init__(
        self,
        root: Visit,
        chains: Sequence[Chain],
        refuse: Callable[[str], bool],
        is_free: Callable[[str], bool],
    ) -> None:
        residuals = [residual for chain in chains for residual in chain]
        self._is_free = is_free
        self._homes = {residual.home for residual in residuals}
        inside = ((r.home, name) for r in residuals for name in (*r.branch, *r.inlined))
        self._branches = {f"{home}.{name}".lstrip(".") for home, name in inside}
        self._refuse = refuse
        self._parents: dict[str, set[str]] = {}
        self._times: dict[str, int] = {}
        self._bad = self._unfit(root, "", in_branch=False)

    def of_branch(self, visit: Visit) -> bool:
        """Whether a home calls a module in a residual branch.

        Of one without parameters the plan may not tell: in eval mode dropout is nothing.
        """
        return not self.outside(visit) or self._is_free(visit.name)

    def holds_home(self, visit: Visit) -> bool:
        """Whether there is a home inside a call."""
        return any(inner.name in self._homes for inner in visit.inside())

    def outside(self, visit: Visit) -> bool:
        """Whether nothing of a chain is in a call, and none of its module is in a branch."""
        prefix = f"{visit.name}." if visit.name else ""
        apart = not any(f"{home}.".startswith(prefix) for home in self._homes)
        return apart and not any(v.name in self._branches for v in visit.inside())

    def stretchable(self, visit: Visit, *, alone: bool) -> bool:
        """Whether a call can be a stretch's member, beside others or alone."""
        if not (visit.simple and visit.given and self.outside(visit)):
            return False
        if visit.name in self._bad or len(self._parents[visit.name]) > 1:
            return False
        return alone or self._times[visit.name] == 1

    def _unfit(self, visit: Visit, parent: str, *, in_branch: bool) -> set[str]:
        """Names of the modules that cannot be members, whatever their calls look like."""
        self._parents.setdefault(visit.name, set()).add(parent)
        self._times[visit.name] = self._times.get(visit.name, 0) + 1
        in_branch |= visit.name in self._branches
        bad = {visit.name} if in_branch or self._refuse(visit.name) else set()
        return bad.union(*(self._unfit(v, visit.name, in_branch=in_branch) for v in visit.visits))


def stretches(parts: Sequence[Part]) -> Mapping[tuple[str, ...], list[Part]]:
    """Parts that are stretches, by the names of their members."""
    found: dict[tuple[str, ...], list[Part]] = {}
    for part in parts:
        if part.visits:
            found.setdefault(part.names, []).append(part)
    return found
