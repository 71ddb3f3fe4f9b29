"""Exact gradients: bit for bit those of plain autograd through the same forward.

A model runs twice from the same state of grids, statistics and generators, once with activations
stored. Networks x dtypes x depths x couplings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import rewire
from tests.exactness import (
    assert_exact,
    assert_same_bits,
    courses,
    prove,
    rewired,
    run,
    same,
    spread,
)
from tests.networks import COUPLINGS, MODES, NETWORKS, WIDTH, Mode, rows

EVERYWHERE = (NETWORKS, MODES, COUPLINGS)


@spread("network, mode, coupling, depth", *EVERYWHERE, (3, 12), turns=2, rest=False)
def test_bits(network: str, mode: str, coupling: str, depth: int) -> None:
    prove(network, mode, depth, coupling)
    assert depth <= 12


@pytest.mark.slow
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_bits_at_depth_48(network: str, mode: str, coupling: str) -> None:
    prove(network, mode, 48, coupling)
    assert mode in MODES


@pytest.mark.slow
@pytest.mark.parametrize("coupling", ["re2", "consistent(1/4)", "dr2(0.9, 0.1)", "dr2(0.5, 0.5)"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", NETWORKS)
def test_bits_at_depth_96(network: str, mode: str, coupling: str) -> None:
    """Without couplings under which the streams themselves grow, 1.74 times in each module."""
    prove(network, mode, 96, coupling)
    assert network in NETWORKS


@pytest.mark.parametrize("network", [*NETWORKS][:3])
def test_the_same_model_twice(network: str) -> None:
    """In ordinary nets the grid of the first batch stays: no copy is needed."""
    rev, x = rewired(network, 3, MODES["fp32"], "consistent(1/2)").eval(), NETWORKS[network][1]()
    first = run(rev, x)
    assert_same_bits(run(rev, x), first)
    with rewire.store_activations(rev):
        assert_same_bits(run(rev, x), first)


@spread("norm_first, mode, coupling", [True, False], [*MODES][1:], ["re2", "consistent(1/8)"])
def test_transformer_encoder(norm_first: bool, mode: str, coupling: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(MODES[mode].dtype)
    x = rows().to(MODES[mode].dtype)
    rev = rewire.make_reversible(model, x, coupling=coupling, check="raise")
    assert [len(course.sites) for course in courses(rev)] == [4]
    for training in (True, False):
        rev.train(training)
        for _ in range(2):
            assert_exact(rev, rows(), MODES[mode])


@spread("network, mode, coupling", [*NETWORKS][1::2], ("fp32", "bf16 autocast"), COUPLINGS[::5])
def test_weights_after_forty_steps(network: str, mode: str, coupling: str) -> None:
    """In float32 and bfloat16 the weights drift apart at once where one bit differs."""
    before = rewired(network, 3, MODES[mode], coupling)
    both = [copy.deepcopy(before) for _ in range(2)]
    torch.manual_seed(1)
    batches = [NETWORKS[network][1]().to(MODES[mode].dtype) for _ in range(40)]
    train(both[0], batches, MODES[mode])
    with rewire.store_activations(both[1]):
        train(both[1], batches, MODES[mode])
    pairs = zip(both[0].parameters(), before.parameters(), strict=True)
    assert not any(same(a, b) for a, b in pairs)
    assert_same_bits(*([*m.parameters(), *m.buffers()] for m in both))


def train(model: nn.Module, batches: Iterable[Tensor], mode: Mode) -> None:
    """A step of AdamW for each batch."""
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x in batches:
        optimizer.zero_grad()
        with mode():
            loss = (model(x).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
