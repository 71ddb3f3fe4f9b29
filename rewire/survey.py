"""A survey of one training forward: which module's code saves which tensors for backward.

On fake tensors where that goes, so that it costs neither memory nor arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rewire.costs import Call, Calls
from rewire.errors import CannotTrace
from rewire.inputs import Example, one_more
from rewire.isolation import as_it_is, isolated, lend_fakes, plain_homes, training_mode, uncompiled
from rewire.recorder import watched_calls
from rewire.replay import version
from rewire.structure import flatten, map_leaves, tensors_of
from rewire.watching import as_fake, own_copy

# Operations that an element takes where it is only read and written: a plan does not hang on the
# machine that makes it. Weighed low, so that what saves much and computes little is checkpointed.
_PER_ELEMENT = 10


@dataclass(slots=True)
class Given:
    """A tensor that a call is handed: the tensor and its storage by number, and its versions.

    Attributes:
        tensor: Its number.
        storage: Of its memory.
        before: Version when the call began.
        after: When it had ended.
        late: At the end of the whole forward.
    """

    tensor: int
    storage: int
    before: int
    after: int = 0
    late: int = 0


@dataclass(slots=True)
class Visit:
    """One call of a module.

    Attributes:
        name: Qualified name of the module.
        given: The tensors among its arguments.
        simple: Its arguments are tensors, numbers and containers of them.
        events: What happened in its code, in order: visits of others, and storages that were saved.
        operations: Of its own code.
        result: Number and version of the tensor that it gave, where that is all.
    """

    name: str
    given: list[Given]
    simple: bool
    events: list[Visit | int] = field(default_factory=list)
    operations: int = 0
    result: tuple[int, int] | None = None

    @property
    def visits(self) -> Iterator[Visit]:
        """Those of its own code."""
        return (event for event in self.events if isinstance(event, Visit))

    def inside(self) -> Iterator[Visit]:
        """Itself, and all visits in it."""
        yield self
        for visit in self.visits:
            yield from visit.inside()


@dataclass
class Survey:
    """One training forward.

    Attributes:
        root: The model's own call.
        sizes: Bytes of each storage; 0 of those that are there anyway (parameters, inputs).
        weights: Bytes of the parameters' storages.
    """

    root: Visit
    sizes: dict[int, int]
    weights: dict[int, int]


def survey(model: nn.Module, example: Example) -> Survey:
    """Watch a forward in train mode, or in eval mode where that does not run on the example.

    Raises:
        CannotTrace: It runs in neither with gradients.
    """
    failure: Exception | None = None
    for training, run in _attempts(example):
        for on_fakes in (True, False):
            try:
                return _surveyed(model, run, training, on_fakes)
            except Exception as error:  # it may want targets, a larger batch, the values of tensors
                failure = failure or error
    raise CannotTrace(
        f'outside="checkpoint": {type(model).__qualname__} does not run with gradients on the '
        f"example inputs: {failure}".splitlines()[0]
        + '. Give `example_inputs=` that it trains on, or use outside="store".'
    )


def _attempts(example: Example) -> Iterator[tuple[bool, Example]]:
    yield True, example
    with suppress(Exception):  # an object among the arguments cannot be copied
        yield True, one_more(example)[1]  # BatchNorm of one value has no variance
    yield False, example


def _surveyed(model: nn.Module, example: Example, training: bool, on_fakes: bool) -> Survey:
    given = example.args, dict(example.kwargs)
    with ExitStack() as stack:
        parameters = () if on_fakes else model.parameters()
        stack.enter_context(isolated(model, parameters))
        stack.enter_context(training_mode(model, training))
        stack.enter_context(uncompiled())
        stack.enter_context(plain_homes())
        stack.enter_context(torch.enable_grad())
        if on_fakes:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            args, kwargs = map_leaves(lambda leaf: as_fake(mode, leaf), given)
            stack.enter_context(mode)
            lend_fakes(model, mode)
        else:
            args, kwargs = map_leaves(own_copy, given)
        return _Surveyor(model, (args, kwargs)).run()


class _Surveyor:
    """Watches the calls of a model, and what autograd saves in them."""

    def __init__(self, model: nn.Module, arguments: Any) -> None:
        self._model, self._arguments = model, arguments
        self._names = {id(module): name for name, module in model.named_modules()}
        self._scope: list[Visit] = [Visit("", [], False)]
        self._tensors: dict[int, int] = {}
        self._storages: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is used twice
        self._sizes: dict[int, int] = {}
        self._given: list[tuple[Given, Tensor]] = []
        self._weights = [tensor for tensor in model.parameters() if tensor.requires_grad]
        for tensor in (*model.parameters(), *model.buffers(), *tensors_of(arguments)):
            self._sizes[self._storage(tensor)] = 0

    def run(self) -> Survey:
        """Run the model."""
        args, kwargs = self._arguments
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, as_it_is)
        with watched_calls(self._call), Calls(self._count), hooks:
            result = self._model(*args, **kwargs)
        del result
        for given, tensor in self._given:
            given.late = version(tensor)
        root = next(self._scope[0].visits)
        weights = {self._storage(tensor): tensor.nbytes for tensor in self._weights}
        return Survey(root, self._sizes, weights)

    def _call(
        self,
        original: Callable[..., Any],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        leaves = flatten((args, kwargs))[0]
        name = self._names.get(id(module), "")
        simple = all(isinstance(leaf, (Tensor, int, float, complex)) for leaf in leaves)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        given = [Given(self._tensor(t), self._storage(t), version(t)) for t in tensors]
        self._given += zip(given, tensors, strict=True)
        visit = Visit(name, given, simple and bool(name))
        self._scope[-1].events.append(visit)
        self._scope.append(visit)
        try:
            result = original(module, *args, **kwargs)
        finally:
            self._scope.pop()
        for row, tensor in zip(given, tensors, strict=True):
            row.after = version(tensor)
        if isinstance(result, Tensor):
            visit.result = self._tensor(result), version(result)
        return result

    def _count(self, call: Call) -> None:
        self._scope[-1].operations += call.amount * (1 if call.product else _PER_ELEMENT)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._scope[-1].events.append(self._storage(tensor))
        return tensor.detach()

    def _tensor(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        return self._tensors.setdefault(id(tensor), len(self._tensors))

    def _storage(self, tensor: Tensor) -> int:
        try:
            held: Any = tensor.untyped_storage()
            key, size = held._cdata, held.nbytes()
        except (RuntimeError, NotImplementedError):  # a sparse one, a wrapper
            held, key, size = tensor, -id(tensor), tensor.nbytes
        self._alive.append(held)
        number = self._storages.setdefault(key, len(self._storages))
        self._sizes.setdefault(number, size)
        return number
