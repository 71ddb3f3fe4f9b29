"""The modules outside the chains that run with their activations dropped.

Such a module is an instance of a subclass of its own class, as a rewired home is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rewire import stretches
from rewire.isolation import plain
from rewire.programs import original_class
from rewire.stretches import Place, Stretch, place_of

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def install(rev: nn.Module, stretch: Stretch) -> None:
    """Have the modules of a stretch run with their activations dropped."""
    for number, name in enumerate(stretch.row.modules):
        module = rev.get_submodule(name)
        module.__dict__["_stretch"] = Place(stretch, number)
        module.__class__ = checkpointed_class(type(module))


class CheckpointedModule:
    """What a module of a stretch adds to its class: a forward, and pickling by name."""

    _rewired_from: type[nn.Module]

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _revive, (self._rewired_from,), state


def _is_traced() -> bool:
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing or torch.compiler.is_exporting()


def _revive(original: type[nn.Module]) -> nn.Module:
    """A module of a stretch without state, for pickle and copy."""
    cls = checkpointed_class(original)
    return cls.__new__(cls)


def checkpointed_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `original` that drops its activations; it bears the same name."""
    if original not in _CLASSES:
        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_rewired_from": original,
        }
        _CLASSES[original] = type(original.__name__, (CheckpointedModule, original), names)
    return _CLASSES[original]
