"""The memory floor of the two standard workloads, in exact bytes."""

from __future__ import annotations

import pytest
import torch

import rewire
from benchmarks.memory import MEBI, WORKLOADS
from rewire.profiling import profile

# Three streams and the largest branch, see the benchmark's record.
FLOORS = {"vit": 41.6, "bottlenecks": 55.2}


@pytest.mark.parametrize("workload", FLOORS)
def test_peak_is_at_the_floor_at_every_depth(workload: str) -> None:
    torch.manual_seed(0)
    peaks = []
    for depth in (2, 4):
        model, x = WORKLOADS[workload](depth)
        found = profile(rewire.make_reversible(model, x), x)
        assert found.left_bytes == 0
        peaks.append(found.peak_bytes / MEBI)
    assert max(peaks) <= FLOORS[workload]
    assert peaks[1] - peaks[0] <= 0.1


def test_a_tail_on_the_trunk_is_not_stored() -> None:
    """ReLU behind each add, as in ResNets: constant too."""
    from torchvision.models.resnet import Bottleneck

    torch.manual_seed(0)
    peaks = []
    for depth in (2, 4):
        model = torch.nn.Sequential(*(Bottleneck(128, 32) for _ in range(depth)))
        x = torch.randn(4, 128, 14, 14, requires_grad=True)
        rev = rewire.make_reversible(model, x)
        assert len(rewire.rewriting.plan_of(rev).modules) == depth
        peaks.append(profile(rev, x).peak_bytes / MEBI)
    assert peaks[1] - peaks[0] <= 0.1
