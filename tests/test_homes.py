"""Which code is rewired as one, and what code may do: decide by values, make objects, share."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import rewire
from benchmarks.outcomes import AsOriginal
from tests.specimens import DIM, Loop, mlp, rows
from tests.test_zoo_finds import lengths, proven


def same_as_original(model: nn.Module, example: Any, *calls: Any) -> None:
    """The plain form gives what the original does, call by call."""
    plain = rewire.make_reversible(copy.deepcopy(model), example, coupling=AsOriginal())
    for args in calls:
        assert torch.allclose(plain(*args), model(*args), rtol=0, atol=1e-9)


# ---- decisions by values -----------------------------------------------------------------


class RootLoop(nn.Module):
    """A residual loop in the root's own forward, which checks lengths first."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mlp() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            assert lengths.max().item() <= x.shape[1]
            if lengths.min().item() < x.shape[1]:
                known = torch.arange(x.shape[1]) < lengths[:, None]
                x = x * known[..., None].to(x)
        for mixer in self.mixers:
            x = x + mixer(x) * self.scale
        return x


def test_a_number_that_was_a_tensor_decides_in_each_call() -> None:
    model, x = RootLoop().double(), rows()
    full, short = torch.full((4,), 6), torch.tensor([6, 2, 3, 1])
    assert lengths(model, (x, full)) == lengths(model, (x, short)) == [3]
    for example in (full, short):
        same_as_original(model, (x, example), (x, full), (x, short), (x,), (x[:, :4], full - 2))
    rev = rewire.make_reversible(model, (x, full))
    with pytest.raises(AssertionError):
        rev(x, torch.full((4,), 9))
    verdict = rewire.verify(rev, x, short, original=model)
    assert verdict.passed, str(verdict)


# ---- objects -----------------------------------------------------------------------------


class Memory:
    """A cache that the code makes where none is given."""

    def __init__(self, depth: int) -> None:
        self.kept: list[Tensor | None] = [None] * depth

    def update(self, layer: int, value: Tensor) -> Tensor:
        before = self.kept[layer]
        self.kept[layer] = value if before is None else torch.cat([before, value], 1)
        return self.kept[layer].mean(1, keepdim=True)  # type: ignore[union-attr]


class Attending(nn.Module):
    """Reads and writes the cache."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.f, self.layer = mlp(), layer

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        return self.f(x + memory.update(self.layer, x))


class Caching(nn.Module):
    """A residual loop in the root's own forward, with a cache of its own making."""

    def __init__(self, *, looks: bool = False) -> None:
        super().__init__()
        self.layers, self.looks = nn.ModuleList(Attending(n) for n in range(3)), looks

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        if memory is None:
            memory = Memory(len(self.layers))
        for layer in self.layers:
            x = x + layer(x, memory)
        return x * len(memory.kept) if self.looks else x


def test_an_object_that_the_code_makes_is_made_in_each_call() -> None:
    model, x = Caching().double(), rows()
    assert lengths(model, x) == [3]
    same_as_original(model, x, (x,), (x,), (x[:, :3],))
    proven(model, x)


def test_an_object_that_the_code_makes_and_then_looks_into_is_a_reason() -> None:
    with pytest.raises(rewire.NothingToRewire, match="of class Memory, hands it on and then reads"):
        rewire.make_reversible(Caching(looks=True), rows().float())


class HoldsTensor(Caching):
    """The object holds what the code has computed."""

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        memory = Memory(len(self.layers))
        memory.kept[0] = x.tanh()
        for layer in self.layers:
            x = x + layer(x, memory)
        return x


def test_an_object_that_holds_what_was_computed_is_a_reason() -> None:
    with pytest.raises(rewire.NothingToRewire, match="makes an object that holds a tensor"):
        rewire.make_reversible(HoldsTensor(), rows().float())


# ---- shared code -------------------------------------------------------------------------


