"""Examining one model of the zoo: what it has, what rewire makes of it, and whether that is right.

The residual adds come from `benchmarks.finder`, which knows nothing of rewire; the plain form
(the same code with x_{i+1} = x_i + F_i(x_i) as its coupling) must be the original bit for bit.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import rewire
from benchmarks.finder import Findings, find
from benchmarks.judging import counted, exists, missed, why_not
from benchmarks.menagerie import Specimen
from benchmarks.outcomes import (
    as_original,
    cast,
    fresh,
    live_bytes,
    other_size,
    runs_to_numbers,
    same_as,
    same_bits,
    stored_bytes,
    training_step,
)
from benchmarks.recording import Row
from rewire.inputs import Example, as_example, example_for, one_more

LIMIT = 1e-10  # relative error of a float64 gradient
ROUNDING = 1e-12  # of float64 outputs whose sums are added up in another order
_MOST_PARAMETERS = 640_000_000  # in float64, with gradients, that 24 GB hold


@dataclass
class Examination:
    """What was found; `row` makes a line of the record of it."""

    specimen: Specimen
    numbers: Row = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def check(self, name: str, passed: bool | None) -> None:
        """Note a check; None: it does not apply."""
        self.numbers[name] = {True: "yes", False: "NO", None: "-"}[passed]
        if passed is False:
            self.faults.append(name)

    def row(self) -> Row:
        """A line of the record."""
        one = self.specimen
        return {
            "library": one.library,
            "model": one.name,
            "family": one.family,
            **dict.fromkeys(COLUMNS, ""),
            **self.numbers,
            "verdict": self._verdict(),
        }

    def _verdict(self) -> str:
        if self.faults:
            return f"FAILED: {', '.join(self.faults)}"
        if not self.numbers["modules"]:
            return "declined" if self.numbers["chains"] else "nothing to rewire"
        return "verified in part" if self.numbers["reason"] else "verified"


COLUMNS = """parameters inputs adds chains planned modules of_modules convert_seconds share outside
    gradient_error dtype exact autocast plain_eval plain_train plain_batch plain_size statistics
    keys left reason refusal seconds""".split()


def examine(specimen: Specimen) -> Row:
    """Examine a model, from building it to its gradients in float64."""
    start = time.perf_counter()
    torch.manual_seed(0)
    result = Examination(specimen)
    model = awake(specimen.build().eval())
    result.numbers["parameters"] = sum(p.numel() for p in model.parameters())
    example = _example(specimen, model)
    result.numbers["inputs"] = example.description
    findings = find(model, *fresh(example))
    began = time.perf_counter()
    plan = rewire.plan(model, example)
    if plan.chains:
        rewire.make_reversible(model, plan=plan)
    result.numbers["convert_seconds"] = round(time.perf_counter() - began, 2)
    _compare(result, findings, plan)
    if plan.chains:
        _share(result, specimen, model, plan, example)
        _plain_form(result, model, plan, example)
        gradients_bit_by_bit(result, model, plan, example)
        _proof(result, model, plan, example)
    result.numbers["seconds"] = round(time.perf_counter() - start, 1)
    return result.row()


def awake(model: nn.Module) -> nn.Module:
    """Weights that begin at zero, or as good as, moved: a branch that gives zeros tests nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not (parameter.abs() > 1e-3).any():
                parameter.normal_(0, 0.1)
    return model


def _example(specimen: Specimen, model: nn.Module) -> Example:
    """What the model is called with: a batch of two where the library has no say in it."""
    if specimen.inputs is not None:
        given = specimen.inputs()
        return as_example(given)
    if specimen.size is not None:
        found = example_for(model, shape=(2, 3, *_frames(model), specimen.size, specimen.size))
        return Example(found.args, found.kwargs, f"{list(found.args[0].shape)}")
    return example_for(model)


def _frames(model: nn.Module) -> tuple[int, ...]:
    """How many, where the first convolution is one in time too."""
    sizes = (getattr(module, "kernel_size", None) for module in model.modules())
    first = next((size for size in sizes if isinstance(size, tuple)), ())
    return (8,) if len(first) == 3 else ()


# ---- finder against detector -------------------------------------------------------------


def _compare(result: Examination, findings: Findings, plan: rewire.Plan) -> None:
    """Hold what exists against what the plan says; a silent difference is a fault."""
    numbers = result.numbers
    planned = sorted(map(len, plan.chains), reverse=True)
    numbers |= {
        "adds": len(findings.adds),
        "chains": " ".join(map(str, findings.lengths)),
        "planned": " ".join(map(str, planned)),
        "modules": len(plan.modules),
        "of_modules": sum(findings.lengths),
        "left": counted(row.reason for row in plan.skipped),
    }
    lost = missed(findings, plan)
    if lost:
        result.faults.append(f"{len(lost)} adds missed, first {lost[0].owner} {lost[0].line}")
    alarms = [module for module in plan.modules if not exists(module, findings)]
    if alarms:
        result.faults.append(f"{len(alarms)} false alarms, first {alarms[0].name}")
    numbers["reason"] = "" if planned == findings.lengths else why_not(findings, plan)


# ---- bytes -------------------------------------------------------------------------------


def _share(
    result: Examination,
    specimen: Specimen,
    model: nn.Module,
    plan: rewire.Plan,
    example: Example,
) -> None:
    """What a training step keeps for backward, and what it does not when rewired.

    Both with all that is alive after forward: the chains' streams, side inputs and corrections.
    """
    if specimen.size is not None:  # the size it is made for, not the one that keeps float64 cheap
        example = example_for(model)
    rev = rewire.make_reversible(model, plan=plan)
    total, kept = live_bytes(model, example), live_bytes(rev, example)
    result.numbers["share"] = round(1 - kept / max(total, 1), 3)
    outside = stored_bytes(rev, example).most_common(3)
    result.numbers["outside"] = ", ".join(
        f"{name or '(model)'} {size / max(total, 1):.2f}" for name, size in outside
    )


