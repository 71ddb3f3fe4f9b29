"""The zoo's finder of residual adds, and what holds it against the plan: both are seen failing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from benchmarks.examination import Examination, _compare, examine
from benchmarks.finder import Findings, find
from benchmarks.judging import exists, missed
from benchmarks.menagerie import Specimen
from benchmarks.outcomes import as_original
from tests.specimens import DIM, SPECIMENS, Loop, mlp, rows


def found_in(model: nn.Module, *args: Any) -> Findings:
    """What the finder says of a network."""
    return find(model, args, {})


@pytest.mark.parametrize("name", SPECIMENS)
def test_finder_and_plan_agree_on_every_way_to_write_a_residual_module(name: str) -> None:
    torch.manual_seed(0)
    specimen = SPECIMENS[name]
    model, x = specimen.make().double(), specimen.inputs()
    findings = found_in(model, x)
    plan = rewire.plan(model, x)
    assert all(exists(module, findings) for module in plan.modules)
    assert not missed(findings, plan)
    assert sum(findings.lengths) >= len(plan.modules)


def test_finder_leaves_a_model_as_it_was() -> None:
    model = Loop(mlp).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found_in(model, rows())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- what looks like a residual add and is none --------------------------------------------


class Near(nn.Module):
    """Three layers of something that is not x + F(x)."""

    def __init__(self, body: Callable[[Near, Tensor, int], Tensor]) -> None:
        super().__init__()
        self.f, self.g = nn.ModuleList(map(mlp_, range(3))), nn.ModuleList(map(mlp_, range(3)))
        self.gru = nn.GRUCell(DIM, DIM)
        self.wide = nn.Linear(2 * DIM, DIM)
        self.position = nn.Parameter(torch.randn(1, 6, DIM))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """The layers, one after another."""
        for number in range(3):
            x = self.body(self, x, number)
        return x


def mlp_(_: int) -> nn.Module:
    """A branch."""
    return mlp()


def positions(net: Near, x: Tensor, n: int) -> Tensor:
    """A position embedding is added."""
    return net.f[n](x) + net.position


def lateral(net: Near, x: Tensor, n: int) -> Tensor:
    """Two maps of one value meet, as in a pyramid."""
    return net.f[n](x) + net.g[n](x).mean(1, keepdim=True)


def two_branches(net: Near, x: Tensor, n: int) -> Tensor:
    """Two branches without a skip."""
    return net.f[n](x) + net.g[n](x)


def gated(net: Near, x: Tensor, n: int) -> Tensor:
    """Gates on both operands (highway)."""
    gate = net.g[n](x).sigmoid()
    return x * gate + net.f[n](x) * (1 - gate)


def twice(net: Near, x: Tensor, n: int) -> Tensor:
    """A value added to itself."""
    y = net.f[n](x)
    return y + y


def difference(net: Near, x: Tensor, n: int) -> Tensor:
    """A difference."""
    return x - net.f[n](x)


def concatenated(net: Near, x: Tensor, n: int) -> Tensor:
    """Concatenated, mapped, and a constant added."""
    return net.wide(torch.cat([x, net.f[n](x)], -1)) + 1.0


def recurrent(net: Near, x: Tensor, n: int) -> Tensor:
    """A recurrent cell, whose gates add up."""
    return net.gru(net.f[n](x).flatten(0, 1), x.flatten(0, 1)).unflatten(0, x.shape[:2])


def form_only(net: Near, x: Tensor, n: int) -> Tensor:
    """Something of a value's form, which takes nothing from the value."""
    y = net.f[n](x)
    return y + torch.ones_like(y).cos()


NEAR_MISSES = [
    positions,
    lateral,
    two_branches,
    gated,
    twice,
    difference,
    concatenated,
    recurrent,
    form_only,
]


@pytest.mark.parametrize("body", NEAR_MISSES, ids=lambda body: body.__name__)
def test_a_near_miss_is_neither_found_nor_planned(body: Any) -> None:
    model, x = Near(body).double(), rows()
    assert found_in(model, x).adds == []
    assert rewire.plan(model, x).chains == []


# ---- planted faults in what is compared ----------------------------------------------------


