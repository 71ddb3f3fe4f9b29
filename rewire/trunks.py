"""What stands on the trunk between two residual sums, and whether a chain goes on over it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

from rewire.dataflow import Watched
from rewire.drafts import Draft, start
from rewire.residuals import Found, trunk_kind


def link(
    watched: Watched,
    draft: Draft,
    drafts: dict[int, Draft],
    trunk: str,
    lost: Mapping[tuple[str, bool], str],
) -> None:
    """Decide whether a residual module goes on from the one whose sum is its skip.

    Args:
        watched: The run.
        draft: The residual module.
        drafts: All of them, by their adds.
        trunk: As for `rewire.plan`.
        lost: Why a link that looked right is none, by `CannotLink.link`.
    """
    found = draft.found
    previous = drafts.get(found.previous.add) if found.previous else None
    if previous is None:
        draft.kind, draft.cut = _why_first(watched, found)
        start(draft)
        return
    norm = _norm_on(watched, previous.found, found.trunk)
    head_norm = [] if norm else _norm_at_head(watched, found, previous.found)
    norm = norm or head_norm
    zones = _zones(watched, found, previous.found, norm)
    same_home = previous.found.home == found.home
    obstacle = _obstacle(watched, found, zones)
    reason = lost.get((draft.residual.name, False), "")
    reason = reason or ("" if same_home else lost.get((previous.residual.name, True), ""))
    obstacle = ("trunk", reason) if reason else obstacle
    if obstacle:
        draft.kind, draft.cut = obstacle
        start(draft)
        return
    kinds = {kind for part in zones.values() for kind in part}
    head = "elementwise" in zones["head"] and not (trunk == "inside" and same_home)
    tail = "elementwise" in zones["tail"]
    draft.residual = replace(
        draft.residual,
        entry="home" if same_home else "outside",
        trunk="activation" if "elementwise" in kinds else "view" if "view" in kinds else "identity",
        head=head,
        head_norm=bool(head_norm),
    )
    previous.residual = replace(
        previous.residual,
        tail=previous.residual.tail or tail,
        norm=previous.residual.norm or (bool(norm) and not head_norm),
        leads=previous.residual.leads or not same_home,
    )
    draft.previous = previous
    previous.followers.append(draft)


def _zones(
    watched: Watched, found: Found, previous: Found, norm: Sequence[int]
) -> dict[str, list[str]]:
    """Kinds of the operations between two sums but for a norm on the first, by whose code."""
    zones: dict[str, list[str]] = {"tail": [], "between": [], "head": []}
    for node in found.trunk[len(norm) :]:
        path = watched.path(node)
        zone = "head" if found.home in path else "tail" if previous.home in path else "between"
        zones[zone].append(trunk_kind(watched, node))
    return zones


def _obstacle(
    watched: Watched, found: Found, zones: dict[str, list[str]]
) -> tuple[str, str] | None:
    """What on the trunk keeps two modules from being one chain: a kind, and in words."""
    kinds = [kind for zone in zones.values() for kind in zone]
    if "norm" in kinds:
        return "post-norm", "a normalisation stands between them, not alone behind the first sum"
    if "elementwise" in zones["between"] or "cast" in kinds:
        return (
            "trunk",
            "an activation, scale, cast or copy stands between the two modules, in neither's code",
        )
    if zones["tail"] != sorted(zones["tail"]) or zones["head"] != sorted(zones["head"])[::-1]:
        return "trunk", "views and activations alternate on the trunk"
    views = [node for node in found.trunk if trunk_kind(watched, node) == "view"]
    if any(node > found.fork for node in views):
        return "trunk", "the branch starts before a view of its skip"
    return None


# ---- normalisations on the trunk -----------------------------------------------------------


def _norm_on(watched: Watched, found: Found, following: Sequence[int]) -> list[int]:
    """The operations up to the normalisation that a home calls on its sum, first of `following`.

    Views of the sum, then one call of a child that normalises and does nothing else but views
    and casts, or the operation itself in the home's own code. Nothing else reads the sum.
    """
    start = 0
    callers = [_caller(watched, found, node) for node in following]
    while start < len(callers) and callers[start] == ("op", following[start]):
        if trunk_kind(watched, following[start]) != "view":
            break
        start += 1
    pairs = zip(following, callers, strict=True)
    group = [node for node, caller in pairs if callers[start:][:1] == [caller]]
    kinds = [trunk_kind(watched, node) for node in group]
    if kinds.count("norm") != 1 or not set(kinds) <= {"norm", "view", "cast"}:
        return []
    way = list(following[: start + len(group)])
    own = all(found.home in watched.path(node) for node in way)
    read = all(
        set(watched.graph.successors(a)) == {b}
        for a, b in itertools.pairwise([found.add, *way[: start + 1]])
    )
    return way if way[start:] == group and own and read else []


def _norm_at_head(watched: Watched, found: Found, previous: Found) -> list[int]:
    """The operations from the sum before to the normalisation with which a home's code begins.

    Nothing but views of the sum stands before it, and nothing else reads the sum.
    """
    kinds = [trunk_kind(watched, node) for node in found.trunk]
    if kinds.count("norm") != 1:
        return []
    way = list(found.trunk[: kinds.index("norm") + 1])
    inside = found.home in watched.path(way[-1]) and previous.home not in watched.path(way[-1])
    views = all(kind == "view" for kind in kinds[: len(way) - 1])
    pairs = itertools.pairwise([previous.add, *way])
    read = all(set(watched.graph.successors(a)) == {b} for a, b in pairs)
    return way if inside and views and read else []


def _caller(watched: Watched, found: Found, node: int) -> tuple[str, int]:
    """The child of a home in whose call an operation runs, or the operation itself."""
    path = watched.path(node)
    depth = path.index(found.home) + 1 if found.home in path else len(path)
    return ("call", path[depth]) if len(path) > depth else ("op", node)


def end_with_norm(watched: Watched, draft: Draft) -> None:
    """Have a chain of post-norm modules end with the norm on its last sum, if there is one."""
    found, way = draft.found, []
    node = found.add
    while len(users := list(watched.graph.successors(node))) == 1:
        node = users[0]
        if trunk_kind(watched, node) not in ("view", "cast", "norm"):
            break
        way.append(node)
    if _norm_on(watched, found, way):
        draft.residual = replace(draft.residual, norm=True)


# ---- starts ------------------------------------------------------------------------------


def _why_first(watched: Watched, found: Found) -> tuple[str, str]:
    """Why no residual sum leads to this skip."""
    if found.previous is not None:
        before = watched.module(found.previous.add) or "the model"
        return "neighbour", f"{before} before it is left alone"
    stop = found.stop
    if stop is None:
        return "first", "nothing residual comes before it"
    op = watched.ops[stop]
    where = watched.module(stop) or "the model"
    if trunk_kind(watched, stop) == "norm" or _is_norm(watched, stop):
        return "post-norm", f"{op.name} in {where} stands on the trunk before it"
    return "first", f"its skip is the result of {op.name} in {where}"


def _is_norm(watched: Watched, stop: int) -> bool:
    """A normalisation spelled out in Python: a scaled value times its inverse deviation."""
    module = watched.ops[stop].scope
    names = {op.name for op in watched.ops[max(0, stop - 12) : stop + 1] if op.scope == module}
    return bool({"rsqrt", "sqrt"} & names) and bool({"mean", "var"} & names)
