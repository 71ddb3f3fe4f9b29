"""Rewriting: a model and a plan make a reversible model that shares every tensor."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from rewire.classes import original_class
from rewire.compiling import Compile
from rewire.coupling import Coupling, coupling_from
from rewire.errors import NothingToRewire, RewireError
from rewire.homes import is_home, rewired_class
from rewire.links import Course
from rewire.planning import inner_homes, modules_by_home, trunk_of
from rewire.plans import Chain, Checkpointed, Plan, Residual
from rewire.programs import HomeChain, HomeState
from rewire.regions import install
from rewire.stretches import Stretch, place_of, unfit

_REGISTRIES = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def rewritten(
    model: nn.Module,
    plan: Plan,
    coupling: str | Coupling | None = None,
    check: str = "warn",
    compile: Compile = False,
) -> nn.Module:
    """Carry out a plan, see `rewire.make_reversible`.

    Args:
        model: The model that it was made of.
        plan: What to do.
        coupling: The object, where the plan has its spelling only.
        check: As for `make_reversible`.
        compile: As for `make_reversible`.
    """
    refuse_unfit(model)
    if not plan.chains:
        raise NothingToRewire(_nearest_miss(plan))
    _check(model, plan)
    copies = _copied(model)
    rev = copies[id(model)]
    courses = [_course(chain, coupling, check, compile) for chain in plan.chains]
    _install(rev, plan, courses)
    for row in plan.outside:
        install(rev, Stretch(row))
    rev.__dict__["_rewire_plan"] = plan
    return rev


def refuse_unfit(model: nn.Module) -> None:
    """What cannot be rewired, or is already."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"make_reversible takes a module, not {type(model).__name__}.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise RewireError(
            f"{type(model).__qualname__} wraps a model. Rewire the model inside, `model.module`, "
            "and wrap the result."
        )
    if is_rewired(model):
        raise RewireError(
            f"{type(model).__qualname__} is rewired already. Rewire the original, which "
            "`rewire.rewriting.restored` gives back."
        )


def is_rewired(model: nn.Module) -> bool:
    """Whether a module came from `make_reversible`, or is a part or a wrapper of one that did."""
    inside = (is_home(module) or place_of(module) for module in model.modules())
    return "_rewire_plan" in model.__dict__ or any(inside)


def plan_of(rev: nn.Module) -> Plan:
    """The plan that a rewired module was made by.

    Of a part of such a module (what `merge_and_unload` takes out of its wrapper) and of a wrapper
    around it: what of the plan is in it, by the names that it has there.

    Raises:
        RewireError: The module was not rewired.
    """
    if not is_rewired(rev):
        raise RewireError(
            f"{type(rev).__qualname__} is not rewired. Pass what `rewire.make_reversible` gave."
        )
    plan: Plan | None = rev.__dict__.get("_rewire_plan")
    return _plan_inside(rev) if plan is None else plan


def _plan_inside(rev: nn.Module) -> Plan:
    """The plan that the homes in a module tell together."""
    modules: dict[Course, dict[int, Residual]] = {}
    trunks: dict[Course, str] = {}
    for name, home in rev.named_modules():
        if not is_home(home):
            continue
        state: HomeState = home.__dict__["_rewire"]
        for residual, (number, place) in zip(state.residuals, state.places, strict=True):
            held = state.chains[number]
            trunks[held.course] = state.trunk
            moved = replace(residual, home=name, name=_moved(residual.name, residual.home, name))
            places = modules.setdefault(held.course, {})
            places.update(dict.fromkeys(held.sites[place], moved))
    chains = []
    for course, places in modules.items():
        members = tuple(places[site] for site in sorted(places))
        chain = Chain(
            name=members[0].home,
            modules=members,
            trunk=trunks[course],
            coupling=str(course.coupling),
            precision=course.precision,
            chunks=course.chunks,
            ways=tuple(course.way(site) for site in sorted(places)) if course.ways else (),
            bits=course.coupling.bits,
        )
        chains.append(chain)
    parameters = sum(parameter.numel() for parameter in rev.parameters())
    return Plan(type(rev).__qualname__, chains, [], "", parameters, _stretches_inside(rev))


