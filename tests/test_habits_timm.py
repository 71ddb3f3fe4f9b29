"""What users of timm do with a model, done with a rewired one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.layers
import torch
from timm.models import FeatureListNet, load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, freeze
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rewire
from benchmarks.outcomes import AsOriginal
from rewire.rewriting import is_rewired, plan_of
from rewire.structure import tensors_of
from tests.exactness import as_found, assert_as_stored, assert_same_bits, courses, some
from tests.specimens import mlp, rows

Call = Callable[[Any], Any]
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2},
    ),
    "convnext": ("convnext_atto", {"depths": (2, 2, 2, 2), "dims": (8, 8, 8, 8)}),
    "resnet": ("resnet18", {"layers": (3, 1, 1, 3), "channels": (8, 8, 8, 8)}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)},
    ),
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def made(name: str, **options: Any) -> Any:
    """A small random model in train mode, the same one each time."""
    torch.manual_seed(0)
    architecture, sizes = SMALL[name]
    return timm.create_model(architecture, num_classes=5, **sizes, **options).train()


@functools.cache
def planned(name: str) -> rewire.Plan:
    return rewire.plan(made(name), X)


def rewired(name: str, model: nn.Module | None = None, **options: Any) -> Any:
    """A rewired model that has not run yet."""
    model = made(name) if model is None else model
    return rewire.make_reversible(model, plan=planned(name), check="raise", **options)


def values(result: Any) -> list[Tensor]:
    """The floating tensors of what a model returns."""
    tensors = tensors_of(list(result.values()) if isinstance(result, dict) else result)
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def stepping(model: nn.Module, call: Call) -> Callable[[], list[Tensor]]:
    """A training step as libraries write it: outputs, and what `backward` leaves in `.grad`."""

    def step() -> list[Tensor]:
        torch.manual_seed(5)
        model.zero_grad()
        outputs = values(call(model))
        sum(((n + 1) * t.double().sin()).sum() for n, t in enumerate(outputs)).backward()
        grads = [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
        found = [tensor.detach().clone() for tensor in (*outputs, *grads)]
        assert all(tensor.isfinite().all() for tensor in found)
        return found

    return step


def assert_exact(model: nn.Module, call: Call) -> None:
    """A step gives the bits of the twin with stored activations."""
    assert_as_stored(model, stepping(model, call))


def assert_close(rev: nn.Module, model: nn.Module, call: Call) -> None:
    """Steps of two models give nearly the same."""
    found, expected = (stepping(m, call)() for m in (rev, model))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def assert_as_original(model: nn.Module, call: Callable[[Any, Tensor], Any]) -> None:
    """Rewired under (1, 0, 1), in float64, a model does what it did."""
    model, x = model.double(), X.double()
    rev = rewire.make_reversible(model, x, coupling=AsOriginal(), check="raise")
    assert_close(rev, model, lambda m: call(m, x))


# ---- the parts of forward ----------------------------------------------------------------


@some("name", SMALL, slow=["swin"])
def test_forward_in_two_parts(name: str) -> None:
    rev = rewired(name).eval()
    assert torch.equal(rev.forward_head(rev.forward_features(X)), rev(X))
    assert_exact(rev, lambda m: m.forward_head(m.forward_features(X), pre_logits=True))


@some("name", ["vit", "convnext", "resnet"], slow=["convnext"])
def test_intermediates(name: str) -> None:
    """Losses on all of them; under (1, 0, 1) they are the original's."""
    assert_exact(rewired(name), lambda m: m.forward_intermediates(X))
    assert_as_original(made(name), lambda m, x: m.forward_intermediates(x))


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_intermediates_of_the_first_stages(name: str) -> None:
    """The chain is left in its middle; the next run knows nothing of it."""
    rev, fresh = rewired(name), rewired(name)
    options = {"indices": [0], "intermediates_only": True, "stop_early": True}
    assert_exact(rev, lambda m: m.forward_intermediates(X, **options))
    with torch.no_grad():
        rev.eval().forward_intermediates(X, **options)
        assert torch.equal(rev(X), fresh.eval()(X))
    assert_exact(rev, lambda m: m(X))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit", "getter"),
        ("vit", "hook"),
        ("convnext", "list"),
        ("convnext", "dict"),
        ("resnet", "hook"),
        ("resnet", "fx"),
    ],
)
def test_feature_models(name: str, kind: str) -> None:
    model = made(name, features_only=True, feature_cls=kind, out_indices=(0, 1))
    rev = rewire.make_reversible(model, X, check="raise").eval().train()
    assert_exact(rev, lambda m: m(X))
    assert_as_original(model, lambda m, x: m(x))