def compared(plan_of: Callable[[rewire.Plan], rewire.Plan]) -> list[str]:
    """The faults noted for a plan that was tampered with."""
    model, x = SPECIMENS["plus"].make().double(), SPECIMENS["plus"].inputs()
    specimen = Specimen("tests", "loop", "loop", lambda: model)
    result = Examination(specimen)
    _compare(result, found_in(model, x), plan_of(rewire.plan(model, x)))
    return result.faults


def without_a_module(plan: rewire.Plan) -> rewire.Plan:
    """The detector misses one."""
    chain = plan.chains[0]
    return dataclasses.replace(
        plan, chains=[dataclasses.replace(chain, modules=chain.modules[1:]), *plan.chains[1:]]
    )


def with_a_false_alarm(plan: rewire.Plan) -> rewire.Plan:
    """The detector takes another line for a residual add."""
    chain = plan.chains[0]
    alarm = dataclasses.replace(chain.modules[0], name="alarm", where="tests/specimens.py:1")
    longer = dataclasses.replace(chain, modules=(*chain.modules, alarm))
    return dataclasses.replace(plan, chains=[longer, *plan.chains[1:]])


def test_a_true_plan_has_no_faults() -> None:
    assert compared(lambda plan: plan) == []


def test_a_planted_miss_is_caught() -> None:
    assert any("missed" in fault for fault in compared(without_a_module))


def test_a_planted_false_alarm_is_caught() -> None:
    assert any("false alarm" in fault for fault in compared(with_a_false_alarm))


def test_an_add_left_alone_with_its_reason_is_no_miss() -> None:
    def told(plan: rewire.Plan) -> rewire.Plan:
        first = plan.chains[0].modules[0]
        row = rewire.Skipped(first.name, first.where, "excluded", "left out on request")
        return dataclasses.replace(without_a_module(plan), skipped=[*plan.skipped, row])

    assert compared(told) == []


def test_that_a_residual_add_is_called_none_is_a_miss() -> None:
    def denied(plan: rewire.Plan) -> rewire.Plan:
        first = plan.chains[0].modules[0]
        row = rewire.Skipped(first.name, first.where, "projection", "no operand is a skip")
        return dataclasses.replace(without_a_module(plan), skipped=[*plan.skipped, row])

    assert any("missed" in fault for fault in compared(denied))


# ---- the whole examination -----------------------------------------------------------------


def test_an_examination_from_the_model_to_its_verdict() -> None:
    spec = SPECIMENS["plus"]
    row = examine(Specimen("tests", "loop", "loop", spec.make, lambda: (spec.inputs().float(),)))
    assert row["verdict"] == "verified"
    assert row["chains"] == row["planned"] == " ".join(map(str, spec.chains))
    assert float(row["gradient_error"]) <= 1e-10
    assert 0.5 < row["share"] <= 1


def test_an_examination_sees_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain form that is not the original: here because its coupling is another."""
    monkeypatch.setattr("benchmarks.outcomes.AsOriginal", lambda: rewire.Consistent(1 / 2))
    spec = SPECIMENS["plus"]
    row = examine(Specimen("tests", "loop", "loop", spec.make, lambda: (spec.inputs().float(),)))
    assert row["verdict"].startswith("FAILED: plain_eval")


class Dropped(nn.Module):
    """Two streams that take turns, with dropout: drawn in another order when rewired."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for f, g in (self.f[:2], self.f[2:]):
            down, across = f(x), g(y)
            x, y = x + down, y + across
        return x, y


def dropped() -> Specimen:
    """The specimen of it."""
    pair = torch.randn(2, 5, DIM), torch.randn(2, 5, DIM)
    return Specimen("tests", "dropped", "tests", Dropped, lambda: pair)


def test_dropout_in_another_order_is_told_from_other_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    row = examine(dropped())
    assert row["plain_train"] in ("order", "yes")
    assert row["verdict"] == "verified"

    def weaker(model: nn.Module, plan: rewire.Plan) -> nn.Module:
        plain = as_original(model, plan)
        for module in plain.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        return plain

    monkeypatch.setattr("benchmarks.examination.as_original", weaker)
    assert "plain_train" in examine(dropped())["verdict"]
