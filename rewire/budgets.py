"""Rewiring within a budget of memory: as fast as that allows.

For each residual module of the chains backward can reverse it, or keep its input (checkpoint), or
keep the results of its products too (select), or its activations (store); outside of the chains a
stretch is checkpointed or stored; branches can run in parts. None of these changes what is
computed. Backward goes through a step from its end to its beginning, and frees what it has passed:
so what a piece keeps is there while backward is in the pieces behind it, and not while it is in
those before. The fastest choice under such a limit is found piece by piece, from the first to the
last, keeping for every amount of memory the cheapest way to get there. What the pieces take is
learnt by runs on tensors without values; so is the peak of what was chosen, and the choice is made
again until that is within the budget.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from rewire.accounting import Optimizer, optimizer_named, standing
from rewire.costs import Call, Clock, clock_of
from rewire.coupling import Coupling
from rewire.errors import RewireError
from rewire.estimation import place_of_estimate
from rewire.inputs import as_example, without_memory
from rewire.planning import outside_of
from rewire.plans import WAYS, Budget, Plan
from rewire.profiling import TrainingStep
from rewire.rewriting import rewritten
from rewire.sizes import budget_of, human_bytes
from rewire.trials import Heights, Trial, on_trial

# Forward and backward together, as multiples of forward.
_STEP = 3
# What a part more costs, as a share of a step of its branch (measured: benchmarks/README.md).
_PART = 1 / 64
# Twice the parts must lower the peak to this share of it.
_WORTH = 0.97
_LEVELS = 2000
_ROUNDS = 6
# A choice this near to the budget is as good as it gets.
_NEAR = 0.98


def budgeted(
    plan: Plan,
    model: nn.Module,
    budget: str | float,
    example_inputs: Any,
    *,
    device: str | torch.device | None = None,
    optimizer: Optimizer | str | None = torch.optim.Adam,
    exclude: Sequence[str] | str = (),
    coupling: str | Coupling | None = None,
) -> Plan:
    """A plan whose training step stays within a budget of memory, and is as fast as that allows.

    What it computes is what `plan` computes; where that says how many parts its branches run in,
    or what is checkpointed, this is chosen anew. Bytes are estimated as by `rewire.estimate`, time
    is that of each operation alone, measured where the device is here; both in the dtype of the
    parameters and of what is not compiled: under autocast there is more room.

    Args:
        plan: What `rewire.plan` gave.
        model: The model it was made of, not on the meta device. It does not run.
        budget: Bytes of a whole training step, in words ("8GB", "16 GiB") or a number above 1:
            parameters, gradients, the optimizer's state, the inputs, and the most that is
            alive beside these. Or a number from 0 to 1: a share of the activations of the
            original's step at its peak; 0 is the least that there is.
        example_inputs: As for `rewire.plan`, of the size that will be trained on.
        device: "cpu" or "cuda"; that of the parameters where none is given.
        optimizer: Whose state is counted: a class of `torch.optim` or its name, or a function
            that makes one of a list of parameters; None counts none.
        exclude: Globs of modules outside of the chains that are not to be checkpointed.
        coupling: The object, where the plan has the spelling only of one of your own.

    Returns:
        The plan, with `ways` and `chunks` of its chains, what is checkpointed outside of them, and
        in `budget` what was found.

    Raises:
        RewireError: The budget is below the least that there is, or the model's code looks at
            values; the message says by how much, and what to do.

    Example:
        >>> import timm, torch, rewire
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=3)
        >>> images = torch.zeros(2, 3, 224, 224, device="meta")
        >>> plan = rewire.budgeted(rewire.plan(model, images), model, 0.5, images)
        >>> plan.budget.peak_bytes <= plan.budget.limit_bytes
        True
    """
    amount = budget_of(budget)
    example = as_example(example_inputs)
    place = place_of_estimate(model, device)
    step = TrainingStep(model, example.args, example.kwargs)
    maker = optimizer_named(optimizer) if isinstance(optimizer, str) else optimizer
    there = sum(standing(model, step.tensors, maker))
    with on_trial(model, example, place) as trial:
        original = trial.run(counted=True)
    plain = original.peak
    limit = _limit(budget, amount, there, plain)
    rows = outside_of(plan, model, without_memory(example), exclude)
    whole = [replace(chain, ways=(), chunks=1) for chain in plan.chains]
    plan = replace(plan, chains=whole, outside=rows)
    names = [residual.name for residual in plan.modules]
    with on_trial(rewritten(model, plan, coupling, "off"), example, place, names) as trial:
        choice, least = _Search(trial, plan, clock_of(place), original.all).found(limit)
    limit = limit or choice.peak
    if choice.peak > limit:
        raise _too_little(budget, least, plain, there)
    found = Budget(
        str(budget),
        limit,
        choice.peak,
        plain,
        there,
        choice.time,
        least.peak,
        least.time,
    )
    return replace(choice.applied(plan), budget=found)


def _limit(budget: str | float, amount: float, there: int, plain: int) -> int | None:
    """Bytes that a step may take at its peak, beside what stands; None: as few as there are."""
    if amount <= 1:
        return int(amount * plain) or None
    if amount <= there:
        raise RewireError(
            f"budget={budget!r}: parameters, gradients, optimizer state and inputs alone take "
            f"{human_bytes(there)}, and activations come on top. Give more, or freeze parameters, "
            "or take an optimizer with less state (`--optimizer`; in Python `optimizer=` of "
            "rewire.budgeted)."
        )
    return int(amount) - there


def _too_little(budget: str | float, least: Choice, plain: int, there: int) -> RewireError:
    """The error for a budget that nothing comes down to."""
    parts = max(least.chunks.values())
    cut = f", branches in up to {parts} parts," if parts > 1 else ""
    share = math.ceil(1000 * least.peak / max(1, plain)) / 1000
    return RewireError(
        f"budget={budget!r}: with everything reversed{cut} a step takes {human_bytes(least.peak)} "
        f"(the original's: {human_bytes(plain)}), beside {human_bytes(there)} of parameters, "
        f"gradients, optimizer state and inputs. Give budget={share}, or "
        f"{human_bytes(1.001 * (least.peak + there))}, or train on less at once: a smaller batch, "
        "shorter or smaller inputs."
    )


# ---- pieces ------------------------------------------------------------------------------


class Option(NamedTuple):
    """One way to run a piece.

    Attributes:
        way: "reverse", "checkpoint", "select" or "store".
        kept: Bytes that are there behind it, more than if it were reversed.
        beside: The same behind a piece that is stored, and has kept a part of these already.
        cost: What backward runs again, in time.
    """

    way: str
    kept: int
    beside: int
    cost: float


@dataclass(frozen=True)
class Piece:
    """A residual module, or a stretch outside of the chains.

    Attributes:
        name: Of the module, or of the stretch's first one.
        height: Most bytes while backward is in it and all others are reversed.
        options: The ways to run it.
    """

    name: str
    height: int
    options: tuple[Option, ...]


class _Label(NamedTuple):
    """How the first pieces are run, one after the other, to keep so many bytes."""

    kept: int
    cost: float
    way: str = ""
    before: _Label | None = None

    def ways(self) -> Iterator[str]:
        """Those of the pieces, the last first."""
        label = self
        while label.before is not None:
            yield label.way
            label = label.before


def cheapest(pieces: Sequence[Piece], end: int, limit: int) -> dict[str, str] | None:
    """The ways of all pieces that cost the least such that no height is above a limit.

    Amounts of memory that differ by less than a two-thousandth of the limit are one: of these
    the cheapest and the smallest are kept.

    Args:
        pieces: In the order in which they run.
        end: Height before backward comes to the last of them.
        limit: In bytes.

    Returns:
        A way for each name, or None where there are none.
    """
    quantum = max(1, limit // _LEVELS)
    labels = {False: [_Label(0, 0.0)], True: list[_Label]()}
    for piece in pieces:
        found: dict[bool, dict[int, list[_Label]]] = {False: {}, True: {}}
        for after_stored, some in labels.items():
            for label in some:
                if label.kept + piece.height > limit:
                    continue
                for option in piece.options:
                    kept = label.kept + (option.beside if after_stored else option.kept)
                    made = _Label(kept, label.cost + option.cost, option.way, label)
                    row = found[option.way == "store"].setdefault(kept // quantum, [made, made])
                    row[0] = min(row[0], made, key=lambda one: (one.cost, one.kept))
                    row[1] = min(row[1], made, key=lambda one: (one.kept, one.cost))
        labels = {
            stored: _undominated(itertools.chain(*rows.values())) for stored, rows in found.items()
        }
    fit = [label for some in labels.values() for label in some if label.kept + end <= limit]
    if not fit:
        return None
    best = min(fit, key=lambda label: (label.cost, label.kept))
    return dict(zip((piece.name for piece in reversed(pieces)), best.ways(), strict=True))


def _undominated(labels: Iterable[_Label]) -> list[_Label]:
    """Those that no other beats in memory and time both."""
    best: list[_Label] = []
    for label in sorted(labels, key=lambda one: (one.kept, one.cost)):
        if not best or label.cost < best[-1].cost:
            best.append(label)
    return best


# ---- searching ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """How a step is run, and what it takes.

    Attributes:
        ways: Of each piece.
        chunks: Of each chain.
        peak: Of the step, in bytes.
        time: Of the step, as a multiple of the original's.
    """

    ways: Mapping[str, str]
    chunks: Mapping[str, int]
    peak: int
    time: float

    def applied(self, plan: Plan) -> Plan:
        """A plan that runs so."""
        chains = []
        for chain in plan.chains:
            ways = tuple(self.ways.get(residual.name, "reverse") for residual in chain)
            said = ways if set(ways) != {"reverse"} else ()
            chains.append(replace(chain, ways=said, chunks=self.chunks[chain.name]))
        rows = [row for row in plan.outside if self.ways.get(row.modules[0]) != "store"]
        return replace(plan, chains=chains, outside=tuple(rows))


class _Search:
    """Looks for the fastest choice within a limit.

    Args:
        trial: The rewired model.
        plan: Its plan, with all the stretches that can be checkpointed.
        clock: Tells what operations cost.
        original: The operations of the original's step.
    """

    def __init__(self, trial: Trial, plan: Plan, clock: Clock, original: Mapping[Call, int]):
        self._trial, self._plan, self._clock = trial, plan, clock
        rows = plan.outside
        self._stretches = {row.modules[0]: row.saved_bytes - row.kept_bytes for row in rows}
        self._streams = trial.streams()
        self._runs = {way: self._uniform(way) for way in WAYS}
        self._cut = {(1,) * len(plan.chains): self._runs["reverse"]}
        clock.measure(itertools.chain(original, *(run.all for run in self._runs.values())))
        self._original = clock.cost(original)
        # What rewiring costs where nothing runs again: the arithmetic of the streams.
        self._coupling = clock.cost(self._runs["store"].all) - self._original

    def _uniform(self, way: str) -> Heights:
        """A run in which all pieces go one way; those inside of others are reversed."""
        modules = self._trial.modules - self._trial.inner
        self._choose(dict.fromkeys([*modules, *self._stretches], way))
        return self._trial.run(counted=True)

    def found(self, limit: int | None) -> tuple[Choice, Choice]:
        """The fastest choice within a limit (None: the least that there is), and the least."""
        chunks = self._parts(limit)
        pieces, end = self._pieces(chunks)
        ways = {piece.name: piece.options[0].way for piece in pieces}
        least = self._choice(pieces, ways, chunks, self._reversed(chunks).peak)
        limit = limit or least.peak
        if least.peak > limit:
            return least, least
        return self._refined(least, pieces, end, limit), least

    def _parts(self, limit: int | None) -> dict[str, int]:
        """Into how many parts the branches of each chain are cut, where all are reversed.

        As few as a limit allows; where there is none, as many as lower the peak.
        """
        chunks = dict.fromkeys((chain.name for chain in self._plan.chains), 1)
        peak = self._reversed(chunks).peak
        while limit is None or peak > limit:
            more = {name: 2 * parts for name, parts in chunks.items()}
            lower = self._reversed(more).peak
            if lower > _WORTH * peak and (limit is None or lower > limit):
                break
            chunks, peak = more, lower
        for name in chunks:
            fewer = {**chunks, name: 1}
            if len(chunks) > 1 and fewer != chunks:
                higher = self._reversed(fewer).peak
                if higher <= (peak if limit is None else limit):
                    chunks, peak = fewer, higher
        return chunks

    def _refined(self, least: Choice, pieces: Sequence[Piece], end: int, limit: int) -> Choice:
        """The fastest choice whose own peak is within a limit, which the least is."""
        target, best = limit, least
        tried: dict[tuple[str, ...], Choice] = {}
        for _ in range(_ROUNDS):
            ways = cheapest(pieces, end, target)
            if ways is None:
                break
            key = tuple(ways.values())
            seen = key in tried
            choice = tried[key] = tried.get(key) or self._tried(pieces, ways, least.chunks)
            if choice.peak > limit:
                target -= max(choice.peak - limit, limit // 50)
                continue
            best = min(best, choice, key=lambda one: one.time)
            if seen or choice.peak >= _NEAR * limit:
                break
            target += limit - choice.peak
        return best

    def _tried(
        self, pieces: Sequence[Piece], ways: Mapping[str, str], chunks: Mapping[str, int]
    ) -> Choice:
        """A choice, run."""
        self._choose(ways, chunks)
        return self._choice(pieces, ways, chunks, self._trial.run().peak)

    def _choice(
        self,
        pieces: Sequence[Piece],
        ways: Mapping[str, str],
        chunks: Mapping[str, int],
        peak: int,
    ) -> Choice:
        """A choice with its time."""
        again = sum(
            option.cost
            for piece in pieces
            for option in piece.options
            if option.way == ways[piece.name]
        )
        share = (again + self._coupling) / max(self._original, 1e-9)
        return Choice(ways, chunks, peak, 1 + share)

    def _pieces(self, chunks: Mapping[str, int]) -> tuple[list[Piece], int]:
        """All pieces, in the order in which they run, and the height behind them."""
        heights = self._reversed(chunks)
        chains = self._plan.chains
        parts = {residual.name: chunks[chain.name] for chain in chains for residual in chain}
        pieces = []
        for name in heights.forward:
            options = self._options(name, parts.get(name))
            pieces.append(Piece(name, heights.backward.get(name, 0), tuple(options)))
        return pieces, heights.end

    def _options(self, name: str, parts: int | None) -> Iterator[Option]:
        """The ways to run a piece, the least memory first.

        Args:
            name: Of it.
            parts: Into how many its branch is cut; None: it is no residual module.
        """
        cost = {way: self._clock.cost(run.again[name]) for way, run in self._runs.items()}
        if parts is None:
            freed = self._stretches[name]
            yield Option("checkpoint", 0, 0, cost["checkpoint"])
            yield Option("store", freed, freed, 0)
            return
        cut = _STEP * cost["reverse"] * parts * _PART if parts > 1 else 0
        yield Option("reverse", 0, 0, cost["reverse"] + cut)
        if name not in self._trial.inner:
            stream = self._streams.get(name, 0)
            selected = self._runs["select"].forward[name]  # with the branch's result, which goes
            stored = self._runs["store"].forward[name]
            yield Option("checkpoint", stream, 0, cost["checkpoint"] + cut)
            yield Option("select", selected, max(0, selected - stream), cost["select"] + cut)
            yield Option("store", stored + stream, stored, 0)

    def _reversed(self, chunks: Mapping[str, int]) -> Heights:
        """The heights with all reversed, in so many parts."""
        parts = tuple(chunks.values())
        if parts not in self._cut:
            self._choose({}, chunks)
            self._trial.run()  # how branches are cut is found once
            self._cut[parts] = self._trial.run()
        return self._cut[parts]

    def _choose(self, ways: Mapping[str, str], chunks: Mapping[str, int] | None = None) -> None:
        stored = [name for name in self._stretches if ways.get(name) == "store"]
        self._trial.choose(ways, chunks or {}, stored)
