"""What a model's code does besides calling torch: kept as it was, or a reason to leave it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rewire
from benchmarks.outcomes import AsOriginal
from rewire.reversible import ReversibleSequential
from tests.specimens import DIM, mlp, rows

Body = Callable[["Block", Tensor, Any], Tensor]


class Block(nn.Module):
    """A residual module whose code is a function of it, the stream and something else."""

    def __init__(self, body: Body, more: nn.Module | None = None) -> None:
        super().__init__()
        self.f, self.body = mlp(), body
        self.more = nn.Identity() if more is None else more

    def forward(self, x: Tensor, other: Any) -> Tensor:
        return self.body(self, x, other)


class Net(nn.Module):
    """Hands the same object to three blocks."""

    def __init__(self, body: Body, more: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(body, more()) for _ in range(3))

    def forward(self, x: Tensor, other: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, other)
        return x


class Counter:
    """An object of a user's class."""

    def __init__(self) -> None:
        self.ticks = 0

    def tick(self) -> int:
        self.ticks += 1
        return self.ticks


@dataclass
class Statistics:
    """A dataclass that its module keeps."""

    runs: int = 0


class Keeping(nn.Module):
    """Gives what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics = Statistics()

    def forward(self, other: Any) -> Any:
        return self.statistics


def ticks(block: Block, x: Tensor, other: Counter) -> Tensor:
    other.tick()
    return x + block.f(x)


def writes_what_a_child_keeps(block: Block, x: Tensor, other: Any) -> Tensor:
    block.more(other).runs += 1
    return x + block.f(x)


def writes_what_a_child_gives_back(block: Block, x: Tensor, other: list[int]) -> Tensor:
    block.more(other).append(1)
    return x + block.f(x)


def marks_a_child(block: Block, x: Tensor, other: Any) -> Tensor:
    block.f.seen = True  # type: ignore[assignment]
    return x + block.f(x)


def test_a_call_that_nobody_reads_the_result_of_is_made() -> None:
    model, counter = Net(ticks).double(), Counter()
    rev = rewire.make_reversible(model, (rows(), Counter()))
    rev(rows(), counter)
    assert counter.ticks == 3


@pytest.mark.parametrize(
    ("body", "more", "other", "reason"),
    [
        (writes_what_a_child_keeps, Keeping, None, "sets the attribute 'runs'"),
        (writes_what_a_child_gives_back, nn.Identity, [], "changes a list or dict"),
        (marks_a_child, nn.Identity, None, "sets the attribute 'seen' of a child"),
    ],
)
def test_writes_that_would_be_lost_are_a_reason(
    body: Body, more: Callable[[], nn.Module], other: Any, reason: str
) -> None:
    with pytest.raises(rewire.NothingToRewire, match=reason):
        rewire.make_reversible(Net(body, more), (rows().float(), other))


def test_a_list_that_modules_share_stays_one_in_the_copy() -> None:
    model = nn.Sequential(nn.Linear(DIM, DIM), Net(lambda block, x, _: x + block.f(x)))
    shared: list[int] = []
    for module in model.modules():
        module.shared = shared  # type: ignore[assignment]
    rev = rewire.make_reversible(Wrapped(model), rows().float())
    kept = [vars(module)["shared"] for module in rev.modules() if "shared" in vars(module)]
    assert len(kept) > 3
    assert all(each is kept[0] for each in kept)
    assert kept[0] is not shared


class Wrapped(nn.Module):
    """Of one argument."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1](self.inner[0](x), None)  # type: ignore[no-any-return]


def too_long(block: Block, x: Tensor, other: Any) -> Tensor:
    if x.shape[1] > 6:
        raise ValueError("the sequence is too long")
    return x + block.f(x)


def test_an_error_of_the_models_own_stays_itself() -> None:
    rev = rewire.make_reversible(Net(too_long).double(), (rows(), None))
    with pytest.raises(ValueError, match="the sequence is too long"):
        rev(torch.cat([rows(), rows()], 1), None)


