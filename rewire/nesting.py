"""Chains inside the branches of other chains: which of them are rewired."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rewire.dataflow import Watched
from rewire.drafts import Draft, cut_off, parts_of, skip
from rewire.plans import Skipped

Chain = list[Draft]


def separate(watched: Watched, chains: list[Chain], skipped: list[Skipped]) -> list[Chain]:
    """Chains none of which stands in a branch of another, in the order in which they run.

    A residual module whose branch holds chains (a whole U-Net under its skip) can be rewired
    itself: then all of its branch is alive when it is rebuilt. Or the chains in it are, and what
    else is in the branch is stored. What takes less memory is done.

    Args:
        watched: The run.
        chains: Some of them inside of others.
        skipped: Gets the modules that are left alone.
    """
    todo, kept = list(chains), []
    while todo:
        outer = max(todo, key=lambda chain: len(_branches(chain)))
        todo.remove(outer)
        within = {draft: [c for c in todo if _inside(c, draft)] for draft in outer}
        holders = {draft: cs for draft, cs in within.items() if any(len(c) > 1 for c in cs)}
        if len(outer) > 1 and _cheaper_inside(watched, holders):
            skipped += [skip(d, "nested", "its branch holds chains itself") for d in holders]
            todo += [cut_off(part) for part in parts_of(outer, holders)]
            continue
        kept.append(outer)
        if len(outer) == 1:
            continue
        where = outer[0].residual.name
        detail = f"it is inside the branch of a residual module of the chain at {where}"
        for chain in [chain for inner in within.values() for chain in inner]:
            todo.remove(chain)
            skipped += [skip(draft, "nested", detail) for draft in chain]
    return sorted(kept, key=lambda chain: chain[0].found.add)


def _cheaper_inside(watched: Watched, holders: dict[Draft, list[Chain]]) -> bool:
    """Whether what would be stored around the chains inside is less than one branch at once."""
    if not holders:
        return False
    whole = {draft: _size(watched, draft.found.branch) for draft in holders}
    inside = sum(
        _size(watched, _branches(d for chain in chains if len(chain) > 1 for d in chain))
        for chains in holders.values()
    )
    return sum(whole.values()) - inside < max(whole.values())


def _inside(chain: Chain, outer: Draft) -> bool:
    return chain[0].found.add in outer.found.branch


def _branches(drafts: Iterable[Draft]) -> frozenset[int]:
    return frozenset().union(*(draft.found.branch for draft in drafts))


def _size(watched: Watched, nodes: frozenset[int]) -> int:
    """Elements that operations make."""
    ops = (watched.ops[node] for node in nodes)
    return sum(math.prod(op.shape) for op in ops if not op.view)
