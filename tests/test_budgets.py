"""Plans on a budget: the search, the peaks that are kept, and the bits that stay."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

import rewire
from rewire import budgets
from rewire.budgets import Option, Piece, cheapest
from rewire.cli import app
from rewire.plans import WAYS
from rewire.report import console, plan_tree
from rewire.rewriting import plan_of
from rewire.trials import Heights

# ---- the search --------------------------------------------------------------------------

options = st.builds(
    Option,
    st.sampled_from(["reverse", "checkpoint", "store"]),
    st.integers(0, 40),
    st.integers(0, 20),
    st.integers(0, 50),
)
pieces = st.lists(
    st.builds(
        Piece,
        st.just(""),
        st.integers(0, 100),
        st.lists(options, min_size=1, max_size=3, unique_by=lambda one: one.way).map(tuple),
    ),
    max_size=5,
).map(lambda found: [replace(piece, name=str(n)) for n, piece in enumerate(found)])


def cost(found: list[Piece], ways: tuple[Option, ...], end: int, limit: int) -> float | None:
    """Cost of a choice; None where it is above the limit somewhere."""
    kept, stored = 0, False
    for piece, option in zip(found, ways, strict=True):
        if kept + piece.height > limit:
            return None
        kept += option.beside if stored else option.kept
        stored = option.way == "store"
    return sum(option.cost for option in ways) if kept + end <= limit else None


@settings(deadline=None)
@given(pieces, st.integers(0, 60), st.integers(0, 200))
def test_the_cheapest_is_that_of_all_choices(found: list[Piece], end: int, limit: int) -> None:
    every = itertools.product(*(piece.options for piece in found))
    costs = [cost(found, ways, end, limit) for ways in every]
    least = min((one for one in costs if one is not None), default=None)
    chosen = cheapest(found, end, limit)
    if chosen is None:
        assert least is None
        return
    ways = tuple(
        next(option for option in piece.options if option.way == chosen[piece.name])
        for piece in found
    )
    assert cost(found, ways, end, limit) == least


@settings(deadline=None)
@given(pieces, st.integers(0, 60), st.integers(0, 200))
def test_where_amounts_are_many_a_choice_is_found_if_there_is_one(
    found: list[Piece], end: int, limit: int
) -> None:
    """Amounts are rounded then; what is found is within the limit, unrounded."""
    large = 7919
    found = [
        replace(
            piece,
            height=large * piece.height,
            options=tuple(
                option._replace(kept=large * option.kept, beside=large * option.beside)
                for option in piece.options
            ),
        )
        for piece in found
    ]
    every = list(itertools.product(*(piece.options for piece in found)))
    costs = [cost(found, ways, large * end, large * limit) for ways in every]
    chosen = cheapest(found, large * end, large * limit)
    assert (chosen is None) == all(one is None for one in costs)
    if chosen is not None:
        ways = next(w for w in every if [o.way for o in w] == [chosen[p.name] for p in found])
        assert cost(found, ways, large * end, large * limit) is not None


# ---- models ------------------------------------------------------------------------------


def vit() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=3, drop_path_rate=0.1)
    return model, torch.randn(2, 3, 224, 224)


def resnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    blocks = timm.models.resnet.Bottleneck
    return timm.models.ResNet(blocks, [3, 4, 2, 1], num_classes=5), torch.randn(4, 3, 64, 64)


def gpt2() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_head=4, n_layer=3, vocab_size=300, attn_implementation="sdpa")
    return GPT2LMHeadModel(config), torch.randint(300, (2, 64))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    output = model(x)
    output = output if isinstance(output, Tensor) else output.logits
    return list(torch.autograd.grad(output.square().mean(), list(model.parameters())))


@pytest.mark.parametrize("make", [vit, resnet, gpt2])
def test_measured_peaks_are_within_the_budget_and_bits_stay(
    make: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    model, x = make()
    plain = rewire.profile(model, x).peak_bytes
    free = rewire.make_reversible(model, x, check="raise")
    expected = gradients(free, x)
    times = []
    for share in (0.95, 0.6):
        rev = rewire.make_reversible(model, x, budget=share, check="raise")
        found = plan_of(rev).budget
        assert found is not None
        measured = rewire.profile(rev, x).peak_bytes
        assert measured <= share * plain * 1.02
        assert measured == pytest.approx(found.peak_bytes, rel=0.03)
        for one, other in zip(gradients(rev, x), expected, strict=True):
            assert torch.equal(one, other)
        times.append(found.time)
        assert found.least_bytes < 0.6 * plain
    assert times[0] < times[1] < found.least_time
    assert times[0] < 1.1  # nearly all of it fits


def test_bytes_are_those_of_the_whole_step() -> None:
    model, x = vit()
    plan = rewire.plan(model, x)
    by_share = rewire.budgeted(plan, model, 0.4, x, optimizer="sgd").budget
    assert by_share is not None
    words = f"{by_share.standing_bytes + by_share.limit_bytes}B"
    by_bytes = rewire.budgeted(plan, model, words, x, optimizer=torch.optim.SGD).budget
    assert by_bytes == replace(by_share, asked=words)
    adam = rewire.budgeted(plan, model, 0.4, x).budget
    assert adam is not None
    assert adam.standing_bytes > by_share.standing_bytes


def test_inputs_need_no_memory() -> None:
    model, x = vit()
    plan = rewire.plan(model, x)
    meta = rewire.budgeted(plan, model, 0.4, torch.empty_like(x, device="meta"))
    assert meta == rewire.budgeted(plan, model, 0.4, x)


def test_below_reversing_branches_run_in_parts() -> None:
    model, _ = vit()
    x = torch.randn(8, 3, 224, 224)
    plan = rewire.plan(model, x)
    reversed_ = rewire.estimate(rewire.make_reversible(model, plan=plan), x).peak_bytes
    budget = rewire.estimate(model, x).total_bytes  # of Adam and all
    whole = rewire.budgeted(plan, model, 1.0, x).budget
    assert whole is not None
    words = f"{whole.standing_bytes + int(0.8 * reversed_)}B"
    found = rewire.budgeted(plan, model, words, x)
    assert found.chains[0].chunks > 1
    assert found.budget is not None
    assert found.budget.peak_bytes + found.budget.standing_bytes < budget
    rev = rewire.make_reversible(model.eval(), plan=found)
    assert rewire.profile(rev, x).peak_bytes <= 0.82 * reversed_


def test_too_little_is_told_with_the_least() -> None:
    model, x = vit()
    with pytest.raises(
        rewire.RewireError, match=r"reversed.* a step takes .* Give budget=0\.\d+, or"
    ):
        rewire.make_reversible(model, x, budget=0.01)
    with pytest.raises(rewire.RewireError, match="optimizer state and inputs alone take"):
        rewire.make_reversible(model, x, budget="10MB")
    for wrong in (-1, 1.5, float("nan"), float("inf"), True, "much", "50%", "0MB"):
        with pytest.raises(ValueError, match="give a share"):
            rewire.make_reversible(model, x, budget=wrong)
    with pytest.raises(rewire.RewireError, match="needs example_inputs"):
        rewire.make_reversible(model, budget=0.5)
    with pytest.raises(rewire.RewireError, match="cpu or cuda"):
        rewire.budgeted(rewire.plan(model, x), model, 0.5, x, device="tpu")


def test_what_is_stored_as_planned_is_verified() -> None:
    torch.manual_seed(0)
    model, x = (
        timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64),
        torch.randn(2, 3, 64, 64),
    )
    rev = rewire.make_reversible(model, x, budget=0.8, compile={"backend": "aot_eager"})
    assert "store" in plan_of(rev).chains[0].ways
    verdict = rewire.verify(rev, x)
    assert verdict.passed, verdict
    (row,) = (check for check in verdict.checks if check.name == "activations dropped")
    assert "store theirs, as planned" in row.detail


def test_couplings_of_ones_own_and_modules_to_leave_alone() -> None:
    class Own(rewire.Re2):
        def __str__(self) -> str:
            return "own"

    model, x = resnet()
    own = rewire.make_reversible(model, x, coupling=Own(), budget=0.6, exclude=["maxpool"])
    assert not any("maxpool" in row.modules for row in plan_of(own).outside)
    free = rewire.plan(model, x, outside="checkpoint")
    assert any("maxpool" in row.modules for row in free.outside)


def test_a_search_that_trusts_its_pieces_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that say they keep nothing: the runs that check a choice find its true peak."""
    model, x = vit()
    plan = rewire.plan(model, x)
    original = budgets._Search._options

    def light(self: object, name: str, parts: int | None) -> object:
        return (option._replace(kept=0, beside=0) for option in original(self, name, parts))

    monkeypatch.setattr(budgets._Search, "_options", light)
    found = rewire.budgeted(plan, model, 0.4, x).budget
    assert found is not None
    assert found.peak_bytes <= found.limit_bytes


