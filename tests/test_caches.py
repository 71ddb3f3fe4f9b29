"""Objects that branches write to: decoders' caches, by hand and in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rewire
from rewire.structure import tensors_of
from tests.specimens import DIM, mlp
from tests.test_rewired import TOLERANCE, distance, rewired


class Cache:
    """Keys seen so far, by layer."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.writes = 0

    def update(self, layer: int, keys: Tensor) -> Tensor:
        self.writes += 1
        seen = self.keys.get(layer)
        self.keys[layer] = keys if seen is None else torch.cat([seen, keys], 1)
        return self.keys[layer]


class Remembering(nn.Module):
    """Mixes in the mean of all keys seen."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer, self.key, self.body = layer, nn.Linear(DIM, DIM), mlp()

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        keys = self.key(x)
        if cache is not None:
            keys = cache.update(self.layer, keys)
        return self.body(x + keys.mean(1, keepdim=True))


class Block(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.mix, self.body = Remembering(layer), mlp()

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.mix(x, cache)
        return x + self.body(x)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(layer) for layer in range(3))

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        cache = Cache() if cache is None else cache
        for block in self.blocks:
            x = block(x, cache)
        return x


def test_a_cache_is_written_once() -> None:
    rev, x = rewired(Decoder())
    wrt = [x, *rev.parameters()]

    def two_calls() -> tuple[list[Tensor], Cache]:
        cache = Cache()
        first = rev(x, cache)
        second = rev(x.cos(), cache)  # reads what the first call wrote
        loss = (first + second).sin().sum()
        found = torch.autograd.grad(loss, wrt, retain_graph=True)
        again = torch.autograd.grad(loss, wrt)  # each rerun begins with the cache as it was
        return [first.detach(), second.detach(), *found, *again], cache

    found, cache = two_calls()
    with rewire.store_activations(rev):
        expected, plain = two_calls()
    assert distance(found, expected) < TOLERANCE
    assert cache.writes == plain.writes == 6
    pairs = zip(cache.keys.values(), plain.keys.values(), strict=True)
    assert all(a.shape == b.shape and torch.allclose(a, b) for a, b in pairs)


SMALL = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, hidden_size=16, intermediate_size=24),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_layer=2, n_head=2, n_embd=16),
}


def language_model(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    tokens = torch.randint(1, 40, (2, 7))
    return rewire.make_reversible(model, {"input_ids": tokens}), tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_language_models_with_their_default_cache(name: str) -> None:
    rev, tokens = language_model(name)

    def step() -> list[Tensor]:
        torch.manual_seed(1)
        out = rev.train()(tokens, labels=tokens)
        assert out.past_key_values is not None
        grads = torch.autograd.grad(out.loss, list(rev.parameters()))
        return [out.logits.detach(), *grads]

    found = step()
    with rewire.store_activations(rev):
        assert distance(found, step()) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_generate(name: str) -> None:
    rev, tokens = language_model(name)
    settings = {"max_new_tokens": 6, "do_sample": False}
    found = rev.eval().generate(tokens, **settings)
    with rewire.store_activations(rev):
        assert torch.equal(found, rev.generate(tokens, **settings))
    with torch.no_grad():
        uncached = rev.generate(tokens, use_cache=False, **settings)
    assert torch.equal(found, uncached)
    # Training afterwards finds nothing left of it.
    rev.train()(tokens, labels=tokens).loss.backward()
    assert all(t.isfinite().all() for t in tensors_of([p.grad for p in rev.parameters()]))
