"""The same on a GPU, where there is one: bits, memory, waiting, random numbers, real models."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import rewire
from benchmarks.memory import MEBI, WORKLOADS
from rewire import fused, integers
from rewire.coupling import slack_of, width_of
from rewire.estimation import estimate
from rewire.grid import OnGrid
from rewire.integers import Coefficients
from rewire.profiling import profile
from rewire.structure import tensors_of
from tests.exactness import MODES, assert_exact, assert_same_bits, by_autograd, courses, rewired
from tests.networks import COUPLINGS, NETWORKS, Stack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """Kernels that give the same bits when run again: those of backward need not, by default."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def on_gpu(network: str, depth: int, mode: str, coupling: str = "re2") -> nn.Module:
    """A rewired network of the tests on the CPU, moved to the GPU."""
    return copy.deepcopy(rewired(network, depth, MODES[mode], coupling)).cuda()


# ---- bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_those_of_autograd(network: str, mode: str, coupling: str) -> None:
    rev = on_gpu(network, 12, mode, coupling)
    for _ in range(2):
        assert_exact(rev, NETWORKS[network][1]().cuda(), MODES[mode])


def pixels(*size: int) -> Tensor:
    return torch.randn(size, device="cuda")


def gpt2() -> nn.Module:
    """With dropout."""
    return transformers.GPT2Model(transformers.GPT2Config(n_embd=128, n_layer=6, n_head=4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "timm vit_small": (
        lambda: timm.create_model("vit_small_patch16_224", drop_path_rate=0.2, proj_drop_rate=0.1),
        lambda: pixels(4, 3, 224, 224),
    ),
    "timm resnet50": (lambda: timm.create_model("resnet50"), lambda: pixels(4, 3, 128, 128)),
    "timm convnext_tiny": (
        lambda: timm.create_model("convnext_tiny", drop_path_rate=0.2),
        lambda: pixels(4, 3, 128, 128),
    ),
    "torchvision swin3d_t": (torchvision.models.video.swin3d_t, lambda: pixels(2, 3, 8, 64, 64)),
    "transformers gpt2": (gpt2, lambda: torch.randint(0, 50257, (2, 40), device="cuda")),
}


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str, amp: bool) -> None:
    """Rewired where they are, on the GPU."""
    torch.manual_seed(0)
    build, example = MODELS[name]
    model, x = build().cuda().train(), example()
    rev = rewire.make_reversible(model, x, check="raise")

    def step() -> list[Tensor]:
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16, amp):
            out = next(t for t in tensors_of(rev(x)) if t.is_floating_point())
        grads = torch.autograd.grad(
            out.float().square().mean(), list(rev.parameters()), allow_unused=True
        )
        return [out.detach(), *(g for g in grads if g is not None)]

    for _ in range(2):
        expected = by_autograd(rev, step)
        assert_same_bits(step(), expected)


@pytest.mark.parametrize("name", ["timm vit_small", "timm resnet50"])
def test_verify(name: str) -> None:
    build, example = MODELS[name]
    rev = rewire.make_reversible(build().cuda(), example())
    assert rewire.verify(rev, example()).passed
    assert rewire.verify(rev, example()[:1], float64=True).passed


def test_a_model_moved_after_rewiring() -> None:
    """Planned on the CPU, run there, on the GPU and there again."""
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    x = torch.randn(2, 3, 224, 224)
    rev = rewire.make_reversible(model, x, check="raise")
    for device in ("cpu", "cuda", "cpu", "cuda"):
        rev.to(device)
        rev(x.to(device)).square().mean().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in rev.parameters())


# ---- kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", [False, True], ids=["", "trunk"])
@pytest.mark.parametrize("branch", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "k", [(0.0, 1.0, 1.0), (0.75, 0.25, 1.25), (1.5, -0.5, 0.5), (0.9, 0.1, 1.0)]
)
def test_kernels(
    k: tuple[float, float, float], dtype: torch.dtype, branch: torch.dtype, trunk: bool
) -> None:
    """As the operations, on the CPU too; and the inverse gives the older stream."""
    step = torch.tensor(2.0**-17, dtype=dtype, device="cuda")
    grid = OnGrid(step, 1 / step)
    x, y = ((pixels(3, 70001).to(dtype) / step).round() * step for _ in range(2))
    f, t = pixels(3, 70001).to(branch), pixels(3, 70001).to(branch) if trunk else None
    assert fused.takes(y, k)
    value, largest = fused.couple(x, y, f, t, Coefficients(*k), grid)
    host = [None if v is None else v.cpu() for v in (x, y, f, t)]
    on_host = OnGrid(step.cpu(), (1 / step).cpu())
    expected = integers.couple(*host, Coefficients(*k), on_host)
    assert torch.equal(value.cpu(), expected)
    assert torch.equal(largest, value.abs().max())
    slack = slack_of(abs(k[1]))
    width = width_of(abs(k[1]), slack)
    digits = fused.pack(y, k[1], grid, width, slack) if width else None
    fused.uncouple(value, x, f, t, Coefficients(*k), grid, digits, slack, value)
    assert torch.equal(value, y)


