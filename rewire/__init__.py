"""rewire: any residual network, made reversible, with the same parameters.

Public names are loaded on first use, so that `import rewire` (and `rewire --help`)
does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewire.budgets import budgeted
    from rewire.comparison import Difference, Distance, distance
    from rewire.coupling import Bdia, Consistent, Coupling, Dr2, Re2
    from rewire.division import parts
    from rewire.errors import (
        BadFile,
        CannotTrace,
        NothingToRewire,
        NotRepeatable,
        RewireError,
        StreamMismatch,
    )
    from rewire.estimation import estimate
    from rewire.integers import Coefficients
    from rewire.making import make_reversible
    from rewire.planning import plan
    from rewire.plans import Budget, Chain, Checkpointed, Parts, Plan, Residual, Skipped
    from rewire.profiling import Profile, profile
    from rewire.recalibration import recalibrate
    from rewire.reversible import ReversibleSequential, store_activations
    from rewire.schedule import Dr2Schedule
    from rewire.storage import load, save
    from rewire.verification import Check, Verdict, verify

__version__ = "0.1.0"

_HOMES = {
    "comparison": ("Difference", "Distance", "distance"),
    "coupling": ("Bdia", "Consistent", "Coupling", "Dr2", "Re2"),
    "errors": (
        "BadFile",
        "CannotTrace",
        "NothingToRewire",
        "NotRepeatable",
        "RewireError",
        "StreamMismatch",
    ),
    "budgets": ("budgeted",),
    "estimation": ("estimate",),
    "making": ("make_reversible",),
    "integers": ("Coefficients",),
    "division": ("parts",),
    "planning": ("plan",),
    "plans": ("Budget", "Chain", "Checkpointed", "Parts", "Plan", "Residual", "Skipped"),
    "profiling": ("Profile", "profile"),
    "recalibration": ("recalibrate",),
    "reversible": ("ReversibleSequential", "store_activations"),
    "schedule": ("Dr2Schedule",),
    "storage": ("load", "save"),
    "verification": ("Check", "Verdict", "verify"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BadFile",
    "Bdia",
    "Budget",
    "CannotTrace",
    "Chain",
    "Check",
    "Checkpointed",
    "Coefficients",
    "Consistent",
    "Coupling",
    "Difference",
    "Distance",
    "Dr2",
    "Dr2Schedule",
    "NotRepeatable",
    "NothingToRewire",
    "Parts",
    "Plan",
    "Profile",
    "Re2",
    "Residual",
    "ReversibleSequential",
    "RewireError",
    "Skipped",
    "StreamMismatch",
    "Verdict",
    "budgeted",
    "distance",
    "estimate",
    "load",
    "make_reversible",
    "parts",
    "plan",
    "profile",
    "recalibrate",
    "save",
    "store_activations",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
