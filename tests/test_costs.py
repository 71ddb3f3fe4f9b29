"""What operations cost: which are told of, and how long they take."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import rewire
from rewire.costs import Call, Calls, Clock, Form, clock_of

CPU = torch.device("cpu")


def told(run: object, *args: Tensor) -> Counter[Call]:
    seen: Counter[Call] = Counter()

    def count(call: Call) -> None:
        seen[call] += 1

    with Calls(count):
        run(*args)  # type: ignore[operator]
    return seen


def by_name(calls: Counter[Call]) -> dict[str, Call]:
    return {str(call.func): call for call in calls}


def test_operations_are_told_with_forms_and_amounts_and_views_are_not() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    calls = told(lambda a, b: torch.relu((a @ b).t()), a, b)
    product, rest = by_name(calls)["aten.mm.default"], by_name(calls)["aten.relu.default"]
    assert len(calls) == 2
    assert (product.amount, product.product) == (2 * 3 * 5 * 7, True)
    assert (rest.amount, rest.product) == (21, False)
    assert rest.args[0].size == (7, 3)  # type: ignore[attr-defined]
    assert rest.args[0].stride == (1, 7)  # type: ignore[attr-defined]
    assert told(torch.relu, torch.zeros(2)) == told(torch.relu, torch.ones(2))


def test_where_the_device_is_not_here_amounts_are_weighed() -> None:
    clock = Clock(torch.device("cuda"), here=False)
    calls = told(torch.mm, torch.randn(3, 5), torch.randn(5, 7))
    assert clock.cost(calls) == 2 * 3 * 5 * 7
    dear = told(torch.relu, torch.randn(100))
    assert clock.cost(dear) > 100
    assert clock.cost(dict.fromkeys(dear, 3)) == 3 * clock.cost(dear)


def test_measured_once_and_nothing_drawn() -> None:
    clock = Clock(CPU, here=True)
    calls = told(lambda x: nn.functional.dropout(x @ x, 0.5), torch.randn(64, 64))
    state = torch.get_rng_state()
    first = clock.cost(calls)
    assert first > 0
    assert clock.cost(calls) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert clock_of(CPU) is clock_of(torch.device("cpu"))


def test_a_generator_of_the_user_s_is_left_alone() -> None:
    mine = torch.Generator().manual_seed(3)
    calls = told(lambda: torch.rand(100, generator=mine))
    state = mine.get_state()
    assert Clock(CPU, here=True).cost(calls) > 0
    assert torch.equal(mine.get_state(), state)


def test_what_somebody_else_s_operation_takes_is_not_tried() -> None:
    ran = []

    @torch.library.custom_op("rewire_tests::counted", mutates_args=())
    def counted(x: Tensor) -> Tensor:
        ran.append(x)
        return x.clone()

    calls = told(counted, torch.ones(2**17))
    assert len(ran) == 1
    clock = Clock(CPU, here=True)
    clock.measure(told(torch.relu, torch.ones(2**17)))
    assert clock.cost(calls) > 0
    assert len(ran) == 1


def test_what_is_too_large_costs_the_same_whenever_it_is_asked() -> None:
    large = told(torch.neg, torch.empty(2**29, device="meta"))
    small = told(torch.neg, torch.empty(2**18))
    clock = Clock(CPU, here=True)
    clock.measure([*large, *small])
    assert clock.cost(large) == clock.cost(large) > clock.cost(small)


def test_what_cannot_run_alone_or_is_too_large_goes_by_what_was_measured() -> None:
    clock = Clock(CPU, here=True)
    half = told(torch.relu, torch.empty(2**18))
    full = {call._replace(amount=2**40, nbytes=2**43): 1 for call in half}
    known = clock.cost(half)
    assert clock.cost(full) == pytest.approx(known * 2**40 / 2**18)
    form = Form((2, 3), (3, 1), torch.float32)
    failing = Call(torch.ops.aten.mm.default, (form, form), (), 2**20, 48, product=False)
    assert clock.cost({failing: 1}) == pytest.approx(known * 4)


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convs = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 32, 1)
        layers = [nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels)) for conv in convs]
        self.body = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


@pytest.mark.parametrize("dear", ["batch_norm", "convolution"])
def test_a_budget_spares_what_is_dear(dear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping results of convolutions pays where these are dear, not where BatchNorm is."""
    monkeypatch.setattr(Clock, "_of", lambda _, call: float(dear in str(call.func)))
    model, x = nn.Sequential(*(Bottleneck() for _ in range(4))), torch.randn(2, 32, 16, 16)
    plan = rewire.budgeted(rewire.plan(model, x), model, 0.8, x)
    ways = plan.chains[0].ways
    assert ("select" in ways) == (dear == "convolution")
    assert plan.budget is not None
    assert plan.budget.time < plan.budget.least_time
