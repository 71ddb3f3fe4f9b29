"""`distance` measures what rewiring changed, chain by chain, and sees what is planted."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import rewire
from rewire.comparison import Difference, Distance, distance
from rewire.errors import RewireError
from tests.specimens import DIM, SPECIMENS, mlp

# No more than the rounding of the streams in float64.
NOTHING = pytest.approx((0.0, 1.0), abs=1e-12)


class Block(nn.Module):
    """x + F(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Stages(nn.Module):
    """Two chains of three, with a projection between them and noise before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*(Block() for _ in range(3)))
        self.project = nn.Linear(DIM, DIM)
        self.second = nn.Sequential(*(Block() for _ in range(3)))

    def forward(self, x: Tensor) -> Any:
        x = functional.dropout(x, 0.3, self.training) + torch.rand_like(x)
        return self.second(self.project(self.first(x)))


class Answering(Stages):
    """Returns its result wrapped in something, or something else."""

    answer: Callable[[Tensor], Any] = staticmethod(lambda y: y)

    def forward(self, x: Tensor) -> Any:
        return self.answer(super().forward(x))


def rewired(model: nn.Module, silent: bool = True) -> tuple[nn.Module, nn.Module, Tensor]:
    """A copy of the original, the rewired model and an input; silent branches give zero."""
    model = model.double()
    if silent:
        for module in model.modules():
            if isinstance(module, nn.Sequential) and isinstance(module[-1], nn.Linear):
                nn.init.zeros_(module[-1].weight)
                nn.init.zeros_(module[-1].bias)
    x = torch.randn(4, 6, DIM, dtype=torch.float64)
    return copy.deepcopy(model), rewire.make_reversible(model, x), x


@pytest.fixture(scope="module")
def answering() -> tuple[nn.Module, nn.Module, Tensor]:
    """As from `rewired`; rewiring takes most of these tests' time."""
    return rewired(Answering(), silent=False)


def numbers(difference: Difference) -> tuple[float, float]:
    return difference.relative, difference.cosine


def test_branches_that_give_zero_make_no_distance() -> None:
    # The noise is the same in both, and the models' dropout is off though they train.
    original, rev, x = rewired(Stages())
    found = distance(original, rev, x)
    assert [chain.name for chain in found.chains] == ["first", "second"]
    for difference in (*found.chains, found.output):
        assert numbers(difference) == NOTHING


def test_a_planted_change_is_seen_in_its_chain_and_behind_it() -> None:
    original, rev, x = rewired(Stages())
    with torch.no_grad():
        rev.second[2].body[-1].bias.fill_(3)  # the copy of the original does not share it
    found = distance(original, rev, x)
    assert numbers(found.chains[0]) == NOTHING
    assert found.chains[1].relative > 0.1
    with torch.no_grad():
        rev.first[0].body[-1].bias.fill_(3)
    assert distance(original, rev, x).chains[0].relative > 0.1


def test_the_numbers_are_those_of_the_formulas() -> None:
    original, rev, x = rewired(nn.Sequential(*(Block() for _ in range(4))), silent=False)
    plain, older, newest = x, x, x
    with torch.no_grad():
        for block in original:
            plain = plain + block.body(plain)
            older, newest = newest, block.body(newest) + older
    merged = (newest + older) / 2
    found = distance(original, rev, x)
    relative = float((merged - plain).norm() / plain.norm())
    cosine = float(functional.cosine_similarity(merged.flatten(1), plain.flatten(1)).mean())
    for difference in (found.output, *found.chains):
        assert difference.relative == pytest.approx(relative, rel=1e-10)
        assert difference.cosine == pytest.approx(cosine, rel=1e-10)
    assert 0 < cosine < 1


@pytest.mark.parametrize("name", ["root loop", "shared", "hidden states"])
def test_chains_end_in_the_root_in_a_shared_home_or_in_the_last_block(name: str) -> None:
    specimen = SPECIMENS[name]
    model, x = specimen.make().double(), specimen.inputs()
    found = distance(model, rewire.make_reversible(model, x), x)
    (chain,) = found.chains
    assert chain.relative > 0
    if name != "hidden states":  # there the output holds more than the last state
        assert (chain.relative, chain.cosine) == (found.output.relative, found.output.cosine)


def test_a_result_that_is_changed_in_place_later_is_compared_as_it_was() -> None:
    class Erased(Stages):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            y = self.project(x)
            x.zero_()
            return y + 0 * self.second(y)

    original, rev, x = rewired(Erased(), silent=False)
    found = distance(original, rev, x)
    assert found.chains[0].relative > 0


# ---- outputs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, [y.argmax(-1)], None),
        lambda y: {"last": y, "name": "x"},
        lambda y: OrderedDict(out=y),
        lambda y: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=y),
    ],
    ids=["tuple", "dict", "OrderedDict", "ModelOutput"],
)
def test_structures_are_compared_by_their_floating_tensors(
    answering: tuple[nn.Module, nn.Module, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    wrap: Callable[[Tensor], Any],
) -> None:
    original, rev, x = answering
    plain = distance(original, rev, x)  # leaves the generators where they are
    monkeypatch.setattr(Answering, "answer", staticmethod(wrap))
    assert distance(original, rev, x) == plain
    assert plain.output.relative > 0


def test_tensors_without_the_batch_first_have_no_part_in_the_cosine(
    answering: tuple[nn.Module, nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = distance(*answering).output
    monkeypatch.setattr(Answering, "answer", staticmethod(lambda y: (y, 100 * y[:2])))
    found = distance(*answering).output
    assert found.cosine == plain.cosine
    assert found.relative != plain.relative


def test_a_loss_counts_in_the_joint_error_and_not_in_the_cosine() -> None:
    class Trained(nn.Sequential):
        def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return (y - labels).square().sum(), y

    model = Trained(*(Block() for _ in range(3))).double()
    x, labels = torch.randn(2, 4, 6, DIM, dtype=torch.float64)
    rev = rewire.make_reversible(model, {"x": x, "labels": labels})
    found = distance(model, rev, x, labels=labels)
    (chain,) = found.chains
    assert found.output.cosine == chain.cosine
    with torch.no_grad():
        (loss, y), (other, z) = model(x, labels), rev(x, labels)
    joint = ((other - loss) ** 2 + (z - y).square().sum()).sqrt()
    size = (loss**2 + y.square().sum()).sqrt()
    assert found.output.relative == pytest.approx(float(joint / size))


@pytest.mark.parametrize(
    ("original", "other", "relative", "cosine"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0, 1.0),
        ([0.0, 0.0], [1.0, 0.0], float("inf"), 0.0),
        ([3.0, 4.0], [0.0, 0.0], 1.0, 0.0),
        ([3.0, 4.0], [-3.0, -4.0], 2.0, -1.0),
        ([3.0, 4.0], [float("nan"), 4.0], float("nan"), float("nan")),
    ],
)
def test_zeros_signs_and_nan(
    answering: tuple[nn.Module, nn.Module, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    original: list[float],
    other: list[float],
    relative: float,
    cosine: float,
) -> None:
    for model, answer in zip(answering, (original, other), strict=False):
        value = torch.tensor([answer])
        monkeypatch.setattr(model, "answer", lambda _, value=value: value)
    found = distance(*answering).output
    assert found.relative == pytest.approx(relative, nan_ok=True)
    assert found.cosine == pytest.approx(cosine, nan_ok=True)


# ---- left as found -----------------------------------------------------------------------


def test_models_inputs_and_generators_are_left_as_found() -> None:
    modes: list[bool] = []

    class Careless(Stages):
        """Writes into its input and counts its calls."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            modes.extend(module.training for module in self.modules())
            x.mul_(2)
            return super().forward(x)

    original, rev, x = rewired(Careless())
    fired: list[int] = []
    for model in (original, rev):
        model.second.eval()
        model.register_forward_hook(lambda *_: fired.append(1))
    hooks = [len(m._forward_hooks) for model in (original, rev) for m in model.modules()]
    modes.clear()
    given, calls, state = x.clone(), rev.calls.clone(), torch.get_rng_state()
    distance(original, rev, x)
    assert modes
    assert not any(modes)
    assert torch.equal(x, given)
    assert torch.equal(rev.calls, calls)
    assert torch.equal(torch.get_rng_state(), state)
    for model in (original, rev):
        assert (model.training, model.first.training, model.second.training) == (True, True, False)
    after = [len(m._forward_hooks) for model in (original, rev) for m in model.modules()]
    assert (after, fired) == (hooks, [])


def test_the_table() -> None:
    chains = Difference("layers.0", 0.5, 0.98765), Difference("", 1.25e-7, 1.0)
    found = Distance(Difference("output", 12.0, -1.0), chains)
    assert str(found) == repr(found)
    assert str(found).splitlines() == [
        "          relative   cosine",
        "layers.0       0.5   0.9877",
        "(model)   1.25e-07   1.0000",
        "output          12  -1.0000",
    ]


# ---- refusals ----------------------------------------------------------------------------


def test_the_models_are_told_apart(answering: tuple[nn.Module, nn.Module, Tensor]) -> None:
    original, rev, x = answering
    with pytest.raises(RewireError, match="Answering is not rewired"):
        distance(rev, original, x)
    with pytest.raises(RewireError, match="the first model is rewired as well"):
        distance(rev, rev, x)
    with pytest.raises(RewireError, match=r"first\.2: chain 'first' ends there, but the original"):
        distance(nn.Linear(2, 2), rev, x)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda y: y[:, :3], r"output: .* shapes \[\[4, 3, 8\]\], .* of \[\[4, 6, 8\]\]"),
        (lambda y: (y, y), r"output: .* \[\[4, 6, 8\], \[4, 6, 8\]\], the rewired"),
        (lambda y: y.argmax(), "the original model gives no floating-point tensor"),
    ],
    ids=["shape", "number", "integers"],
)
def test_outputs_that_cannot_be_compared_are_refused(
    answering: tuple[nn.Module, nn.Module, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[Tensor], Any],
    message: str,
) -> None:
    original, rev, x = answering
    monkeypatch.setattr(original, "answer", answer)
    with pytest.raises(RewireError, match=message):
        distance(original, rev, x)


def test_a_chain_that_does_not_run_is_refused(
    answering: tuple[nn.Module, nn.Module, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, rev, x = answering
    monkeypatch.setattr(original, "forward", original.first.forward)
    with pytest.raises(RewireError, match=r"second\.2: chain 'second' .* in the original model"):
        distance(original, rev, x)