class Adapted(nn.Module):
    """Two residual modules; the skip of the second is the sum before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm, self.g = mlp(), nn.LayerNorm(DIM), mlp()

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        x = x + self.f(hidden)
        return x + self.g(self.norm(x))


class AdaptedBlock(nn.Module):
    """The branch of the child's first module begins here: its code is part of this one's."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.wide, self.output = mlp(), mlp(), Adapted()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return self.output(self.wide(x), x)


def test_code_that_two_homes_share_is_one_home() -> None:
    model, x = Loop(AdaptedBlock).double(), rows()
    plan = rewire.plan(model, x)
    assert [len(chain) for chain in plan.chains] == [9]
    assert {module.home for module in plan.modules} == {f"blocks.{n}" for n in range(3)}
    proven(model, x)


class Untraceable(nn.Module):
    """Reaches into its child's code, and cannot be traced itself; its child can."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.output, self.seen = mlp(), Pair(), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(self.seen))
        return self.output(x, self.wide(x))


class Pair(nn.Module):
    """Its first sum belongs to the module around it, the others are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor, wide: Tensor) -> Tensor:
        x = x + wide
        x = x + self.f(x)
        return x + self.g(x)


def test_where_the_outer_home_fails_the_inner_one_is_rewired() -> None:
    model, x = Loop(Untraceable).double(), rows()
    plan = rewire.plan(model, x)
    assert [len(chain) for chain in plan.chains] == [2, 2, 2]
    shared = [row for row in plan.skipped if row.reason == "shared code"]
    assert len(shared) == 3
    assert "is in the code of blocks.0.output" in shared[0].detail
    proven(model, x)


# ---- streams that read each other --------------------------------------------------------


class Levels(nn.Module):
    """Three streams of other sizes: each branch adds what the others' branches give."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv2d(DIM, DIM, 3, padding=1) for _ in range(3))
        self.out = nn.ModuleList(nn.Conv2d(DIM, DIM, 1) for _ in range(3))
        self.drop = nn.Dropout(0.2)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        ys = [mix(x).tanh() for mix, x in zip(self.mix, xs, strict=True)]
        sums = [sum(interpolate(y, size=x.shape[-2:]) for y in ys) for x in xs]
        xs = tuple(x + self.drop(s) for x, s in zip(xs, sums, strict=True))
        return tuple(x + out(x).relu() for out, x in zip(self.out, xs, strict=True))


class Pyramid(nn.Module):
    """Two such blocks, and one result."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Levels() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        xs = tuple(interpolate(x, scale_factor=f) for f in (1, 0.5, 0.25))
        for block in self.blocks:
            xs = block(*xs)
        return sum(x.mean((2, 3)) for x in xs)  # type: ignore[return-value]


def test_branches_of_three_streams_that_read_each_other() -> None:
    x = torch.randn(2, DIM, 8, 8, dtype=torch.float64)
    model = Pyramid().double()
    assert lengths(model, x) == [4, 4, 4]
    same_as_original(model.eval(), x, (x,), (x[:1],))
    proven(model, x)


# ---- on the trunk ------------------------------------------------------------------------


class Affine(nn.Module):
    """What stands for a normalisation without statistics: z w + b."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(DIM))
        self.bias = nn.Parameter(torch.randn(DIM))

    def forward(self, z: Tensor) -> Tensor:
        return z * self.weight + self.bias


class AffineBehind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = mlp(), Affine()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.f(x))


def test_a_chain_goes_on_over_a_scale_and_a_bias() -> None:
    model, x = Loop(AffineBehind).double(), rows()
    assert lengths(model, x) == [3]
    same_as_original(model, x, (x,))
    proven(model, x)


# ---- what the code asks and makes --------------------------------------------------------


class Windowed(nn.Module):
    """Masks what it pads: a tensor made in forward, written into piece by piece."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.f, self.g, self.window = mlp(), mlp(), window

    def mask(self, length: int) -> Tensor:
        mask = torch.ones(length, 1, dtype=torch.float64)
        for number, part in enumerate((slice(0, -2), slice(-2, None))):
            mask[part] = number + 0.5
        return mask

    def forward(self, x: Tensor) -> Tensor:
        masked = self.f(x) * self.mask(x.shape[1]) if x.shape[1] % self.window else self.f(x)
        x = x + masked
        return x + self.g(x)


