"""From residual adds to chains: which sums are skips of which, and what cuts a chain."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from rewire.plans import Chain, Residual, Skipped
from rewire.residuals import Found, common_prefix, is_addition, trunk_kind
from rewire.watching import Watched

_MOST = 0.5  # a chain nested in a branch is kept instead of it from this share of its operations


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


def draft_chains(
    watched: Watched,
    found: Sequence[Found],
    keep: Callable[[Residual], Skipped | None],
    trunk: str,
    apart: Collection[str] | None,
) -> tuple[list[Chain], list[Skipped]]:
    """Chains of the residual adds that `keep` has nothing against, and the adds left alone.

    Args:
        watched: The run.
        found: Its residual adds.
        keep: Why a residual module is left alone, or None.
        trunk: As for `rewire.plan`.
        apart: Blocks that cannot be one residual module as a whole; None: none shall be.
    """
    skipped: list[Skipped] = []
    drafts: dict[int, Draft] = {}
    for draft in name_residuals(watched, found):
        refusal = keep(draft.residual) or _foreign_code(watched, draft, found)
        if refusal is None:
            drafts[draft.found.add] = draft
        elif refusal not in skipped:
            skipped.append(refusal)
    for draft in drafts.values():
        _link(watched, draft, drafts, trunk)
    chains = _nesting(_distinct(_longest(list(drafts.values()))), skipped)
    plan = []
    for chain in chains:
        if len(chain) > 1:
            plan.append(_finished(watched, chain, trunk, apart))
        else:
            skipped.append(_too_short(chain[0]))
    return _uniquely_named(plan), list(dict.fromkeys(skipped))


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a qualified name, or a module above it, matches one of the globs."""
    parts = name.split(".")
    above = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(fnmatchcase(part, glob) for glob in globs for part in above)


# ---- names -------------------------------------------------------------------------------


def name_residuals(watched: Watched, found: Sequence[Found]) -> list[Draft]:
    """Each residual add as a `Residual`, named after the child that does most of its work."""
    by_home: dict[int, list[Found]] = {}
    for one in found:
        by_home.setdefault(one.home, []).append(one)
    drafts: list[Draft] = []
    named: dict[tuple[str, int], str] = {}
    for home, residuals in by_home.items():
        inlined = _inlined(watched, home, residuals)
        ranks = _ranks(watched, home, inlined)
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
    """Calls between a home and the code that runs its adds."""
    depth = len(watched.calls[home].path)
    return tuple(
        sorted(
            {call for one in residuals for add in one.adds for call in watched.path(add)[depth:]}
        )
    )


def _ranks(watched: Watched, home: int, inlined: tuple[int, ...]) -> dict[int, int]:
    """The number of each tensor add in the code of a home and its inlined children."""
    scopes = {home, *inlined}
    ops = watched.ops
    adds = [n for n, op in enumerate(ops) if op.scope in scopes and is_addition(op, ops)]
    return {node: rank for rank, node in enumerate(adds)}


def _residual(
    watched: Watched, one: Found, inlined: tuple[int, ...], ranks: dict[int, int]
) -> Residual:
    home = watched.calls[one.home]
    depth = len(home.path)
    below = [watched.path(node)[depth:] for node in sorted(one.branch)]
    children = [path[0] for path in below if path and path[0] not in inlined]
    branch = tuple(dict.fromkeys(_relative(watched.calls[c].name, home.name) for c in children))
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
        inlined=tuple(_relative(watched.calls[c].name, home.name) for c in inlined),
        adds=len(ranks),
        branch=branch,
    )


def _relative(name: str, home: str) -> str:
    return name[len(home) + 1 :] if home else name


def _foreign_code(watched: Watched, draft: Draft, found: Sequence[Found]) -> Skipped | None:
    """A home whose code is read as part of another home's cannot be rewired by itself."""
    for other in found:
        if other.home == draft.found.home:
            continue
        depth = len(watched.calls[other.home].path)
        if any(draft.found.home in watched.path(add)[depth:] for add in other.adds):
            name = watched.calls[other.home].name
            detail = f"its module's code holds an add of {name or 'the model'} too"
            return _skip(draft, "shared code", detail)
    return None


# ---- links -------------------------------------------------------------------------------


