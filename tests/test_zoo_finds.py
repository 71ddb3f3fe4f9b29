"""What the zoo found in real models, each made small: mechanisms that must not be lost again."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.ao import quantization
from torch.nn.utils import parametrizations

import rewire
from benchmarks.outcomes import AsOriginal
from tests.specimens import DIM, Loop, mlp, rows


def lengths(model: nn.Module, x: Any) -> list[int]:
    """Number of residual modules in each chain."""
    return [len(chain) for chain in rewire.plan(model, x).chains]


def proven(model: nn.Module, x: Tensor) -> nn.Module:
    """Rewired, and verified in float64."""
    rev = rewire.make_reversible(model.double().train(), x)
    verdict = rewire.verify(rev, x, original=model)
    assert verdict.passed, str(verdict)
    return rev


# ---- caches ------------------------------------------------------------------------------


def cached(function: Any) -> Any:
    """A decorator that hides an lru_cache in its closure."""
    inner = functools.lru_cache(maxsize=8)(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return inner(*args)

    return wrapper


@cached
def table(length: int) -> Tensor:
    """Positions, made once for each length."""
    return torch.arange(length, dtype=torch.float64)[:, None]


class Tabled(nn.Module):
    """Reads a cached table in its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x + table(x.shape[1]))


def test_no_fake_tensor_stays_in_a_cache_behind_a_decorator() -> None:
    rewire.plan(Loop(Tabled).double(), rows())
    assert not isinstance(table(6), FakeTensor)


class Memory:
    """A decoder's cache: it grows with each write."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def write(self, value: Tensor) -> Tensor:
        """All that was written so far."""
        self.kept = [*self.kept, value]
        return torch.cat(self.kept, 1)


class Remembering(nn.Module):
    """Asks about a value after it has written: the trace is tried again with the other answer."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        seen = memory.write(x)
        if not x.isfinite().all():
            raise ValueError("a number was expected")
        if seen.shape[1] != x.shape[1]:
            raise ValueError("the memory is not empty")
        return x + self.f(x + seen.mean())


class RemembersAll(nn.Module):
    """Each block has a memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Remembering() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, Memory())
        return x


def test_a_trace_that_is_tried_again_finds_its_arguments_as_they_were() -> None:
    model = RemembersAll().double()
    assert lengths(model, rows()) == [3]
    plain = rewire.make_reversible(model, rows())
    assert plain(rows()).shape == (4, 6, DIM)


# ---- results that are tuples with names ----------------------------------------------------


class Maximum(nn.Module):
    """Reads `.values` of what `max` gives, and the rest of a shape."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        best = x.max(dim=1, keepdim=True).values
        return x + self.f(x).reshape(x.shape[0], *x.shape[1:]) * best.sigmoid()


def test_named_results_and_parts_of_shapes() -> None:
    proven(Loop(Maximum), rows())


# ---- normalisations where the next module begins -------------------------------------------


class NormAct(nn.BatchNorm1d):
    """A normalisation and its activation in one module."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1
        )
        return nn.functional.relu(y)


class HeadNorm(nn.Module):
    """T(x) + F(T(x)): the skip is what the home's own code makes of the sum before."""

    norm: type[nn.Module] = nn.LayerNorm

    def __init__(self) -> None:
        super().__init__()
        self.t = self.norm(DIM)
        self.f = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.t(x)
        return x + self.f(x)


class HeadNormAct(HeadNorm):
    """The same with an activation behind the norm, in the norm's own code."""

    norm = NormAct


class HeadNormThenAct(HeadNorm):
    """The same with the activation in the home's code."""

    norm = nn.BatchNorm1d

    def forward(self, x: Tensor) -> Tensor:
        x = self.t(x).relu()
        return x + self.f(x)


def flat() -> Tensor:
    """[8, DIM]."""
    return torch.randn(8, DIM, dtype=torch.float64)


@pytest.mark.parametrize("block", [HeadNorm, HeadNormAct, HeadNormThenAct])
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)", "dr2(0.9, 0.1)"])
def test_a_chain_goes_on_over_a_norm_that_begins_the_next_module(block: Any, coupling: str) -> None:
    torch.manual_seed(0)
    model = Loop(block, 4).double()
    x = flat()
    assert lengths(model, x) == [4]
    rev = rewire.make_reversible(model, x, coupling=coupling)
    verdict = rewire.verify(rev, x, original=model)
    assert verdict.passed, str(verdict)


