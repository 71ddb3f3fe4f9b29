"""Who holds the memory of a training step: parameters, optimizer, and each module's activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewire.errors import RewireError
from rewire.meters import LiveBytes
from rewire.recorder import watched_calls

Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
LOSS = "(loss)"


# ---- what is there all the time ----------------------------------------------------------


class Standing(NamedTuple):
    """Bytes that are there before a step and after it."""

    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    input_bytes: int


def standing(model: nn.Module, inputs: Sequence[Tensor], optimizer: Optimizer | None) -> Standing:
    """What a model that trains has beside its activations.

    Args:
        model: Any module.
        inputs: The tensors that it is called with.
        optimizer: Makes the optimizer of a list of parameters; None: there is none.
    """
    parameters = list(model.parameters())
    leaves = [t for t in (*parameters, *inputs) if t.requires_grad and t.is_leaf]
    trained = [p for p in parameters if p.requires_grad]
    return Standing(
        _bytes(parameters),
        _bytes(model.buffers()),
        _bytes(leaves),
        optimizer_bytes(optimizer, trained) if optimizer and trained else 0,
        _bytes(inputs),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_named(name: str) -> Optimizer | None:
    """The class of `torch.optim` of a name.

    Raises:
        RewireError: There is none.
    """
    if name.lower() == "none":
        return None
    base = torch.optim.Optimizer
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, base)]
    known = {c.__name__.lower(): c for c in classes if c is not base}
    if name.lower() not in known:
        names = ", ".join(sorted(c.__name__ for c in known.values()))
        raise RewireError(f"{name}: no optimizer of torch.optim. There are {names}, and none.")
    return known[name.lower()]


def optimizer_bytes(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Bytes of an optimizer's state after its first step, found without memory and arithmetic.

    Args:
        optimizer: A class of `torch.optim`, or what makes an optimizer of a list of parameters.
        parameters: What it trains; only their shapes and dtypes matter.

    Raises:
        RewireError: It cannot step without values.
    """
    twins = [nn.Parameter(torch.empty_like(p, device="meta")) for p in parameters]
    for twin in twins:
        twin.grad = torch.zeros_like(twin)
    try:
        made = optimizer(twins)
        made.step()
    except Exception as error:  # any optimizer's code may run here
        name = getattr(optimizer, "__name__", "the optimizer")
        raise RewireError(
            f"{name}: its first step on tensors without values failed "
            f"({type(error).__name__}: {str(error).strip().splitlines()[:1]}), so its state "
            "cannot be sized. Pass optimizer=None and add it yourself, or one like it."
        ) from error
    states = (value for state in made.state.values() for value in state.values())
    return _bytes(value for value in states if isinstance(value, Tensor) and value.is_meta)


# ---- what waits for backward -------------------------------------------------------------


class Kept(NamedTuple):
    """Bytes alive between forward and backward.

    Attributes:
        outside: What ordinary autograd saves, by the innermost module that was running; the most
            first. A tensor that two modules save belongs to the first.
        output_bytes: What the model returned.
        other_bytes: The rest, in a rewired model what its chains hold.
    """

    outside: tuple[tuple[str, int], ...]
    output_bytes: int
    other_bytes: int


def kept_by_module(model: nn.Module, forward: Callable[[], tuple[Any, Tensor]]) -> Kept:
    """Run a forward and see what waits for its backward, and whose it is.

    Args:
        model: Whose modules get the bytes.
        forward: Runs the model and gives its output and the loss.
    """
    running = [LOSS]
    savers: dict[int, str] = {}

    with LiveBytes() as meter, names_of_calls(model, running):

        def pack(tensor: Tensor) -> Tensor:
            for storage in meter.sizes_of(tensor):
                savers.setdefault(storage, running[-1])
            return tensor.detach()  # a result that its own operation saves would hold itself alive

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output, loss = forward()
    returned = meter.sizes_of(output)
    counted: Counter[str] = Counter()
    for storage, name in savers.items():
        if storage not in returned:
            counted[name] += meter.size(storage)
    found = tuple((name, size) for name, size in counted.most_common() if size)
    of_output = sum(returned.values())
    other = meter.live - of_output - counted.total()
    del loss
    return Kept(found, of_output, other)


@contextmanager
def names_of_calls(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Have the name of the module whose code runs at the list's end.

    Hooks would do too, and be seen by rewired modules, which have their own rules for them.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def noted(original: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
        running.append(names.get(id(module), running[-1]))
        try:
            return original(module, *args, **kwargs)
        finally:
            running.pop()

    with watched_calls(noted):
        yield


@contextmanager
def saved_inside(running: Sequence[str]) -> Iterator[dict[str, int]]:
    """Count the bytes that autograd keeps for backward while something runs.

    What saved-tensor hooks inside it take (a reversible chain's, checkpoint's) does not
    count: autograd hands a tensor to the innermost hooks only.

    Args:
        running: Names of what runs just now, the innermost last; nothing: not counted.

    Yields:
        Bytes by name, filled while forward runs; nothing kept, no entry.
    """
    kept: dict[str, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if running:
            kept[running[-1]] = kept.get(running[-1], 0) + tensor.nbytes
        return tensor.detach()  # a result that its own operation saves would hold itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept
