"""What modules find around them when they run, kept so that a rerun finds the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from rewire.attributes import Kept, changed_attribute, replayed_attributes
from rewire.compiling import running_plain, runs_plain
from rewire.holdings import (
    Changed,
    Flags,
    Held,
    Holdings,
    changed_flag,
    changed_parameter,
    replayed_buffers,
    replayed_flags,
    replayed_tensors,
)
from rewire.replay import AutocastState, replayed_autocast, uncached_autocast

_SMALL = 4096  # a buffer of this fraction of the input costs nothing to keep


@dataclass(slots=True)
class Surroundings:
    """Autocast, and what the modules of one run held; random numbers are apart.

    Attributes:
        autocast: Its settings.
        held: Parameters and buffers.
        flags: The modules' training flags.
        buffers: Those that the run changed, as they were.
        attributes: The same of plain attributes, and those that it read.
        plain: Compiled functions ran as they are.
    """

    autocast: AutocastState
    held: Sequence[Held] = ()
    flags: Flags = ()
    buffers: Changed = field(default_factory=list)
    attributes: Sequence[Kept] = ()
    plain: bool = False

    @contextmanager
    def noted(self, holdings: Holdings, input_bytes: int, *, plain: bool = False) -> Iterator[None]:
        """Note them of the first run, which is inside.

        Args:
            holdings: Of its modules.
            input_bytes: Of its input.
            plain: Compiled functions are to run as they are.
        """
        self.plain = plain or runs_plain()
        self.held, self.flags = holdings.held(), holdings.flags()
        before = holdings.before(input_bytes // _SMALL)
        modes = tuple(training for _, training in self.flags)
        settings = holdings.attributes.before(modes)
        with uncached_autocast(), running_plain(self.plain):
            yield
        self.buffers = holdings.after(before)
        self.attributes = holdings.attributes.after(modes, settings)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run in them again, always with gradients: some modules compute something else without."""
        autocast, compiled = replayed_autocast(self.autocast), running_plain(self.plain)
        with torch.enable_grad(), autocast, compiled, ExitStack() as stack:
            for context in self._differing():
                stack.enter_context(context)
            yield

    def _differing(self) -> Iterator[AbstractContextManager[None]]:
        """What puts the modules' holdings back; mostly there is nothing to put back."""
        if any(h.registry.get(h.name) is not h.tensor for h in self.held):
            yield replayed_tensors(self.held)
        if self.buffers:
            yield replayed_buffers(self.buffers)
        if self.attributes:
            yield replayed_attributes(self.attributes)
        if changed_flag(self.flags) is not None:
            yield replayed_flags(self.flags)

    def changed(self) -> str | None:
        """What was changed since, so that a rerun would not repeat the run; a whole sentence."""
        if name := changed_parameter(self.held):
            return (
                f"its parameter {name!r} was changed in place after forward. Step the optimizer "
                "after backward."
            )
        if name := changed_attribute(self.attributes):
            return (
                f"the tensor in {name!r}, an attribute that it reads, was changed in place after "
                "forward. Set a new tensor instead."
            )
        return None