def test_a_sum_that_something_else_reads_before_the_norm_cuts_the_chain() -> None:
    class Tapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(HeadNorm() for _ in range(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.zeros_like(x)
            for block in self.blocks:
                x = block(x)
                total = total * x
            return x, total

    assert lengths(Tapped().double(), flat()) == []


# ---- chains under the skip of a U-Net ------------------------------------------------------


class Unet(nn.Module):
    """Chains on two levels, the lower one under a skip that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.first, self.lower, self.last = (Loop(HeadFree, depth) for depth in (2, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.up(self.lower(self.down(x)))
        return self.last(x)


class HeadFree(HeadNorm):
    """x + F(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.t(x))


def test_the_chains_under_a_skip_are_taken_before_the_skip() -> None:
    model = Unet().double()
    assert sorted(lengths(model, rows())) == [2, 2, 4]
    proven(model, rows())


# ---- layers that are more than weights -----------------------------------------------------


class Quantized(HeadFree):
    """x + F(q(x)), q a fake quantizer whose observer changes buffers in each training forward."""

    def __init__(self) -> None:
        super().__init__()
        observer = quantization.MovingAverageMinMaxObserver
        self.q = quantization.FakeQuantize(observer, quant_min=0, quant_max=255)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(self.q(self.t(x)))


class Weighed(HeadFree):
    """A branch with a parametrized weight, which power iteration changes in each forward."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.f[0])
        parametrizations.weight_norm(self.f[2])


class Counting(HeadFree):
    """A branch that counts its calls in a buffer, and an auxiliary loss that leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = CountedMlp()


class CountedMlp(nn.Module):
    """Counts its training forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.body(x)


@pytest.mark.parametrize("block", [Quantized, Weighed, Counting])
def test_layers_that_change_their_own_state_in_forward(block: Any) -> None:
    torch.manual_seed(0)
    model = Loop(block).double() if block is not Quantized else Loop(block)
    x = rows() if block is not Quantized else rows().float()
    assert lengths(model, x) == [3]
    rev = rewire.make_reversible(model.train(), x)
    verdict = rewire.verify(rev, x, original=model)
    assert verdict.passed, str(verdict)


# ---- a branch that begins in another module ------------------------------------------------


class SumAndNorm(nn.Module):
    """Hands on its sum and what the next branch begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.t = mlp(), nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.f(x)
        return x, self.t(x)


class Handed(nn.Module):
    """x + F(t), both from a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = SumAndNorm(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x, t = self.first(x)
        return x + self.second(t)


def test_a_branch_that_begins_in_the_module_before() -> None:
    model = Loop(Handed).double()
    assert lengths(model, rows()) == [6]
    proven(model, rows())


class Level(nn.Module):
    """A skip over a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.lower = Loop(HeadFree, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.lower(self.down(x)))


def test_a_chain_that_is_cut_before_a_norm_starts_behind_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Level(), Loop(HeadNormAct, 2)).double()
    assert sorted(lengths(model, flat())) == [2, 4]
    rev = rewire.make_reversible(model, flat(), coupling=AsOriginal(), precision="float64")
    x = flat()
    assert torch.allclose(rev.eval()(x), model.eval()(x), rtol=0, atol=1e-9)


@dataclass
class Seen:
    """What a child gives beside its output; its caller may write into it."""

    values: Tensor
    kind: str | None = None


class Noted(nn.Module):
    """Its branch gives a dataclass, into which the module's own code writes."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Telling()

    def forward(self, x: Tensor, heard: list[Seen]) -> tuple[Tensor, list[Seen]]:
        branch, seen = self.f(x)
        seen.kind = "self"
        return x + branch, [*heard, seen]


class Telling(nn.Module):
    """A branch with a dataclass of what came up in it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> tuple[Tensor, Seen]:
        branch = self.f(x)
        return branch, Seen(branch.tanh())


class AllNoted(nn.Module):
    """Collects what its modules note."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Noted() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Seen]]:
        heard: list[Seen] = []
        for block in self.blocks:
            x, heard = block(x, heard)
        return x, heard


def test_a_dataclass_that_a_branch_gives_may_be_written_into() -> None:
    model, x = AllNoted().double(), rows()
    assert lengths(model, x) == [3]
    rev = rewire.make_reversible(model, x, coupling=AsOriginal(), precision="float64")
    (ours, heard), (wanted, all_noted) = rev(x), model(x)
    assert torch.allclose(ours, wanted, rtol=0, atol=1e-9)
    assert [seen.kind for seen in heard] == ["self"] * 3
    for seen, other in zip(heard, all_noted, strict=True):
        assert torch.allclose(seen.values, other.values, rtol=0, atol=1e-9)
    proven(model, x)


class Scribe(nn.Module):
    """Changes a value of a dict among its arguments, itself or by a child."""

    def __init__(self, by_child: bool) -> None:
        super().__init__()
        self.f, self.count, self.by_child = mlp(), Counting(), by_child

    def forward(self, x: Tensor, state: dict[str, Tensor]) -> Tensor:
        if self.by_child:
            self.count(state)
        else:
            state["steps"] = state["steps"] + 1
        return x + self.f(x)


class Counting(nn.Module):
    """Counts in a dict that it is handed."""

    def forward(self, state: dict[str, Tensor]) -> None:
        state["steps"] = state["steps"] + 1


class Counted(nn.Module):
    """Its modules hand a dict on."""

    def __init__(self, by_child: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Scribe(by_child) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = {"steps": x.new_zeros(1)}
        for block in self.blocks:
            x = block(x, state)
        return x, state["steps"]


@pytest.mark.parametrize(
    ("by_child", "reason"),
    [(False, "changes a list or dict among its arguments"), (True, "count changes a list or dict")],
)
def test_a_dict_that_is_written_into_is_a_reason(by_child: bool, reason: str) -> None:
    """It was lost, silently: a rewired home's containers are made anew."""
    with pytest.raises(rewire.NothingToRewire, match=reason):
        rewire.make_reversible(Counted(by_child), rows().float())


class Sums(nn.Module):
    """x + F(x) with an activation behind it: torchvision's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.f(x))


class Decoded(nn.Module):
    """A skip from the encoder's end over a deeper level, added by a decoder that is a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Levels(), Summing()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class Levels(nn.Module):
    """Gives what each level is."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = nn.Sequential(Sums(), Sums(), Sums()), nn.Sequential(Sums(), Sums())

    def forward(self, x: Tensor) -> list[Tensor]:
        high = self.high(x)
        return [high, self.low(high.cos())]


class Summing(nn.Module):
    """Adds the levels up."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, DIM)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return levels[0] + self.up(levels[1])


def test_a_skip_over_leaves_that_cannot_be_one_spoils_no_chain_before_it() -> None:
    model = Decoded().double()
    assert lengths(model, rows()) == [3, 2]
    proven(model, rows())


class Rows(nn.Module):
    """[B, L, D] -> [B L, D] or back: a view, in a child's code."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, DIM) if x.dim() == 3 else x.reshape(-1, self.length, DIM)


class Framed(nn.Module):
    """Two residual modules between views that its children make."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = Rows(5), Rows(5)
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.there(x)
        x = x + self.f(x)
        x = x + self.g(x)
        return self.back(x)


def test_a_link_that_does_not_hold_in_the_code_cuts_the_chain_there() -> None:
    """The home was left alone for it, with all its modules."""
    model = nn.Sequential(*(Framed() for _ in range(3))).double()
    x = rows()[:, :5]
    assert lengths(model, x) == [2, 2, 2]
    proven(model, x)


class Sized(nn.Module):
    """Is handed the sizes of its levels, as `torch.Size` in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor, sizes: list[torch.Size]) -> Tensor:
        return x + self.f(x) * sizes[0][-1]


class AllSized(nn.Module):
    """Hands sizes to its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Sized() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, [x.shape])
        return x