def test_a_feature_model_around_a_rewired_one() -> None:
    features = FeatureListNet(rewired("convnext"), (0, 2), flatten_sequential=True)
    expected = rewired("convnext").forward_intermediates(X, indices=[0, 2], intermediates_only=True)
    assert_same_bits(features(X), expected)
    assert_exact(features, lambda m: m(X))


# ---- checkpointing -----------------------------------------------------------------------


@contextmanager
def reentrant() -> Iterator[None]:
    """timm's models checkpoint with `use_reentrant=True`."""
    timm.layers.set_reentrant_ckpt(True)
    try:
        yield
    finally:
        timm.layers.set_reentrant_ckpt(False)


def checkpointing(name: str, when: str) -> Any:
    """A rewired model, with checkpointing turned on in the original or in itself."""
    model = made(name, drop_path_rate=0.3)
    model.set_grad_checkpointing(when == "before")
    rev = rewired(name, model)
    rev.set_grad_checkpointing(True)
    return rev


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("vit", "before"),
        ("convnext", "after"),
        ("resnet", "before"),
        ("resnet", "after"),
    ],
)
def test_checkpointing_changes_no_bit(name: str, when: str) -> None:
    """Neither in the first run nor in a later one."""
    rev = checkpointing(name, when)
    step = stepping(rev, lambda m: m(X))
    found = []
    for _ in range(2):
        with as_found(rev):
            found.append(step())
    rev.set_grad_checkpointing(False)
    expected = step()
    assert_same_bits(found[0], expected)
    assert_same_bits(found[1], expected)


@pytest.mark.parametrize(
    ("name", "when"),
    [("vit", "before"), ("convnext", "after"), ("resnet", "after"), ("swin", "after")],
)
def test_reentrant_checkpointing_of_a_part_of_a_chain_is_refused(name: str, when: str) -> None:
    """It hands on tensors whose past it hides, so the older stream would get no gradient."""
    rev = checkpointing(name, when)
    x = X.clone().requires_grad_()
    with reentrant(), pytest.raises(rewire.RewireError, match="use_reentrant=False"):
        rev(x).sum().backward()


