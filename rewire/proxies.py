"""Proxies that know the value they had in one run."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, fx

from rewire.errors import CannotTrace
from rewire.traces import Trace


class HintTracer(Protocol):
    """What a proxy needs of its tracer."""

    trace: Trace

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Note a call and wrap what it gives."""

    def register(self, proxy: HintProxy) -> None:
        """Note a proxy that the code may hold."""

    def guard(self, node: fx.Node, value: Any) -> Any:
        """Note a decision."""

    def ask(self, node: fx.Node) -> bool:
        """Note a decision by the value of a tensor."""

    def plainly(self) -> AbstractContextManager[None]:
        """What runs in here is not the traced code."""


class HintProxy(fx.Proxy):
    """A proxy that answers Python's questions from its hint, and has the answers guarded."""

    def __init__(self, node: fx.Node, tracer: HintTracer) -> None:
        super().__init__(node, tracer)  # type: ignore[arg-type]
        tracer.register(self)

    @property
    def hint(self) -> Any:
        """The value in the traced run."""
        return self.tracer.trace.hints[self.node]  # type: ignore[attr-defined]

    @property
    def __class__(self) -> Any:
        """So that `isinstance` answers as for the value."""
        return Tensor if isinstance(self.hint, Tensor) else type(self.hint)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise TypeError("a proxy keeps its class")

    def __getattr__(self, name: str) -> Any:
        with self.tracer.plainly():  # type: ignore[attr-defined]
            value = getattr(self.hint, name)
        if name == "ndim" and isinstance(self.hint, Tensor):
            return value  # a program is for inputs of these numbers of dimensions
        if callable(value):
            return _Method(self, name)
        return self._call(getattr, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise CannotTrace(f"its forward sets the attribute {name!r} of an argument or result")
        object.__setattr__(self, name, value)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})

    def _decide(self, function: Callable[[Any], Any]) -> Any:
        if isinstance(self.hint, Tensor):
            raise CannotTrace("its forward decides by the values of a tensor")
        with self.tracer.plainly():  # type: ignore[attr-defined]
            value = function(self.hint)
        decided = self._call(function)
        return self.tracer.guard(decided.node, value)  # type: ignore[attr-defined]

    def __bool__(self) -> bool:
        if isinstance(self.hint, Tensor):
            return self.tracer.ask(self.node)  # type: ignore[attr-defined,no-any-return]
        return self._decide(bool)  # type: ignore[no-any-return]

    def __len__(self) -> int:
        if isinstance(self.hint, Tensor):
            return self._call(getattr, "shape")._call(operator.getitem, 0).__index__()  # type: ignore[no-any-return]
        return self._decide(len)  # type: ignore[no-any-return]

    def __int__(self) -> int:
        return self._decide(int)  # type: ignore[no-any-return]

    def __float__(self) -> float:
        return self._decide(float)  # type: ignore[no-any-return]

    def __index__(self) -> int:
        return self._decide(operator.index)  # type: ignore[no-any-return]

    def __ceil__(self) -> Any:
        return self._call(math.ceil)

    def __floor__(self) -> Any:
        return self._call(math.floor)

    def __iter__(self) -> Iterator[Any]:
        return iter([self._call(operator.getitem, number) for number in range(len(self))])

    def __contains__(self, item: Any) -> bool:
        return bool(self._call(operator.contains, item))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._call(operator.setitem, key, value)

    def __hash__(self) -> int:
        return id(self)


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[HintProxy, Any], Any]:
    """`x += y` on a tensor changes it; numbers are made anew."""

    def change(proxy: HintProxy, other: Any) -> Any:
        return proxy._call(function, other) if isinstance(proxy.hint, Tensor) else NotImplemented

    return change


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(HintProxy, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _Method:
    """A bound method of a proxy."""

    def __init__(self, proxy: HintProxy, name: str) -> None:
        self._proxy, self._name = proxy, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        proxy = self._proxy
        if self._name in ("dim", "ndimension") and isinstance(proxy.hint, Tensor):
            return proxy.hint.ndim
        return proxy.tracer.create_proxy("call_method", self._name, (proxy, *args), kwargs)
