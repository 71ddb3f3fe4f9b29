"""Recalibrated statistics are the average over the batches, and nothing else changes."""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional

import rewire
from rewire.errors import RewireError
from rewire.recalibration import recalibrate
from tests.specimens import DIM, SPECIMENS

DOUBLE = torch.float64
State = dict[str, Tensor]


def net() -> nn.Sequential:
    """Two norms, with statistics that fit nothing, flags that differ and two momenta."""
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.BatchNorm1d(4)
    model = nn.Sequential(*layers).to(DOUBLE)
    for norm in (layers[1], layers[4]):
        norm.running_mean.fill_(7)
        norm.num_batches_tracked.fill_(5)
    layers[4].momentum, layers[4].eps = 0.3, 1e-3
    layers[1].eval()
    layers[2].eval()
    return model


def batches(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3, dtype=DOUBLE) for size in sizes]


def state_of(model: nn.Module) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(before: State, after: State) -> None:
    assert before.keys() == after.keys()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


def habits(model: nn.Module) -> list[Any]:
    """Training flags and momenta."""
    return [(m.training, getattr(m, "momentum", None)) for m in model.modules()]


def by_hand(model: nn.Sequential, given: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The average of each norm's means and variances, without any of torch's norms."""
    linear = model[0]
    moments: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for x in given:
        h = x @ linear.weight.T + linear.bias
        for number, norm in enumerate((model[1], model[4])):
            mean, centred = h.mean(0), h - h.mean(0)
            square = centred.square().sum(0)
            moments[number].append((mean, square / (len(h) - 1)))
            h = torch.tanh(centred / torch.sqrt(square / len(h) + norm.eps))
    pairs = [list(zip(*each, strict=True)) for each in moments]
    return [(torch.stack(means).mean(0), torch.stack(v).mean(0)) for means, v in pairs]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_statistics_are_the_plain_average_over_the_batches(count: int) -> None:
    model, given = net(), batches(9, 4, 16, 5, 2)
    before = habits(model)
    assert recalibrate(model, given, batches=count) == count
    # Dropout stands before the second norm: its statistics tell that it was not active.
    for norm, (mean, var) in zip((model[1], model[4]), by_hand(model, given[:count]), strict=True):
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-12, atol=1e-12)
        assert norm.num_batches_tracked == count
        assert not norm.running_mean.requires_grad
    assert habits(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fewer_batches_than_asked_are_counted_and_more_are_not_drawn() -> None:
    model, given = net(), batches(4, 4, 4)
    assert recalibrate(model, given) == 3
    rest = iter(given)
    assert recalibrate(model, rest, 2) == 2
    assert list(rest) == given[2:]


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(DIM), (5, DIM, 3)),
        (nn.BatchNorm2d(DIM, affine=False, momentum=None), (5, DIM, 3, 3)),
        (nn.BatchNorm3d(DIM), (5, DIM, 2, 2, 2)),
        (nn.SyncBatchNorm(DIM), (5, DIM, 3, 3)),
        (timm.layers.BatchNormAct2d(DIM, drop_layer=nn.Dropout), (5, DIM, 3, 3)),
        (timm.layers.SyncBatchNormAct(DIM), (5, DIM, 3, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_batch_norm(norm: nn.Module, shape: tuple[int, ...]) -> None:
    given = [torch.randn(shape) + 3 for _ in range(3)]
    recalibrate(norm, given)
    mean = torch.stack([x.transpose(0, 1).flatten(1).mean(1) for x in given]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    assert norm.training


def test_a_shared_norm_averages_over_all_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, affine=False, dtype=DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) + 10)

    model, (x, y) = Twice(), batches(6, 6)
    recalibrate(model, [x, y])
    mean = (x.mean(0) + y.mean(0) + 20) / 4
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    assert model.norm.num_batches_tracked == 4


def test_a_rewired_model_gets_the_statistics_of_what_its_norms_see() -> None:
    specimen = SPECIMENS["bottlenecks"]
    model = specimen.make().double()
    given = [specimen.inputs() for _ in range(3)]
    rev = rewire.make_reversible(model, given[0])
    seen: dict[str, list[Tensor]] = {}
    names = [name for name, module in rev.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for name in names:
        seen[name] = []

        def look(_: nn.Module, args: Any, into: list[Tensor] = seen[name]) -> None:
            into.append(args[0].mean((0, 2, 3)))

        rev.get_submodule(name).register_forward_pre_hook(look)
    recalibrate(rev, given)
    assert len(names) == 8
    for name in names:
        mean = torch.stack(seen[name]).mean(0)
        assert len(seen[name]) == 3
        assert rev.get_submodule(name).running_mean is model.get_submodule(name).running_mean
        torch.testing.assert_close(model.get_submodule(name).running_mean, mean)


# ---- what a loader gives -----------------------------------------------------------------


class Named(nn.Module):
    """Takes keyword arguments, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=DOUBLE)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.norm(images)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(6)),
        lambda x: [x, "labels"],
        lambda x: {"images": x, "labels": torch.zeros(6)},
        lambda x: UserDict(images=x),
    ],
    ids=["tensor", "tuple", "list", "dict", "mapping"],
)
def test_batches_come_as_tensors_tuples_or_keyword_arguments(wrap: Any) -> None:
    model, (x,) = Named(), batches(6)
    assert recalibrate(model, iter([wrap(x)])) == 1
    torch.testing.assert_close(model.norm.running_mean, x.mean(0))


