"""Branches run part by part: what may be cut, exactness, memory, and what must not be cut."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.video import swin3d_t

import rewire
from benchmarks.costs import step_bytes, zero_gradients
from rewire import following, mixing
from rewire.plans import Parts
from rewire.profiling import scalar_loss
from rewire.reversible import ReversibleSequential, store_activations, whole_branches


class Mlp(nn.Module):
    def __init__(self, dim: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 32), nn.Linear(32, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(F.gelu(self.up(self.norm(x)))))


class Attention(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, dim // 2).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Windows(nn.Module):
    """Attention in windows of 4 tokens, after a roll."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.attention, self.shift = Attention(), shift

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        x = torch.roll(x, -self.shift, 1)
        x = self.attention(x.view(batch * tokens // 4, 4, dim)).view(batch, tokens, dim)
        return torch.roll(x, self.shift, 1)


class DropPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_empty((x.shape[0], 1, 1)).bernoulli_(0.7).div_(0.7)
        return self.inner(x) * mask


class Embedded(nn.Module):
    """Adds a tensor that differs from token to token."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.place = Mlp(), nn.Parameter(torch.randn(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.place)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = Mlp(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(12), nn.Conv1d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


def chain(*branches: nn.Module, chunks: int | str = 4, **options: object) -> ReversibleSequential:
    torch.manual_seed(0)
    return ReversibleSequential(branches, chunks=chunks, check="raise", **options)


def rows(net: nn.Module, x: Tensor) -> list[Parts]:
    return rewire.parts(net, x)


def gradients(net: nn.Module, x: Tensor, *sides: Tensor) -> list[Tensor]:
    for parameter in net.parameters():
        parameter.grad = None
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    output = net(x, *sides)
    scalar_loss(output).backward()
    return [output.detach(), x.grad, *(p.grad for p in net.parameters())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


X = torch.randn(6, 12, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("branch", "chunks", "along"),
    [
        (Mlp(), 4, ((0, 4),)),
        (Mlp(), 20, ((0, 6), (1, 4))),
        (Attention(), 20, ((0, 6),)),
        (Windows(), 20, ((0, 6), (1, 3))),
        (Windows(shift=2), 20, ((0, 6),)),
        (DropPath(), 20, ((0, 6),)),
        (Embedded(), 20, ((0, 6),)),
        (Normed(), 20, ()),
        (Normed().eval(), 20, ((0, 6),)),
    ],
)
def test_a_branch_is_cut_along_what_its_operations_keep_apart(
    branch: nn.Module, chunks: int, along: tuple[tuple[int, int], ...]
) -> None:
    net = chain(branch, chunks=chunks).train(branch.training)
    assert rows(net, X)[0].along == along


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x - x.mean(0), "mean"),
        (lambda x: x.cumsum(0), "cumsum"),
        (lambda x: x.flip(0), "flip"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)), "pads"),
        (lambda x: x * x.shape[0], "counts"),
        (lambda x: x[torch.arange(6)], ""),
        (lambda x: torch.roll(x, 1, 0), "roll"),
        (lambda x: x / x.norm(), "reduces all"),
        (lambda x: torch.einsum("bnd,bnd->nd", x, x).expand(6, 12, 8) + x, ""),
        (lambda x: x + torch.arange(x.shape[0]).view(-1, 1, 1), "counts"),
        (lambda x: torch.linalg.qr(x.flatten(1))[0].repeat(1, 16).view(6, 12, 8), ""),
        (lambda x: x.sort(0).values, "sort"),
        (lambda x: x.transpose(0, 1).reshape(6, 12, 8), ""),
        (lambda x: (x.flatten(1).T @ x.flatten(1) @ x.flatten(1).T).T.view(6, 12, 8), ""),
    ],
)
def test_what_mixes_samples_is_not_cut_by_samples(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    net = chain(Function(function), Mlp(), chunks=6)
    first, second = rows(net, X)
    assert all(dim != 0 for dim, _ in first.along)
    assert reason in first.reason
    assert second.along == ((0, 6),)
    with whole_branches(net):
        expected = net(X)
    assert torch.allclose(net(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("chunks", [5, 20])
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)", "dr2(0.9, 0.1)", "bdia"])
def test_gradients_are_those_of_the_stored_twin(
    depth: int, chunks: int | str, coupling: str
) -> None:
    branches = [
        module
        for _ in range(depth)
        for module in (Attention(), Mlp(dropout=0.2), DropPath(), Windows())
    ]
    net = chain(*branches, chunks=chunks, coupling=coupling)
    found = gradients(net, X)
    with store_activations(net):
        assert same(found, gradients(net, X))


@pytest.mark.parametrize("precision", ["exact", "float64", "fast"])
def test_the_function_is_that_of_the_whole_branches(precision: str) -> None:
    net = chain(Attention(), Mlp(), Windows(), Mlp(), chunks=20, precision=precision).double()
    x = X.double()
    found = gradients(net, x)
    with whole_branches(net):
        whole = gradients(net, x)
    for a, b in zip(found, whole, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_streams_of_another_memory_format_are_cut() -> None:
    conv = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))
    net = chain(conv, copy.deepcopy(conv), chunks=8)
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    assert rows(net, x)[0].along == ((0, 2), (2, 4))
    found = gradients(net, x)
    with store_activations(net):
        assert same(found, gradients(net, x))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x) * mask


@pytest.mark.parametrize("shape", [(6, 1, 1), (6, 12, 1), (1, 1, 8), (8,)])
def test_side_inputs_go_along(shape: tuple[int, ...]) -> None:
    net = chain(Masked(), Masked(), chunks=6)
    mask = torch.rand(shape, requires_grad=True)
    found = gradients(net, X, mask), mask.grad
    mask.grad = None
    with store_activations(net):
        assert same(found[0], gradients(net, X, mask))
    assert torch.equal(found[1], mask.grad)
    assert net.branches[0].cutting.last.axes == ((0, 6),)


def test_a_part_is_recalled_in_any_order() -> None:
    net = chain(Attention(), Mlp(), Attention(), Mlp(), chunks=3)
    x = X.clone().requires_grad_()
    loss = scalar_loss(net(x))
    first = torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)
    again = torch.autograd.grad(loss, [x, *net.parameters()], retain_graph=True)
    assert same(list(first), list(again))
    one = next(iter(net.branches[1].function.parameters()))
    (alone,) = torch.autograd.grad(loss, [one], retain_graph=True)
    (third,) = torch.autograd.grad(loss, [x], retain_graph=True)
    assert torch.equal(third, first[0])
    assert torch.equal(alone, first[1 + [p is one for p in net.parameters()].index(True)])


def test_double_backward() -> None:
    net = chain(Mlp(), Mlp(), chunks=3).double()
    x = X.double().requires_grad_()

    def second() -> list[Tensor]:
        (gradient,) = torch.autograd.grad(scalar_loss(net(x)), [x], create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), [x, *net.parameters()]))

    found = second()
    with store_activations(net):
        for a, b in zip(found, second(), strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_frozen_branches_and_inputs_without_gradient() -> None:
    net = chain(Attention(), Mlp(), Attention(), Mlp(), chunks=3)
    for parameter in net.branches[0].function.parameters():
        parameter.requires_grad_(False)
    loss = scalar_loss(net(X))
    loss.backward()
    found = [p.grad.clone() for p in net.parameters() if p.requires_grad]
    net.zero_grad()
    with store_activations(net):
        scalar_loss(net(X)).backward()
    assert same(found, [p.grad for p in net.parameters() if p.requires_grad])


class Norms(nn.Module):
    """Eight pre-norm blocks of a transformer."""

    def __init__(self, depth: int, dim: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            timm.layers.Mlp(dim, 4 * dim, norm_layer=None) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("depth", [4, 8])
def test_the_peak_falls_and_nothing_is_left(depth: int) -> None:
    x = torch.randn(16, 128, 64, requires_grad=True)
    peaks = {}
    for chunks in (1, 8):
        net = rewire.make_reversible(Norms(depth), x, chunks=chunks)
        zero_gradients([x, *net.parameters()])
        net(x)
        cost = step_bytes(net, x)
        peaks[chunks] = cost.peak
        assert cost.left == 0
    stream = x.nbytes
    assert peaks[8] < 0.55 * peaks[1]
    assert peaks[8] < 7.5 * stream


@pytest.mark.parametrize(
    ("name", "cut"),
    [("vit_tiny_patch16_224", 1.0), ("convnext_atto", 1.0), ("swin_tiny_patch4_window7_224", 1.0)],
)
def test_models_with_drop_path_train_in_parts(name: str, cut: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=0.2)
    x = torch.randn(3, 3, 224, 224)
    rev = rewire.make_reversible(model, x, chunks=3, check="raise").train()
    found = gradients(rev, x)
    with store_activations(rev):
        assert same(found, gradients(rev, x))
    parts = rewire.parts(rev, x)
    assert sum(bool(row.along) for row in parts) >= cut * len(parts)


def test_video_windows_are_cut_in_slabs() -> None:
    model = swin3d_t()
    rev = rewire.make_reversible(model, torch.randn(1, 3, 8, 56, 56), chunks=4)
    first = rewire.parts(rev, torch.randn(1, 3, 64, 56, 56))[0]
    assert first.along == ((1, 4),)


def test_verify_looks_at_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Mlp(), Function(lambda x: x - x.mean(0, keepdim=True))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            return x + self.b(x)

    def checks() -> dict[str, bool]:
        rev = rewire.make_reversible(Net(), X, chunks=3)
        verdict = rewire.verify(rev, X)
        return {check.name: check.passed for check in verdict.checks}

    right = checks()
    assert right["parts as the whole (eval)"]
    assert right["parts as the whole (train)"]
    monkeypatch.setitem(mixing.RULES, "mean", lambda call: None)
    monkeypatch.setattr(following.Following, "_compare", lambda *_: None)
    monkeypatch.setitem(mixing.RULES, "sub", lambda call: call.labels(call.given["self"]))
    assert not checks()["parts as the whole (eval)"]


def test_plans_and_files_keep_chunks(tmp_path: object) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    rev = rewire.make_reversible(model, chunks=4)
    plan = rewire.rewriting.plan_of(rev)
    assert {c.chunks for c in plan.chains} == {4}
    assert rewire.Plan.from_dict(plan.to_dict()) == plan
    again = rewire.make_reversible(model, plan=plan)
    assert {row.count for row in rewire.parts(again, torch.zeros(8, 3, 224, 224))} == {4}
    path = tmp_path / "rev.pt"  # type: ignore[operator]
    rewire.save(rev, path)
    loaded = rewire.load(path)
    assert {row.count for row in rewire.parts(loaded, torch.zeros(8, 3, 224, 224))} == {4}
    assert {
        row.count for row in rewire.parts(rewire.make_reversible(model, plan=plan, chunks=1))
    } == {1}


def test_chunks_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="'auto' or a number of parts"):
        ReversibleSequential([Mlp()], chunks=0)
    with pytest.raises(ValueError, match="chunks='many'"):
        rewire.make_reversible(timm.create_model("vit_tiny_patch16_224", depth=2), chunks="many")


def test_estimates_know_of_parts() -> None:
    x = torch.randn(16, 128, 64, requires_grad=True)
    peaks = {}
    for chunks in (1, 8):
        net = rewire.make_reversible(Norms(4), x, chunks=chunks)
        guess = rewire.estimate(net, x).peak_bytes
        peaks[chunks] = rewire.profile(net, x).peak_bytes
        assert guess == pytest.approx(peaks[chunks], rel=0.02)
    assert peaks[8] < 0.55 * peaks[1]


@pytest.mark.parametrize(("tokens", "parts"), [(128, 1), (1024, 6)])
def test_auto_decides_alike_on_values_and_without(tokens: int, parts: int) -> None:
    """Weights are no activations; and where their gradients outweigh those, nothing is cut."""
    net = Norms(2, dim=256)
    x = torch.randn(2, tokens, 256)
    rev = rewire.make_reversible(net, x, chunks="auto")
    found = {part.count for part in rewire.parts(rev, x)}
    assert found == {parts}, found
    measured = rewire.profile(rev, x, optimizer=None).peak_bytes
    assert measured == rewire.estimate(rev, x, optimizer=None).peak_bytes
    whole = rewire.profile(rewire.make_reversible(net, x), x, optimizer=None).peak_bytes
    assert (measured < 0.8 * whole) if parts > 1 else (measured == whole)