# ---- the plain form ----------------------------------------------------------------------


def _plain_form(result: Examination, model: nn.Module, plan: rewire.Plan, example: Example) -> None:
    """Bit for bit; where not, the same but for rounding, or but for the order of random draws.

    Rounding differs where a sum has several terms, which are added up in another order, and where
    branch and skip lie otherwise in memory: a sum lies as its first term does, a stream as the
    chain's input. Dropout draws in another order where two streams take turns in one home.
    """
    runs = {
        "plain_eval": (example, False),
        "plain_train": (example, True),
        "plain_batch": (one_more(example)[1], False),
        "plain_size": (other_size(example), False),
    }
    same = same_as(model, as_original(model, plan))
    for name, (given, training) in runs.items():
        found = same(given, training)
        result.check(name, False if found is None and given is example else found)
    failed = [name for name in runs if name in result.faults]
    if not failed:
        return
    wide = copy.deepcopy(model).double()
    near = same_as(wide, as_original(wide, plan), ROUNDING)
    for name in failed:
        given, training = runs[name]
        assert given is not None, "what is not there was not examined"
        given = cast(given, torch.float64)
        if near(given, training):
            why = "rounding"
        else:
            undropped = _Undropped()
            with undropped:
                why = "order" if training and near(given, training) else ""
            if not undropped.twice_the_same():
                why = ""
        if why:
            result.faults.remove(name)
            result.numbers[name] = why


class _Undropped(TorchFunctionMode):
    """No dropout drops anything; what each would have is noted."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if "dropout" not in name:
            return func(*args, **kwargs)
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        tensor = given.pop("input")
        if type(tensor) is Tensor:  # neither a fake one nor a proxy
            self._calls.append(f"{name} {list(tensor.shape)} {sorted(given.items())}")
        return tensor

    def twice_the_same(self) -> bool:
        """Whether the plain form called each as often as the original, which ran before it."""
        half = len(self._calls) // 2
        return sorted(self._calls[:half]) == sorted(self._calls[half:])


# ---- exact mode --------------------------------------------------------------------------


def gradients_bit_by_bit(
    result: Examination, model: nn.Module, plan: rewire.Plan, example: Example
) -> None:
    """What a training step gives, in float32 and under autocast: the bits of the stored twin.

    With gradients for the input in float32, without under autocast. It does not apply where the
    twin, run again, has other bits itself (float32 kernels that go by where a tensor lies).
    """
    rev = rewire.make_reversible(model, plan=plan)
    for name, half in {"exact": False, "autocast": True}.items():
        try:
            found = _as_its_twin(rev, example, half) if _trains(model, example, half) else None
        except rewire.RewireError as error:  # in so many words: casts on the trunk under autocast
            result.numbers[name] = "refused"
            result.numbers["refusal"] = str(error)[:200]
        else:
            result.check(name, found)


def _as_its_twin(rev: nn.Module, example: Example, half: bool) -> bool | None:
    """Whether a step gives what it does with activations stored; None if all of that varies.

    Held against are those outputs and gradients that have the same bits in two stored runs.
    """
    found = training_step(rev, example, half)
    with rewire.store_activations(rev):
        wanted, again = (training_step(rev, example, half) for _ in range(2))
    steps = zip(found, wanted, again, strict=True)
    same = [same_bits(a, b) for a, b, c in steps if b is not None and same_bits(b, c)]
    return all(same) if same else None


def _trains(model: nn.Module, example: Example, half: bool) -> bool:
    """Whether the original has gradients in this mode."""
    try:
        training_step(model, example, half)
    except Exception:  # whatever it is, it is the model's own
        return False
    return True


# ---- proof -------------------------------------------------------------------------------


def _proof(result: Examination, model: nn.Module, plan: rewire.Plan, example: Example) -> None:
    """`rewire.verify` in float64, in place: the model is not needed any more.

    A few networks have no float64 (kernels of their own, masks that become NaN, too many
    parameters for the machine): in float32 they must give the twin's gradients bit for bit, as
    exact mode promises.
    """
    verdict = None
    small = sum(p.numel() for p in model.parameters()) < _MOST_PARAMETERS
    if small and runs_to_numbers(model.double(), cast(example, torch.float64)):
        with suppress(rewire.CannotTrace):  # a skip that is cast to float32, whatever it is
            verdict = _verified(model, plan, cast(example, torch.float64))
    if verdict is None:
        result.numbers["dtype"] = "float32"
        verdict = _verified(model.float(), plan, example)
    found = {check.name: check for check in verdict.checks}
    gradients = [c for c in verdict.checks if "gradient" in c.name and c.unit == "relative"]
    error = max((check.measured for check in gradients), key=lambda e: (math.isnan(e), e))
    result.numbers["gradient_error"] = f"{error:.1e}"
    result.check("statistics", found["statistics once"].passed)
    result.check("keys", found["keys equal"].passed)
    if not error <= LIMIT:
        result.faults.append(f"gradients {error:.1e}")
    # Of networks as small as these the peak may be a stream, not an activation: no fault.
    failed = [c for c in verdict.checks if not c.passed and c.name != "peak memory"]
    result.faults += [f"{c.name} {c.detail}" for c in failed]


def _verified(model: nn.Module, plan: rewire.Plan, example: Example) -> rewire.Verdict:
    rev = rewire.make_reversible(model, plan=plan)
    return rewire.verify(rev, *example.args, original=model, **example.kwargs)
