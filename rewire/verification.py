"""Proof that a rewired model does what it should, as named checks with numbers.

Gradients are compared with the stored-activation twin: the same two-stream function,
run by ordinary autograd.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from rewire import rewriting
from rewire.accounting import saved_inside
from rewire.drift import Reconstruction, watch_reconstruction
from rewire.errors import RewireError
from rewire.holdings import Holdings
from rewire.inputs import Example, example_for, mapped, one_more
from rewire.isolation import isolated, training_mode
from rewire.links import Course
from rewire.profiling import floating_tensors, profile
from rewire.replay import RngStates, all_rng_states, replayed_generators, same_rng_states
from rewire.reversible import (
    courses,
    exact,
    kept_grids,
    store_activations,
    whole_branches,
)
from rewire.running import watch_branches
from rewire.tape import watch_repeats

# Largest relative error of a gradient. In float64 rounding reaches 1e-13 in the deepest
# nets, in float32 1e-5 in transformers of 96 modules and 1e-3 in rare ReLU nets; a planted
# fault gives 1e-2 and more. Half precision rounds each activation to 3 or 2 digits.
_GRADIENT_LIMITS = {torch.float64: 1e-10, torch.float32: 1e-3}  # else 5e-2
# Some gradients are zero but for rounding (a key's bias): below this share of the largest
# gradient an error counts relative to the share, not to the tensor's own size.
_PEAK_SLACK = 100_000  # bytes: of a toy network a stream is more than all activations
_SMALLEST_SHARE = 1e-3
# Products of matrices of another height round otherwise; a wrong cut gives 1e-3 and more.
_PARTS = 1e-9


@dataclass(frozen=True)
class Check:
    """One measured property of a rewired model.

    Attributes:
        name: What was checked.
        measured: The number found; NaN fails.
        limit: The largest that passes.
        unit: Of both.
        detail: Where the worst was found, and other facts.
    """

    name: str
    measured: float
    limit: float
    unit: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the measured number is within the limit."""
        return self.measured <= self.limit


