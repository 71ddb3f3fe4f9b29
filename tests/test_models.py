"""Real models of timm, torchvision and transformers: chains, and proof in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import rewire
from rewire.structure import tensors_of

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
PICTURES = {"image_size": 32, "patch_size": 8}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def image(batch: int = 2, size: int = 224) -> Tensor:
    """[batch, 3, size, size]."""
    return torch.randn(batch, 3, size, size)


def video(batch: int = 1, size: int = 32) -> Tensor:
    """[batch, 3, 4, size, size]."""
    return torch.randn(batch, 3, 4, size, size)


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    """[batch, length] token ids."""
    return torch.randint(3, 90, (batch, length))


def vit() -> nn.Module:
    """A small random ViTModel."""
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **PICTURES))


def videomae() -> nn.Module:
    """A small random VideoMAEModel."""
    return transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**SMALL, **PICTURES, num_frames=4)
    )


def gpt2() -> nn.Module:
    """A small random GPT2Model."""
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=90, **SPECIAL)
    return transformers.GPT2Model(config)


def llama() -> nn.Module:
    """A small random LlamaModel."""
    return transformers.LlamaModel(transformers.LlamaConfig(**SMALL, vocab_size=90, **SPECIAL))


# Builder, chains in graph order, an example, and another size.
NAMED: dict[str, tuple[Callable[[], nn.Module], list[int], Tensor, Tensor]] = {
    "timm vit_base": (
        lambda: timm.create_model("vit_base_patch16_224"),
        [24],
        image(1),
        image(2),
    ),
    "timm convnext_tiny": (
        lambda: timm.create_model("convnext_tiny"),
        [3, 3, 9, 3],
        image(2, 64),
        image(1, 96),
    ),
    "timm swin_tiny": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=64),
        [4, 4, 12, 4],
        image(2, 64),
        image(3, 64),
    ),
    "torchvision resnet50": (
        torchvision.models.resnet50,
        [2, 3, 5, 2],
        image(4, 64),
        image(3, 96),
    ),
    "torchvision swin_t": (torchvision.models.swin_t, [4, 4, 12, 4], image(2, 64), image(1, 96)),
    "torchvision swin3d_t": (
        torchvision.models.video.swin3d_t,
        [4, 4, 12, 4],
        video(),
        video(2, 48),
    ),
    "transformers ViT": (vit, [6], image(2, 32), image(3, 32)),
    "transformers VideoMAE": (
        videomae,
        [6],
        torch.randn(2, 4, 3, 32, 32),
        torch.randn(1, 4, 3, 32, 32),
    ),
    "transformers GPT2": (gpt2, [6], tokens(), tokens(3, 7)),
    "transformers Llama": (llama, [6], tokens(), tokens(3, 7)),
}
FAST = [name for name in NAMED if name.startswith("transformers")]
SLOW = [name for name in NAMED if name not in FAST]


def lengths(plan: rewire.Plan) -> list[int]:
    """Number of residual modules in each chain."""
    return [len(chain) for chain in plan.chains]


@pytest.mark.parametrize("name", NAMED)
def test_chains(name: str) -> None:
    make, expected, x, _ = NAMED[name]
    torch.manual_seed(0)
    assert lengths(rewire.plan(make(), x)) == expected


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_chains_without_an_example(name: str) -> None:
    expected = [24] if name.startswith("vit") else [4, 4, 12, 4]
    assert lengths(rewire.plan(timm.create_model(name))) == expected


def prove(name: str) -> None:
    """All checks of `verify` in float64, and another size."""
    make, _, x, other = NAMED[name]
    torch.manual_seed(0)
    model = make().train()
    rev = rewire.make_reversible(model, x)
    verdict = rewire.verify(rev, x, float64=True, original=model)
    assert verdict.passed, str(verdict)
    measured = {check.name: check.measured for check in verdict.checks}
    assert measured["parameter gradients"] <= 1e-10
    assert list(rev.state_dict()) == list(model.state_dict())
    outputs = [t for t in tensors_of(rev(other)) if t.is_floating_point()]
    outputs[0].square().mean().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", FAST)
def test_proof(name: str) -> None:
    prove(name)
    assert name in FAST


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_proof_of_large_models(name: str) -> None:
    prove(name)
    assert name in SLOW


def test_trunk_inside_is_the_papers_form() -> None:
    """Re2TAL's ResNet: F' = relu(F), no activation on the trunk, here written by hand."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=3).double().eval()
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    rev = rewire.make_reversible(model, torch.randn(1, 3, 64, 64).double(), trunk="inside")
    first, second, third = model.layer1

    def branch(block: Any, value: Tensor) -> Tensor:
        out = block.relu(block.bn1(block.conv1(value)))
        out = block.relu(block.bn2(block.conv2(out)))
        return block.bn3(block.conv3(out)).relu()

    start = first(x)
    one = start + branch(second, start)
    two = start + branch(third, one)
    assert torch.allclose(rev.layer1(x), (two + one) / 2, rtol=0, atol=1e-12)
    assert not torch.allclose(rev.layer1(x), model.layer1(x))


@pytest.mark.parametrize("name", ["vit_large_patch16_224", "swin3d_b"])
def test_large_models(name: str) -> None:
    model = (
        timm.create_model(name)
        if name.startswith("vit")
        else torchvision.models.get_model(name, weights=None)
    )
    rev = rewire.make_reversible(model)
    assert len(rewire.rewriting.plan_of(rev).modules) == 48


def test_generate_writes_the_cache_once() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, vocab_size=90, **SPECIAL)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = tokens(1, 5)
    rev = rewire.make_reversible(model, ids)
    found = rev.generate(ids, max_new_tokens=6, do_sample=False)
    with rewire.store_activations(rev):
        expected = rev.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(found, expected)
    output = rev(ids, labels=ids)
    assert output.past_key_values.get_seq_length() == 5
    output.loss.backward()
    assert output.past_key_values.get_seq_length() == 5


def test_forward_features_and_named_outputs_stay() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    rev = rewire.make_reversible(model)
    x = image(1)
    assert rev.forward_features(x).shape == (1, 197, 192)
    assert torch.equal(rev(x), rev.forward_head(rev.forward_features(x)))
    named = rewire.make_reversible(vit().eval(), image(1, 32))
    output = named(image(1, 32), output_hidden_states=True)
    assert output.last_hidden_state.shape == (1, 17, 32)
    assert len(output.hidden_states) == 4
