"""Examining one model of the zoo: what it has, what rewire makes of it, and whether that is right.

The residual adds come from `benchmarks.finder`, which knows nothing of rewire; the plain form
(the same code with x_{i+1} = x_i + F_i(x_i) as its coupling) must be the original bit for bit.
"""

from __future__ import annotations

import copy
import inspect
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import rewire
from benchmarks.finder import Findings, ResidualAdd, find
from benchmarks.menagerie import Specimen
from benchmarks.recording import Row
from rewire.inputs import Example, as_example, example_for, mapped, one_more
from rewire.isolation import training_mode
from rewire.tape import watch_corrections
from rewire.watching import watched_calls

LIMIT = 1e-10  # relative error of a float64 gradient
ROUNDING = 1e-12  # of float64 outputs whose sums are added up in another order
_MOST_PARAMETERS = 640_000_000  # in float64, with gradients, that 24 GB hold
# Why an add that is known to be residual is left alone: that it is none is no excuse.
DECISIONS = {
    "excluded", "cannot trace", "own backward", "nested", "post-norm", "shared code", "too short"
}  # fmt: skip


@dataclass(frozen=True)
class AsOriginal(rewire.Coupling):
    """x_{i+1} = x_i + F_i(x_i): the network before rewiring, run by the rewired one's code."""

    name: ClassVar[str] = "as the original"

    def coefficients(self, x: Tensor, training: bool) -> rewire.Coefficients:
        return rewire.Coefficients(1.0, 0.0, 1.0)


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
    keys left reason seconds""".split()


def examine(specimen: Specimen) -> Row:
    """Examine a model, from building it to its gradients in float64."""
    start = time.perf_counter()
    torch.manual_seed(0)
    result = Examination(specimen)
    model = awake(specimen.build().eval())
    result.numbers["parameters"] = sum(p.numel() for p in model.parameters())
    example = _example(specimen, model)
    result.numbers["inputs"] = example.description
    findings = find(model, *_fresh(example))
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
        "left": _counted(row.reason for row in plan.skipped),
    }
    lost = missed(findings, plan)
    if lost:
        result.faults.append(f"{len(lost)} adds missed, first {lost[0].owner} {lost[0].line}")
    alarms = [module for module in plan.modules if not exists(module, findings)]
    if alarms:
        result.faults.append(f"{len(alarms)} false alarms, first {alarms[0].name}")
    numbers["reason"] = "" if planned == findings.lengths else why_not(findings, plan)


def why_not(findings: Findings, plan: rewire.Plan) -> str:
    """The plan's reasons for the modules of chains that it leaves alone, with the first detail."""
    rows = [
        row
        for chain in findings.chains
        for add in chain
        for row in plan.skipped
        if not any(_is(module, add) for module in plan.modules) and _names(row, add)
    ]
    if not rows:
        heads = [chain[0] for chain in findings.chains]
        cuts = [c.start for c in plan.chains if not any(_is(c.modules[0], add) for add in heads)]
        return f"cut {len(cuts)}: {cuts[0] if cuts else 'chains of other modules'}"
    return f"{_counted(row.reason for row in rows)}: {rows[0].detail}"


def missed(findings: Findings, plan: rewire.Plan) -> list[ResidualAdd]:
    """Residual adds that are neither in a chain nor known as one and left alone for a reason.

    Each line of the plan's list is about one add of the code, however often the code runs.
    """
    known = [row for row in plan.skipped if row.reason in DECISIONS]
    silent = []
    for add in {add.key: add for add in findings.adds}.values():
        if any(_is(module, add) for module in plan.modules):
            continue
        row = next((row for row in known if _names(row, add)), None)
        if row is None:
            silent.append(add)
        else:
            known.remove(row)
    return silent


def exists(module: rewire.Residual, findings: Findings) -> bool:
    """Whether a residual module that the plan speaks of was seen in the run."""
    return any(_is(module, add) for add in findings.adds)


def _is(module: rewire.Residual, add: ResidualAdd) -> bool:
    owners = {module.home, *(f"{module.home}.{name}".lstrip(".") for name in module.inlined)}
    return module.where == add.line and add.owner in owners


def _names(row: rewire.Skipped, add: ResidualAdd) -> bool:
    """Whether a line of the plan's list is about an add: its module, or a branch of its module."""
    where = row.where.partition("#")[0]
    home = where.rpartition(".")[0]  # a residual module is called after the child that does it
    near = where == add.owner or f"{where}.".startswith(f"{add.owner}.") or not add.owner
    above = not home or f"{add.owner}.".startswith((f"{where}.", f"{home}."))
    return row.line == add.line and (near or above)