def test_the_command_line_keeps_to_a_budget(tmp_path: Path) -> None:
    name, out = "timm/vit_tiny_patch16_224", tmp_path / "rev.pt"
    shape = ["--input-shape", "2,3,224,224", "--budget", "0.3"]
    done = CliRunner().invoke(app, ["convert", name, "-o", str(out), *shape])
    assert done.exit_code == 0, done.output
    plan = plan_of(rewire.load(out))
    assert plan.budget is not None
    assert plan.budget.peak_bytes <= plan.budget.limit_bytes
    assert set(plan.chains[0].ways) <= set(WAYS)
    assert rewire.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    shown = io.StringIO()
    console(shown).print(plan_tree(plan))
    assert "budget 0.3" in shown.getvalue()
    assert "checkpointed" in shown.getvalue()
    again = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert rewire.Plan.from_dict(_without_source(again.output)) == plan
    chosen = [*shape, "--chunks", "2"]
    for wrong in (["--budget", "0.3"], [*shape[:2], "--budget", "lots"], chosen):
        refused = CliRunner().invoke(app, ["inspect", name, *wrong])
        assert refused.exit_code == 2
        assert "--budget" in refused.output


def _without_source(printed: str) -> dict[str, object]:
    found = json.loads(printed)
    del found["source"]
    return found


