"""Residual modules of one block taken together: attention and MLP as F(x) = block(x) - x."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

from rewire.dataflow import Watched
from rewire.drafts import Draft, ranks_of, relative
from rewire.plans import Residual
from rewire.residuals import common_prefix


def blocks(watched: Watched, drafts: list[Draft], apart: Collection[str]) -> list[list[Draft]]:
    """Modules of one block together, e.g. attention and MLP; else each by itself.

    A block is the module call, as far up as can be, that holds each of its residual modules
    once. One that runs the same code again is a stack of blocks.
    """
    paths = [watched.calls[draft.found.home].path for draft in drafts]
    depth = len(common_prefix(paths))
    while depth < max(map(len, paths)):
        parts = [path[depth] if len(path) > depth else None for path in paths]
        pairs = zip(drafts, parts, strict=True)
        groups = [list(group) for _, group in itertools.groupby(pairs, key=lambda pair: pair[1])]
        wheres = [[draft.residual.where for draft, _ in group] for group in groups]
        if len(groups) > 1 and all(len(set(lines)) == len(lines) for lines in wheres):
            return [
                part
                for group in groups
                for part in _together([draft for draft, _ in group], group[0][1], watched, apart)
            ]
        depth += 1
    return [[draft] for draft in drafts]


def _together(
    drafts: list[Draft], call: int | None, watched: Watched, apart: Collection[str]
) -> list[list[Draft]]:
    if call is None or len(drafts) == 1 or watched.calls[call].name in apart:
        return [[draft] for draft in drafts]
    return [drafts]


def as_one(watched: Watched, drafts: list[Draft]) -> Residual:
    """The residual modules of a block as one: from the first skip to the last sum."""
    first, last = drafts[0], drafts[-1]
    if len(drafts) == 1:
        return first.residual
    home = common_prefix([watched.calls[draft.found.home].path for draft in drafts])[-1]
    depth = len(watched.calls[home].path)
    inlined = tuple(watched.path(last.found.add)[depth:])
    ranks = ranks_of(watched, home, inlined)
    name = watched.calls[home].name
    below = [watched.path(node)[depth:] for d in drafts for node in sorted(d.found.branch)]
    children = (path[0] for path in below if path and path[0] not in inlined)
    branch = (relative(watched.calls[child].name, name) for child in children)
    return replace(
        last.residual,
        name=name or "(model)",
        home=name,
        add=ranks[last.found.add],
        skip=(),
        inlined=tuple(relative(watched.calls[c].name, name) for c in inlined),
        adds=len(ranks),
        trunk=first.residual.trunk,
        entry="fork" if first.residual.entry == "fork" else "outside",
        head=False,
        head_norm=False,
        block=True,
        branch=tuple(dict.fromkeys(branch)),
    )
