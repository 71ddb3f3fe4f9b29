"""Estimates on fake tensors against what was measured, and what an estimate leaves as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d

import rewire
from benchmarks.costs import step_bytes, zero_gradients
from benchmarks.memory import WORKLOADS
from rewire import estimation
from rewire.errors import RewireError
from rewire.estimation import estimate
from rewire.profiling import Profile, profile

LIMIT = 0.05


def pixels(*size: int) -> Tensor:
    return torch.randn(size)


def swin() -> nn.Module:
    """Windows that shift, by torchvision's second version."""
    return SwinTransformer(
        [4, 4],
        32,
        [2, 2],
        [2, 4],
        [4, 4],
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
        num_classes=10,
    )


def swin3d() -> nn.Module:
    sizes = {"patch_size": [2, 4, 4], "embed_dim": 32, "window_size": [2, 4, 4], "num_classes": 10}
    return SwinTransformer3d(depths=[2, 2], num_heads=[2, 4], **sizes)


def gpt2() -> nn.Module:
    """With dropout."""
    config = transformers.GPT2Config(vocab_size=500, n_embd=64, n_layer=3, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """Normalisations on the trunk, whose corrections an estimate can only guess."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=500, intermediate_size=256, **sizes)
    return transformers.BertModel(config)


Made = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
MODELS: dict[str, Made] = {
    "vit with dropout": (
        lambda: timm.create_model(
            "test_vit", img_size=64, drop_path_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1
        ),
        lambda: pixels(2, 3, 64, 64),
    ),
    "resnet": (lambda: ResNet(BasicBlock, [3, 3, 1, 1]), lambda: pixels(2, 3, 96, 96)),
    "convnext": (lambda: timm.create_model("test_convnext"), lambda: pixels(2, 3, 96, 96)),
    "swin": (swin, lambda: pixels(2, 3, 32, 32)),
    "swin3d": (swin3d, lambda: pixels(1, 3, 8, 32, 32)),
    "gpt2": (gpt2, lambda: torch.randint(0, 500, (2, 64))),
    "bert": (bert, lambda: torch.randint(0, 500, (2, 64))),
}
LARGE: dict[str, Made] = {
    "resnet50": (lambda: timm.create_model("resnet50"), lambda: pixels(2, 3, 224, 224)),
    "vit": (lambda: timm.create_model("vit_small_patch16_224"), lambda: pixels(2, 3, 224, 224)),
    "swin": (torchvision.models.swin_t, lambda: pixels(2, 3, 224, 224)),
    "convnext": (lambda: timm.create_model("convnext_tiny"), lambda: pixels(2, 3, 224, 224)),
    "swin3d": (torchvision.models.video.swin3d_t, lambda: pixels(1, 3, 16, 112, 112)),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        lambda: torch.randint(0, 50257, (1, 256)),
    ),
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig()),
        lambda: torch.randint(0, 30522, (4, 128)),
    ),
}


def both(made: Made) -> Iterator[tuple[nn.Module, Tensor]]:
    """A model and its rewired twin, which have not run yet."""
    torch.manual_seed(0)
    build, example = made
    model, x = build().train(), example()
    yield model, x
    yield rewire.make_reversible(model, x, check="raise"), x


@pytest.mark.parametrize("name", MODELS)
def test_estimate_is_what_is_measured(name: str) -> None:
    for model, x in both(MODELS[name]):
        guess, true = estimate(model, x), profile(model, x)
        assert guess.estimated
        assert not true.estimated
        assert guess.peak_bytes == pytest.approx(true.peak_bytes, rel=LIMIT)
        assert guess.standing_bytes == true.standing_bytes
        assert guess.left_bytes == true.left_bytes == 0
        if name != "bert":
            assert guess.saved_bytes == true.saved_bytes
            assert dict(guess.outside) == dict(true.outside)
            assert guess.chain_bytes == true.chain_bytes


def meters_agree(made: Made, scratch: float) -> None:
    """Live tensors, what the CPU's allocator hands out, and the estimate; CUDA's: test_cuda.py.

    The allocator alone sees what kernels, above all of convolutions, take and free themselves: the
    share `scratch` of the peak.
    """
    for model, x in both(made):
        guess = estimate(model, x).peak_bytes
        zero_gradients([x, *model.parameters()])
        live, allocated = profile(model, x).peak_bytes, step_bytes(model, x).peak
        assert guess == pytest.approx(live, rel=LIMIT)
        assert live <= allocated <= (1 + scratch) * live


def test_three_meters_agree() -> None:
    make = WORKLOADS["vit"]
    meters_agree((lambda: make(2)[0], lambda: make(2)[1]), 0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_three_meters_agree_on_real_models(name: str) -> None:
    meters_agree(LARGE[name], 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("name", WORKLOADS)
def test_three_meters_agree_on_workloads(name: str) -> None:
    scratch = 0.15 if name == "bottlenecks" else 0.01  # BatchNorm's backward takes a stream
    meters_agree((lambda: WORKLOADS[name](6)[0], lambda: WORKLOADS[name](6)[1]), scratch)


def test_a_wrong_estimate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: every tensor is taken for one of half its size."""
    made = estimation._Fakes._made

    def halved(self: Any, tensor: Tensor) -> Tensor:
        return made(self, tensor[:2] if tensor.dim() == 3 else tensor)

    model, x = nn.Sequential(nn.Tanh(), nn.Linear(16, 16)), pixels(4, 16, 16)
    true = profile(model, x).peak_bytes
    assert estimate(model, x).peak_bytes == true
    monkeypatch.setattr(estimation._Fakes, "_made", halved)
    assert estimate(model, x).peak_bytes < 0.6 * true


# ---- nothing is touched, and nothing is needed -------------------------------------------


class Counting(nn.Module):
    """A branch whose buffers change in each run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.inner = nn.Linear(32, 32)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        result: Tensor = self.inner(self.norm(x))
        return result


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Counting()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.branch(x)
        return result


def test_leaves_the_models_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Counted() for _ in range(3))).train()
    x = pixels(64, 32).requires_grad_()
    rev = rewire.make_reversible(model, x, check="raise")
    before = {name: value.clone() for name, value in rev.state_dict().items()}
    state = torch.get_rng_state()
    for _ in range(2):
        estimate(rev, x, device="cuda")
        estimate(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in rev.state_dict().items())
    assert all(type(p) is nn.Parameter and p.grad is None for p in rev.parameters())
    assert x.grad is None
    rev(x).square().mean().backward()
    found = [p.grad.clone() for p in rev.parameters()]
    rev.zero_grad()
    rev.load_state_dict(before)
    with rewire.store_activations(rev):
        rev(x).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(found, rev.parameters(), strict=True))
    assert all(int(block.branch.runs) == 1 for block in rev)


def test_neither_model_nor_input_need_memory() -> None:
    with torch.device("meta"):
        layers = [nn.Linear(4096, 4096) for _ in range(4)]
        model, x = nn.Sequential(*layers), torch.empty(2**20, 4096)
    found = estimate(model, x)
    assert found.parameter_bytes == 4 * 4096 * 4097 * 4
    assert found.input_bytes == 2**34
    assert found.peak_bytes > 3 * 2**34
    assert found.device == "cpu"


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    guess, true = estimate(model, pixels(8, 64)), profile(model, pixels(8, 64))
    assert guess.peak_bytes == true.peak_bytes
    assert guess.gradient_bytes == 4 * (64 * 64 + 2 * 64)


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * 2 if y.max().item() > 0 else y


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("one of its kind")


def test_what_cannot_be_estimated_says_so() -> None:
    with pytest.raises(RewireError, match=r"looks at the values.*rewire\.profile"):
        estimate(LooksAtValues(), pixels(2, 4))
    with pytest.raises(RewireError, match=r"one of its kind.*rewire\.profile"):
        estimate(Uncopied(4, 4), pixels(2, 4))
    with pytest.raises(RewireError, match="for cpu or cuda"):
        estimate(nn.Linear(4, 4), pixels(2, 4), device="mps")
    with pytest.raises(RewireError, match="Unfreeze a parameter"):
        estimate(nn.Linear(2, 2).requires_grad_(False), pixels(2, 2))


# ---- as on CUDA --------------------------------------------------------------------------


def saved(model: nn.Module, *inputs: Tensor, device: str) -> int:
    found = estimate(model, *inputs, device=device)
    assert found.device == device
    return found.saved_bytes


def test_dropout_on_cuda_keeps_a_byte() -> None:
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Flatten()), pixels(64, 32).requires_grad_()
    out, loss = x.nbytes, 4
    assert saved(model, x, device="cpu") == out + x.nbytes + loss
    assert saved(model, x, device="cuda") == out + x.numel() + loss
    assert saved(model.eval(), x, device="cuda") == loss


class Attends(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(x, x, x, mask, dropout_p=self.dropout)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_cuda_keeps_no_matrix(masked: bool) -> None:
    """On the CPU it does where there is dropout."""
    x = pixels(2, 4, 128, 16).requires_grad_()
    inputs = (x, torch.ones(128, 128, dtype=torch.bool)) if masked else (x,)
    matrix, rows = 2 * 4 * 128 * 128 * 4, 2 * 4 * 128 * 4
    for dropout in (0.0, 0.2):
        kept = saved(Attends(dropout), *inputs, device="cuda")
        mask = masked * 128 * 128 * 4  # as numbers
        assert x.nbytes + rows <= kept <= x.nbytes + rows + mask + 64
    assert saved(Attends(0.2), *inputs, device="cpu") > 2 * matrix


@pytest.mark.parametrize("weights", [False, True])
def test_attention_of_torchs_own_module_too(weights: bool) -> None:
    """It calls dropout, and attention where nobody wants its weights, by itself."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(64, 4, dropout=0.2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(x, x, x, need_weights=weights)[0]
            return result

    x, matrix = pixels(2, 128, 64), 2 * 4 * 128 * 128
    on_cpu, on_cuda = (saved(Net(), x, device=device) for device in ("cpu", "cuda"))
    # The weights, the mask of dropout as numbers and as bytes, and the weights after it.
    fewer = (4 - 1) * matrix if weights else (4 + 4 + 4) * matrix
    assert on_cpu - on_cuda == pytest.approx(fewer, rel=0.1)


@pytest.mark.parametrize("name", ["vit with dropout", "bert"])
def test_runs_in_backward_as_in_forward_on_cuda(name: str) -> None:
    for model, x in both(MODELS[name]):
        found = estimate(model, x, device="cuda")
        assert found.left_bytes == 0
        assert found.peak_bytes <= estimate(model, x, device="cpu").peak_bytes


def test_an_estimate_for_cuda_is_of_its_kernels() -> None:
    """One operator for each coupling, inverse and self-check, where the CPU runs several."""
    model, x = WORKLOADS["bottlenecks"](3)
    rev = rewire.make_reversible(model, x)
    on_cpu, on_cuda = (estimate(rev, x, device=device) for device in ("cpu", "cuda"))
    assert len(on_cuda.trace) < len(on_cpu.trace)
    assert on_cpu.peak_bytes >= on_cuda.peak_bytes
    assert on_cpu.saved_bytes == on_cuda.saved_bytes


def test_says_that_it_is_an_estimate() -> None:
    assert str(estimate(nn.Linear(2, 2), pixels(2, 2))).endswith("left, estimated (cpu)")
    row = Profile(1, 2, 3, float("nan"), "cuda", estimated=True).to_dict()
    assert row["step_seconds"] is None
    assert row["estimated"] is True
