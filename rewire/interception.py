"""Routing what a module's own code does to whoever traces it.

Children that it calls, torch functions, parameters that it reads, attributes that it sets on
others, custom autograd functions, and what it reads of objects that it has made, in one thread.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rewire.errors import CannotTrace
from rewire.proxies import HintProxy
from rewire.recorder import watched_calls

# Functions without tensor arguments, which torch would not hand to a proxy.
_FACTORIES = """arange empty eye full linspace ones rand randint randn tensor zeros
    finfo iinfo""".split()


class Intercepting(Protocol):
    """Who traces.

    Attributes:
        evaluating: What runs is not the traced code.
    """

    evaluating: bool

    def attribute(self, tensor: Tensor) -> Any:
        """A parameter or buffer as the code is to see it; None: it is not the home's."""

    def makes(self, module: nn.Module) -> None:
        """The code makes a module."""

    def read(self, module: nn.Module, name: str) -> None:
        """The code reads an attribute of a module, or a parameter, buffer or child."""

    def has_handed(self, value: Any) -> bool:
        """Whether the code has handed an object on."""

    def is_foreign(self, module: nn.Module) -> bool:
        """Whether a module is one that the code calls, and does not consist of or make."""

    def module_call(
        self, original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any
    ) -> Any:
        """A call of a module."""

    def torch_call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a torch function or of a tensor's method."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """A call of anything else."""


@contextmanager
def intercepted(tracer: Intercepting, made: Collection[type]) -> Iterator[None]:
    """Route this thread's calls through a tracer.

    Args:
        tracer: Where to.
        made: Classes of objects that the code makes: into such, once handed on, it may not look.
    """
    routes = _Routes(tracer)
    with ExitStack() as stack:
        stack.enter_context(watched_calls(tracer.module_call))
        stack.enter_context(mock.patch.object(nn.Module, "__init__", routes.init()))
        stack.enter_context(mock.patch.object(nn.Module, "__setattr__", routes.setattr()))
        stack.enter_context(mock.patch.object(nn.Module, "__getattr__", routes.getattr()))
        read = routes.getattribute()
        stack.enter_context(mock.patch.object(nn.Module, "__getattribute__", read))
        apply = inspect.getattr_static(torch.autograd.Function, "apply")
        applied = classmethod(routes.apply(apply))
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", applied))
        for name in _FACTORIES:
            factory = routes.function(getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, factory))
        for cls in made:
            look = routes.look_into(cls)
            stack.enter_context(mock.patch.object(cls, "__getattribute__", look))
        stack.enter_context(_Capture(tracer))
        yield


class _Routes:
    """What stands in the place of functions while they are intercepted."""

    def __init__(self, tracer: Intercepting) -> None:
        self._tracer = tracer
        self._thread = threading.get_ident()

    def _mine(self) -> bool:
        return threading.get_ident() == self._thread and not self._tracer.evaluating

    def init(self) -> Callable[..., Any]:
        original = nn.Module.__init__

        def traced_init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if self._mine():
                self._tracer.makes(module)
            original(module, *args, **kwargs)

        return traced_init

    def getattribute(self) -> Callable[..., Any]:
        def traced_getattribute(module: nn.Module, name: str) -> Any:
            if not self._mine():
                return object.__getattribute__(module, name)
            self._tracer.read(module, name)
            return self._as_seen(object.__getattribute__(module, name))

        return traced_getattribute

    def _as_seen(self, value: Any) -> Any:
        known = self._tracer.attribute(value) if isinstance(value, Tensor) else None
        return value if known is None else known

    def getattr(self) -> Callable[..., Any]:
        original = nn.Module.__getattr__

        def traced_getattr(module: nn.Module, name: str) -> Any:
            value = original(module, name)
            return self._as_seen(value) if self._mine() else value

        return traced_getattr

    def setattr(self) -> Callable[..., Any]:
        original = nn.Module.__setattr__

        def traced_setattr(module: nn.Module, name: str, value: Any) -> None:
            if self._mine() and self._tracer.is_foreign(module):
                if getattr(module, name, None) is value:
                    return
                raise CannotTrace(f"its forward sets the attribute {name!r} of a child")
            original(module, name, value)

        return traced_setattr

    def function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def traced_function(*args: Any, **kwargs: Any) -> Any:
            if self._mine() and _has_proxy((args, kwargs)):
                return self._tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return traced_function

    def apply(self, descriptor: Any) -> Callable[..., Any]:
        """Custom autograd functions are calls like others; their C++ side takes no proxies."""

        def traced_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if not (self._mine() and _has_proxy((args, kwargs))):
                return descriptor.__get__(None, cls)(*args, **kwargs)

            def call(*args: Any, **kwargs: Any) -> Any:
                return cls.apply(*args, **kwargs)

            call.__name__ = call.__qualname__ = f"apply_{cls.__name__}"
            return self._tracer.create_proxy("call_function", call, args, kwargs)

        return traced_apply

    def look_into(self, made: type) -> Callable[..., Any]:
        """What others do to an object in the meantime the code would see, and the trace not."""
        original: Callable[..., Any] = made.__getattribute__

        def traced_look(value: Any, name: str) -> Any:
            if name != "__class__" and self._mine() and self._tracer.has_handed(value):
                raise CannotTrace(
                    f"its forward makes an object of class {made.__qualname__}, hands it on and "
                    f"then reads its {name!r}"
                )
            return original(value, name)

        return traced_look


class _Capture(TorchFunctionMode):
    """Hands every torch call of the traced code to the tracer."""

    def __init__(self, tracer: Intercepting) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._tracer.evaluating:
            return func(*args, **(kwargs or {}))
        return self._tracer.torch_call(func, args, kwargs or {})


def _has_proxy(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_proxy, value))
    if type(value) is dict:
        return any(map(_has_proxy, value.values()))
    return type(value) is HintProxy