def test_a_mask_made_and_written_into_at_some_sizes_only() -> None:
    model, x = Loop(Windowed).double(), rows()
    for example, other in ((x, x[:, :4]), (x[:, :4], x)):
        assert lengths(model, example) == [6]
        same_as_original(model, example, (example,), (other,), (x[:2, :5],), (example,))
    proven(model, x)


class Fold(nn.Module):
    """A layer without parameters; what it does hangs on the number of dimensions."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            return x.flatten(0, 1).unflatten(0, x.shape[:2]) * self.factor
        return x * (self.factor if x.dim() == 2 else 0.5)


class MakesLayers(nn.Module):
    """Makes a layer in forward and calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + Fold(0.25)(self.f(x))
        return x + Fold(0.75)(self.g(x))


def test_a_layer_made_in_forward_and_inputs_of_other_dimensions() -> None:
    model, x = Loop(MakesLayers).double(), rows()
    assert lengths(model, x) == [6]
    same_as_original(model, x, (x,), (x[0],), (x[None],), (x[:1],))
    proven(model, x)


class Indexed(nn.Module):
    """Layers in lists, called by number; no activation follows the last sum."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: Tensor, index: int = 0) -> Tensor:
        x = x + self.convs[index](x)
        return x.relu() if index < 3 else x


class CallsByNumber(nn.Module):
    """Calls one module once for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Indexed()

    def forward(self, x: Tensor) -> Tensor:
        for index in range(4):
            x = self.layers(x, index)
        return x


def test_one_module_called_with_the_number_of_the_layer() -> None:
    model, x = CallsByNumber().double(), rows()
    same_as_original(model, x, (x,), (x[:1],))
    proven(model, x)


class NormalisesBatch(nn.Module):
    """Whose code asks for more in train mode than in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.batch_norm(
            self.f(x).relu(),
            self.norm.running_mean,
            self.norm.running_var,
            training=self.training,
        )


def test_an_example_of_one_is_enough() -> None:
    model, x = Loop(NormalisesBatch).double().eval(), rows()[:, 0]
    assert lengths(model, x[:1]) == [3]
    proven(model, x)


# ---- what children are handed ------------------------------------------------------------


class Recorder(nn.Module):
    """A branch that can note what it sees in a dict or list that it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.records = mlp(), False

    def forward(self, x: Tensor, notes: Any) -> Tensor:
        if self.records:
            notes["seen" if isinstance(notes, dict) else 0] = x
        result: Tensor = self.body(x)
        return result


class Recording(nn.Module):
    """A residual module that hands its branch a dict of its own, or the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Recorder()

    def forward(self, x: Tensor, notes: Any = None) -> Tensor:
        notes = {"seen": None} if notes is None else notes
        return x + self.branch(x, notes)


class Noted(Loop):
    """Hands on what it is given beside x."""

    def forward(self, x: Tensor, *notes: Any) -> Tensor:
        for block in self.blocks:
            x = block(x, *notes)
        return x


@pytest.mark.parametrize("notes", [(), ({"seen": None},), ([0, 1],)])
def test_a_child_that_begins_to_write_into_what_it_is_handed(notes: Any) -> None:
    model = Noted(Recording).double()
    rev = rewire.make_reversible(model, (rows(), *notes))
    rev(rows(), *notes).sum().backward()
    rev.blocks[1].branch.records = True  # type: ignore[index, union-attr]
    with pytest.raises(rewire.CannotTrace, match="changes a list or dict"):
        rev(rows(), *notes)


# ---- residual modules that a call leaves out ---------------------------------------------


class Decoder(nn.Module):
    """Self-attention, as it were; attention to a context where there is one; and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.across, self.mlp = mlp(), mlp(), mlp()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.own(x)
        if context is not None:
            x = x + self.across(context) * x.sigmoid()
        return x + self.mlp(x)