def test_sizes_in_a_list_are_not_changed_by_being_read() -> None:
    assert lengths(AllSized().double(), rows()) == [3]


class Tied(nn.Module):
    """Two streams whose branches share what one child gives: it counts, and drops at random."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Linear(2 * DIM, 2 * DIM), nn.BatchNorm1d(6, momentum=0.5)
        self.drop, self.f, self.g = nn.Dropout(0.5), mlp(), mlp()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.drop(self.norm(self.mix(torch.cat([x, y], -1)))).chunk(2, -1)
        return x + self.f(a), y + self.g(b)


class AllTied(nn.Module):
    """Three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Tied() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh()
        for block in self.blocks:
            x, y = block(x, y)
        return x + 2 * y.cos()


def test_what_two_branches_share_is_computed_once() -> None:
    """It was in both: drawn twice, counted twice."""
    model, x = AllTied().double(), rows()
    assert lengths(model, x) == [3, 3]
    rev = rewire.make_reversible(model, x, coupling=AsOriginal(), precision="float64")
    model.train()
    rev.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    wanted = model(x)
    counted = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.load_state_dict(before, strict=False)
    torch.manual_seed(3)
    assert torch.allclose(rev(x), wanted, rtol=0, atol=1e-9)
    for name, buffer in rev.named_buffers():
        assert torch.allclose(buffer.double(), counted[name].double()), name
    model.load_state_dict(before, strict=False)
    proven(model, x)
