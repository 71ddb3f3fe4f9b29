"""The modules outside the chains that run with their activations dropped.

Such a module is an instance of a subclass of its own class, as a rewired home is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewire import stretches
from rewire.classes import Replacing, original_class, subclass_of
from rewire.isolation import plain
from rewire.stretches import Place, Stretch, place_of


def install(rev: nn.Module, stretch: Stretch) -> None:
    """Have the modules of a stretch run with their activations dropped."""
    for number, name in enumerate(stretch.row.modules):
        module = rev.get_submodule(name)
        module.__dict__["_stretch"] = Place(stretch, number)
        module.__class__ = subclass_of(type(module), CheckpointedModule)


class CheckpointedModule(Replacing):
    """What a module of a stretch adds to its class: a forward, and pickling by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's forward, activations dropped."""
        forward: Any = original_class(type(self)).forward
        place = place_of(self)  # type: ignore[arg-type]
        if place is None or plain.active or _is_traced():
            return forward(self, *args, **kwargs)
        run: Any = stretches.run
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(run)  # type: ignore[no-untyped-call]
        return run(self, place, forward, args, kwargs)


def _is_traced() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch.compiler.is_exporting()