def _stretches_inside(rev: nn.Module) -> tuple[Checkpointed, ...]:
    """What is checkpointed in a module, by the names that it has there."""
    members: dict[Stretch, dict[int, str]] = {}
    for name, module in rev.named_modules():
        if place := place_of(module):
            members.setdefault(place.stretch, {})[place.number] = name
    found = []
    for stretch, names in members.items():
        modules = tuple(names[number] for number in sorted(names))
        found.append(replace(stretch.row, modules=modules))
    return tuple(found)


def _moved(name: str, home: str, now: str) -> str:
    """A residual module's name where its home has another one."""
    inner = name[len(home) :] if name.startswith(home) else f".{name}"
    return f"{now}{inner}".lstrip(".")


def restored(rev: nn.Module) -> nn.Module:
    """The module as it was before rewiring: original classes, the very same tensors.

    Raises:
        RewireError: The module was not rewired.
    """
    plan_of(rev)
    copies = _copied(rev)
    for copy in copies.values():
        checkpointed = copy.__dict__.pop("_stretch", None) is not None
        if copy.__dict__.pop("_rewire", None) is None and not checkpointed:
            continue
        copy.__dict__.pop("_chains", None)
        for name, child in list(copy._modules.items()):
            if isinstance(child, HomeChain):
                del copy._modules[name]
        copy.__class__ = original_class(type(copy))
    for copy in copies.values():
        copy.__dict__.pop("_rewire_plan", None)
    return copies[id(rev)]


# ---- installing --------------------------------------------------------------------------


def _check(model: nn.Module, plan: Plan) -> None:
    """A plan made for another model is refused before anything is built."""
    names = {name for name, _ in model.named_modules()}
    for residual in plan.modules:
        inlined = [f"{residual.home}.{name}".lstrip(".") for name in residual.inlined]
        missing = [name for name in (residual.home, *inlined) if name not in names]
        if missing:
            raise RewireError(
                f"the plan was made for {plan.model} and names a module {missing[0]!r} that "
                f"{type(model).__qualname__} does not have. Make a plan of this model."
            )
    for name in (name for row in plan.outside for name in row.modules):
        if why := _unfit(model, plan, name, names):
            raise RewireError(
                f"the plan was made for {plan.model} and checkpoints {name!r}, which cannot be: "
                f"{why}. Make a plan of this model."
            )


def _unfit(model: nn.Module, plan: Plan, name: str, names: set[str]) -> str:
    """Why a module cannot be checkpointed; empty if it can."""
    if name not in names:
        return "the model does not have it"
    if any(f"{residual.home}.".startswith(f"{name}.") for residual in plan.modules):
        return "a chain runs in it"
    return unfit(model.get_submodule(name))


def _install(rev: nn.Module, plan: Plan, courses: Sequence[Course]) -> None:
    """Turn the homes of a copied model into rewired ones."""
    homes = modules_by_home(plan.chains)
    trunks = trunk_of(plan.chains)
    for name, residuals in homes.items():
        home = rev.get_submodule(name)
        chains: list[HomeChain] = []
        places: dict[int, tuple[int, int]] = {}
        for chain, course in zip(plan.chains, courses, strict=True):
            members = [r for r in residuals if any(r is module for module in _unique(chain))]
            if not members:
                continue
            for place, residual in enumerate(members):
                places[residual.add] = (len(chains), place)
            sites = [_sites(chain, residual.home, residual.add) for residual in members]
            chains.append(HomeChain(course, sites, [r.name for r in members]))
            chains[-1].training = home.training
        home.__dict__["_rewire"] = HomeState(
            tuple(residuals),
            inner_homes(name, homes),
            trunks[name],
            tuple(chains),
            tuple(places[residual.add] for residual in residuals),
        )
        home.__class__ = rewired_class(type(home))
        _register(home, chains)


def _course(chain: Chain, coupling: str | Coupling | None, check: str, compile: Compile) -> Course:
    """A chain at run time."""
    sites = tuple(residual.name for residual in chain)
    found = coupling_from(chain.coupling if coupling is None else coupling)
    how: Any = {"chunks": chain.chunks, "ways": chain.ways, "compile": compile}
    return Course(chain.name, sites, found, chain.precision, check, **how)


