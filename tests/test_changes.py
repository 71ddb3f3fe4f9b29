"""What changes between one call and another, or under another name: the code is traced anew, or not
rewired."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import functools
import gc
import random
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import rewire
from benchmarks.outcomes import AsOriginal
from tests.specimens import DIM, Loop, mlp, rows
from tests.test_zoo_finds import lengths


@dataclasses.dataclass(slots=True)
class Slotted:
    """An object without a dict."""

    scale: float = 1.0


class Helper:
    """An object whose method a module keeps."""

    scale = 1.0

    def apply(self, h: Tensor) -> Tensor:
        """Reads the object."""
        return h * self.scale


class Block(nn.Module):
    """A residual module; what its code is, the tests say."""

    twice = False

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), nn.Linear(DIM, DIM)
        self.options: Any = {"a": {"scale": 1.0}}
        self.point: Any = collections.namedtuple("Point", "x y")(1.0, 2.0)
        self.kind: Any = torch.float64
        self.flag: Any = 1
        self.act: Any = torch.tanh
        self.many, self.queue = copy.copy(MANY), collections.deque([1.0])
        self.options_given = argparse.Namespace(scale=1.0)
        self.slotted, self.helper = Slotted(), Helper()
        self.help = self.helper.apply
        self.shuffle = random.Random(0)
        self.post: nn.Module = nn.Identity()

    @classmethod
    def factor(cls) -> float:
        """Of its class."""
        return SCALE

    kind_of_shift = functools.partialmethod(lambda self, shift: shift, 0.0)


def loop(code: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Three blocks of such code, in float64."""
    torch.manual_seed(0)
    return Loop(type("Block", (Block,), {"forward": code})).double()


# ---- attributes --------------------------------------------------------------------------


def anything(self: Any, x: Tensor) -> Tensor:
    """Reads whatever a class, an object or a container may hold."""
    h = self.act(self.f(x)) * self.options["a"]["scale"] * self.point.x
    h = 2 * h if self.twice else h
    h = h + 1 if self.kind is torch.float32 else h
    h = h * 3 if self.flag is True else h
    h = h * self.many.scale * self.queue[0] * self.factor() + self.kind_of_shift()
    h = self.help(h) * self.options_given.scale * self.slotted.scale
    return x + (h if isinstance(self.post, nn.Identity) else self.post(h))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "class attribute on the instance": lambda b: setattr(b, "twice", True),
    "class attribute": lambda b: setattr(type(b), "twice", True),
    "nested container": lambda b: b.options["a"].update(scale=3.0),
    "named tuple": lambda b: setattr(b, "point", b.point._replace(x=4.0)),
    "dtype": lambda b: setattr(b, "kind", torch.float32),
    "1 and True": lambda b: setattr(b, "flag", True),
    "function": lambda b: setattr(b, "act", torch.relu),
    "one of many": lambda b: setattr(b.many, "scale", 2.0),
    "parsed options": lambda b: setattr(b.options_given, "scale", 2.0),
    "slots": lambda b: setattr(b.slotted, "scale", 2.0),
    "object of a method": lambda b: setattr(b.helper, "scale", 2.0),
    "deque": lambda b: b.queue.__setitem__(0, 2.0),
    "class of a child": lambda b: setattr(b, "post", nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_code_that_would_act_otherwise_is_traced_anew(change: str) -> None:
    model, x = loop(anything), rows()
    rev = rewire.make_reversible(model, x, coupling=AsOriginal())
    before = rev(x)
    for both in (model, rev):
        for block in both.blocks:  # type: ignore[union-attr]
            CHANGES[change](block)
    assert not torch.allclose(rev(x), before)
    assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-12)


SCALE, TABLE_OF_SCALES = 1.0, {"a": [1.0]}
CALLS = [0]
MANY = type("Many", (), {f"option_{n}": n for n in range(100)})()
MANY.scale = 1.0
vars(MANY).update({f"more_{n}": n for n in range(100)})


def helped(h: Tensor, factor: float = 1.0) -> Tensor:
    """Reads a table at the top of its file."""
    return h * TABLE_OF_SCALES["a"][0] * factor


def with_help(self: Any, x: Tensor) -> Tensor:
    return x + SCALE * helped(self.f(x))


def test_what_code_reads_of_its_file_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = loop(with_help), rows()
    rev = rewire.make_reversible(model, x, coupling=AsOriginal())
    assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-12)
    file = __name__
    changes: list[tuple[str, Any]] = [
        (f"{file}.SCALE", 3.0),
        (f"{file}.TABLE_OF_SCALES", {"a": [0.5]}),
        (f"{file}.helped", lambda h: h * 4),
    ]
    for name, value in changes:
        before = rev(x)
        monkeypatch.setattr(name, value)
        assert not torch.allclose(rev(x), before)
        assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-12)


