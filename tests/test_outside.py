"""What lies outside of the chains: found where it pays, dropped, and computed again exactly."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torchvision
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import rewire
from rewire import stretches, surroundings
from rewire.cli import app
from rewire.errors import CannotTrace, NotRepeatable, RewireError
from rewire.inputs import as_example
from rewire.outside import checkpointed
from rewire.plans import Checkpointed, Plan
from rewire.profiling import LiveBytes, no_collection, profile
from rewire.report import plan_tree
from rewire.rewriting import plan_of, restored
from rewire.survey import survey
from rewire.timeline import Timeline
from tests.exactness import assert_as_stored, assert_same_bits, run
from tests.networks import MODES

STRETCHES = (("conv", "bn", "act", "pool"), ("down",), ("head",))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.body(x))


class Down(nn.Module):
    """Counts its calls, draws random numbers, keeps statistics."""

    calls = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.short = (nn.Conv2d(width, 2 * width, 3, 2, 1) for _ in range(2))
        self.bn, self.drop = nn.BatchNorm2d(2 * width), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.relu(self.drop(self.bn(self.conv(x)))) + self.short(x)


class Net(nn.Module):
    """A stem of four modules, a stage, downsampling, a stage, a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.act, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.first = nn.Sequential(*(Block(width) for _ in range(3)))
        self.down = Down(width)
        self.second = nn.Sequential(*(Block(2 * width) for _ in range(2)))
        self.head = nn.Sequential(nn.Linear(2 * width, 32), nn.Dropout(0.2), nn.Linear(32, 4))

    def forward(self, x: Tensor, between: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        x = self.bn(self.conv(x))
        if between is not None:
            x = between(x)
        x = self.first(self.pool(self.act(x)))
        return self.head(self.second(self.down(x)).mean((2, 3)))


def images(size: int = 16, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def made(net: nn.Module, *names: tuple[str, ...], x: Any = None) -> nn.Module:
    """A network with these stretches checkpointed, whatever they bring."""
    plan = rewire.plan(net, images() if x is None else x)
    rows = tuple(map(Checkpointed, names or STRETCHES))
    return rewire.make_reversible(net, plan=dataclasses.replace(plan, outside=rows), check="raise")


def net(**kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(**kwargs)


def seen_by_autograd(model: nn.Module, *inputs: Any, **kwargs: Any) -> int:
    """Bytes of tensors that are no parameters and that nothing of rewire's has dropped."""
    there = {id(p) for p in model.parameters()}
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        found.append(0 if id(tensor) in there else tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*inputs, **kwargs)
    return sum(found)


# ---- which -------------------------------------------------------------------------------


def test_a_resnet_s_stem_and_first_blocks_are_found_and_its_head_is_not() -> None:
    plan = rewire.plan(torchvision.models.resnet50(), images(128, 2), outside="checkpoint")
    found = [row.modules for row in plan.outside]
    assert found[:3] == [("conv1", "bn1", "relu", "maxpool"), ("layer1.0",), ("layer2.0",)]
    assert set(found[3:]) <= {("layer3.0",), ("layer4.0",)}
    for row in plan.outside[:3]:
        assert row.saved_bytes > 3 * row.kept_bytes
        assert row.reason.startswith("without it the peak is ")
    homes = {residual.home for residual in plan.modules}
    assert not homes.intersection(name for row in plan.outside for name in row.modules)


def test_nothing_is_found_unless_asked_for() -> None:
    assert rewire.plan(net(), images()).outside == ()
    with pytest.raises(ValueError, match="outside='all'; choose one of"):
        rewire.plan(net(), images(), outside="all")


def test_what_is_found_does_not_hang_on_names_or_classes() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = net(width=16)
            self.a, self.b, self.c, self.d = inner.conv, inner.bn, inner.act, inner.pool
            self.e, self.f, self.g = inner.first, inner.second, inner.head
            self.h = inner.down

        def forward(self, x: Tensor) -> Tensor:
            x = self.e(self.d(self.c(self.b(self.a(x)))))
            return self.g(self.f(self.h(x)).mean((2, 3)))

    renamed = dict(zip(("conv", "bn", "act", "pool", "down"), "abcdh", strict=True))
    plain = rewire.plan(net(width=16), images(32), outside="checkpoint").outside
    odd = rewire.plan(Odd(), images(32), outside="checkpoint").outside
    assert plain
    assert [tuple(renamed[name] for name in row.modules) for row in plain] == [
        row.modules for row in odd
    ]
    assert [row.saved_bytes for row in plain] == [row.saved_bytes for row in odd]


def test_where_it_does_not_lower_the_peak_nothing_is_checkpointed() -> None:
    class Heady(nn.Module):
        """All that is large is in the head: backward begins there."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(Block(3) for _ in range(3)))
            self.head = nn.Conv2d(3, 256, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(self.head(self.blocks(x)))

    assert rewire.plan(Heady(), images(32), outside="checkpoint").outside == ()


def test_a_large_stretch_is_taken_apart_where_the_peak_is_in_it() -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = (nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Tanh()) for _ in range(8))
            self.stem = nn.Sequential(*layers)
            self.blocks = nn.Sequential(Block(3), Block(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(self.stem(x))

    plan = rewire.plan(Long(), images(32), outside="checkpoint")
    assert len(plan.outside) > 1
    assert all(name.startswith("stem.") for row in plan.outside for name in row.modules)
    x = images(32)
    whole, parts = made(Long(), ("stem",), x=x), rewire.make_reversible(Long(), plan=plan)
    assert profile(parts, x).peak_bytes < 0.8 * profile(whole, x).peak_bytes


def test_a_module_that_runs_both_outside_and_in_a_branch_is_not_checkpointed() -> None:
    model = net(width=16)
    for block in model.first:
        block.body.append(model.act)
    found = rewire.plan(model, images(32), outside="checkpoint").outside
    assert found
    assert "act" not in {name for row in found for name in row.modules}


def test_what_writes_into_its_input_does_not_begin_a_stretch() -> None:
    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x, between=lambda y: y * 1.5)

    torch.manual_seed(0)
    found = rewire.plan(Written(16), images(32), outside="checkpoint").outside
    assert ("act", "pool") not in {row.modules for row in found}
    assert all(row.modules[0] != "act" for row in found)


def test_exclude_keeps_a_module_out() -> None:
    model, x = torchvision.models.resnet50(), images(64, 2)
    plan, without = (
        rewire.plan(model, x, outside="checkpoint", exclude=globs) for globs in ((), "layer1.0")
    )
    every, others = ({row.modules for row in p.outside} for p in (plan, without))
    assert ("layer1.0",) in every
    assert ("layer2.0",) in others
    assert not any(name.startswith("layer1.0") for names in others for name in names)
    with pytest.raises(RewireError, match="'down' matches no residual module"):
        rewire.plan(net(), images(), exclude="down")


def test_a_model_that_runs_in_no_way_with_gradients_says_so() -> None:
    class Detached(Net):
        def forward(self, x: Tensor, between: Any = None) -> Tensor:
            if torch.is_grad_enabled() and self.training is not None:
                self.count = getattr(self, "count", 0) + 1
                if self.count > 1:
                    raise ValueError("only once")
            return super().forward(x)

    model = Detached()
    plan = rewire.plan(model, images())
    model.count = 1
    with pytest.raises(CannotTrace, match=r'only once.*outside="store"'):
        checkpointed(model, as_example(images()), plan.chains, lambda *_: False)


def test_the_plan_goes_through_json_and_is_printed() -> None:
    plan = rewire.plan(net(width=16), images(32), outside="checkpoint")
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert plan.outside
    old = plan.to_dict()
    del old["outside"]  # a file of an earlier version
    assert Plan.from_dict(old).outside == ()
    text = io.StringIO()
    Console(file=text, width=120).print(plan_tree(plan))
    assert "outside of the chains, checkpointed" in text.getvalue()
    assert " → ".join(plan.outside[0].modules) in text.getvalue()
    assert "checkpointed: conv" in str(plan)


# ---- exact -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_gradients_statistics_and_generators_are_the_stored_ones_bit_for_bit(mode: str) -> None:
    model, x = net().to(MODES[mode].dtype), images().to(MODES[mode].dtype)
    plain = rewire.make_reversible(model, x)  # shares every tensor
    rev = made(model, x=x)
    states = {name: buffer.clone() for name, buffer in model.named_buffers()}
    found = []
    for one in (plain, rev):
        for name, buffer in one.named_buffers():
            buffer.copy_(states[name])
        found.append([*run(one, x, MODES[mode]), torch.get_rng_state()])
    assert_same_bits(found[1], found[0])
    assert_as_stored(rev, lambda: run(rev, x, MODES[mode]))


def test_everything_in_the_stretches_is_dropped() -> None:
    model, x = net(), images()
    plain = rewire.make_reversible(model, x)
    rev = made(model)
    mean = 8  # bytes: none but what stands between them
    assert seen_by_autograd(plain, x) > 40_000
    assert seen_by_autograd(rev, x) <= mean


def test_torch_s_own_checkpoint_agrees() -> None:
    """Another implementation of the same: without statistics, which that counts twice."""
    x = images().double()
    theirs = net().double()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    ours = made(copy.deepcopy(theirs), x=x)
    plain = rewire.make_reversible(theirs, x)
    down = plain.down.forward
    plain.down.forward = lambda x: checkpoint(down, x, use_reentrant=False)
    counters = [torch.int64]
    found, expected = (
        [t for t in run(model, x, MODES["fp64"]) if t.dtype not in counters]
        for model in (ours, plain)
    )
    assert_same_bits(found, expected)


@pytest.mark.parametrize("fault", ["replayed_rng", "replayed_buffers", "replayed_autocast"])
def test_faults_are_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of what surrounds a rerun is needed: `verify` and the comparison fail without it."""
    mode = MODES["bf16 autocast" if fault == "replayed_autocast" else "fp32"]
    rev, x = made(net()), images()
    assert_as_stored(rev, lambda: run(rev, x, mode))
    home = stretches if fault == "replayed_rng" else surroundings
    monkeypatch.setattr(home, fault, lambda *_: nullcontext())
    with pytest.raises((AssertionError, NotRepeatable)):
        assert_as_stored(rev, lambda: run(rev, x, mode))
    if fault != "replayed_autocast":
        assert not rewire.verify(rev, x).passed


def test_a_dropped_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rev, x = made(net()), images()
    recall = stretches.Ran.recall

    def wrong(self: Any, key: Any, number: int) -> Tensor:
        tensor = recall(self, key, number)
        return tensor * 1.001 if tensor.is_floating_point() else tensor

    monkeypatch.setattr(stretches.Ran, "recall", wrong)
    verdict = rewire.verify(rev, x)
    assert not verdict["gradients bit for bit"].passed


def test_verify_passes() -> None:
    model = net(width=16)
    rev = rewire.make_reversible(model, images(32), outside="checkpoint")
    verdict = rewire.verify(rev, images(32), original=model)
    assert verdict.passed, verdict


def test_second_and_double_backward() -> None:
    rev, x = made(net()).double(), images().double().requires_grad_()

    def twice() -> list[Tensor]:
        torch.manual_seed(0)
        rev.eval()  # without statistics, dropout
        y = rev(x).sin().sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True)
        (again,) = torch.autograd.grad(y, x, retain_graph=True)
        wrt = [x, *rev.parameters()]
        second = torch.autograd.grad(first.square().sum(), wrt, allow_unused=True)
        return [first.detach(), again, *(torch.zeros(()) if g is None else g for g in second)]

    assert_as_stored(rev, twice)


def test_interleaved_micro_batches_and_only_a_part_of_backward() -> None:
    rev, x = made(net()), images()

    def interleaved() -> list[Tensor]:
        torch.manual_seed(0)
        losses = [rev(x + shift).sin().sum() for shift in range(3)]
        found = list(torch.autograd.grad(losses[1], list(rev.head.parameters()), retain_graph=True))
        for loss in (losses[2], losses[0], losses[1]):
            found += torch.autograd.grad(loss, list(rev.parameters()))
        return found

    assert_as_stored(rev, interleaved)


def test_frozen_parts_no_grad_and_transforms() -> None:
    rev, x = made(net()), images()
    for parameter in (*rev.conv.parameters(), *rev.bn.parameters(), *rev.down.parameters()):
        parameter.requires_grad_(False)
    assert_as_stored(rev, lambda: run(rev, x))

    def frozen() -> list[Tensor]:
        torch.manual_seed(0)
        return list(torch.autograd.grad(rev(x).sin().sum(), list(rev.head.parameters())))

    assert_as_stored(rev, frozen)
    rev.eval()
    with torch.no_grad():
        expected = rev(x)
    assert torch.equal(rev(x), expected)
    parameters = dict(rev.named_parameters())

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(rev, {**parameters, "down.conv.weight": weight}, x).sum()

    weight = rev.down.conv.weight.detach().clone().requires_grad_()
    by_transform = torch.func.grad(loss)(weight.detach())
    (by_autograd,) = torch.autograd.grad(loss(weight), weight)
    torch.testing.assert_close(by_transform, by_autograd, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "between",
    [lambda y: y * 2, lambda y: y.clone(), lambda y: y.mul_(3), lambda y: y.view(y.shape)],
    ids=["scaled", "cloned", "in place", "view"],
)
def test_code_between_the_modules_begins_a_new_stretch(between: Any) -> None:
    rev, x = made(net()), images()
    assert_as_stored(rev, lambda: run(rev, x, between=between))


def test_values_read_from_inside_a_stretch() -> None:
    rev, x = made(net()), images()

    def read() -> list[Tensor]:
        torch.manual_seed(0)
        seen: list[Tensor] = []

        def between(y: Tensor) -> Tensor:
            seen.append(y.mean())
            return y

        loss = rev(x, between=between).sin().sum() + seen[0]
        return list(torch.autograd.grad(loss, list(rev.parameters())))

    assert_as_stored(rev, read)


class Nested(nn.Module):
    """Takes and gives nests of containers, a number, and a tensor twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, pair: Any, *, scale: float, more: dict[str, list[Tensor]]) -> dict[str, Any]:
        x, y = pair
        more["x"].append(x)  # a list of the caller's own
        out = torch.tanh(self.linear(x) * torch.sigmoid(y)) * scale + more["x"][0]
        return {"out": [out, x, x.view(-1)], "scale": scale}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Odd(nn.Module):
    """Calls modules in odd ways: twice, with nests; one gives its input, others views of it."""

    def __init__(self) -> None:
        super().__init__()
        self.nested, self.twice, self.same = Nested(), nn.Linear(6, 6), nn.Identity()
        self.flat, self.deep = nn.Flatten(), nn.Unflatten(1, (2, 3))
        self.blocks = nn.Sequential(Residual(), Residual(), Residual())

    def forward(self, x: Tensor) -> Tensor:
        given = {"x": [x]}
        found = self.nested((x, x.exp()), scale=0.5, more=given)
        y, same, view = found["out"]
        assert same is x
        assert view.data_ptr() == x.data_ptr()
        assert len(given["x"]) == 2
        y = self.blocks(self.twice(torch.tanh(self.twice(y))))
        y = self.flat(self.deep(self.same(y)))
        return torch.tanh(self.same(y)) + view.view(x.shape)


def test_nested_arguments_views_inputs_as_results_and_repeated_calls() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    names = ("nested",), ("twice",), ("same", "deep", "flat")
    rev = made(Odd(), *names, x=x)
    assert_as_stored(rev, lambda: run(rev, x))
    plain = rewire.make_reversible(Odd(), x)
    assert seen_by_autograd(rev, x) < 0.5 * seen_by_autograd(plain, x)


def test_a_run_of_a_module_that_fails_can_be_repeated() -> None:
    class Failing(Down):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            if self.fails:
                raise ValueError("not now")
            return y

    model = net()
    model.down = Failing(8)
    rev, x = made(model), images()
    rev.down.fails = True
    with pytest.raises(ValueError, match="not now"):
        rev(x)
    rev.down.fails = False
    assert_as_stored(rev, lambda: run(rev, x))


def test_a_counter_counts_once() -> None:
    rev, x = made(net()), images()
    before = rev.down.calls
    rev(x).sum().backward()
    assert rev.down.calls == before + 1
    assert int(rev.down.bn.num_batches_tracked) == int(rev.bn.num_batches_tracked) == 1


@pytest.mark.parametrize("what", ["its inputs", "its parameter 'weight'"])
def test_what_is_changed_before_backward_is_an_error(what: str) -> None:
    rev, x = made(net()), images()
    loss = rev(x).sum()
    with torch.no_grad():
        (x if "inputs" in what else rev.conv.weight).add_(1)
    with pytest.raises(NotRepeatable, match=f"conv: .*{what} was changed in place"):
        loss.backward()


# ---- memory ------------------------------------------------------------------------------


def test_the_peak_of_a_resnet_falls_and_nothing_is_left() -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet50(num_classes=10), images(96, 4)
    rev = rewire.make_reversible(model, x)
    out = rewire.make_reversible(model, x, outside="checkpoint")
    plain, found = profile(rev, x), profile(out, x)
    assert found.left_bytes == 0
    assert found.saved_bytes < 0.5 * plain.saved_bytes
    assert found.peak_bytes < 0.65 * plain.peak_bytes
    timeline = Timeline(
        survey(model, as_example(x)), plan_of(rev).chains, lambda _: False, lambda _: False
    )
    names = {row.modules for row in plan_of(out).outside}
    assert timeline.peak((), weights=True) == pytest.approx(plain.peak_bytes, rel=0.05)
    assert timeline.peak(names, weights=True) == pytest.approx(found.peak_bytes, rel=0.05)


def test_nothing_is_left_where_outputs_are_kept() -> None:
    """Of a stretch that the network ends with, not its inputs either."""
    rev, x = made(net()), images()
    rev(x).sum().backward()
    with no_collection(), LiveBytes() as meter:
        y = rev(x)
        y.sum().backward()
        rev.zero_grad()
        left = meter.live
    assert left == y.nbytes


def test_what_is_saved_dies_with_the_graph() -> None:
    rev, x = made(net()), images()
    rev(x).sum().backward()
    with no_collection(), LiveBytes() as meter:
        y = rev(x)
        held = meter.live
        del y
        assert held > 0
        assert meter.live == 0
    gc.collect()


# ---- the module --------------------------------------------------------------------------


def copies(rev: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield "deepcopy", copy.deepcopy(rev)
    yield "pickle", pickle.loads(pickle.dumps(rev))


def test_copies_run_by_themselves() -> None:
    rev, x = made(net()), images()
    rev(x).sum().backward()  # something is learnt that a copy has to learn anew
    rev.zero_grad()
    expected = run(copy.deepcopy(rev), x)
    for how, twin in copies(rev):
        assert plan_of(twin) == plan_of(rev), how
        assert type(twin.down).__qualname__ == "Down"
        assert seen_by_autograd(copy.deepcopy(twin), x) <= 8
        assert_same_bits(run(twin, x), expected)


def test_keys_classes_and_the_original_stay() -> None:
    model, x = net(), images()
    before = [type(module) for module in model.modules()]
    rev = made(model)
    assert list(rev.state_dict()) == list(model.state_dict())
    assert rev.down is not model.down
    assert rev.down.conv.weight is model.down.conv.weight
    assert isinstance(rev.down, Down)
    assert repr(rev.down) == repr(model.down)
    assert [type(module) for module in model.modules()] == before
    again = restored(rev)
    assert [type(module) for module in again.modules()] == before
    assert "_stretch" not in vars(again.down)
    assert seen_by_autograd(again, x) == seen_by_autograd(model, x)


def test_a_part_of_a_rewired_model_tells_its_plan() -> None:
    rev = made(net())
    wrapped = nn.Sequential(rev)
    found = [row.modules for row in plan_of(wrapped).outside]
    assert found == [tuple(f"0.{name}" for name in names) for names in STRETCHES]
    with pytest.raises(RewireError, match="rewired already"):
        rewire.make_reversible(wrapped, images())


def test_a_plan_of_another_model_is_refused() -> None:
    model = net()
    plan = rewire.plan(model, images())
    model.down.forward = lambda x: x
    for name, why in (
        ("stem", "does not have it"),
        ("down", "its forward is replaced"),
        ("first", "a chain runs in it"),
    ):
        rows = (Checkpointed((name,)),)
        with pytest.raises(RewireError, match=f"checkpoints '{name}'.*{why}"):
            rewire.make_reversible(model, plan=dataclasses.replace(plan, outside=rows))


def test_files_hold_the_plan(tmp_path: Any) -> None:
    out = tmp_path / "rev.pt"
    arguments = ["convert", "torchvision/resnet18", "-o", str(out), "--json"]
    shape = ["--input-shape", "2,3,64,64"]
    result = CliRunner().invoke(app, [*arguments, *shape, "--outside", "checkpoint"])
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)["plan"]["outside"]
    rev = rewire.load(out)
    assert [list(row.modules) for row in plan_of(rev).outside] == [
        row["modules"] for row in written
    ]
    assert "conv1" in written[0]["modules"]
    x = images(64, 2)
    plain = rewire.make_reversible(restored(rev), x)
    assert seen_by_autograd(rev, x) < 0.75 * seen_by_autograd(plain, x)
    usage = CliRunner().invoke(app, [*arguments, "--outside", "all"])
    assert usage.exit_code == 2
    assert "--outside is store or checkpoint" in usage.output


def test_compiled_and_checkpointed_around() -> None:
    rev, x = made(net()), images()

    def around() -> list[Tensor]:
        torch.manual_seed(0)
        y = checkpoint(rev, x, use_reentrant=False)
        return list(torch.autograd.grad(y.sin().sum(), list(rev.parameters())))

    rev.eval()
    assert_as_stored(rev, around)
    torch.manual_seed(0)
    expected = run(rev, x)
    compiled = torch.compile(rev, backend="eager")
    assert_same_bits(run(compiled, x), expected)
    exported = torch.export.export(rev, (x,)).module()
    torch.testing.assert_close(exported(x), expected[0])