def _unique(chain: Chain) -> list[Any]:
    return list({(r.home, r.add): r for r in chain}.values())


def _sites(chain: Chain, home: str, add: int) -> tuple[int, ...]:
    return tuple(n for n, r in enumerate(chain) if (r.home, r.add) == (home, add))


def _register(home: nn.Module, chains: list[HomeChain]) -> None:
    """Make the chains children of the home, unless its children are what it runs."""
    if isinstance(home, _CONTAINERS):
        home.__dict__["_chains"] = chains
        return
    for number, chain in enumerate(chains):
        name = "reversible" if len(chains) == 1 else f"reversible_{number}"
        while hasattr(home, name):
            name += "_"
        home.add_module(name, chain)


def _nearest_miss(plan: Plan) -> str:
    """Why nothing was found, with the add that came closest."""
    ranks = (
        "cannot trace",
        "own backward",
        "too short",
        "post-norm",
        "nested",
        "excluded",
        "projection",
    )
    rows = sorted(
        plan.skipped,
        key=lambda row: ranks.index(row.reason) if row.reason in ranks else len(ranks),
    )
    found = f"{plan.model}: no chain of two or more residual modules was found"
    if not rows:
        return f"{found}, and no add of two tensors at all. Is the network residual?"
    near = rows[0]
    return (
        f"{found} among {len(rows)} adds. The nearest miss is {near.where or 'the model'} at "
        f"{near.line}: {near.reason}, {near.detail}. `rewire inspect` lists them all."
    )


# ---- copying -----------------------------------------------------------------------------


def _copied(model: nn.Module) -> dict[int, nn.Module]:
    """New module objects for a whole tree, sharing every tensor and everything else.

    References between modules, also in plain lists, dicts, bound methods and partials, lead
    to the copies, so that neither model's train() or hooks reach the other.
    """
    shells: dict[int, nn.Module] = {}
    originals: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            shells[id(module)] = module
            continue
        compiled = isinstance(module, fx.GraphModule) and not is_home(module)
        shells[id(module)] = (type(module) if compiled else object).__new__(type(module))
        originals.append(module)
    held: dict[int, Any] = {}  # containers that several modules share
    for module in originals:
        shell = shells[id(module)]
        for name, value in module.__dict__.items():
            shell.__dict__[name] = _redirected(name, value, shells, held)
        if isinstance(shell, fx.GraphModule) and not is_home(shell):
            shell.recompile()  # its code is in its class, which is its own
    return shells


def _redirected(name: str, value: Any, shells: dict[int, nn.Module], held: dict[int, Any]) -> Any:
    """An attribute for the copy: containers copied, modules of the tree replaced."""
    if name == "_modules":
        return type(value)((key, shells.get(id(m), m)) for key, m in value.items())
    if name in _REGISTRIES or (name.endswith("_hooks") and isinstance(value, dict)):
        return _rebound(value, shells, held) if isinstance(value, OrderedDict) else value.copy()
    return _rebound(value, shells, held)


def _rebound(value: Any, shells: dict[int, nn.Module], held: dict[int, Any]) -> Any:
    """`value` with references to modules of the tree leading to their copies.

    One list, dict or set in several places stays one.
    """
    if id(value) in held:
        return held[id(value)]
    again = functools.partial(_rebound, shells=shells, held=held)
    kind = type(value)
    if isinstance(value, nn.Module):
        return shells.get(id(value), value)
    if kind is types.MethodType:
        return types.MethodType(value.__func__, again(value.__self__))
    if kind is functools.partial:
        keywords = {key: again(item) for key, item in value.keywords.items()}
        return functools.partial(again(value.func), *map(again, value.args), **keywords)
    if kind is tuple:
        return tuple(map(again, value))
    if kind not in (list, set, dict, OrderedDict):
        return value
    copy = held[id(value)] = value.copy()
    copy.clear()
    if kind is list:
        copy.extend(map(again, value))
    else:
        items = value if kind is set else value.items()
        copy.update(again(item) for item in items)  # a pair is a tuple; keys are no modules
    return copy