def _link(watched: Watched, draft: Draft, drafts: dict[int, Draft], trunk: str) -> None:
    """Decide whether a residual module goes on from the one whose sum is its skip."""
    found = draft.found
    previous = drafts.get(found.previous.add) if found.previous else None
    if previous is None:
        draft.kind, draft.cut = _why_first(watched, found)
        _start(watched, draft)
        return
    norm = _norm_on(watched, previous.found, found.trunk)
    zones = _zones(watched, found, previous.found, norm)
    obstacle = _obstacle(watched, found, zones)
    if obstacle:
        draft.kind, draft.cut = obstacle
        _start(watched, draft)
        return
    same_home = previous.found.home == found.home
    kinds = {kind for part in zones.values() for kind in part}
    head = "elementwise" in zones["head"] and not (trunk == "inside" and same_home)
    tail = "elementwise" in zones["tail"]
    draft.residual = replace(
        draft.residual,
        entry="home" if same_home else "outside",
        trunk="activation" if "elementwise" in kinds else "view" if "view" in kinds else "identity",
        head=head,
    )
    previous.residual = replace(
        previous.residual,
        tail=previous.residual.tail or tail,
        norm=previous.residual.norm or bool(norm),
        leads=previous.residual.leads or not same_home,
    )
    draft.previous = previous
    previous.followers.append(draft)


def _start(watched: Watched, draft: Draft) -> None:
    """Note how a residual module starts its chain."""
    found = draft.found
    head = any(node > found.fork for node in found.trunk)
    draft.residual = replace(draft.residual, entry="fork", head=head)


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


def _caller(watched: Watched, found: Found, node: int) -> tuple[str, int]:
    """The child of a home in whose call an operation runs, or the operation itself."""
    path = watched.path(node)
    depth = path.index(found.home) + 1 if found.home in path else len(path)
    return ("call", path[depth]) if len(path) > depth else ("op", node)


def _last_norm(watched: Watched, draft: Draft) -> Draft:
    """A chain of post-norm modules ends with the norm on its last sum."""
    found, way = draft.found, []
    node = found.add
    while len(users := list(watched.graph.successors(node))) == 1:
        node = users[0]
        if trunk_kind(watched, node) not in ("view", "cast", "norm"):
            break
        way.append(node)
    if _norm_on(watched, found, way):
        draft.residual = replace(draft.residual, norm=True)
    return draft


def _why_first(watched: Watched, found: Found) -> tuple[str, str]:
    """Why no residual sum leads to this skip."""
    if found.previous is not None:
        return "neighbour", f"{watched.module(found.previous.add)} before it is left alone"
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
    return "rsqrt" in names and bool({"mean", "var"} & names)


# ---- chains ------------------------------------------------------------------------------


def _longest(drafts: list[Draft]) -> list[list[Draft]]:
    """Chains, each sum followed by the module from which most modules come."""
    for draft in drafts:  # not into the branch of a module that itself goes on from the sum
        inside = frozenset().union(*(other.found.branch for other in draft.followers))
        draft.followers = [f for f in draft.followers if f.found.add not in inside]
    length: dict[Draft, int] = {}
    for draft in reversed(drafts):
        length[draft] = 1 + max((length[f] for f in draft.followers), default=0)
    chains, done = [], set()
    for draft in drafts:
        chain = []
        node: Draft | None = draft
        while node is not None and node not in done:
            done.add(node)
            chain.append(node)
            node = max(node.followers, key=length.__getitem__, default=None)
        if chain:
            chains.append(_cut(chain))
    return chains


def _cut(chain: list[Draft]) -> list[Draft]:
    """A chain whose first module starts it, whatever came before."""
    first = chain[0]
    if first.residual.entry != "fork":
        head = any(node > first.found.fork for node in first.found.trunk)
        first.residual = replace(first.residual, entry="fork", head=head)
        first.kind = first.kind or "fork"
        first.cut = first.cut or "another chain goes on from the sum before it"
    if chain[-1].residual.tail:
        chain[-1].residual = replace(chain[-1].residual, tail=False)
    return chain


def _distinct(chains: list[list[Draft]]) -> list[list[Draft]]:
    """Each module in one chain only: a model that calls modules twice repeats its chains."""
    kept: list[list[Draft]] = []
    owner: dict[tuple[str, int], int] = {}
    for chain in sorted(chains, key=len, reverse=True):
        if any(draft.key in owner for draft in chain):
            continue
        owner.update({draft.key: len(kept) for draft in chain})
        kept.append(chain)
    return sorted(kept, key=lambda chain: chain[0].found.add)


