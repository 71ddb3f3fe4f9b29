"""The training loop, as people write it: nothing in it knows of rewire."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def finetune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    learning_rate: float,
    stops: Collection[int],
) -> Iterator[int]:
    """Train, and pause to be looked at whenever one of `stops` steps are done."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    model.train()
    for step, batch in zip(range(1, max(stops) + 1), batches, strict=False):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in stops:
            yield step
            model.train()  # looking needs eval mode