@dataclass(frozen=True, repr=False)
class Verdict:
    """What `verify` found. Prints as a table."""

    checks: list[Check]
    model: str

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as lists, dicts, strings and numbers: ready for JSON."""
        checks = [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checks]
        return {"model": self.model, "passed": self.passed, "checks": checks}

    def __str__(self) -> str:
        rows = []
        for c in self.checks:
            numbers = f"{c.measured:.3g}", f"<= {c.limit:.3g}"
            rows.append(("ok" if c.passed else "FAILED", c.name, *numbers, c.unit, c.detail))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.model}: {sum(c.passed for c in self.checks)} of {len(rows)} checks passed"]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join(lines)

    __repr__ = __str__


@dataclass(frozen=True)
class _Run:
    """What one forward and backward gave."""

    outputs: list[Tensor]
    inputs: Mapping[str, Tensor | None]
    parameters: Mapping[str, Tensor | None]
    buffers: dict[str, Tensor]
    generators: RngStates
    reconstructions: list[Reconstruction]


def verify(
    rev: nn.Module,
    *inputs: Any,
    float64: bool = False,
    original: nn.Module | None = None,
    **kwargs: Any,
) -> Verdict:
    """Check a rewired model against its stored-activation twin and against the original.

    Nothing of the model changes: training flags, buffers, gradients, random generators.

    Args:
        rev: What `make_reversible` returned, or any model with a `ReversibleSequential`.
        *inputs: What to call it with; found where nothing is given.
        float64: Compare gradients on a float64 copy, where rounding cannot hide an error.
        original: The model before rewiring; rebuilt from `rev` where it is not given.
        **kwargs: Keyword arguments of the call.
    """
    given = Example(inputs, kwargs) if inputs or kwargs else example_for(rev)
    original = rewriting.restored(rev) if original is None else original
    if not _takes_gradients(original, given):
        given = _Constant(given.args, given.kwargs, given.description)
    model, example = rev, given
    if float64:  # for the numbers only; the other checks look at the model itself
        model = copy.deepcopy(rev).double()
        example = mapped(given, lambda t: t.double() if t.is_floating_point() else t)
    with watch_reconstruction():  # a check says what would be a warning
        checks = [
            *_evaluation_checks(model, example),
            *_training_checks(model, example),
            _repeat_check(model, example),
            *_parts_checks(rev, given),
            _other_batch_check(model, example, original),
            *_memory_checks(rev, given, original),
            *_sharing_checks(rev, original),
        ]
    return Verdict(checks, type(rev).__name__)


class _Constant(Example):
    """Inputs that a model does not take with gradients, e.g. where it sets the flag itself."""


def _takes_gradients(original: nn.Module, example: Example) -> bool:
    fresh, _ = _fresh(example)
    try:
        with isolated(original), training_mode(original, True), torch.enable_grad():
            original(*fresh.args, **fresh.kwargs)
    except Exception:  # whatever else is wrong with the inputs comes up again in the checks
        return False
    return True


def _evaluation_checks(model: nn.Module, example: Example) -> Iterator[Check]:
    lost = ""
    try:
        run, twin = _pair(model, example, training=False)
    except RuntimeError as error:  # torch's: a network that writes into its state, say
        lost = f"the network has no gradients in eval mode: {error}".splitlines()[0][:120]
        run, twin = _pair(model, example, training=False, backward=False)
    limit = _gradient_limit(model)
    different = sum(int((a != b).sum()) for a, b in zip(run.outputs, twin.outputs, strict=True))
    yield Check("outputs", different, 0, "elements", f"in {len(run.outputs)} tensors")
    yield _gradient_check("input gradients", run.inputs, twin.inputs, limit)
    yield _gradient_check("parameter gradients", run.parameters, twin.parameters, limit)
    found = [(math.inf if math.isnan(d) else d, name) for name, d in run.reconstructions]
    difference, worst = max(found, default=(0.0, ""))
    detail = lost or f"worst {worst or '(model)'} of {len(found)}"
    if not found and not lost and not any(map(_rebuilds, courses(model))):
        detail = "no stream is rebuilt: the modules before the last are kept, as planned"
    elif not found and not lost and _goes_through(twin):
        difference, detail = math.inf, "backward reached no chain's start"
    yield Check("reconstruction", difference, limit, "relative", detail)


def _goes_through(run: _Run) -> bool:
    """Whether gradients flow through all of a network: it may hold its first blocks without."""
    inputs, parameters = run.inputs.values(), run.parameters.values()
    return any(g is not None for g in inputs) or all(g is not None for g in parameters)


def _training_checks(model: nn.Module, example: Example) -> Iterator[Check]:
    run, twin = _pair(model, example, training=True)
    limit = _gradient_limit(model)
    if _bits_promised(model):
        yield _bits_check("gradients bit for bit", run, twin)
    yield _gradient_check("randomness replayed", run.parameters, twin.parameters, limit)
    states = run.generators
    moved = sum(not torch.equal(state, states[index]) for index, state in twin.generators.items())
    yield Check("generators afterwards", moved, 0, "generators", f"of {len(twin.generators)}")
    ours, theirs = ({n: b.nan_to_num() for n, b in r.buffers.items()} for r in (run, twin))
    changed = [name for name, b in theirs.items() if not torch.equal(ours[name], b)]
    detail = f"first {changed[0]}" if changed else f"of {len(twin.buffers)}"
    yield Check("statistics once", len(changed), 0, "buffers", detail)


def _repeat_check(model: nn.Module, example: Example) -> Check:
    """Each branch runs twice on the same input: a reversible one must give the same bits."""
    with ExitStack() as stack:
        stack.enter_context(isolated(model))
        stack.enter_context(kept_grids(model))
        stack.enter_context(training_mode(model, True))
        found = stack.enter_context(watch_repeats())
        stack.enter_context(torch.enable_grad())
        fresh, _ = _fresh(example)
        model(*fresh.args, **fresh.kwargs)
    other = [name for name, same in found if not same]
    detail = f"first {other[0]}" if other else f"of {len(found)}"
    return Check("branches repeat", len(other), 0, "branches", detail)


def _parts_checks(rev: nn.Module, given: Example) -> Iterator[Check]:
    """Branches run part by part give what they give whole, but for the last digits."""
    if all(course.chunks == 1 for course in courses(rev)):
        return
    model = copy.deepcopy(rev).double()
    example = mapped(given, lambda t: t.double() if t.is_floating_point() else t)
    for mode, training in (("eval", False), ("train", True)):
        with isolated(model), kept_grids(model), training_mode(model, training):
            states = all_rng_states()
            parts = _outputs(model, example)
            drawn = not same_rng_states(states, all_rng_states())
            with whole_branches(model):
                whole = _outputs(model, example)
        if drawn:  # for each part by itself: nothing to compare
            continue
        pairs = zip(parts, whole, strict=True)
        worst = max((_relative(a, b) for a, b in pairs), default=0.0)
        yield Check(f"parts as the whole ({mode})", worst, _PARTS, "relative", "of the outputs")


def _outputs(model: nn.Module, example: Example) -> list[torch.Tensor]:
    fresh, _ = _fresh(example)
    return [t.detach() for t in floating_tensors(model(*fresh.args, **fresh.kwargs))]


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (value - expected).abs().amax() / expected.abs().amax().clamp_min(1e-300)
    found = float(difference)
    return math.inf if math.isnan(found) else found


def _bits_promised(model: nn.Module) -> bool:
    """Whether gradients must be those of the twin bit for bit: where kernels repeat themselves."""
    on_host = all(p.device.type == "cpu" for p in model.parameters())
    return exact(model) and (on_host or torch.are_deterministic_algorithms_enabled())


def _bits_check(name: str, run: _Run, twin: _Run) -> Check:
    pairs = [
        (key, getattr(run, part).get(key), b)
        for part in ("inputs", "parameters")
        for key, b in getattr(twin, part).items()
    ]
    other = [key for key, a, b in pairs if not _same_bits(a, b)]
    detail = f"first {other[0]}" if other else f"of {len(pairs)}"
    return Check(name, len(other), 0, "tensors", detail)


def _same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _other_batch_check(model: nn.Module, example: Example, original: nn.Module) -> Check:
    limit = _gradient_limit(model)
    batch, larger = one_more(example)
    name, sizes = "other batch size", f"{batch + 1} instead of {batch}"
    try:
        try:
            run, twin = _pair(model, larger, training=False)
        except RuntimeError:  # no gradients in eval mode
            run, twin = _pair(model, larger, training=True)
    except Exception as error:
        measured = 0.0 if _refuses(original, larger) else math.inf
        return Check(name, measured, limit, "relative", f"{sizes}: {error}".splitlines()[0])
    check = _gradient_check(name, run.parameters, twin.parameters, limit)
    return dataclasses.replace(check, detail=f"{sizes}; {check.detail}")


def _refuses(original: nn.Module, example: Example) -> bool:
    """Whether the original cannot run on inputs of these sizes either."""
    dtype = next((p.dtype for p in original.parameters() if p.is_floating_point()), torch.float32)
    fitting = mapped(example, lambda t: t.to(dtype) if t.is_floating_point() else t)
    try:
        with isolated(original), training_mode(original, False), torch.no_grad():
            original(*fitting.args, **fitting.kwargs)
    except Exception:
        return True
    return False


def _rebuilds(course: Course) -> bool:
    """Whether backward rebuilds a stream that can be compared with what it was."""
    ways = [course.way(number) for number in range(len(course.sites))]
    return "reverse" in ways


def _stored(rev: nn.Module) -> set[str]:
    """Names of the residual modules whose activations are stored."""
    return {
        site
        for course in courses(rev)
        for number, site in enumerate(course.sites)
        if course.way(number) == "store"
    }


def _memory_checks(rev: nn.Module, example: Example, original: nn.Module) -> Iterator[Check]:
    fresh, _ = _fresh(example)
    observed = watch_branches()
    with isolated(rev), torch.enable_grad(), observed as running, saved_inside(running) as kept:
        rev(*fresh.args, **fresh.kwargs)
    stored = _stored(rev)
    kept = {name: nbytes for name, nbytes in kept.items() if name not in stored}
    where = f"first {next(iter(kept))}" if kept else "in branches"
    if stored:
        where += f" ({len(stored)} more store theirs, as planned)"
    yield Check("activations dropped", sum(kept.values()), 0, "bytes", where)
    with training_mode(rev, True), training_mode(original, True):
        ours, plain = (profile(m, *example.args, **example.kwargs) for m in (rev, original))
    megabytes = f"{ours.peak_bytes / 1e6:.2f} MB, the original {plain.peak_bytes / 1e6:.2f} MB"
    ratio = ours.peak_bytes / max(plain.peak_bytes, 1)
    limit = 1 + _PEAK_SLACK / max(plain.peak_bytes, 1)
    yield Check("peak memory", ratio, limit, "of original", megabytes)
    yield Check("bytes left", ours.left_bytes, plain.left_bytes, "bytes", "at most the original's")


def _sharing_checks(rev: nn.Module, original: nn.Module) -> Iterator[Check]:
    pair = rev, original
    every = [(m.named_parameters("", True, False), m.named_buffers("", True, False)) for m in pair]
    ours, theirs = (dict(chain(*named)) for named in every)
    copied = [name for name, tensor in theirs.items() if ours.get(name) is not tensor]
    detail = f"first {copied[0]}" if copied else f"of {len(theirs)}"
    yield Check("parameters shared", len(copied), 0, "tensors", detail)
    keys, wanted = list(rev.state_dict()), list(original.state_dict())
    places = max(len(keys), len(wanted))
    wrong = [i for i in range(places) if keys[i : i + 1] != wanted[i : i + 1]]
    detail = f"first {[*wanted, *keys[len(wanted) :]][wrong[0]]}" if wrong else f"of {places}"
    yield Check("keys equal", len(wrong), 0, "keys", detail)


def _pair(
    model: nn.Module, example: Example, *, training: bool, backward: bool = True
) -> tuple[_Run, _Run]:
    """The rewired model and its stored-activation twin."""
    twin, run = (_run(model, example, training, stored, backward) for stored in (True, False))
    return run, twin


def _run(model: nn.Module, example: Example, training: bool, stored: bool, backward: bool) -> _Run:
    """One forward, and backward, from a fixed random state, leaving nothing behind.

    Gradients come from `autograd.grad`, so that no hook that steps an optimizer fires.
    """
    with ExitStack() as stack:
        stack.enter_context(isolated(model))
        stack.enter_context(kept_grids(model))
        stack.enter_context(training_mode(model, training))
        stack.enter_context(replayed_generators(_own_generators(model)))
        seen = stack.enter_context(watch_reconstruction())
        if stored:
            stack.enter_context(store_activations(model))
        stack.enter_context(torch.enable_grad())
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(0)
        fresh, leaves = _fresh(example)
        output = model(*fresh.args, **fresh.kwargs)
        outputs = [tensor.detach().clone() for tensor in floating_tensors(output)]
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wanted = [*leaves.values(), *parameters.values()]
        loss = _loss(output)
        del output
        gradients: Sequence[Tensor | None] = [None] * len(wanted)
        if backward:
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        generators = all_rng_states()
    inputs = dict(zip(leaves, gradients, strict=False))
    weights = dict(zip(parameters, gradients[len(leaves) :], strict=True))
    return _Run(outputs, inputs, weights, buffers, generators, seen)


def _own_generators(model: nn.Module) -> list[tuple[torch.Generator, Tensor]]:
    holdings = Holdings()
    holdings.refresh([model])
    return holdings.generators(())


def _fresh(example: Example) -> tuple[Example, dict[str, Tensor]]:
    """Copies of the inputs; the floating ones hang on leaves whose gradients are compared."""
    leaves: dict[str, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().clone()
        if tensor.is_floating_point() and not isinstance(example, _Constant):
            leaves[f"input {len(leaves)}"] = tensor.requires_grad_()
        return tensor.clone()  # a model may change its input in place, but not a leaf

    return mapped(example, copied), leaves


def _loss(output: Any) -> Tensor:
    """A random linear function of all floating outputs.

    Not their squares: those of a normalised output are constant, and its gradient zero.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [tensor for tensor in floating_tensors(output) if tensor.requires_grad]
    if not tensors:
        raise RewireError("output: no tensor in it requires a gradient. Unfreeze a parameter.")
    loss = torch.zeros((), device=tensors[0].device)
    for tensor in tensors:
        weights = torch.randn(tensor.shape, generator=generator).to(tensor)
        loss = loss + ((tensor * weights).sum() / math.sqrt(tensor.numel() + 1)).to(loss.device)
    return loss