def test_the_loader_may_use_gradients_and_the_model_does_not() -> None:
    model, grad_modes = Named(), []
    model.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))

    def loader() -> Iterator[Tensor]:
        x = torch.randn(6, 3, dtype=DOUBLE, requires_grad=True)
        yield torch.autograd.grad(x.square().sum(), x)[0]

    recalibrate(model, loader())
    assert grad_modes == [False]
    assert torch.is_grad_enabled()


# ---- what is left as found ---------------------------------------------------------------


def broken(error: BaseException) -> Iterator[Tensor]:
    """Two batches, then an error."""
    yield from batches(4, 4)
    raise error


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_an_interrupted_run_changes_nothing(error: BaseException) -> None:
    model = net()
    before, flags = state_of(model), habits(model)
    with pytest.raises(type(error)):
        recalibrate(model, broken(error))
    assert_same(before, model.state_dict())
    assert habits(model) == flags
    # An error of the model itself, in its third call.
    with pytest.raises(RuntimeError):
        recalibrate(model, [*batches(4, 4), torch.zeros(4, 9, dtype=DOUBLE)])
    assert_same(before, model.state_dict())
    assert habits(model) == flags


class Busy(nn.Module):
    """Writes into a buffer, puts a new tensor in another, and draws when training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(()))  # named as a BatchNorm's
        self.register_buffer("latest", torch.zeros(3, dtype=DOUBLE), persistent=False)
        self.instance = nn.InstanceNorm1d(3, track_running_stats=True, dtype=DOUBLE)
        self.norm = nn.BatchNorm1d(3, dtype=DOUBLE)
        self.head = nn.BatchNorm1d(3, dtype=DOUBLE)
        self.head.running_mean.fill_(2)
        self.head.num_batches_tracked.fill_(9)

    def forward(self, x: Tensor) -> Tensor:
        self.running_mean += 1
        self.latest = x[0]
        self.instance(x.T[None])
        x = self.norm(functional.dropout(x, 0.5, self.training))
        return self.head(x) if self.training else x


@pytest.mark.parametrize("fails", [False, True])
def test_other_buffers_and_norms_that_do_not_run_are_left_alone(fails: bool) -> None:
    model, given = Busy(), batches(6, 6)
    latest, before = model.latest, state_of(model)
    if fails:
        with pytest.raises(OSError, match="disk"):
            recalibrate(model, broken(OSError("disk")))
    else:
        recalibrate(model, given)
        mean = torch.stack([x.mean(0) for x in given]).mean(0)
        torch.testing.assert_close(model.norm.running_mean, mean)
    assert model.latest is latest
    assert not latest.any()
    after = model.state_dict()
    others = [name for name in before if not name.startswith("norm.")]
    assert {"running_mean", "instance.running_mean", "head.running_mean"} < set(others)
    assert_same({name: before[name] for name in others}, {name: after[name] for name in others})


@pytest.mark.parametrize("fails", [False, True])
def test_random_generators_end_where_they_began(fails: bool) -> None:
    def shuffled() -> Iterator[Tensor]:
        for _ in range(3):
            yield torch.randn(4, 3, dtype=DOUBLE) + random.random() + numpy.random.rand()
        if fails:
            raise OSError("disk")

    def drawn() -> list[float]:
        return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]

    model, expected = net(), []
    for _ in range(2):
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(3)
        if expected:
            with pytest.raises(OSError, match="disk") if fails else nullcontext():
                recalibrate(model, shuffled())
        expected.append(drawn())
    assert expected[0] == expected[1]


# ---- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "gave no batch"),
        (iter(()), "gave no batch"),
        (torch.zeros(4, 3), "got one Tensor"),
        ({"images": torch.zeros(4, 3)}, "got one dict"),
        ([torch.ones(4, 3, dtype=DOUBLE), "x"], "batch 1 is a str"),
        ([()], "batch 0 is an empty tuple"),
        ([torch.full((4, 3), float("nan"), dtype=DOUBLE)], "1: its statistics hold NaN"),
    ],
    ids=["empty", "exhausted", "tensor", "dict", "item", "empty item", "NaN"],
)
def test_refused_loaders_leave_the_statistics(loader: Any, message: str) -> None:
    model = net()
    before, flags = state_of(model), habits(model)
    with pytest.raises(RewireError, match=message):
        recalibrate(model, loader)
    assert_same(before, model.state_dict())
    assert habits(model) == flags


@pytest.mark.parametrize("count", [0, -3])
def test_less_than_one_batch_is_refused(count: int) -> None:
    with pytest.raises(RewireError, match=f"batches: got {count}"):
        recalibrate(net(), batches(4), count)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
        nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)),
    ],
    ids=["no BatchNorm", "no statistics"],
)
def test_models_without_statistics_are_refused(model: nn.Module) -> None:
    with pytest.raises(RewireError, match="BatchNorm that tracks statistics"):
        recalibrate(model, [torch.ones(4, 3)])


def test_a_model_whose_norms_do_not_run_is_refused() -> None:
    class Idle(Named):
        def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
            return images

    model = Idle()
    model.norm.num_batches_tracked.fill_(4)
    before = state_of(model)
    with pytest.raises(RewireError, match="none of its 1 BatchNorms ran, the first is norm"):
        recalibrate(model, batches(4))
    assert_same(before, model.state_dict())
