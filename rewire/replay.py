"""What surrounds a branch when it runs, kept so that a rerun finds the same.

Random generators and autocast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

AutocastState = tuple[tuple[str, bool, torch.dtype], ...]
RngStates = dict[int, Tensor]  # by CUDA device; -1 is the CPU


# ---- random generators -------------------------------------------------------------------


def rng_states(devices: Iterable[int] = ()) -> RngStates:
    """States of the CPU generator and of the given CUDA devices' generators."""
    states: RngStates = {-1: torch.get_rng_state()}
    states.update((index, torch.cuda.get_rng_state(index)) for index in devices)
    return states


def all_rng_states() -> RngStates:
    """States of the CPU generator and, where CUDA is up, of every CUDA device's."""
    up = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return rng_states(range(torch.cuda.device_count() if up else 0))


def set_rng_states(states: RngStates) -> None:
    """The inverse of `rng_states`."""
    for index, state in states.items():
        torch.set_rng_state(state) if index < 0 else torch.cuda.set_rng_state(state, index)


def same_rng_states(a: RngStates, b: RngStates) -> bool:
    """Whether nothing was drawn between two snapshots."""
    return a.keys() == b.keys() and all(torch.equal(a[index], b[index]) for index in a)


def replayed_rng(states: RngStates | None) -> AbstractContextManager[None]:
    """Run with the generators at `states`; afterwards they are as if nothing had run."""
    return nullcontext() if states is None else _replayed_rng(states)


@contextmanager
def _replayed_rng(states: RngStates) -> Iterator[None]:
    current = rng_states(index for index in states if index >= 0)
    set_rng_states(states)
    try:
        yield
    finally:
        set_rng_states(current)


def replayed_generators(
    states: Sequence[tuple[torch.Generator, Tensor]],
) -> AbstractContextManager[None]:
    """Run with a branch's own generators as they were; afterwards as if nothing had run."""
    return _replayed_generators(states) if states else nullcontext()


@contextmanager
def _replayed_generators(states: Sequence[tuple[torch.Generator, Tensor]]) -> Iterator[None]:
    current = [(generator, generator.get_state()) for generator, _ in states]
    try:
        for generator, state in states:
            generator.set_state(state)
        yield
    finally:
        for generator, state in current:
            generator.set_state(state)


# ---- autocast ----------------------------------------------------------------------------


def autocast_state(device_type: str) -> AutocastState:
    """Autocast's settings for the CPU and for `device_type`."""
    types_ = ("cpu",) if device_type == "cpu" else ("cpu", device_type)
    return tuple(
        (name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in types_
    )


@contextmanager
def replayed_autocast(state: AutocastState) -> Iterator[None]:
    """Re-enter autocast as it was: the engine runs backward with it off."""
    if state == autocast_state(state[-1][0]):
        with uncached_autocast():
            yield
        return
    with ExitStack() as stack:
        for name, enabled, dtype in state:
            stack.enter_context(torch.autocast(name, dtype, enabled, cache_enabled=False))
        yield


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Autocast's weight cache off: it keeps a cast copy of every weight until the context ends."""
    if not torch.is_autocast_cache_enabled():
        yield
        return
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(True)


# ---- transforms ------------------------------------------------------------------------


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is going on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def hooks_apply() -> bool:
    """Whether there is a graph whose saved tensors can be packed: not in torch.func transforms."""
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._autograd._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
    )


# ---- versions -------------------------------------------------------------------------


def version(tensor: Tensor | None) -> int:
    """The version counter; -1 for None and for inference tensors, which have none."""
    return -1 if tensor is None or tensor.is_inference() else tensor._version
