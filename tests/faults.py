"""Faults to plant in a rewired model or in the runtime: each must be caught by `verify`.

Each is a context manager over the rewired model, and undoes itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from rewire import surroundings, tape
from rewire.arithmetic import Coupled
from rewire.replay import set_rng_states
from rewire.steps import Key

Fault = Callable[[nn.Module], AbstractContextManager[Any]]


def flipped_inverse_sign(_: nn.Module) -> AbstractContextManager[Any]:
    """The inverse adds the branch instead of subtracting it."""

    def inverse(
        self: Coupled, newer: Tensor, newest: Tensor, branch: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        return newer + branch

    return patch.object(Coupled, "inverse", inverse)


def dropped_gradient(_: nn.Module) -> AbstractContextManager[Any]:
    """What the first branch saved comes back as zeros."""
    recall = tape.Tape.recall

    def forgetful(self: tape.Tape, key: Key, number: int) -> Tensor:
        tensor = recall(self, key, number)
        return torch.zeros_like(tensor) if key == (0, 0) else tensor

    return patch.object(tape.Tape, "recall", forgetful)


@contextmanager
def copied_parameter(rev: nn.Module) -> Iterator[None]:
    """One parameter is a copy: equal now, another one after the first step of training."""
    name, parameter = next(iter(rev.named_parameters()))
    owner = rev.get_submodule(name.rpartition(".")[0])
    registry, key = owner._parameters, name.rpartition(".")[2]
    registry[key] = nn.Parameter(parameter.detach().clone())
    try:
        yield
    finally:
        registry[key] = parameter


def unseeded_dropout(_: nn.Module) -> AbstractContextManager[Any]:
    """The rerun draws new masks."""
    return patch.object(tape, "replayed_rng", lambda _: nullcontext())


def moved_generators(_: nn.Module) -> AbstractContextManager[Any]:
    """The rerun draws the same masks, but leaves the generators where it ended."""

    def replayed(states: list[Tensor] | None) -> AbstractContextManager[None]:
        if states is not None:
            set_rng_states(states)
        return nullcontext()

    return patch.object(tape, "replayed_rng", replayed)


def one_module_unreversed(_: nn.Module) -> AbstractContextManager[Any]:
    """The second residual module stores its activations."""
    dropping = tape.Record.dropping

    def storing(self: tape.Record, of: tape.Tape, key: Key, *more: Any) -> Any:
        return nullcontext() if key == (1, 0) else dropping(self, of, key, *more)

    return patch.object(tape.Record, "dropping", storing)


def statistics_twice(_: nn.Module) -> AbstractContextManager[Any]:
    """The rerun updates BatchNorm's statistics once more."""
    return patch.object(surroundings, "replayed_buffers", lambda _: nullcontext())


@contextmanager
def lost_key(rev: nn.Module) -> Iterator[None]:
    """One buffer is no longer part of the state dict."""
    name, _ = next(iter(rev.named_buffers()))
    owner, _, key = name.rpartition(".")
    registry = rev.get_submodule(owner)._non_persistent_buffers_set
    registry.add(key)
    try:
        yield
    finally:
        registry.remove(key)


def inexact_forward(_: nn.Module) -> AbstractContextManager[Any]:
    """The recorded forward rounds otherwise than the twin."""
    run = tape.Tape.run

    def scaled(self: tape.Tape, *args: Any) -> tape.Output:
        output = run(self, *args)
        return output._replace(branch=output.branch * (1 + 1e-6))

    return patch.object(tape.Tape, "run", scaled)


def rounded_otherwise(_: nn.Module) -> AbstractContextManager[Any]:
    """The inverse is off by a rounding."""
    inverse = Coupled.inverse

    def nearly(self: Coupled, *args: Any, **kwargs: Any) -> Tensor:
        older = inverse(self, *args, **kwargs)
        return torch.nextafter(older, torch.full_like(older, torch.inf))

    return patch.object(Coupled, "inverse", nearly)


@contextmanager
def leaked_tape(_: nn.Module) -> Iterator[None]:
    """Somebody holds on to the tapes, and so to the streams."""
    held: list[tape.Tape] = []
    commit = tape.Tape.commit

    def kept(self: tape.Tape, *args: Any, **kwargs: Any) -> None:
        held.append(self)
        commit(self, *args, **kwargs)

    with patch.object(tape.Tape, "commit", kept):
        yield


@contextmanager
def hoarded_tensors(_: nn.Module) -> Iterator[None]:
    """The forward keeps a hundred copies of each stream until backward reaches it."""
    commit, back = tape.Tape.commit, tape.Tape._back
    held: list[Tensor] = []

    def hoarding(self: tape.Tape, step: Any, newest: Tensor, *args: Any, **kwargs: Any) -> None:
        held.extend(newest.detach().clone() for _ in range(100))
        commit(self, step, newest, *args, **kwargs)

    def letting_go(self: tape.Tape, **kwargs: Any) -> None:
        held.clear()
        back(self, **kwargs)

    with patch.object(tape.Tape, "commit", hoarding), patch.object(tape.Tape, "_back", letting_go):
        yield


_HIDDEN = torch.Generator()


class Noise(nn.Module):
    """Draws from a generator that nobody knows of."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.rand((), generator=_HIDDEN).to(x))


@contextmanager
def unrepeatable_branch(rev: nn.Module) -> Iterator[None]:
    """A branch gives something else when it runs again."""
    block = rev.get_submodule("blocks.1")
    before, block.drop = block.drop, Noise()
    try:
        yield
    finally:
        block.drop = before


def burned_in_batch(rev: nn.Module) -> AbstractContextManager[Any]:
    """The rewired chains take the batch they saw first, and no other."""
    run = tape.Tape.run
    seen: list[int] = []

    def narrow(self: tape.Tape, step: Any, x: Tensor, *args: Any) -> tape.Output:
        seen.append(x.shape[0])
        if x.shape[0] != seen[0]:
            raise RuntimeError(f"expected a batch of {seen[0]}, got {x.shape[0]}")
        return run(self, step, x, *args)

    return patch.object(tape.Tape, "run", narrow)


FAULTS: dict[str, tuple[Fault, str]] = {
    "flipped inverse sign": (flipped_inverse_sign, "reconstruction"),
    "dropped gradient": (dropped_gradient, "parameter gradients"),
    "wrong input gradient": (flipped_inverse_sign, "input gradients"),
    "copied parameter": (copied_parameter, "parameters shared"),
    "unseeded dropout": (unseeded_dropout, "randomness replayed"),
    "moved generators": (moved_generators, "generators afterwards"),
    "one module unreversed": (one_module_unreversed, "activations dropped"),
    "statistics updated twice": (statistics_twice, "statistics once"),
    "lost key": (lost_key, "keys equal"),
    "inexact forward": (inexact_forward, "outputs"),
    "leaked tape": (leaked_tape, "bytes left"),
    "hoarded tensors": (hoarded_tensors, "peak memory"),
    "unrepeatable branch": (unrepeatable_branch, "branches repeat"),
    "rounded otherwise": (rounded_otherwise, "gradients bit for bit"),
    "burned-in batch": (burned_in_batch, "other batch size"),
}
