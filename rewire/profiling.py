"""What one training step costs: peak bytes of live tensors, time, and where the bytes are.

On the CPU the bytes are those of live tensors; on CUDA the allocator's own statistics are used.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rewire.accounting import Optimizer, Standing, kept_by_module, standing
from rewire.errors import RewireError
from rewire.isolation import isolated
from rewire.meters import LiveBytes, Meter, meter_for
from rewire.tape import watch_corrections


@dataclass(frozen=True)
class Profile:
    """What one training step, forward and backward, of a model costs, and where memory goes.

    Peak, saved and left bytes are those of the step: parameters, their gradients, buffers and
    inputs are there before it and do not count.

    Attributes:
        peak_bytes: Most bytes of tensors alive at once.
        saved_bytes: Bytes alive between forward and backward, outputs included.
        left_bytes: Bytes alive after the step, outputs dropped, no garbage collected.
        step_seconds: Time of one step, measured without the meter; NaN in an estimate.
        device: Where it was measured, or what it was estimated for.
        correction_bytes: Of the saved bytes, what makes the inverses of the chains exact.
        correction_bits: The same in bits per element of the stream and residual module.
        parameter_bytes: All parameters.
        buffer_bytes: All buffers.
        gradient_bytes: Gradients of the parameters and inputs that require one.
        optimizer_bytes: The optimizer's state.
        input_bytes: What the model is called with.
        output_bytes: Of the saved bytes, what the model returns.
        outside: Of the saved bytes, what ordinary autograd keeps, by module, the most first.
        chain_bytes: The rest of the saved bytes: what the chains hold (streams, side inputs,
            corrections); in a model without chains what its own code keeps elsewhere.
        estimated: Whether it was estimated, on tensors without values.
        trace: Bytes of tensors alive after each operation of the step.
    """

    peak_bytes: int
    saved_bytes: int
    left_bytes: int
    step_seconds: float
    device: str
    correction_bytes: int = 0
    correction_bits: float = 0.0
    parameter_bytes: int = 0
    buffer_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    outside: tuple[tuple[str, int], ...] = ()
    chain_bytes: int = 0
    estimated: bool = False
    trace: tuple[int, ...] = field(default=(), repr=False)

    @property
    def standing_bytes(self) -> int:
        """What is there all the time: parameters, buffers, gradients, optimizer state, inputs."""
        model = self.parameter_bytes + self.buffer_bytes + self.input_bytes
        return model + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> int:
        """What training takes: all that stands, and the peak of a step.

        Of a GPU's memory, what the driver and the libraries take (about 0.5 GB) comes on top.
        """
        return self.standing_bytes + self.peak_bytes

    def __str__(self) -> str:
        megabytes = [n / 1e6 for n in (self.peak_bytes, self.saved_bytes, self.left_bytes)]
        peak, saved, left = (f"{number:.1f} MB" for number in megabytes)
        bits = f"{self.correction_bits:.2f} bits of correction per element and module"
        return (
            f"peak {peak}, {saved} saved for backward, {left} left, "
            + ("estimated" if self.estimated else f"{self.step_seconds:.3f} s a step")
            + f" ({self.device})"
            + (f", {bits}" if self.correction_bytes else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; without the trace."""
        row = {name: value for name, value in vars(self).items() if name != "trace"}
        row["step_seconds"] = None if math.isnan(self.step_seconds) else self.step_seconds
        return {**row, "outside": dict(self.outside), "total_bytes": self.total_bytes}


