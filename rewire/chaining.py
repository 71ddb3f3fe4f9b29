"""From residual adds to chains: which sums are skips of which, and what cuts a chain."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from rewire.blocks import as_one, blocks
from rewire.dataflow import Watched
from rewire.drafts import Draft, cut_off, foreign_code, name_residuals, parts_of, skip
from rewire.nesting import separate
from rewire.plans import Chain, Residual, Skipped
from rewire.residuals import Found, common_prefix, share_code
from rewire.trunks import end_with_norm, link


def draft_chains(
    watched: Watched,
    found: Sequence[Found],
    keep: Callable[[Residual], Skipped | None],
    trunk: str,
    apart: Collection[str] | None,
    lost: Mapping[tuple[str, bool], str],
    alone: Collection[str],
) -> tuple[list[Chain], list[Skipped]]:
    """Chains of the residual adds that `keep` has nothing against, and the adds left alone.

    Args:
        watched: The run.
        found: Its residual adds.
        keep: Why a residual module is left alone, or None.
        trunk: As for `rewire.plan`.
        apart: Blocks that cannot be one residual module as a whole; None: none shall be.
        lost: Links that do not hold, as for `rewire.trunks.link`.
        alone: Homes that cannot take in others whose code is part of theirs.
    """
    share_code(watched, found, alone)
    skipped: list[Skipped] = []
    drafts: dict[int, Draft] = {}
    for draft in name_residuals(watched, found):
        refusal = keep(draft.residual) or foreign_code(watched, draft, found)
        if refusal is None:
            drafts[draft.found.add] = draft
        elif refusal not in skipped:
            skipped.append(refusal)
    for draft in drafts.values():
        link(watched, draft, drafts, trunk, lost)
    chains = _distinct(_longest(list(drafts.values())))
    chains = separate(watched, chains, skipped)
    plan = []
    for chain in chains:
        if len(chain) > 1:
            plan.append(_finished(watched, chain, trunk, apart))
        else:
            skipped.append(_too_short(chain[0]))
    return _uniquely_named(plan), list(dict.fromkeys(skipped))


def lost_in_training(
    watched: Watched, found: Sequence[Found], trained: Watched, also: Sequence[Found], trunk: str
) -> dict[tuple[str, bool], str]:
    """Links between homes that hold in eval mode only: dropout stands there, in nobody's code.

    Args:
        watched: A run in eval mode.
        found: Its residual adds.
        trained: One in train mode; layers that it dropped say nothing.
        also: Its residual adds.
        trunk: As for `rewire.plan`.

    Returns:
        As `draft_chains` takes them.
    """
    for run, adds in ((watched, found), (trained, also)):
        share_code(run, adds, ())
    there = _linked(watched, found, trunk)
    then = _linked(trained, also, trunk)
    only_then = [
        name
        for name, draft in there.items()
        if draft.residual.entry == "outside"
        and draft.residual.trunk != "activation"
        and name in then
        and then[name].found.previous is None
    ]
    why = "in train mode or with another batch more stands between them, in neither's code"
    return {(name, False): why for name in only_then}


def _linked(watched: Watched, found: Sequence[Found], trunk: str) -> dict[str, Draft]:
    drafts = {draft.found.add: draft for draft in name_residuals(watched, found)}
    for draft in drafts.values():
        link(watched, draft, drafts, trunk, {})
    return {draft.residual.name: draft for draft in drafts.values()}


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
            chains.append(cut_off(chain))
    return chains


def _distinct(chains: list[list[Draft]]) -> list[list[Draft]]:
    """Each module in one chain only, the longest: others go on before and behind it.

    A model that calls modules twice repeats its chains; two streams may share a module.
    """
    kept: list[list[Draft]] = []
    owned: set[tuple[str, int]] = set()
    for chain in sorted(chains, key=len, reverse=True):
        shared = [draft for draft in chain if draft.key in owned]
        kept += [cut_off(part) if shared else part for part in parts_of(chain, shared)]
        owned.update(draft.key for draft in chain)
    return sorted(kept, key=lambda chain: chain[0].found.add)


def _finished(
    watched: Watched, drafts: list[Draft], trunk: str, apart: Collection[str] | None
) -> Chain:
    if drafts[-2].residual.norm:
        end_with_norm(watched, drafts[-1])
    each = [[draft] for draft in drafts]
    groups = each if apart is None else blocks(watched, drafts, apart)
    modules = _unified([as_one(watched, group) for group in groups])
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
        start=drafts[0].cut,
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
    return skip(draft, reason, f"a chain of one ({draft.cut})")
