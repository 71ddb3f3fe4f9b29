"""Residual adds on their way into a plan: their names, their places in their homes' code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from rewire.dataflow import Watched
from rewire.plans import Residual, Skipped
from rewire.residuals import Found, is_addition, trunk_kind


@dataclass(eq=False)
class Draft:
    """A residual add on its way into a plan."""

    found: Found
    residual: Residual
    previous: Draft | None = None
    cut: str = ""  # why the chain does not come from before
    kind: str = ""  # the same in one word
    followers: list[Draft] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int]:
        """The same for each run of the same code."""
        return self.residual.home, self.residual.add


def name_residuals(watched: Watched, found: Sequence[Found]) -> list[Draft]:
    """Each residual add as a `Residual`, named after the child that does most of its work."""
    by_home: dict[int, list[Found]] = {}
    for one in found:
        by_home.setdefault(one.home, []).append(one)
    drafts: list[Draft] = []
    named: dict[tuple[str, int], str] = {}
    for home, residuals in by_home.items():
        inlined = _inlined(watched, home, residuals)
        ranks = ranks_of(watched, home, inlined)
        for one in residuals:
            residual = _residual(watched, one, inlined, ranks)
            key = residual.home, residual.add
            taken = [name for other, name in named.items() if other != key]
            if residual.name in taken:
                residual = replace(residual, name=f"{residual.name}#{residual.add}")
            named[key] = residual.name
            drafts.append(Draft(one, residual))
    return sorted(drafts, key=lambda draft: draft.found.add)


def _inlined(watched: Watched, home: int, residuals: Sequence[Found]) -> tuple[int, ...]:
    """Calls between a home and the code that runs its adds, or both norm and activation of one."""
    depth = len(watched.calls[home].path)
    nodes = [node for one in residuals for node in (*one.adds, *_fused(watched, one))]
    return tuple(sorted({call for node in nodes for call in watched.path(node)[depth:]}))


def _fused(watched: Watched, found: Found) -> list[int]:
    """Operations on the trunk in calls, inside the home, that normalise and activate."""
    kinds: dict[int, set[str]] = {}
    own = [node for node in found.trunk if found.home in watched.path(node)]
    for node in own:
        kinds.setdefault(watched.ops[node].scope, set()).add(trunk_kind(watched, node))
    return [node for node in own if {"norm", "elementwise"} <= kinds[watched.ops[node].scope]]


def ranks_of(watched: Watched, home: int, inlined: tuple[int, ...]) -> dict[int, int]:
    """The number of each tensor add in the code of a home and its inlined children."""
    ops = watched.ops
    nodes = sorted(node for call in {home, *inlined} for node in watched.adds.get(call, ()))
    return {node: rank for rank, node in enumerate(n for n in nodes if is_addition(ops[n], ops))}


def _residual(
    watched: Watched, one: Found, inlined: tuple[int, ...], ranks: dict[int, int]
) -> Residual:
    home = watched.calls[one.home]
    depth = len(home.path)
    below = [watched.path(node)[depth:] for node in sorted(one.branch)]
    children = [path[0] for path in below if path and path[0] not in inlined]
    branch = tuple(dict.fromkeys(relative(watched.calls[c].name, home.name) for c in children))
    name = home.name
    if children:
        child, count = Counter(children).most_common(1)[0]
        name = watched.calls[child].name if 2 * count > len(children) else name
    return Residual(
        name=name or "(model)",
        home=home.name,
        where=watched.ops[one.add].line,
        add=ranks[one.add],
        skip=one.skip,
        inlined=tuple(relative(watched.calls[c].name, home.name) for c in inlined),
        adds=len(ranks),
        branch=branch,
    )


def relative(name: str, home: str) -> str:
    """A qualified name as its home sees it."""
    return name[len(home) + 1 :] if home else name


def foreign_code(watched: Watched, draft: Draft, found: Sequence[Found]) -> Skipped | None:
    """A residual module whose add is in another home's code, where these cannot be one."""
    depth = len(watched.calls[draft.found.home].path)
    inside = {call for add in draft.found.adds for call in watched.path(add)[depth:]}
    for other in found if inside else ():
        if other.home in inside:
            detail = f"its add is in the code of {watched.calls[other.home].name}, a home as well"
            return skip(draft, "shared code", detail)
    return None


def start(draft: Draft) -> None:
    """Note that a residual module starts its chain: what stands before its fork is not its own."""
    head = any(node > draft.found.fork for node in draft.found.trunk)
    draft.residual = replace(draft.residual, entry="fork", head=head, head_norm=False)


def cut_off(chain: list[Draft]) -> list[Draft]:
    """A chain whose first module starts it and whose last ends it, whatever stands around."""
    first = chain[0]
    if first.residual.entry != "fork":
        start(first)
        first.kind = first.kind or "fork"
        first.cut = first.cut or "the chain of the sum before it goes another way"
    chain[-1].residual = replace(chain[-1].residual, tail=False, leads=False)
    return chain


def parts_of(chain: list[Draft], without: Container[Draft]) -> list[list[Draft]]:
    """What remains of a chain, piece by piece."""
    parts: list[list[Draft]] = [[]]
    for draft in chain:
        if draft in without:
            parts.append([])
        else:
            parts[-1].append(draft)
    return [part for part in parts if part]


def skip(draft: Draft, reason: str, detail: str) -> Skipped:
    """A draft as a module that is left alone."""
    return Skipped(draft.residual.name, draft.residual.where, reason, detail)
