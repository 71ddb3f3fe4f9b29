"""Two CPU ranks: gradients under DDP and FSDP2 equal those of one process."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rewire
from rewire.plans import Checkpointed

WIDTH = 8
RANKS = 2
Gradients = dict[str, Tensor]


class Block(nn.Module):
    """Two residual modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x)).tanh()
        return x + self.body(x)


class Net(nn.Module):
    """A stem, blocks, a head, and a layer that runs only when asked to."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        self.spare = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, *, spare: bool = True, skip: int | None = None) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number != skip:
                x = block(x)
        return self.head(x) + self.spare(x) if spare else self.head(x)


def net() -> nn.Module:
    """The rewired model; the same on every rank."""
    torch.manual_seed(0)
    return rewire.make_reversible(Net().double(), torch.randn(2, 5).double())


def batch(rank: int, micro: int = 0) -> Tensor:
    """A rank's share of the data."""
    generator = torch.Generator().manual_seed(10 * micro + rank)
    return torch.randn(4, 5, dtype=torch.float64, generator=generator)


def expected(micros: int = 1, make: Callable[[], nn.Module] = net, **kwargs: Any) -> Gradients:
    """The mean over ranks of the gradients summed over micro-batches, in one process."""
    model = make()
    with rewire.store_activations(model):
        for micro in range(micros):
            for rank in range(RANKS):
                (model(batch(rank, micro), **kwargs).square().mean() / RANKS).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def gathered(model: nn.Module) -> Gradients:
    """A wrapped model's gradients under the plain names."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name.removeprefix("module.")] = grad.detach().clone()
    return found


# ---- what one rank does ------------------------------------------------------------------


def ddp(rank: int, model: nn.Module | None = None, **options: Any) -> Gradients:
    model = DistributedDataParallel(model or net(), **options)
    for _ in range(2):  # static graphs differ from the second step on
        model.zero_grad()
        model(batch(rank)).square().mean().backward()
    return gathered(model)


def ddp_plain(rank: int) -> Gradients:
    return ddp(rank)


def ddp_views(rank: int) -> Gradients:
    return ddp(rank, gradient_as_bucket_view=True, bucket_cap_mb=1)


def ddp_static_graph(rank: int) -> Gradients:
    return ddp(rank, static_graph=True)


def ddp_unused(rank: int) -> Gradients:
    model = DistributedDataParallel(net(), find_unused_parameters=True)
    for skip in (0, 2, 1):
        model.zero_grad(set_to_none=True)
        model(batch(rank), spare=False, skip=skip).square().mean().backward()
    return gathered(model)


def ddp_no_sync(rank: int) -> Gradients:
    model = DistributedDataParallel(net())
    with model.no_sync():
        model(batch(rank, 0)).square().mean().backward()
    model(batch(rank, 1)).square().mean().backward()
    return gathered(model)


def fsdp(
    rank: int,
    *,
    reshard: bool,
    parts: Callable[[Any], list[nn.Module]],
    model: nn.Module | None = None,
) -> Gradients:
    model = model or net()
    mesh = init_device_mesh("cpu", (RANKS,))
    for part in parts(model):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    for _ in range(2):
        model.zero_grad()
        model(batch(rank)).square().mean().backward()
    return gathered(model)


def fsdp_blocks(rank: int) -> Gradients:
    return fsdp(rank, reshard=True, parts=lambda model: list(model.blocks))


def fsdp_blocks_kept(rank: int) -> Gradients:
    return fsdp(rank, reshard=False, parts=lambda model: list(model.blocks))


def fsdp_root(rank: int) -> Gradients:
    return fsdp(rank, reshard=False, parts=lambda _: [])


def fsdp_inner(rank: int) -> Gradients:
    def inner(model: Any) -> list[nn.Module]:
        return [m for block in model.blocks for m in (block.mix, block.body)]

    return fsdp(rank, reshard=True, parts=inner)


def outside() -> nn.Module:
    """The same, with two stretches outside of the chain checkpointed: a stem of two, a head."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 5).double()
    model.stem = nn.Sequential(model.stem, nn.Identity(), nn.Tanh())
    model.head = nn.Sequential(nn.Tanh(), model.head)
    model.double()
    rows = Checkpointed(("stem.0", "stem.1", "stem.2")), Checkpointed(("head",))
    plan = dataclasses.replace(rewire.plan(model, x), outside=rows)
    return rewire.make_reversible(model, plan=plan)


def ddp_outside(rank: int) -> Gradients:
    return ddp(rank, outside())


def fsdp_outside(rank: int) -> Gradients:
    """Each member for itself: the first is gathered anew when the last needs its result.

    The rerun of the head ends inside the module that is wrapped.
    """

    def members(model: Any) -> list[nn.Module]:
        return [*model.stem, *model.blocks, model.head[1]]

    return fsdp(rank, reshard=True, parts=members, model=outside())


def fsdp_root_outside(rank: int) -> Gradients:
    return fsdp(rank, reshard=False, parts=lambda _: [], model=outside())


def fsdp_accumulated(rank: int) -> Gradients:
    model: Any = net()
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for micro in range(2):
        model.set_requires_gradient_sync(micro == 1)
        model(batch(rank, micro)).square().mean().backward()
    return gathered(model)


WAYS: dict[str, tuple[Callable[[int], Gradients], dict[str, Any]]] = {
    way.__name__: (way, wanted)
    for way, wanted in (
        (ddp_plain, {}),
        (ddp_views, {}),
        (ddp_static_graph, {}),
        (ddp_unused, {"spare": False, "skip": 1}),
        (ddp_no_sync, {"micros": 2}),
        (fsdp_blocks, {}),
        (fsdp_blocks_kept, {}),
        (fsdp_root, {}),
        (fsdp_inner, {}),
        (fsdp_accumulated, {"micros": 2}),
        (ddp_outside, {"make": outside}),
        (fsdp_outside, {"make": outside}),
        (fsdp_root_outside, {"make": outside}),
    )
}


def every_way(rank: int, folder: str) -> None:
    """One process: the ways in turn; what they give, or how they fail, into a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", rank=rank, world_size=RANKS, init_method=f"file://{folder}/store"
    )
    found: dict[str, Any] = {}
    for name, (way, _) in WAYS.items():
        try:
            found[name] = way(rank)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_gradients_equal_one_process(tmp_path: Path) -> None:
    """All in one test: starting two processes takes longer than the rest."""
    mp.start_processes(every_way, (str(tmp_path),), nprocs=RANKS, start_method="spawn")
    for rank in range(RANKS):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert {name: differs(name, found[name]) for name in WAYS} == dict.fromkeys(WAYS)


def differs(name: str, found: Gradients | str) -> str | None:
    """What is wrong with the gradients that one way gave; None: nothing."""
    if isinstance(found, str):
        return found
    wanted = expected(**WAYS[name][1])
    used = {key: grad for key, grad in found.items() if key in wanted or grad.any()}
    if used.keys() != wanted.keys():
        return f"gradients of {sorted(used.keys() ^ wanted.keys())}"
    worst = max(float((used[key] - wanted[key]).abs().max()) for key in wanted)
    return None if worst < 1e-12 else f"off by {worst}"


def test_the_single_process_reference_is_not_trivial() -> None:
    assert all(grad.abs().max() > 1e-6 for grad in expected().values())
    assert copy.deepcopy(expected()).keys() == dict(net().named_parameters()).keys()