def _gradient_check(
    name: str, found: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None], limit: float
) -> Check:
    """The largest relative error, max|a - b| / max|b|, over all tensors."""
    sizes = (_largest(b.nan_to_num()) for b in wanted.values() if b is not None)
    floor = _SMALLEST_SHARE * max(sizes, default=0.0)
    errors = {key: _error(found.get(key), b, floor) for key, b in wanted.items()}
    worst = max(errors, key=lambda key: errors[key], default="")
    detail = f"worst {worst} of {len(errors)}" if errors else "nothing requires a gradient"
    return Check(name, errors.get(worst, 0.0), limit, "relative", detail)


def _error(a: Tensor | None, b: Tensor | None, floor: float) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    lost = a.isnan() & b.isnan()  # the network's own, not ours
    a, b = a.masked_fill(lost, 0), b.masked_fill(lost, 0)
    difference, scale = _largest(a - b), max(_largest(b), floor)
    if math.isnan(difference) or scale == 0:
        return math.inf if difference else 0.0
    return difference / scale


def _largest(tensor: Tensor) -> float:
    """max|t|; 0 of nothing (a network without register tokens has a parameter [1, 0, D])."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _gradient_limit(model: nn.Module) -> float:
    """The limit of the least precise floating-point dtype among the parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return max((_GRADIENT_LIMITS.get(dtype, 5e-2) for dtype in dtypes), default=1e-3)
