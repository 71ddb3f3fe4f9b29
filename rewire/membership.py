"""Which calls of a surveyed run lie outside of the chains, and can be in a stretch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rewire.plans import Chain
from rewire.survey import Visit


def may_begin(visit: Visit) -> bool:
    """Whether what a call is handed stays as it is: it is what a stretch begins with."""
    return all(given.before == given.after == given.late for given in visit.given)


def follows(before: Visit, visit: Visit) -> bool:
    """Whether a call is handed the very result of the one before it."""
    links = [(given.tensor, given.before) for given in visit.given]
    others = [given for given in visit.given if (given.tensor, given.before) != before.result]
    fixed = all(given.before == given.after == given.late for given in others)
    return before.result in links and fixed


class Membership:
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
