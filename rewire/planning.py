"""Planning: which residual modules of a model will be rewired, decided before anything changes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from rewire.chaining import draft_chains, lost_in_training
from rewire.coupling import Coupling, coupling_from
from rewire.cuts import Chunks, checked
from rewire.dataflow import Call, Watched
from rewire.drafts import name_residuals
from rewire.errors import CannotLink, CannotTrace, RewireError
from rewire.extraction import Program, extract, forms_of
from rewire.inputs import Example, as_example, example_for, one_more, without_memory
from rewire.isolation import own_surroundings, training_mode
from rewire.links import PRECISIONS
from rewire.outside import CHOICES, checkpointed
from rewire.plans import Chain, Checkpointed, Plan, Residual, Skipped
from rewire.replay import uncached_autocast
from rewire.residuals import Found, find_residuals
from rewire.stretches import unfit
from rewire.structure import flatten
from rewire.tracing import CodeRaised, trace_home
from rewire.watching import watch, watch_training

TRUNKS = ("identity", "inside")
GRANULARITIES = ("module", "block")


def plan(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    coupling: str | Coupling = "re2",
    precision: str = "exact",
    chunks: Chunks = 1,
    granularity: str = "module",
    trunk: str = "identity",
    outside: str = "store",
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
) -> Plan:
    """Find the reversible chains of a model; nothing is changed.

    One run on fake tensors is watched, residual adds are found by dominance in its dataflow
    graph, and each module that owns one is traced by itself, in eval and in train mode.

    Args:
        model: Any module. Its training flags, buffers, hooks and gradients stay as they are, and
            so do the random generators.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword
            arguments; on the meta device they take no memory, and zeros stand for them. May
            be left out for models that take an image, a video, or token ids.
            Nothing of it (batch, size, dtype, device) is burned in.
        coupling: As for `rewire.make_reversible`.
        precision: As for `rewire.make_reversible`.
        chunks: As for `rewire.make_reversible`. Which branches can be cut, and along what, is
            found when they run; `rewire.parts` tells it.
        granularity: "module": attention and MLP are two residual modules. "block": a whole block
            is one, F(x) = block(x) - x: nearer to the original, with larger branches.
        trunk: What happens to an activation after an add: "identity" keeps the function of each
            module exactly, "inside" moves it into the branch (Re2TAL's form for ResNets).
        outside: What happens to activations outside of the chains (stem, downsampling, first
            blocks of stages, head): "store" keeps them as always, "checkpoint" computes them
            again in backward where that lowers the peak of a step. Which these are follows from
            the bytes of one more run, in train mode; see `rewire.outside`.
        include: Globs of qualified names of residual modules or modules above them; others are
            left alone.
        exclude: Globs of those to be left alone, and of modules not to be checkpointed.

    Raises:
        CannotTrace: The model does not run on the example, or no example was found.

    Example:
        >>> import torchvision, rewire
        >>> [len(chain) for chain in rewire.plan(torchvision.models.resnet50()).chains]
        [2, 3, 5, 2]
    """
    _check_choices(trunk=trunk, granularity=granularity, precision=precision, outside=outside)
    example = example_for(model) if example_inputs is None else as_example(example_inputs)
    example = without_memory(example)
    globs = _Globs(_tuple(include), _tuple(exclude))
    with uncached_autocast():
        watched = watch(model, example.args, example.kwargs)
        trained = _trained(model, example)
    found, skipped = find_residuals(watched)
    others = {call.name for call in watched.calls} if outside == "checkpoint" else set()
    _check_globs(watched, found, globs.include)
    _check_globs(watched, found, globs.exclude, others)
    lost = {}
    if trained is not None:
        lost = lost_in_training(watched, found, trained, find_residuals(trained)[0], trunk)
    runs = watched, trained
    chains, left = _traceable(model, runs, found, globs, trunk, granularity, lost)
    plan = Plan(
        model=type(model).__qualname__,
        chains=chains,
        skipped=[*left, *dict.fromkeys(skipped)],
        inputs=example.description,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    plan = coupled(plan, coupling, precision, chunks)
    if outside == "store" or not chains:
        return plan
    return replace(plan, outside=outside_of(plan, model, example, exclude))


def outside_of(
    plan: Plan, model: nn.Module, example: Example, exclude: Sequence[str] | str
) -> tuple[Checkpointed, ...]:
    """What pays to be checkpointed outside of a plan's chains, but for what globs exclude."""
    globs = _tuple(exclude)

    def refuse(name: str, module: nn.Module) -> bool:
        return _matches(name, globs) or bool(unfit(module))

    return checkpointed(model, example, plan.chains, refuse)


def _trained(model: nn.Module, example: Example) -> Watched | None:
    """A run in train mode with one sample more, where a view may be none: of one it often is."""
    with suppress(Exception):  # an object among the arguments cannot be copied
        _, larger = one_more(example)
        watched = watch_training(model, larger.args, larger.kwargs)
        if watched is not None:
            return watched
    return watch_training(model, example.args, example.kwargs)


def coupled(
    plan: Plan,
    coupling: str | Coupling | None,
    precision: str | None,
    chunks: Chunks | None = None,
) -> Plan:
    """A plan with another coupling, precision or number of parts; None leaves what it has."""
    found = None if coupling is None else coupling_from(coupling)
    changed: dict[str, Any] = {} if precision is None else {"precision": precision}
    if chunks is not None:
        changed["chunks"] = checked(chunks)
    if found is not None:
        changed |= {"coupling": str(found), "bits": found.bits}
    chains = [replace(chain, **changed) for chain in plan.chains]
    for chain in chains:
        if chain.norms and chain.precision == "fast":
            raise RewireError(
                f"chain {chain.name or '(model)'}: {chain.norms} normalisations stand on its "
                'trunk, and precision="fast" cannot undo them (safe: 0). Use precision="exact".'
            )
    return replace(plan, chains=chains)


def _check_choices(**given: str) -> None:
    known = {"trunk": TRUNKS, "granularity": GRANULARITIES, "precision": PRECISIONS}
    known["outside"] = CHOICES
    for what, choice in given.items():
        if choice not in known[what]:
            choices = ", ".join(map(repr, known[what]))
            raise ValueError(f"{what}={choice!r}; choose one of {choices}.")


def _traceable(
    model: nn.Module,
    runs: tuple[Watched, Watched | None],
    found: Sequence[Found],
    globs: _Globs,
    trunk: str,
    granularity: str,
    lost: dict[tuple[str, bool], str],
) -> tuple[list[Chain], list[Skipped]]:
    """Chains whose homes can all be traced and cut, and the adds left alone.

    A home that cannot is left alone, and the chains are made anew without it; a block that
    cannot be one residual module falls apart into its modules first, and a link that does not
    hold in the code cuts the chain.
    """
    watched, obstacles = runs[0], _Obstacles(links=lost)

    def keep(residual: Residual) -> Skipped | None:
        if not globs.choose(residual):
            return Skipped(residual.name, residual.where, "excluded", "left out on request")
        if detail := obstacles.homes.get(residual.home):
            return Skipped(residual.name, residual.where, "cannot trace", detail)
        return None

    while True:
        blocks = obstacles.blocks if granularity == "block" else None
        known = obstacles.links, obstacles.alone
        chains, left = draft_chains(watched, found, keep, trunk, blocks, *known)
        failures = _outermost(_failures(model, *runs, chains))
        if not failures:
            return chains, left
        whole = {r.home for chain in chains for r in chain if r.block}
        shared = {watched.calls[one.home].name for one in found if one.home != one.lowest}
        obstacles.note(failures, whole, shared)


@dataclass
class _Obstacles:
    """What the code of a model turned out not to allow.

    Attributes:
        homes: Why a home is left alone.
        blocks: Those that cannot be one residual module as a whole.
        alone: Those that cannot take in others whose code is part of theirs.
        links: Why a sum is not the skip of the next residual module, by `CannotLink.link`.
    """

    homes: dict[str, str] = field(default_factory=dict)
    blocks: set[str] = field(default_factory=set)
    alone: set[str] = field(default_factory=set)
    links: dict[tuple[str, bool], str] = field(default_factory=dict)

    def note(
        self, failures: Mapping[str, CannotTrace], whole: Collection[str], shared: set[str]
    ) -> None:
        """Of a home that fails: the block that it is, the link that does not hold, or itself.

        Args:
            failures: Why they fail.
            whole: Homes that are blocks.
            shared: Homes that have taken others in.
        """
        for home, error in failures.items():
            if home in whole:
                self.blocks.add(home)
            elif isinstance(error, CannotLink) and error.link not in self.links:
                self.links[error.link] = str(error)
            elif home in shared - self.alone:
                self.alone.add(home)
            else:
                self.homes[home] = f"{home or 'the model'}: {error}"


# ---- globs -------------------------------------------------------------------------------


class _Globs(NamedTuple):
    """Which residual modules the user wants."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def choose(self, residual: Residual) -> bool:
        """Whether a residual module is to be rewired."""
        names = residual.name, residual.home
        out = any(_matches(name, self.exclude) for name in names)
        return not out and (not self.include or any(_matches(n, self.include) for n in names))


def _tuple(value: Sequence[str] | str) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a qualified name, or a module above it, matches one of the globs."""
    parts = name.split(".")
    above = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(fnmatchcase(part, glob) for glob in globs for part in above)


def _check_globs(
    watched: Watched, found: Sequence[Found], globs: Sequence[str], others: Collection[str] = ()
) -> None:
    """A glob that matches nothing, no other module either, is a slip of the pen."""
    drafts = name_residuals(watched, found)
    names = {name for d in drafts for name in (d.residual.name, d.residual.home)}.union(others)
    for glob in globs:
        if not any(_matches(name, [glob]) for name in names):
            near = difflib.get_close_matches(glob, sorted(names), 3, 0) or ["none"]
            raise RewireError(
                f"{glob!r} matches no residual module (near it: {', '.join(near)}). Names are "
                "listed by `rewire inspect`."
            )


# ---- homes -------------------------------------------------------------------------------


def modules_by_home(chains: Sequence[Chain]) -> dict[str, list[Residual]]:
    """The residual modules of each home, in the order of its code."""
    homes: dict[str, dict[int, Residual]] = {}
    for chain in chains:
        for residual in chain:
            homes.setdefault(residual.home, {})[residual.add] = residual
    return {home: [rows[add] for add in sorted(rows)] for home, rows in homes.items()}


def inner_homes(home: str, homes: Mapping[str, Any]) -> tuple[str, ...]:
    """Names, relative to a home, of the homes among its children."""
    prefix = f"{home}." if home else ""
    return tuple(name[len(prefix) :] for name in homes if name != home and name.startswith(prefix))


def trunk_of(chains: Sequence[Chain]) -> dict[str, str]:
    """The trunk form of each home's chains."""
    return {residual.home: chain.trunk for chain in chains for residual in chain}


def _failures(
    model: nn.Module, watched: Watched, trained: Watched | None, chains: Sequence[Chain]
) -> dict[str, CannotTrace]:
    """Homes that cannot be traced and cut in eval or in train mode, with the reasons."""
    homes = modules_by_home(chains)
    trunks = trunk_of(chains)
    runs = [(run, _distinct_calls(run)) for run in (watched, trained or watched)]
    failures: dict[str, CannotTrace] = {}
    for home, residuals in homes.items():
        module = model.get_submodule(home)
        try:
            for training, (run, calls) in enumerate(runs):
                if home not in calls:  # layer drop
                    run, calls = runs[0]
                for call in calls[home]:
                    program = partial(
                        program_for,
                        module,
                        call.arguments,
                        residuals,
                        inner_homes(home, homes),
                        trunks[home],
                        run.fake_mode,
                        lend=True,
                    )
                    with training_mode(module, bool(training)), torch.enable_grad():
                        _check_traceable(program)
        except CannotTrace as error:
            failures[home] = error
    return failures


def _distinct_calls(watched: Watched) -> dict[str, list[Call]]:
    """The calls of each module that differ in more than the values of tensors."""
    calls: dict[str, dict[Any, Call]] = {}
    for call in watched.calls:
        leaves, spec = flatten(call.arguments)
        calls.setdefault(call.name, {}).setdefault((spec, forms_of(leaves)), call)
    return {name: list(found.values()) for name, found in calls.items()}


def _outermost(failures: Mapping[str, CannotTrace]) -> dict[str, CannotTrace]:
    """Those of failing homes that are in no other: without these the others may do."""
    inside = {name for home in failures for name in inner_homes(home, failures)}
    return {home: why for home, why in failures.items() if home not in inside}


def _check_traceable(trace: Callable[..., Program]) -> None:
    """Raise unless a home can be traced and cut, whatever the tensors it asks about answer."""
    program = trace()
    for answers in program.others():
        try:
            other = trace(answers=answers, in_part=True)
        except CodeRaised:
            continue  # `assert x.isfinite().all()`: so it will where the answer is that
        if missing := program.lacks(other, len(answers)):
            raise CannotTrace(
                f"it decides by the values of a tensor whether to go on with {sorted(missing)[0]}, "
                "which is computed inside a residual branch"
            )


def program_for(
    home: nn.Module,
    arguments: Any,
    residuals: Sequence[Residual],
    inner: Sequence[str],
    trunk: str,
    mode: Any,
    forward: Any = None,
    answers: Sequence[bool] = (),
    lend: bool = False,
    in_part: bool = False,
) -> Program:
    """Trace a home and cut it at its residual adds; arguments as for `trace_home` and `extract`.

    Raises:
        CannotTrace: With the reason.
    """
    if "_orig_mod" in home._modules:
        raise CannotTrace("it is compiled: rewire the model first, then compile")
    if "forward" in vars(home):
        raise CannotTrace("its forward is replaced on the instance")
    for name in residuals[0].inlined:
        child = home.get_submodule(name)
        if child._forward_hooks or child._forward_pre_hooks:
            raise CannotTrace(
                f"{name} has a forward hook, which would not run: its code is inlined"
            )
    forward = type(home).forward if forward is None else forward
    with uncached_autocast(), own_surroundings():  # else it would keep fake tensors for later runs
        inlined = residuals[0].inlined
        trace = trace_home(home, forward, arguments, inlined, mode, answers, lend=lend)
    return extract(trace, residuals, inner, trunk, in_part=in_part)
