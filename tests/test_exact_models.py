"""Models of transformers and torch with norms on the trunk: chains of all their modules, exact."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.detr.modeling_detr import DetrEncoder

import rewire
from rewire.drift import watch_reconstruction
from rewire.structure import tensors_of
from tests.exactness import assert_as_stored, assert_same_bits, by_autograd, courses, some, spread
from tests.networks import MODES, Mode

TOLERANCE = 1e-10
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HALVES = {
    "d_model": 16,
    "vocab_size": 50,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def ids(length: int = 6) -> Tensor:
    """[2, length] token ids."""
    return torch.randint(3, 50, (2, length))


@dataclass(frozen=True)
class Case:
    """A model, what to call it with, and the lengths of its chains."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    chains: tuple[int, ...]


def bert(kind: str, layers: int = 2, **more: Any) -> nn.Module:
    """BERT or one of its children."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, num_hidden_layers=layers, **more)
    return getattr(transformers, f"{kind}Model")(config)


def t5() -> nn.Module:
    """Two layers on each side; RMSNorm in Python, before the branches."""
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0
    )
    return transformers.T5Model(config)


def bart() -> nn.Module:
    """Post-norm, encoder and decoder."""
    return transformers.BartModel(transformers.BartConfig(**HALVES))


def wav2vec2() -> nn.Module:
    """Post-norm, behind convolutions and a convolutional position embedding."""
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    return transformers.Wav2Vec2Model(config)


def encoder(norm_first: bool, activation: str = "relu") -> nn.Module:
    """nn.TransformerEncoder of two layers."""
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, batch_first=True, norm_first=norm_first, activation=activation
    )
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)


def decoder(norm_first: bool) -> nn.Module:
    """nn.TransformerDecoder of two layers."""
    layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 2)


def detr() -> nn.Module:
    """DETR's encoder, post-norm; in train mode it asks whether its values are finite."""
    return DetrEncoder(
        transformers.DetrConfig(
            d_model=16, encoder_layers=2, encoder_ffn_dim=32, encoder_attention_heads=2
        )
    )


def pixels() -> dict[str, Tensor]:
    """[2, 6, 16] with positions."""
    positions = torch.randn(2, 6, 16)
    return {"inputs_embeds": torch.randn(2, 6, 16), "spatial_position_embeddings": positions}


def source() -> dict[str, Tensor]:
    """[2, 6, 16]."""
    return {"src": torch.randn(2, 6, 16)}


def target() -> dict[str, Tensor]:
    """[2, 6, 16] and a memory [2, 5, 16]."""
    return {"tgt": torch.randn(2, 6, 16), "memory": torch.randn(2, 5, 16)}


def tokens() -> dict[str, Tensor]:
    """Ids with a mask that hides the end of one row."""
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def both_sides() -> dict[str, Any]:
    """Ids for an encoder and a decoder."""
    return {"input_ids": ids(), "decoder_input_ids": ids(5), "use_cache": False}


CASES = {
    "BERT": Case(lambda: bert("Bert"), tokens, (4,)),
    "RoBERTa": Case(lambda: bert("Roberta"), tokens, (4,)),
    "T5": Case(t5, both_sides, (4, 6)),
    "BART": Case(bart, both_sides, (4, 6)),
    "Wav2Vec2": Case(wav2vec2, lambda: {"input_values": torch.randn(2, 200)}, (4,)),
    "DETR": Case(detr, pixels, (4,)),
    "encoder, pre-norm": Case(lambda: encoder(True), source, (4,)),
    "encoder, post-norm": Case(lambda: encoder(False), source, (4,)),
    "encoder, post-norm, GELU": Case(lambda: encoder(False, "gelu"), source, (4,)),
    "decoder, pre-norm": Case(lambda: decoder(True), target, (6,)),
    "decoder, post-norm": Case(lambda: decoder(False), target, (6,)),
}


@functools.cache
def _made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Mapping[str, Any], nn.Module]:
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.make().to(dtype).train(), cast(case.inputs(), dtype)
    return model, inputs, rewire.make_reversible(model, dict(inputs), check="raise")


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The floating-point tensors in another dtype."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def grads(model: nn.Module, inputs: Mapping[str, Any], mode: Mode) -> list[Tensor]:
    """Outputs and the gradients of all parameters."""
    torch.manual_seed(3)
    with mode():
        outputs = [t for t in tensors_of(model(**inputs)) if t.is_floating_point()]
    loss = sum((n + 1) * t.double().sin().sum() for n, t in enumerate(outputs))
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    kept = [torch.zeros(()) if g is None else g for g in found]
    return [*(t.detach() for t in outputs), *kept]


FAST = ["BERT", "T5", "DETR", "encoder, pre-norm", "encoder, post-norm", "decoder, post-norm"]


@some("name", CASES, slow=CASES.keys() - {*FAST})
def test_float64(name: str) -> None:
    """Chains of all modules, and backward comes to the start of each, with no tape in between.

    Equal bits; and at most the tolerance, were these ever given up.
    """
    _, inputs, rev = _made(name, torch.float64)
    rev.train(name != "T5")
    expected = by_autograd(rev, lambda: grads(rev, inputs, MODES["fp64"]))
    with watch_reconstruction() as seen:
        found = grads(rev, inputs, MODES["fp64"])
    plan = rewire.rewriting.plan_of(rev)
    assert tuple(len(chain) for chain in plan.chains) == CASES[name].chains
    assert sorted(chain for chain, _ in seen) == sorted(c.name for c in courses(rev))
    assert not any(difference for _, difference in seen)
    worst = max(
        float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3)
        for a, b in zip(found, expected, strict=True)
    )
    assert worst <= TOLERANCE
    assert_same_bits(found, expected)


@spread(
    "mode, name, coupling",
    ["fp32", "bf16 autocast", "bf16 parameters"],
    ["decoder, post-norm", "BERT", "T5"],
    ["re2", "dr2(0.9, 0.1)"],
)
def test_lower_precision(mode: str, name: str, coupling: str) -> None:
    dtype = MODES[mode].dtype
    model, inputs, first = _made(name, dtype)
    plan = rewire.rewriting.plan_of(first)
    rev = rewire.make_reversible(model, plan=plan, coupling=coupling, check="raise")
    for _ in range(2):
        assert_as_stored(rev, lambda: grads(rev, inputs, MODES[mode]))


@pytest.mark.parametrize("name", ["BERT", "decoder, post-norm"])
def test_bdia_in_eval_mode_is_the_original(name: str) -> None:
    model, inputs, first = _made(name, torch.float64)
    plan = rewire.rewriting.plan_of(first)
    rev = rewire.make_reversible(model, plan=plan, coupling="bdia", check="raise").eval()
    model.eval()
    pairs = zip(*(grads(m, inputs, MODES["fp64"]) for m in (rev, model)), strict=True)
    model.train()
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 1e-10


@some("name", ["BERT", "T5"], slow=["T5"])
def test_hidden_states_in_the_loss(name: str) -> None:
    _, inputs, rev = _made(name, torch.float64)
    rev.train()
    inputs = {**inputs, "output_hidden_states": True}
    found = grads(rev, inputs, MODES["fp64"])
    assert len([t for t in found if t.dim() == 3]) >= 3
    assert_as_stored(rev, lambda: grads(rev, inputs, MODES["fp64"]))