def profile(
    model: nn.Module, *inputs: Any, optimizer: Optimizer | None = torch.optim.Adam, **kwargs: Any
) -> Profile:
    """Measure one training step of a model: forward, a scalar loss, backward.

    The loss is the sum of the means of squares of all floating-point outputs. The model
    runs in the mode it is in; its buffers, gradients and the generators are left as they
    were.

    Args:
        model: Any module.
        *inputs: What to call it with; found by `example_for` where nothing is given.
        optimizer: Whose state is counted: a class of `torch.optim`, or a function that makes an
            optimizer of a list of parameters; None counts none. It makes no step.
        **kwargs: Keyword arguments of the call.

    Raises:
        RewireError: No output depends on anything that requires a gradient.
    """
    inputs, kwargs = given_or_found(model, inputs, kwargs)
    step = TrainingStep(model, inputs, kwargs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise RewireError(
            f"{type(model).__name__} is on the meta device, where nothing can be measured. "
            "Estimate it: rewire.estimate(model, ...)."
        )
    there = standing(model, step.tensors, optimizer)
    with isolated(model), step.zero_gradients():
        return step.profiled(there, device, meter_for(device), timed=True)


def given_or_found(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a model with; an example where nothing is given."""
    if inputs or kwargs:
        return inputs, kwargs
    from rewire.inputs import example_for

    example = example_for(model)
    return example.args, example.kwargs


@dataclass(frozen=True)
class TrainingStep:
    """A model, and what it is called with."""

    model: nn.Module
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the inputs."""
        return [t for t in tree_leaves((self.inputs, self.kwargs)) if isinstance(t, Tensor)]

    def forward(self) -> tuple[Any, Tensor]:
        """The output, and its loss."""
        output = self.model(*self.inputs, **self.kwargs)
        return output, scalar_loss(output)

    def run(self, meter: Meter | None = None) -> int:
        """Forward and backward; the bytes alive between them."""
        loss = scalar_loss(self.model(*self.inputs, **self.kwargs))
        saved = meter.live if meter else 0
        loss.backward()  # type: ignore[no-untyped-call]
        return saved

    def profiled(
        self, there: Standing, device: torch.device, meter: Meter, *, timed: bool
    ) -> Profile:
        """Run the step until all is known of it.

        Args:
            there: What stands while it runs.
            device: Which the profile is of.
            meter: Of the peak.
            timed: Whether the time of it means anything.
        """
        with watch_corrections() as kept:
            self.run()  # what is made once (tables, workspaces) is no cost of a step
        seconds = self._seconds(device) if timed else math.nan
        with no_collection(), meter:
            saved = self.run(meter)
            left, peak = meter.live, meter.peak
        held = kept_by_module(self.model, self.forward)
        corrections = sum(row.nbytes for row in kept)
        return Profile(
            peak,
            saved,
            left,
            seconds,
            str(device),
            corrections,
            8 * corrections / max(1, sum(row.elements for row in kept)),
            *there,
            output_bytes=held.output_bytes,
            outside=held.outside,
            chain_bytes=held.other_bytes,
            estimated=not timed,
            trace=self._trace(meter),
        )

    def _trace(self, meter: Meter) -> tuple[int, ...]:
        """Bytes alive after each operation; an allocator has none, so the step runs again."""
        if isinstance(meter, LiveBytes):
            return tuple(meter.trace)
        with LiveBytes() as live:
            self.run()
        return tuple(live.trace)

    def _seconds(self, device: torch.device) -> float:
        """Time of one step."""
        _wait(device)
        start = time.perf_counter()
        self.run()
        _wait(device)
        return time.perf_counter() - start

    @contextmanager
    def zero_gradients(self) -> Iterator[None]:
        """Preallocate gradients, so that they do not count; the caller's come back after."""
        leaves = [t for t in (*self.model.parameters(), *self.tensors) if t.requires_grad]
        kept = [(leaf, leaf.grad) for leaf in leaves if leaf.is_leaf]
        try:
            for leaf, _ in kept:
                leaf.grad = torch.zeros_like(leaf)
            yield
        finally:
            for leaf, grad in kept:
                leaf.grad = grad


def scalar_loss(output: Any) -> Tensor:
    """The sum of the means of squares of all floating-point tensors in an output.

    Args:
        output: A tensor, or mappings, sequences and dataclasses of tensors, nested.

    Raises:
        RewireError: Nothing in it requires a gradient.
    """
    loss = None
    for tensor in floating_tensors(output):
        # Squares of half precision overflow.
        wide = tensor.float() if tensor.dtype.itemsize < 4 else tensor
        term = wide.square().mean()
        loss = term if loss is None else loss + term
    if loss is None or not loss.requires_grad:
        raise RewireError(
            f"output ({type(output).__name__}): no floating-point tensor in it requires a "
            "gradient. Unfreeze a parameter, or give an input that requires a gradient."
        )
    return loss


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in mappings, sequences and dataclasses, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name) for field in fields(value)]
    for item in items:
        yield from floating_tensors(item)


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage once, then keep the collector off: what stays alive is held."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