class Checkpointed(nn.Module):
    """A wrapper, as torch.distributed's and fairscale's."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("number", range(3))
def test_one_block_in_a_reentrant_checkpoint_is_refused(number: int) -> None:
    """The first, one inside, the last: each fails in another way."""
    rev = rewired("vit")
    rev.blocks[number] = Checkpointed(rev.blocks[number], reentrant=True)
    with pytest.raises(rewire.RewireError, match="use_reentrant=False"):
        rev(X).sum().backward()


@pytest.mark.parametrize("number", range(3))
def test_one_block_in_a_checkpoint(number: int) -> None:
    rev = rewired("vit")
    step = stepping(rev, lambda m: m(X))
    with as_found(rev):
        expected = step()
    rev.blocks[number] = Checkpointed(rev.blocks[number], reentrant=False)
    assert_same_bits(step(), expected)


class Own(nn.Module):
    """A block whose own code checkpoints its branch in training."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.branch, self.reentrant = mlp(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x + self.branch(x)
        return x + checkpoint(self.branch, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_checkpoint_their_branch(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(mlp(), *(Own(reentrant) for _ in range(3))).double()
    rev = rewire.make_reversible(model, rows(), check="raise").train()
    assert_exact(rev, lambda m: m(rows()))


def test_reentrant_checkpointing_of_whole_chains() -> None:
    """Each stage of a Swin in a checkpoint of its own."""
    rev = rewired("swin")

    def forward(model: Any, around: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        x = model.patch_embed(X)
        for stage in model.layers:
            x = around(stage, x)
        return model.forward_head(model.norm(x))

    around = functools.partial(checkpoint, use_reentrant=True)
    with as_found(rev):
        expected = stepping(rev, lambda m: forward(m, lambda stage, x: stage(x)))()
    assert_same_bits(stepping(rev, lambda m: forward(m, around))(), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_hook_that_replaces_a_result_is_refused(mode: Any) -> None:
    """In evaluation, too: a chain that begins anew in its middle is another function."""
    rev = rewired("vit").eval()
    rev.blocks[0].register_forward_hook(lambda module, args, result: result.clone())
    with mode(), pytest.raises(rewire.StreamMismatch):
        rev(X)


# ---- the classifier, weights, optimizers -------------------------------------------------


@some("name", ["vit", "convnext", "resnet"], slow=["convnext"])
def test_another_classifier(name: str) -> None:
    model = made(name)
    rev = rewired(name, model)
    rev.reset_classifier(7)
    assert rev(X).shape == (2, 7)
    assert model(X).shape == (2, 5)
    assert_exact(rev, lambda m: m(X))
    rev.reset_classifier(0)
    model.reset_classifier(0)
    assert list(rev.state_dict()) == list(model.state_dict())
    assert torch.equal(rev.eval()(X), rev.forward_head(rev.forward_features(X), pre_logits=True))


@pytest.mark.parametrize("warm", [False, True])
def test_a_moving_average(warm: bool) -> None:
    model = made("resnet")
    rev = rewired("resnet", model)
    if warm:
        rev(X).sum().backward()
    average = ModelEmaV3(rev, decay=0.25)
    before = {key: value.clone() for key, value in rev.state_dict().items()}
    with torch.no_grad():
        for parameter in rev.parameters():
            parameter.mul_(1.5)
    average.update(rev)
    for key, value in average.module.state_dict().items():
        now = rev.state_dict()[key]
        expected = 0.25 * before[key] + 0.75 * now if value.is_floating_point() else now
        torch.testing.assert_close(value, expected)
    assert is_rewired(average.module)
    assert not {*map(id, courses(average.module))} & {*map(id, courses(rev))}
    other = made("resnet")
    other.load_state_dict(average.module.state_dict())
    expected = rewired("resnet", other).eval()(X)
    torch.testing.assert_close(average(X), expected, rtol=1e-4, atol=1e-4)
    assert_exact(average.module.train(), lambda m: m(X))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_checkpoints_go_both_ways(name: str, tmp_path: Path) -> None:
    trained = made(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "original.pth")
    torch.save({"state_dict": rewired(name, trained).state_dict()}, tmp_path / "rewired.pth")

    rev, model = rewired(name).eval(), made(name).eval()
    load_checkpoint(rev, str(tmp_path / "original.pth"))
    load_checkpoint(model, str(tmp_path / "rewired.pth"))
    assert torch.equal(rev(X), rewired(name, trained).eval()(X))
    assert torch.equal(model(X), trained.eval()(X))


@pytest.mark.parametrize("name", ["vit", "convnext"])
def test_parameter_groups(name: str) -> None:
    model = made(name)
    rev = rewired(name, model)
    options = {"opt": "adamw", "lr": 1e-2, "weight_decay": 0.05, "layer_decay": 0.7}
    found, expected = (create_optimizer_v2(m, **options).param_groups for m in (rev, model))
    assert len(found) > 4
    for group, other in zip(found, expected, strict=True):
        parameters, others = group.pop("params"), other.pop("params")
        assert all(a is b for a, b in zip(parameters, others, strict=True))
        assert group == other


def test_freezing_replaces_batchnorms() -> None:
    rev = rewired("resnet")
    rev(X)
    freeze(rev, ["conv1", "bn1", "layer1"])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in rev.layer1.modules())
    assert_exact(rev, lambda m: m(X))
    assert all(parameter.grad is None for parameter in rev.layer1.parameters())


def test_plans_of_these_models() -> None:
    """So that the tests above test something."""
    lengths = {name: [len(chain) for chain in planned(name).chains] for name in SMALL}
    expected = {"vit": [6], "convnext": [2] * 4, "resnet": [2, 2], "swin": [4, 4]}
    assert lengths == expected
    assert plan_of(rewired("vit")) == planned("vit")