def test_what_code_reads_of_the_function_around_it_is_followed() -> None:
    shift = 0.0

    def around(self: Any, x: Tensor) -> Tensor:
        return x + (self.f(x) + shift)

    model, x = loop(around), rows()
    rev = rewire.make_reversible(model, x, coupling=AsOriginal())
    before, shift = rev(x), 1.0
    assert not torch.allclose(rev(x), before)
    assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-12)


def counting(self: Any, x: Tensor) -> Tensor:
    CALLS[0] += 1
    return x + self.f(x)


def test_code_that_changes_its_file_is_refused() -> None:
    plan = rewire.plan(loop(counting), rows())
    assert not plan.chains
    assert "of its file" in plan.skipped[0].detail


def by_form_of_a_result(self: Any, x: Tensor) -> Tensor:
    h = self.f(x)
    return x + self.g(h * 3 if h.dtype == torch.float32 else h)


def test_code_that_asks_for_the_dtype_of_a_childs_result() -> None:
    model, x = loop(by_form_of_a_result), rows()
    rev = rewire.make_reversible(model, x, coupling=AsOriginal())
    rev(x)
    model, rev, x = model.float(), rev.float(), x.float()
    assert torch.allclose(rev(x), model(x), rtol=0, atol=1e-5)


def draws(self: Any, x: Tensor) -> Tensor:
    return x + self.f(x) * (self.shuffle.random() > 0.5)


def test_a_generator_of_the_codes_own_is_refused() -> None:
    plan = rewire.plan(loop(draws), rows())
    assert "draws random numbers" in plan.skipped[0].detail


def test_a_second_call_traces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rev, x = rewire.make_reversible(loop(anything), rows()), rows()
    found = rev(x)
    monkeypatch.setattr("rewire.programs.program_for", None)  # to call it is an error
    assert torch.equal(rev(x), found)


class Divides(nn.Module):
    """Decides by a number that must not be 0, unless it is."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor, number: int) -> Tensor:
        h = self.f(x)
        return x + (2 * h if number > 0 and 10 % number == 0 else h)


class Numbered(Loop):
    """Hands on a number."""

    def forward(self, x: Tensor, number: int) -> Tensor:
        for block in self.blocks:
            x = block(x, number)
        return x


def test_a_decision_that_the_code_would_not_have_come_to() -> None:
    model, x = Numbered(Divides).double(), rows()
    rev = rewire.make_reversible(model, (x, 5), coupling=AsOriginal())
    for number in (5, 0, 3, 2):
        assert torch.allclose(rev(x, number), model(x, number), rtol=0, atol=1e-12)


# ---- sums in place -----------------------------------------------------------------------


class Pile(nn.Module):
    """A residual loop of sums in place, of which something else holds what is added to."""

    def __init__(self, keeps: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f, self.keeps = nn.ModuleList(mlp() for _ in range(3)), keeps

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.0
        kept = self.keeps(x)
        for f in self.f:
            x += f(x)
        return x, kept


def test_another_name_for_a_sum_in_place_is_the_sum() -> None:
    model, x = Pile(lambda x: x).double(), rows()
    rev = rewire.make_reversible(model, x)
    assert lengths(model, x) == [3]
    out, kept = rev(x)
    assert torch.equal(out, kept)


def test_a_view_of_a_sum_in_place_is_refused() -> None:
    plan = rewire.plan(Pile(lambda x: x[:, :2]).double(), rows())
    assert not plan.chains
    assert "through a view" in plan.skipped[0].detail


def adds_in_place(self: Any, x: Tensor) -> Tensor:
    x += self.f(x)
    return x


class Around(nn.Module):
    """Goes on with what it has handed to its blocks, or with what they give."""

    def __init__(self, blocks: nn.Module, way: str) -> None:
        super().__init__()
        self.blocks, self.way = blocks.blocks, way

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        first = x
        for block in self.blocks:  # type: ignore[union-attr]
            if self.way == "ignores":
                block(x)
            else:
                x = block(x)
        return x * first if self.way == "keeps" else x


@pytest.mark.parametrize(("way", "chains"), [("goes on", [3]), ("ignores", []), ("keeps", [])])
def test_a_caller_that_goes_on_with_the_tensor_it_handed_in(way: str, chains: list[int]) -> None:
    model, x = Around(loop(adds_in_place), way).double(), rows()
    plan = rewire.plan(model, x)
    assert [len(chain) for chain in plan.chains] == chains
    assert [row.reason for row in plan.skipped] == ["in place"] * (3 - sum(chains))
    if chains:
        plain = rewire.make_reversible(model, x, coupling=AsOriginal())
        assert torch.allclose(plain(x), model(x), rtol=0, atol=1e-12)


class Keeps(nn.Module):
    """Keeps what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = result = self.f(x)
        return result  # type: ignore[no-any-return]