def test_what_a_budget_chooses_is_not_chosen_beside_it() -> None:
    model, x = vit()
    for beside in ({"chunks": 2}, {"outside": "checkpoint"}):
        with pytest.raises(ValueError, match="a budget chooses"):
            rewire.make_reversible(model, x, budget=0.5, **beside)  # type: ignore[arg-type]


def test_models_on_the_meta_device_are_told_from_inputs_there() -> None:
    with torch.device("meta"):
        model, _ = vit()
    x = torch.empty(2, 3, 224, 224, device="meta")
    assert rewire.estimate(model, x).peak_bytes > 0
    with pytest.raises(rewire.RewireError, match=r"Estimate it: rewire\.estimate"):
        rewire.profile(model, x)
    with pytest.raises(rewire.CannotTrace, match="only its inputs may be"):
        rewire.make_reversible(model, x, budget=0.5)


def test_chains_that_somebody_else_made_stay_as_they_are() -> None:
    torch.manual_seed(0)
    own = rewire.ReversibleSequential([nn.Linear(16, 16) for _ in range(3)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.blocks = own, nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            x = self.own(x)
            for block in self.blocks:
                x = x + block(x).tanh()
            return x

    plan = rewire.budgeted(rewire.plan(Net(), torch.randn(64, 16)), Net(), 0.9, torch.randn(64, 16))
    assert plan.budget is not None
    assert plan.budget.peak_bytes <= plan.budget.limit_bytes


def test_parts_are_taken_where_they_fit_even_if_they_free_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    search = object.__new__(budgets._Search)
    plan = rewire.plan(*vit())
    peaks = {1: 1000, 2: 975, 4: 974}
    search._plan = plan
    monkeypatch.setattr(
        search, "_reversed", lambda chunks: Heights(end=peaks[chunks[plan.chains[0].name]])
    )
    assert list(search._parts(980).values()) == [2]
    assert list(search._parts(None).values()) == [1]