class Steps(nn.Module):
    """A residual loop in the root's forward over some of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(mlp() for _ in range(5))

    def forward(self, x: Tensor, first: int = 0, last: int = 5) -> Tensor:
        for f in self.f[first:last]:
            x = x + f(x)
        return x


def assert_runs(model: nn.Module, example: Any, *calls: Any) -> None:
    """The plain form is the original, and gradients are those with activations stored."""
    same_as_original(model, example, *calls)
    rev = rewire.make_reversible(model, example)
    for args in calls:
        leaves = [*rev.parameters()]
        found = torch.autograd.grad(rev(*args).sin().sum(), leaves, allow_unused=True)
        with rewire.store_activations(rev):
            wanted = torch.autograd.grad(rev(*args).sin().sum(), leaves, allow_unused=True)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_optional_attention_may_be_left_out() -> None:
    torch.manual_seed(0)
    model, x, context = Noted(Decoder).double(), rows(), rows()
    assert lengths(model, (x, context)) == [9]
    assert_runs(model, (x, context), (x, context), (x, None), (x,), (x, context))


def test_a_loop_may_go_round_fewer_times() -> None:
    torch.manual_seed(0)
    model, x = Steps().double(), rows().requires_grad_()
    assert_runs(model, x, (x,), (x, 0, 3), (x, 2), (x, 4), (x,))
    rev = rewire.make_reversible(model, x)
    assert torch.equal(rev(x, 5), x)
    assert torch.allclose(rev(x, 2), three_steps(model, x), rtol=0, atol=1e-12)


def three_steps(model: Any, x: Tensor) -> Tensor:
    """The last three modules in two streams, and their merge."""
    older = newest = x
    for f in model.f[2:]:
        older, newest = newest, older + f(newest)
    return (older + newest) / 2


def test_residual_modules_that_the_example_did_not_come_to() -> None:
    rev = rewire.make_reversible(Noted(Decoder).double(), (rows(),))
    with pytest.raises(rewire.CannotTrace, match="an example that takes the longest way"):
        rev(rows(), rows())
    rev = rewire.make_reversible(Steps().double(), (rows(), 0, 3))
    with pytest.raises(rewire.CannotTrace, match="5 times, and in the example 3 times"):
        rev(rows())


class Scaled(nn.Module):
    """Decides by a number that it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp()

    def forward(self, x: Tensor, position: int) -> Tensor:
        return x + self.f(x) * float(int(position))


def test_code_that_is_traced_in_every_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewire.programs._MOST_PROGRAMS", 3)
    model, x = Noted(Scaled).double(), rows()
    rev = rewire.make_reversible(model, (x, 0), coupling=AsOriginal())
    for number in range(3):
        rev(x, number)
    with pytest.warns(UserWarning, match="traced for the 4th time"):
        found = rev(x, 3)
    assert torch.allclose(found, model(x, 3), rtol=0, atol=1e-12)


def test_functional_transforms_around_a_model_that_has_not_run() -> None:
    """The code is traced in its first run, here inside of the transforms."""
    torch.manual_seed(0)
    model, x = RootLoop().double(), torch.randn(4, 5, DIM, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def found(net: nn.Module) -> Any:
        parameters = {name: p.detach() for name, p in net.named_parameters()}

        def loss(p: Any, one: Tensor) -> Tensor:
            return torch.func.functional_call(net, p, (one[None],)).sin().sum()

        grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        return [grads[name] for name in names], torch.func.jvp(net, (x,), (x,))[1]

    rev = rewire.make_reversible(model, x, coupling=AsOriginal())
    torch.testing.assert_close(found(rev), found(model), rtol=0, atol=1e-12)
    rev(x).sum().backward()  # with hooks again, which the transforms had forbidden