class AddsToKept(nn.Module):
    """Adds in place to what a child has kept."""

    def __init__(self) -> None:
        super().__init__()
        self.f = Keeps()

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.f(x)
        h += x
        return h


def test_a_sum_in_place_into_what_a_module_keeps_is_refused() -> None:
    plan = rewire.plan(Loop(AddsToKept).double(), rows())
    assert not plan.chains
    assert "a module keeps" in plan.skipped[0].detail


def test_a_sum_in_place_of_another_dtype_is_refused() -> None:
    def adds_wider(self: Any, x: Tensor) -> Tensor:
        x += self.f(x).double()
        return x

    plan = rewire.plan(loop(adds_wider).float(), rows().float() * 1.0)
    assert not plan.chains
    assert "adds torch.float64 in place" in plan.skipped[0].detail


# ---- buffers that children write into ----------------------------------------------------


class Counts(nn.Module):
    """Counts its calls in place."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.f(x)  # type: ignore[no-any-return]


class Weighs(nn.Module):
    """Reads what its children count, before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(Counts() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x
        for f in self.f:
            before = f.count * 2.0
            x = x + f(x)
            y = y * (f.count - before)
        return x, y


def test_counts_of_children_are_read_in_their_turn() -> None:
    model, x = Weighs().double(), rows()
    rev = rewire.make_reversible(copy.deepcopy(model), x, coupling=AsOriginal())
    for _ in range(3):
        for found, wanted in zip(rev(x), model(x), strict=True):
            assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


# ---- threads and marks -------------------------------------------------------------------


def test_the_first_run_may_be_in_several_threads_at_once() -> None:
    model, x = loop(anything), rows()
    rev = rewire.make_reversible(model, x)
    names, wanted = [name for name, _ in rev.named_modules()], rev(x)
    rev = rewire.make_reversible(model, x)
    start, found = threading.Barrier(4), []

    def run() -> None:
        start.wait()
        found.append(rev(x))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, wanted) for one in found)
    assert [name for name, _ in rev.named_modules()] == names


TABLE: dict[int, Any] = {}
DEEP: dict[str, dict[int, Any]] = {"rope": {}}


class Tables(nn.Module):
    """Fills tables of its class and file, writes into a tensor of its own, has odd buffers."""

    table: ClassVar[dict[int, Tensor]] = {}
    latest: ClassVar[Tensor | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = loop(anything)
        self.own, self.recent = torch.ones(DIM, dtype=torch.float64), collections.deque[Tensor]()
        self.nested: list[dict[str, Any]] = [{}]
        self.register_buffer("edges", torch.eye(3).to_sparse())
        self.register_buffer("unknown", torch.full((2,), float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        for table in (TABLE, self.table):
            if x.shape[1] not in table:
                table[x.shape[1]] = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            x = x + table[x.shape[1]]
        DEEP["rope"][x.shape[1]] = (x, [x])
        Tables.latest = x
        self.nested[0].setdefault("x", (x,))
        self.own.mul_(0.5)
        self.recent.append(x)
        return self.blocks(x * self.own)  # type: ignore[no-any-return]


def test_planning_leaves_no_mark_on_classes_files_and_tensors() -> None:
    model, x, heard = Tables(), rows(), []
    version = model.unknown._version
    hook = nn.modules.module.register_module_forward_hook(lambda *_: heard.append(1))
    rewire.plan(model, x)
    hook.remove()
    assert (TABLE, Tables.table, list(model.recent), heard) == ({}, {}, [], [])
    assert (DEEP["rope"], Tables.latest, model.nested) == ({}, None, [{}])
    assert torch.equal(model.own, torch.ones(DIM, dtype=torch.float64))
    assert model.unknown._version == version
    assert type(model(x)) is Tensor


def test_planning_and_a_first_run_leave_no_fake_tensor_alive() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(item) is FakeTensor for item in gc.get_objects())

    model = Loop(lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)).double()
    before = alive()
    rewire.make_reversible(model, rows())(rows())
    assert alive() == before


class Batch:
    """A tensor in an object of the user's."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_a_tensor_inside_an_object_is_an_input() -> None:
    class Unpacks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = loop(anything)

        def forward(self, batch: Batch) -> Tensor:
            return self.blocks(batch.tensor)  # type: ignore[no-any-return]

    assert lengths(Unpacks(), (Batch(rows()),)) == [3]