class Rounds(nn.Module):
    """One block, four times; stops when it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.most = Block(lambda block, x, _: x + block.f(x)), 4
        self.copying = False

    def forward(self, x: Tensor) -> Tensor:
        for number in range(4):
            if number == self.most:
                break
            x = self.block(x, None)
            x = x.clone() if self.copying else x
        return x.tanh()


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_shared_block_runs_again_after_a_run_that_stopped(surroundings: Any) -> None:
    model = Rounds().double().eval()
    rev = rewire.make_reversible(model, rows(), coupling=AsOriginal(), precision="float64")
    x = rows()
    with surroundings():
        rev.most = 2  # type: ignore[assignment]
        rev(x)
        rev.most = 4  # type: ignore[assignment]
        for _ in range(2):
            assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-9)
        rev.copying = True  # type: ignore[assignment]
        with pytest.raises(rewire.StreamMismatch):
            rev(x)


def test_nothing_is_alive_after_a_post_norm_run_without_gradients() -> None:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double()
    rev = rewire.make_reversible(model, rows())
    with torch.no_grad():
        rev(rows())
    chains = [module for module in rev.modules() if isinstance(module, ReversibleSequential)]
    assert chains
    for module in rev.modules():
        state = vars(module).get("_rewire")
        for chain in state.chains if state else ():
            assert chain.course.run.visible is None


class Dropping(nn.Module):
    """Dropout between every second pair of blocks, in nobody's code but its parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(lambda block, x, _: x + block.f(x)) for _ in range(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = block(self.drop(x) if number == 2 else x, None)
        return x


def test_a_link_that_holds_in_eval_mode_only_is_none() -> None:
    model, x = Dropping().double(), rows()
    assert [len(chain) for chain in rewire.plan(model, x).chains] == [2, 2]
    verdict = rewire.verify(rewire.make_reversible(model, x), x, original=model)
    assert verdict.passed, str(verdict)


class Passing(nn.Module):
    """Gives back the list it is handed; the model goes on writing into it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(handed_back) for _ in range(3))

    def forward(self, x: Tensor, seen: list[int]) -> Tensor:
        for block in self.blocks:
            x, same = block(x, {"seen": seen})
            same.append(len(same))
        return x


def handed_back(block: Block, x: Tensor, other: dict[str, list[int]]) -> Any:
    return x + block.f(x), other["seen"]


def test_a_list_that_is_handed_back_is_the_callers_own() -> None:
    rev = rewire.make_reversible(Passing().double(), (rows(), []))
    seen: list[int] = []
    rev(rows(), seen)
    assert seen == [0, 1, 2]


# ---- objects that are handed from child to child -----------------------------------------


class Memory:
    """What children hand each other, in an object of the user's."""

    def __init__(self) -> None:
        self.sums: list[float] = []


class Writes(nn.Module):
    """A branch that notes what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        y: Tensor = self.body(x)
        memory.sums.append(float(y.detach().sum()) if type(y.detach()) is Tensor else 0.0)
        return y


class Reads(nn.Module):
    """Gives what was noted so far, as often as it was."""

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return x.new_tensor([len(memory.sums)]).expand(1) + 0 * x.sum()


class Remembers(nn.Module):
    """Hands one object to its branch and to a child beside it."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.writes, self.reads, self.order = Writes(), Reads(), order
        self.register_buffer("zero", torch.zeros(DIM))

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        if self.order == "before":
            seen = self.reads(x, memory)
            return x + self.writes(x, memory), seen
        if self.order == "within":
            f = self.writes(x, memory)
            seen = self.reads(x, memory)
            return x + self.writes(f, memory) * seen, seen
        if self.order == "torn":
            f = self.writes(x, memory)
            seen = self.reads(self.zero, memory)
            return x + self.writes(f, memory), seen
        f = self.writes(x, memory)
        if self.order == "between":
            seen = self.reads(x, memory)
            return x + f, seen
        x = x + f
        return x, self.reads(x, memory)


class Remembering(nn.Module):
    """A loop over blocks with a memory of its own in each call."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Remembers(order) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, found = Memory(), []
        for block in self.blocks:
            x, seen = block(x, memory)
            found.append(seen)
        return x, torch.cat(found)


@pytest.mark.parametrize("order", ["before", "within", "between", "behind"])
def test_an_object_is_handed_on_in_order(order: str) -> None:
    model = Remembering(order).double()
    plain = rewire.make_reversible(model, rows(), coupling=AsOriginal())
    x = rows()
    (y, found), (z, wanted) = plain(x), model(x)
    assert torch.equal(found, wanted)
    assert torch.allclose(y, z, rtol=0, atol=1e-12)


def test_an_object_handed_on_in_the_middle_of_a_branch_is_refused() -> None:
    plan = rewire.plan(Remembering("torn").double(), rows())
    assert not plan.chains
    assert sum("handed the same object" in row.detail for row in plan.skipped) == 3
