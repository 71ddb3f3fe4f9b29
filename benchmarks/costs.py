"""What a training step takes: bytes of the allocator, on the CPU and on CUDA.

On the CPU the bytes are those that torch's allocator hands out, as `torch.profiler` notes them.
That agrees with `rewire.profiling.LiveBytes` to a few KB, and sees what that cannot: storages
that a library resizes, buffers of compiled code, workspaces of kernels.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as traced

from rewire.profiling import no_collection, scalar_loss


class StepBytes(NamedTuple):
    """Bytes of one step, beyond what was there before it.

    Attributes:
        peak: Most at once.
        left: After it, no garbage collected.
    """

    peak: int
    left: int


def step(model: nn.Module, x: Tensor) -> None:
    """One forward and backward."""
    scalar_loss(model(x)).backward()  # type: ignore[no-untyped-call]


def zero_gradients(leaves: Iterable[Tensor]) -> None:
    """Gradients of zeros, made once: they are no cost of a step."""
    for leaf in leaves:
        if not leaf.requires_grad:
            continue
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        else:
            leaf.grad.zero_()


def release(device: torch.device) -> None:
    """Give back what is free: garbage, and the blocks that the allocators keep."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        # Not in every torch that rewire runs with.
        getattr(torch.accelerator, "empty_host_cache", lambda: None)()


def step_bytes(model: nn.Module, x: Tensor) -> StepBytes:
    """Measure one step, on the device of x; gradients have to be there."""
    with no_collection():
        return (_cuda_bytes if x.is_cuda else _cpu_bytes)(lambda: step(model, x))


def _cuda_bytes(work: Callable[[], None]) -> StepBytes:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    peak, left = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    return StepBytes(peak - start, left - start)


def _cpu_bytes(work: Callable[[], None]) -> StepBytes:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop
    with traced(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        work()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative where memory is freed
        peak = max(peak, live)
    return StepBytes(peak, live)