def _nesting(chains: list[list[Draft]], skipped: list[Skipped]) -> list[list[Draft]]:
    """Of a chain and the chains inside its branches, keep those that do most of the work."""
    dropped: set[int] = set()
    for outer in sorted(chains, key=lambda chain: chain[0].found.add):
        if len(outer) < 2 or id(outer) in dropped:
            continue
        inside = frozenset().union(*(draft.found.branch for draft in outer))
        inner = [c for c in chains if c is not outer and c[0].found.add in inside]
        long = [c for c in inner if len(c) > 1]
        work = (
            frozenset().union(*(d.found.branch for c in long for d in c)) if long else frozenset()
        )
        where = outer[0].residual.name
        if len(work) > _MOST * len(inside):
            dropped.add(id(outer))
            skipped += [_skip(d, "nested", "its branch is mostly chains itself") for d in outer]
        else:
            dropped.update(map(id, inner))
            detail = f"it is inside the branch of a residual module of the chain at {where}"
            skipped += [_skip(d, "nested", detail) for c in inner for d in c]
    return [chain for chain in chains if id(chain) not in dropped]


def _finished(
    watched: Watched, drafts: list[Draft], trunk: str, apart: Collection[str] | None
) -> Chain:
    if drafts[-2].residual.norm:
        _last_norm(watched, drafts[-1])
    each = [[draft] for draft in drafts]
    groups = each if apart is None else _blocks(watched, drafts, apart)
    modules = _unified([_as_one(watched, group) for group in groups])
    taps = []
    for draft, following in ((a[-1], b[0]) for a, b in itertools.pairwise(groups)):
        own = {*following.found.branch, *following.found.adds, *following.found.trunk}
        values = {draft.found.add, *following.found.trunk}
        users = {user for value in values for user in watched.graph.successors(value)}
        if users - own or values & watched.results:
            taps.append(draft.residual.name)
    shape = watched.ops[drafts[0].found.add].shape
    inside = trunk == "inside"
    return Chain(
        name=_common([module.home for module in modules]),
        modules=modules,
        shape=shape,
        trunk="inside" if inside else "identity",
        taps=tuple(dict.fromkeys(taps)),
    )


def _blocks(watched: Watched, drafts: list[Draft], apart: Collection[str]) -> list[list[Draft]]:
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


def _as_one(watched: Watched, drafts: list[Draft]) -> Residual:
    """The residual modules of a block as one: from the first skip to the last sum."""
    first, last = drafts[0], drafts[-1]
    if len(drafts) == 1:
        return first.residual
    home = common_prefix([watched.calls[draft.found.home].path for draft in drafts])[-1]
    depth = len(watched.calls[home].path)
    inlined = tuple(watched.path(last.found.add)[depth:])
    ranks = _ranks(watched, home, inlined)
    name = watched.calls[home].name
    below = [watched.path(node)[depth:] for d in drafts for node in sorted(d.found.branch)]
    children = (path[0] for path in below if path and path[0] not in inlined)
    branch = (_relative(watched.calls[child].name, name) for child in children)
    return replace(
        last.residual,
        name=name or "(model)",
        home=name,
        add=ranks[last.found.add],
        skip=(),
        inlined=tuple(_relative(watched.calls[c].name, name) for c in inlined),
        adds=len(ranks),
        trunk=first.residual.trunk,
        entry="fork" if first.residual.entry == "fork" else "outside",
        head=False,
        block=True,
        branch=tuple(dict.fromkeys(branch)),
    )


def _unified(modules: list[Residual]) -> tuple[Residual, ...]:
    """Places of a chain that share their code (one home run several times) share its form."""
    forms: dict[tuple[str, int], Residual] = {}
    for module in modules:
        form = forms.setdefault((module.home, module.add), module)
        forms[module.home, module.add] = replace(
            module if form.entry == "fork" else form,
            name=form.name,
            head=form.head or module.head,
            tail=form.tail or module.tail,
            leads=form.leads or module.leads,
        )
    return tuple(forms[module.home, module.add] for module in modules)


def _common(names: list[str]) -> str:
    """The qualified name that all names begin with."""
    return ".".join(common_prefix([name.split(".") for name in names]))


def _uniquely_named(chains: list[Chain]) -> list[Chain]:
    """Chains under one parent are told apart by the homes where they begin and end."""
    counts = Counter(chain.name for chain in chains)
    seen: Counter[str] = Counter()
    named = []
    for chain in chains:
        if counts[chain.name] > 1:
            seen[chain.name] += 1
            chain = replace(chain, name=f"{chain.name or 'chain'}#{seen[chain.name]}")
        named.append(chain)
    return named


def _too_short(draft: Draft) -> Skipped:
    reason = "post-norm" if draft.kind == "post-norm" else "too short"
    return _skip(draft, reason, f"a chain of one ({draft.cut})")


def _skip(draft: Draft, reason: str, detail: str) -> Skipped:
    return Skipped(draft.residual.name, draft.residual.where, reason, detail)
