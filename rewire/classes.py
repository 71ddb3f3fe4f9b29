"""Classes of modules that run other code: each a subclass of the module's own, of the same name."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

_CLASSES: dict[tuple[type, type], type[nn.Module]] = {}


class Replacing:
    """What such a class adds; subclasses of this one bring the forward."""

    _rewired_from: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the original class: this one has no name of its own."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _revive, (self._rewired_from, type(self).__bases__[0]), state


def _revive(original: type[nn.Module], replacing: type[Replacing]) -> nn.Module:
    """A module without state, for pickle and copy."""
    cls = subclass_of(original, replacing)
    return cls.__new__(cls)


def subclass_of(original: type[nn.Module], replacing: type[Replacing]) -> type[nn.Module]:
    """The subclass of `original` that runs other code; it bears the same name."""
    key = original, replacing
    if key not in _CLASSES:
        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_rewired_from": original,
        }
        kind: Any = _Recompiled if issubclass(original, fx.GraphModule) else type
        _CLASSES[key] = kind(original.__name__, (replacing, original), names)
    return _CLASSES[key]


def original_class(cls: type) -> type[nn.Module]:
    """The class that one of these was made from; other classes as they are."""
    return getattr(cls, "_rewired_from", cls)


class _Recompiled(type(fx.GraphModule)):  # type: ignore[misc]
    """A graph module writes its code into its class: into the one it was made from."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name == "forward":
            setattr(cls._rewired_from, name, value)
        elif name not in ("__call__", "_wrapped_call"):
            super().__setattr__(name, value)
