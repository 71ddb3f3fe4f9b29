"""What modules find around them when they run, kept so that a rerun finds the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from rewire.attributes import Kept, changed_attribute, replayed_attributes
from rewire.holdings import (
    Changed,
    Flags,
    Held,
    Holdings,
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
    """

    autocast: AutocastState
    held: Sequence[Held] = ()
    flags: Flags = ()
    buffers: Changed = field(default_factory=list)
    attributes: Sequence[Kept] = ()

    @contextmanager
    def noted(self, holdings: Holdings, input_bytes: int) -> Iterator[None]:
        """Note them of the first run, which is inside."""
        self.held, self.flags = holdings.held(), holdings.flags()
        before = holdings.before(input_bytes // _SMALL)
        modes = tuple(training for _, training in self.flags)
        settings = holdings.attributes.before(modes)
        with uncached_autocast():
            yield
        self.buffers = holdings.after(before)
        self.attributes = holdings.attributes.after(modes, settings)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run in them again, always with gradients: some modules compute something else without."""
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(replayed_autocast(self.autocast))
            stack.enter_context(replayed_tensors(self.held))
            stack.enter_context(replayed_buffers(self.buffers))
            stack.enter_context(replayed_attributes(self.attributes))
            stack.enter_context(replayed_flags(self.flags))
            yield

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