def _counted(reasons: Iterator[str] | Sequence[str]) -> str:
    return ", ".join(f"{reason} {n}" for reason, n in Counter(reasons).most_common())


# ---- bytes -------------------------------------------------------------------------------


def _share(
    result: Examination,
    specimen: Specimen,
    model: nn.Module,
    plan: rewire.Plan,
    example: Example,
) -> None:
    """The share of a training step's stored activations that the chains do not store any more."""
    if specimen.size is not None:  # the size it is made for, not the one that keeps float64 cheap
        example = example_for(model)
    rev = rewire.make_reversible(model, plan=plan)
    before = _stored(model, example)
    with watch_corrections() as kept:
        after = _stored(rev, example)
    after["corrections"] += sum(correction.nbytes for correction in kept)
    total = sum(before.values())
    result.numbers["share"] = round(1 - sum(after.values()) / max(total, 1), 3)
    outside = sorted(after.items(), key=lambda item: -item[1])[:3]
    result.numbers["outside"] = ", ".join(
        f"{name or '(model)'} {size / max(total, 1):.2f}" for name, size in outside
    )


def _stored(model: nn.Module, example: Example) -> Counter[str]:
    """Bytes that autograd stores in one training forward, by the part of the model."""
    bytes_of: dict[int, tuple[str, int]] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    owners = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            part = ".".join(owners[-1].split(".")[:2])
            bytes_of.setdefault(storage.data_ptr(), (part, storage.nbytes()))
        return tensor

    with _unchanged(model), _owners(model, owners), torch.enable_grad():
        model.train()
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = _call(model, example)  # alive, so that no address is used twice
    del output
    counted: Counter[str] = Counter()
    for part, size in bytes_of.values():
        counted[part] += size
    return counted


