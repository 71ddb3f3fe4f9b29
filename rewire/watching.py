"""Watching one run of a model: its dataflow graph, and which module call each operation is in.

The run is on fake tensors, so it costs neither memory nor arithmetic, and nothing is
traced: the model's own Python runs as always, whatever it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from rewire.dataflow import Watched
from rewire.errors import CannotTrace
from rewire.isolation import isolated, lend_fakes, plain_homes, training_mode, uncompiled
from rewire.recorder import Recorder, watched_calls
from rewire.sides import cloned, structural_copy
from rewire.structure import map_leaves


def watch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Watched:
    """Watch one run of `model` in eval mode; nothing of the model or its inputs changes.

    On fake tensors, or on the real ones without gradients where the model needs values
    (data-dependent shapes).

    Raises:
        CannotTrace: The model does not run on these inputs.
    """
    try:
        return _on_fakes(model, args, kwargs, training=False)
    except Exception as fake_error:
        copies = map_leaves(own_copy, (args, dict(kwargs)))
        try:
            own = isolated(model, model.parameters())
            with own, training_mode(model, False), torch.no_grad():
                return _record(model, *copies)
        except Exception as error:
            raise _does_not_run(model, error) from fake_error


def _does_not_run(model: nn.Module, error: Exception) -> CannotTrace:
    """What to do about a model that does not run on its example."""
    name = type(model).__qualname__
    if any(parameter.is_meta for parameter in model.parameters()):
        return CannotTrace(
            f"{name} is on the meta device, and only its inputs may be. Build it on the CPU; "
            "rewire.estimate alone takes it as it is."
        )
    by_name = isinstance(error, TypeError) and "unexpected keyword" in str(error)
    more = " (a dict is keyword arguments: for one argument, ({...},))" if by_name else ""
    return CannotTrace(
        f"{name} does not run on the example inputs: {_first_line(error)}. "
        f"Give `example_inputs=` that its forward accepts{more}."
    )


def watch_training(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Watched | None:
    """The same in train mode, on fake tensors; None where that does not run.

    It may want targets, a larger batch, or the value of a random number.
    """
    try:
        return _on_fakes(model, args, kwargs, training=True)
    except Exception:  # whatever it is: eval mode has said what there is
        return None


def _on_fakes(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool
) -> Watched:
    try:
        return _watched(model, args, kwargs, training, lend=True)
    except Exception:  # the value of a parameter may be wanted, which a fake one does not have
        return _watched(model, args, kwargs, training, lend=False)


def _watched(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    training: bool,
    *,
    lend: bool,
) -> Watched:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    faked = map_leaves(lambda leaf: as_fake(mode, leaf), (args, dict(kwargs)))
    with isolated(model), training_mode(model, training), mode, torch.enable_grad():
        if lend:
            lend_fakes(model, mode)
        watched = _record(model, *faked)
    watched.fake_mode = mode
    return watched


def as_fake(mode: FakeTensorMode, leaf: Any) -> Any:
    """A fake twin of a tensor; copies of mutable objects, with fake tensors inside."""

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        made = mode.from_tensor(tensor.detach(), static_shapes=True)
        return made.requires_grad_(tensor.requires_grad)

    return structural_copy(leaf, share=fake)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


def _record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Watched:
    recorder = Recorder(model, (args, kwargs))
    apply = inspect.getattr_static(torch.autograd.Function, "apply")
    applied = classmethod(recorder.applied(apply))
    opaque = mock.patch.object(torch.autograd.Function, "apply", applied)
    eager = uncompiled()
    with watched_calls(recorder.call), plain_homes(), opaque, eager, recorder:
        model(*args, **kwargs)
    return recorder.watched


def own_copy(leaf: Any) -> Any:
    """A copy that may be written into, tensors included."""
    return structural_copy(leaf, share=cloned)
