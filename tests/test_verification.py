"""Every check of `verify` passes on sound models and is seen failing on a planted fault."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy
import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import rewire
from rewire.reversible import ReversibleSequential
from rewire.verification import Check, Verdict, verify
from tests.faults import FAULTS
from tests.specimens import DIM, SPECIMENS, Loop, rows
from tests.test_zoo_finds import HeadFree

NAMES = [
    "outputs",
    "input gradients",
    "parameter gradients",
    "reconstruction",
    "gradients bit for bit",
    "randomness replayed",
    "generators afterwards",
    "statistics once",
    "branches repeat",
    "other batch size",
    "activations dropped",
    "peak memory",
    "bytes left",
    "parameters shared",
    "keys equal",
]


class Block(nn.Module):
    """A residual module with all that makes a rerun hard: statistics and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Linear(width, 4 * width)
        self.norm = nn.BatchNorm1d(4 * width)
        self.drop = nn.Dropout(0.2)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drop(self.narrow(torch.tanh(self.norm(self.wide(x)))))
        return y


class Net(nn.Module):
    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


def specimen() -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the rewired model, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model, x = Net(), torch.randn(16, 5)
    return model, rewire.make_reversible(model, x), x


@pytest.mark.parametrize("float64", [False, True])
def test_a_sound_model_passes_every_check(float64: bool) -> None:
    model, rev, x = specimen()
    verdict = verify(rev, x, float64=float64, original=model)
    assert [check.name for check in verdict.checks] == NAMES
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_caught(name: str) -> None:
    fault, check = FAULTS[name]
    model, rev, x = specimen()
    with fault(rev):
        verdict = verify(rev, x, float64=True, original=model)
    assert not verdict[check].passed, str(verdict)
    assert not verdict.passed


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_caught_in_float32(name: str) -> None:
    fault, check = FAULTS[name]
    model, rev, x = specimen()
    with fault(rev):
        assert not verify(rev, x, original=model)[check].passed


def test_each_check_has_a_fault() -> None:
    assert {check for _, check in FAULTS.values()} == set(NAMES)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
MODELS = {
    "timm ViT": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, drop_path_rate=0.2, proj_drop_rate=0.1
    ),
    "torchvision ResNet": lambda: torchvision.models.resnet18(num_classes=7),
    "transformers ViT": lambda: transformers.ViTModel(
        transformers.ViTConfig(**SMALL, image_size=32, patch_size=8)
    ),
    "transformers Llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(**SMALL, vocab_size=99)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_pass_with_inputs_found(name: str) -> None:
    torch.manual_seed(0)
    verdict = verify(rewire.make_reversible(MODELS[name]()), float64=True)
    assert verdict.passed, str(verdict)


def test_a_chain_made_by_hand() -> None:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8)) for _ in range(4)]
    rev, plain = ReversibleSequential(branches), nn.Sequential(*branches)
    verdict = verify(rev, torch.randn(16, 8), float64=True, original=plain)
    assert verdict.passed, str(verdict)


def test_nothing_of_the_callers_changes() -> None:
    model, rev, x = specimen()
    rev.blocks[1].norm.eval()
    x.requires_grad_()
    grad = rev.stem.weight.grad = torch.ones(8, 5)
    before = {name: value.clone() for name, value in rev.state_dict().items()}
    flags = [module.training for module in rev.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    assert verify(rev, x, float64=True, original=model).checks
    assert [module.training for module in rev.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in rev.state_dict().items())
    assert rev.stem.weight.grad is grad
    assert torch.equal(grad, torch.ones(8, 5))
    assert all(p.grad is None for name, p in rev.named_parameters() if name != "stem.weight")
    assert x.grad is None
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == numpy.random.get_state()[1]).all()
    assert all(not module._forward_hooks for module in rev.modules())


class OneBatch(Net):
    def forward(self, x: Tensor) -> Any:
        if x.shape[0] != 16:
            raise ValueError("a batch of 16 only")
        return super().forward(x)


def test_a_model_that_takes_one_batch_size_only_may() -> None:
    model, x = OneBatch(), torch.randn(16, 5)
    check = verify(rewire.make_reversible(model, x), x, float64=True)["other batch size"]
    assert check.passed
    assert "a batch of 16 only" in check.detail


def test_nan_fails() -> None:
    assert not Check("x", float("nan"), 1.0, "relative").passed
    assert Check("x", 1.0, 1.0, "relative").passed


def test_verdict_prints_as_a_table_and_as_json() -> None:
    checks = [
        Check("outputs", 0, 0, "elements", "in 1 tensors"),
        Check("peak memory", 1.5, 1.0, "of original"),
    ]
    verdict = Verdict(checks, "Net")
    assert str(verdict) == repr(verdict)
    assert str(verdict).splitlines() == [
        "Net: 1 of 2 checks passed",
        "  ok      outputs      0    <= 0  elements     in 1 tensors",
        "  FAILED  peak memory  1.5  <= 1  of original",
    ]
    data = json.loads(json.dumps(verdict.to_dict()))
    assert data["passed"] is False
    assert data["checks"][1]["passed"] is False
    assert data["checks"][0]["name"] == "outputs"


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_in_eval_mode_on_fake_tensors(norm_first: bool) -> None:
    """Inputs are found on fakes, where attention's fast path gives more than real tensors do."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    rev = rewire.make_reversible(model, torch.randn(2, 3, 16)).eval()
    assert rewire.verify(rev, torch.randn(2, 3, 16)).passed
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert rev(torch.empty(2, 3, 16)).shape == (2, 3, 16)


class OwnGenerator(nn.Module):
    """x + noise of a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(8, 8), torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * torch.rand(x.shape, generator=self.generator)


def test_own_generators_are_no_fault() -> None:
    model = nn.Sequential(*(OwnGenerator() for _ in range(6)))
    rev = rewire.make_reversible(model, torch.randn(2, 8))
    verdict = rewire.verify(rev, torch.randn(256, 8))
    assert verdict.passed, str(verdict)


def test_a_parameter_without_elements_is_no_obstacle() -> None:
    model = Loop(HeadFree).double()
    model.register_tokens = nn.Parameter(torch.empty(1, 0, DIM, dtype=torch.float64))
    rev = rewire.make_reversible(model, rows())
    assert rewire.verify(rev, rows(), original=model).passed


class Frozen(nn.Module):
    """Its first blocks run without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = SPECIMENS["plus"].make().blocks

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.blocks[0](x)  # type: ignore[operator]
        for block in self.blocks[1:]:  # type: ignore[index]
            x = block(x)
        return x


def test_first_blocks_without_gradients_are_no_fault() -> None:
    model, x = Frozen().double(), SPECIMENS["plus"].inputs()
    verdict = verify(rewire.make_reversible(model, x), x, original=model)
    assert verdict.passed, str(verdict)