@contextmanager
def _owners(model: nn.Module, owners: list[str]) -> Iterator[None]:
    """Note whose code runs. Hooks would be seen by rewired modules, which have their own rules."""
    names = {id(module): name for name, module in model.named_modules()}

    def noted(original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        owners.append(names.get(id(module), owners[-1]))
        try:
            return original(module, *args, **kwargs)
        finally:
            owners.pop()

    with watched_calls(noted):
        yield


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
        "plain_size": (_other_size(example), False),
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
        given = _cast(given, torch.float64)
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


def as_original(model: nn.Module, plan: rewire.Plan) -> nn.Module:
    """A rewired model whose coupling is the original's and whose streams are plain floats."""
    plain = rewire.make_reversible(model, plan=plan, coupling=AsOriginal())
    for module in plain.modules():
        if isinstance(module, rewire.ReversibleSequential):
            module.course.precision = "fast"
    return plain


def same_as(
    model: nn.Module, plain: nn.Module, limit: float = 0.0
) -> Callable[[Example | None, bool], bool | None]:
    """Whether outputs and buffers are the same; None where the original refuses the call.

    Args:
        model: The original.
        plain: The rewired model.
        limit: Largest relative difference; 0: the same bits.
    """

    def same(example: Example | None, training: bool) -> bool | None:
        if example is None:
            return None
        try:
            wanted = _outcome(model, example, training)
        except Exception:  # not an input of this model
            return None
        with rewire.store_activations(plain):
            found = _outcome(plain, example, training)
        pairs = zip(found, wanted, strict=True)
        return len(found) == len(wanted) and all(_alike(a, b, limit) for a, b in pairs)

    return same


def _alike(a: Tensor, b: Tensor, limit: float) -> bool:
    if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = a.nan_to_num(), b.nan_to_num()
    if limit == 0 or not a.is_floating_point() or not a.numel():
        return torch.equal(a, b)
    scale = torch.maximum(b.abs(), b.abs().median())  # not that of a mask's smallest number
    return bool(((a - b).abs() <= limit * scale).all())


def _outcome(model: nn.Module, example: Example, training: bool) -> list[Tensor]:
    with _unchanged(model), torch.set_grad_enabled(training):
        model.train(training)
        _seed()
        output = _call(model, example)
        leaves = [t.detach().clone() for t in tree_leaves(output) if isinstance(t, Tensor)]
        return [*leaves, *(b.clone() for b in model.buffers())]


def _seed() -> None:
    """Dropout is the same, and which layers are dropped."""
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(0)


def _call(model: nn.Module, example: Example) -> Any:
    args, kwargs = _fresh(example)
    return model(*args, **kwargs)


def _fresh(example: Example) -> tuple[Any, Any]:
    """Arguments that a model may write into."""
    own = mapped(example, Tensor.clone)
    return own.args, own.kwargs


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and training flags afterwards are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with training_mode(model, model.training):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _other_size(example: Example) -> Example | None:
    """Larger pictures and volumes, shorter texts."""
    changed = False

    def other(leaf: Tensor) -> Tensor:
        nonlocal changed
        if leaf.dim() < 2:
            return leaf
        if leaf.is_floating_point() and leaf.dim() >= 4:
            sizes = [2 * n if leaf.dim() == 5 and n < 32 else n + 32 for n in leaf.shape[-2:]]
            changed = True
            return torch.randn(*leaf.shape[:-2], *sizes)
        if not leaf.is_floating_point() and leaf.shape[1] > 5:
            changed = True
            return leaf[:, :-3]
        return leaf

    resized = mapped(example, other)
    return resized if changed else None


# ---- exact mode --------------------------------------------------------------------------


def gradients_bit_by_bit(
    result: Examination, model: nn.Module, plan: rewire.Plan, example: Example
) -> None:
    """A training step's gradients in float32 and under autocast: the bits of the stored twin.

    With gradients for the input in float32, without under autocast. It does not apply where the
    twin, run again, has other bits itself (float32 kernels that go by where a tensor lies).
    """
    rev = rewire.make_reversible(model, plan=plan)
    for name, half in {"exact": False, "autocast": True}.items():
        trains = _trains(model, example, half)
        result.check(name, _as_its_twin(rev, example, half) if trains else None)


def _as_its_twin(rev: nn.Module, example: Example, half: bool) -> bool | None:
    """Whether gradients are those with activations stored; None if those vary by themselves."""
    with rewire.store_activations(rev):
        wanted = _gradients(rev, example, half)
    if _same_bits(_gradients(rev, example, half), wanted):
        return True
    with rewire.store_activations(rev):
        again = _gradients(rev, example, half)
    return False if _same_bits(again, wanted) else None


def _trains(model: nn.Module, example: Example, half: bool) -> bool:
    """Whether the original has gradients in this mode."""
    try:
        return bool(_gradients(model, example, half))
    except Exception:  # whatever it is, it is the model's own
        return False


def _gradients(model: nn.Module, example: Example, half: bool) -> list[Tensor | None]:
    """Of a training step: for all parameters, and without autocast for the inputs."""
    given = mapped(example, lambda leaf: leaf.clone().requires_grad_(_takes_gradients(leaf, half)))
    inputs = [t for t in tree_leaves((given.args, given.kwargs)) if isinstance(t, Tensor)]
    leaves = [t for t in (*model.parameters(), *inputs) if t.requires_grad]
    with _unchanged(model):
        model.train()
        _seed()
        with torch.autocast("cpu", torch.bfloat16, half):
            output = _call(model, given)
        ends = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        toward = [torch.randn_like(end) for end in ends]
        return [*torch.autograd.grad(ends, leaves, toward, allow_unused=True)]


def _takes_gradients(leaf: Tensor, half: bool) -> bool:
    return leaf.is_floating_point() and not half


def _same_bits(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> bool:
    return all(
        a is b if a is None or b is None else _alike(a, b, 0.0)
        for a, b in zip(found, wanted, strict=True)
    )


# ---- proof -------------------------------------------------------------------------------


def _proof(result: Examination, model: nn.Module, plan: rewire.Plan, example: Example) -> None:
    """`rewire.verify` in float64, in place: the model is not needed any more.

    A few networks have no float64 (kernels of their own, masks that become NaN, too many
    parameters for the machine): in float32 they must give the twin's gradients bit for bit, as
    exact mode promises.
    """
    verdict = None
    small = sum(p.numel() for p in model.parameters()) < _MOST_PARAMETERS
    if small and _runs(model.double(), _cast(example, torch.float64)):
        with suppress(rewire.CannotTrace):  # e.g. a skip that is cast to float32, whatever it is
            verdict = _verified(model, plan, _cast(example, torch.float64))
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


def _runs(model: nn.Module, example: Example) -> bool:
    """Whether it does, in eval mode, to numbers."""
    try:
        leaves = _outcome(model, example, False)
    except Exception:  # whatever it is, the network has no such dtype
        return False
    return not any(leaf.isnan().any() for leaf in leaves if leaf.is_floating_point())


def _cast(example: Example, dtype: torch.dtype) -> Example:
    return mapped(example, lambda t: t.to(dtype) if t.is_floating_point() else t)