def test_operators_follow_torchs_rules() -> None:
    x, y, f = (pixels(2, 5).requires_grad_() for _ in range(3))
    g = torch.tensor(2.0**-17, device="cuda")
    torch.library.opcheck(torch.ops.rewire.couple.default, (x, y, f, None, 0.5, 0.5, 1.5, g, 1 / g))
    torch.library.opcheck(torch.ops.rewire.merge.default, (x, y, None))
    out, words = (
        torch.empty(2, 5, device="cuda"),
        fused.pack(y.detach(), 0.5, OnGrid(g, 1 / g), 1, 0),
    )
    terms = (x.detach(), y.detach(), f.detach(), None, 0.5, 0.5, 1.5, g, 1 / g, words.words, 1, 0)
    torch.library.opcheck(torch.ops.rewire.uncouple.default, (*terms, out))
    torch.library.opcheck(torch.ops.rewire.apart.default, (x.detach(), y.detach()))


# ---- random numbers ----------------------------------------------------------------------


def test_the_generator_goes_on_as_without_reruns() -> None:
    rev = on_gpu("dropout and drop path", 6, "fp32")
    x = NETWORKS["dropout and drop path"][1]().cuda().requires_grad_()

    def drawn() -> list[Tensor]:
        torch.manual_seed(3)
        rev(x).sum().backward()
        return [torch.rand(4, device="cuda"), torch.rand(4)]

    assert_same_bits(drawn(), by_autograd(rev, drawn))


# ---- memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["vit", "bottlenecks"])
def test_memory_is_flat_and_nothing_is_left(workload: str) -> None:
    torch.manual_seed(0)
    peaks = []
    for depth in (4, 12):
        model, x = WORKLOADS[workload](depth)
        model, x = model.cuda(), x.detach().cuda().requires_grad_()
        found = profile(rewire.make_reversible(model, x), x)
        assert found.left_bytes == 0
        peaks.append(found.peak_bytes / MEBI)
    assert peaks[1] - peaks[0] <= 0.1


def large(name: str) -> tuple[nn.Module, Tensor]:
    """A model of the tests, and enough samples that activations are what counts."""
    build, example = MODELS[name]
    x = example()
    return build().cuda().train(), torch.cat([x] * 4)


@pytest.mark.parametrize("name", MODELS)
def test_three_meters_agree(name: str) -> None:
    """The allocator, live tensors on the GPU, and the estimate that uses none.

    Workspaces of cuDNN are the allocator's alone: the models are large enough that these are small.
    """
    torch.manual_seed(0)
    model, x = large(name)
    for one in (model, rewire.make_reversible(model, x)):
        guess = estimate(one, x, device="cuda").peak_bytes
        allocated = profile(one, x)
        assert guess == pytest.approx(allocated.peak_bytes, rel=0.05)
        assert max(allocated.trace) == pytest.approx(allocated.peak_bytes, rel=0.05)
        assert 0 < allocated.step_seconds < 60


# ---- waiting -----------------------------------------------------------------------------


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever waits for the device inside raises, as far as torch notices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("network", ["pre-norm transformer", "conv-BatchNorm-ReLU"])
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/2)", "dr2(0.9, 0.1)"])
def test_the_host_does_not_wait_for_the_device(network: str, coupling: str) -> None:
    """But in a chain's first run, which chooses the grid."""
    rev = on_gpu(network, 6, "fp32", coupling)
    for course in courses(rev):
        course.drift.check = "warn"
    x = NETWORKS[network][1]().cuda().requires_grad_()
    rev(x).sum().backward()
    with waiting_is_an_error():
        rev(x).sum().backward()


class Restless(nn.Module):
    """A branch that does not repeat itself: planted."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        Restless.calls += 1
        return x * (1.0 + Restless.calls)


def test_a_branch_that_does_not_repeat_itself_is_told_of_without_waiting() -> None:
    model = Stack(nn.Linear(8, 8), [Restless() for _ in range(3)]).cuda()
    x = torch.randn(4, 8, device="cuda")
    rev = rewire.make_reversible(model, x)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            rev(x).sum().backward()
            torch.cuda.synchronize()
    assert any("did not repeat itself" in str(w.message) for w in seen)


# ---- surroundings ------------------------------------------------------------------------


def test_compiled_blocks() -> None:
    """`torch.compile` of each block's inside."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=4).cuda()
    for block in model.blocks:
        block.mlp = torch.compile(block.mlp)
    x = pixels(2, 3, 224, 224)
    rev = rewire.make_reversible(model, x, check="raise")

    def step() -> list[Tensor]:
        out = rev(x)
        return [out.detach(), *torch.autograd.grad(out.square().mean(), list(rev.parameters()))]

    assert_same_bits(step(), by_autograd(rev, step))


def test_loss_scaling_in_half_precision() -> None:
    """float16 autocast with GradScaler, as people train on older cards."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=10).cuda()
    x, y = pixels(8, 3, 224, 224), torch.randint(0, 10, (8,), device="cuda")
    rev = rewire.make_reversible(model, x, check="raise")
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.AdamW(rev.parameters(), 1e-3, fused=True)
    losses: list[Any] = []
    for _ in range(20):
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(rev(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
