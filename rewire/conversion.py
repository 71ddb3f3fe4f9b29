"""What `rewire inspect` and `rewire convert` do, for the command line and the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewire.plans import Plan
from rewire.report import progress
from rewire.sources import Source, open_model
from rewire.storage import export_state_dict, save

if TYPE_CHECKING:
    from rewire.inputs import Example


@dataclass(frozen=True)
class Request:
    """How to open a model and what to rewire in it: the options that commands share."""

    arch: str | None = None
    trust: Sequence[str] = ()
    pretrained: bool = False
    shape: Sequence[int] | None = None
    coupling: str = "re2"
    precision: str = "exact"
    chunks: int | str = 1
    granularity: str = "module"
    trunk: str = "identity"
    outside: str = "store"
    budget: str | None = None
    device: str | None = None
    optimizer: str = "Adam"
    include: Sequence[str] = field(default=())
    exclude: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Conversion:
    """What was converted and written; `trust` is what loading it will need."""

    source: str
    plan: Plan
    out: Path
    out_bytes: int
    trust: tuple[str, ...] = ()


def opened(model: str, request: Request) -> Source:
    """Open MODEL as the request says."""
    with progress(f"Opening {model}"):
        return open_model(
            model, arch=request.arch, trust=request.trust, pretrained=request.pretrained
        )


def planned(source: Source, request: Request, example: Example | None = None) -> Plan:
    """The plan for an opened model, by an example input or by one that is found."""
    from rewire.inputs import example_for
    from rewire.planning import plan

    with progress("Finding residual modules"):
        if example is None and request.shape is not None:
            example = example_for(source.module, request.shape)
        found = plan(
            source.module,
            example,
            coupling=request.coupling,
            precision=request.precision,
            chunks=request.chunks,
            granularity=request.granularity,
            trunk=request.trunk,
            outside=request.outside if request.budget is None else "checkpoint",
            include=request.include,
            exclude=request.exclude,
        )
    if request.budget is None or not found.chains:
        return found
    from rewire.budgets import budgeted

    with progress("Choosing within the budget"):
        how: Any = {"device": request.device, "exclude": request.exclude}
        how["optimizer"] = request.optimizer
        return budgeted(found, source.module, request.budget, example, **how)


def convert(
    model: str, out: Path, request: Request | None = None, export: Path | None = None
) -> Conversion:
    """Open, plan, rewire and write; `out` appears whole or not at all."""
    from rewire.making import make_reversible

    request = request or Request()
    source = opened(model, request)
    plan = planned(source, request)
    with progress("Rewiring"):
        rev = make_reversible(source.module, plan=plan)
    with progress(f"Writing {out}"):
        save(rev, out, source=source.recipe)
        if export is not None:
            export_state_dict(rev, export)
    trust = tuple(request.trust)
    if source.recipe is not None:  # then only a user's own builder needs trust
        called = source.recipe.kind == "import"
        trust = (source.recipe.name.partition(":")[0].split(".")[0],) if called else ()
    return Conversion(source.description, plan, out, out.stat().st_size, trust)
