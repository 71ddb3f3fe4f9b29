"""Ways to train a network in less memory, rewire's and others', as modules that share parameters.

plain             as it is
checkpoint        torch.utils.checkpoint around each residual block
checkpoint-sqrt   checkpoint_sequential over each row of n blocks, in √n segments
compile           torch.compile
compile-0.5, -0   the same with half, or none, of the activations that its partitioner would keep
offload           torch.autograd.graph.save_on_cpu
memcnn, revlib, revtorch, reformer, momentumnet    reversible libraries, for stacks of blocks
rewire            make_reversible
rewire-2, -4, -8, -auto    the same with `chunks=`
rewire-compile    the same with `compile=True`
budget-checkpoint, ...     the same with `budget=` that way's measured peak

A library gets the stack's branches, F and G by turns, on two streams that both begin as the input
and whose mean is the output: for all but momentumnet that is the function which rewire computes.
Under autocast each of its branches enters autocast by itself, because these libraries run them
again in backward, which autocast does not reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch._functorch import config as partitioner
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import rewire
from benchmarks.costs import step, step_bytes, zero_gradients
from benchmarks.workloads import Autocast, Bottleneck, Stack

HOST_BYTES = 48 * 2**30
"""What offload may hold in host memory: pinned blocks are rounded up to a power of two."""


@dataclass(frozen=True)
class Subject:
    """What a way is made for.

    Attributes:
        model: Takes one tensor, on the device of that.
        x: The input of the steps, [B, ...].
        dtype: Of autocast; float32 is without.
    """

    model: nn.Module
    x: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def leaves(self) -> list[Tensor]:
        """The input and all parameters."""
        return [self.x, *self.model.parameters()]


class CannotApply(Exception):
    """The way is not for this model."""


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of the modules of a model, with its own parameters and buffers in them."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


# ---- checkpointing -----------------------------------------------------------------------


def blocks_of(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the residual blocks: outermost modules of a class whose forward adds to a trunk.

    Raises:
        CannotApply: Residual modules stand in the forward of the model itself, or nowhere.
    """
    homes = {module.home for module in rewire.plan(model, x).modules} - {""}
    kinds = {type(model.get_submodule(home)) for home in homes}
    names = [name for name, module in model.named_modules() if name and type(module) in kinds]
    outer = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    if not outer:
        raise CannotApply("no residual blocks that are modules of their own")
    return outer


def checkpointed(subject: Subject) -> nn.Module:
    """Each residual block under `torch.utils.checkpoint`."""
    model = _sharing(subject.model)
    for name in blocks_of(subject.model, subject.x):
        block = model.get_submodule(name)
        _replace_forward(block, partial(checkpoint, block.forward))
    return model


def checkpointed_sqrt(subject: Subject) -> nn.Module:
    """Rows of n residual blocks in √n segments, all but the last checkpointed.

    Raises:
        CannotApply: There is no `nn.Sequential` of residual blocks.
    """
    if isinstance(subject.model, Stack):
        subject = Subject(nn.Sequential(*subject.model.blocks), subject.x)
    model = _sharing(subject.model)
    names = blocks_of(subject.model, subject.x)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in names)
    owners = [model.get_submodule(parent) for parent in parents]
    rows = [row for row in owners if isinstance(row, nn.Sequential) and len(row) > 1]
    if not rows:
        raise CannotApply("its residual blocks do not stand in an nn.Sequential")
    for row in rows:
        blocks, segments = list(row), max(2, round(len(row) ** 0.5))
        _replace_forward(row, partial(checkpoint_sequential, blocks, segments))
    return model


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Run a module, of a copy of ours, in another way; forward takes `use_reentrant` too."""
    module.forward = partial(forward, use_reentrant=False)


# ---- torch -------------------------------------------------------------------------------


def compiled(subject: Subject, budget: float = 1.0) -> nn.Module:
    """The model compiled by Inductor.

    Args:
        subject: What to compile.
        budget: Of memory for activations; 1 is what the partitioner takes by itself.
    """
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        with partitioner.patch(activation_memory_budget=budget):
            return compile_fx(graph, inputs)

    # A backend of its own, so that no way is given what was compiled for another.
    return torch.compile(_sharing(subject.model), backend=backend, dynamic=False)  # type: ignore[return-value]


class Offloaded(nn.Module):
    """A model whose saved tensors wait in host memory.

    Args:
        model: Any module of one input.
        limit: Bytes that may wait there at once.
    """

    def __init__(self, model: nn.Module, limit: int = HOST_BYTES) -> None:
        super().__init__()
        self.model = model
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        """Run the model, x: [B, ...].

        Raises:
            MemoryError: More than `limit` bytes would have to wait.
        """
        hooks = save_on_cpu(pin_memory=x.is_cuda)
        waiting = 0

        def pack(tensor: Tensor) -> Any:
            nonlocal waiting
            waiting += tensor.nbytes
            if waiting > self.limit:
                raise MemoryError(f"more than {self.limit / 2**30:.0f} GiB would be on the host")
            return hooks.pack_hook(tensor)

        with saved_tensors_hooks(pack, hooks.unpack_hook):
            result: Tensor = self.model(x)
        return result


# ---- reversible libraries ----------------------------------------------------------------


class TwoStreams(nn.Module):
    """A chain on both streams in one tensor, cut along a dimension; both begin as the input."""

    def __init__(self, chain: nn.Module, dim: int) -> None:
        super().__init__()
        self.chain = chain
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """The mean of both streams, [*S] like x."""
        y: Tensor = self.chain(torch.cat([x, x], self.dim))
        y1, y2 = y.chunk(2, self.dim)
        return (y1 + y2) / 2


def branches_of(subject: Subject) -> list[nn.Module]:
    """The branches of a stack, in the order in which they run.

    Raises:
        CannotApply: The model is no stack, or its branches are not known.
    """
    branches: list[nn.Module] = []
    for block in getattr(subject.model, "blocks", []) if isinstance(subject.model, Stack) else []:
        if isinstance(block, Block):
            branches += [
                nn.Sequential(block.norm1, block.attn, block.ls1, block.drop_path1),
                nn.Sequential(block.norm2, block.mlp, block.ls2, block.drop_path2),
            ]
        elif isinstance(block, Bottleneck):
            branches.append(block.body)
    if not branches:
        raise CannotApply("only for the stacks, whose blocks are cut into F and G")
    if subject.dtype == torch.float32:
        return branches
    return [Autocast(branch, subject.dtype) for branch in branches]


def pairs_of(subject: Subject) -> list[tuple[nn.Module, nn.Module]]:
    """(F, G) of each reversible block.

    Raises:
        CannotApply: The number of branches is odd.
    """
    branches = branches_of(subject)
    if len(branches) % 2:
        raise CannotApply(f"{len(branches)} branches do not make pairs of F and G")
    return list(zip(branches[::2], branches[1::2], strict=True))


def memcnn(subject: Subject) -> nn.Module:
    """Of van de Leemput et al., JOSS 2019."""
    library = import_module("memcnn")
    couplings = [library.AdditiveCoupling(f, g, split_dim=1) for f, g in pairs_of(subject)]
    return TwoStreams(nn.Sequential(*map(library.InvertibleModuleWrapper, couplings)), 1)


def revlib(subject: Subject) -> nn.Module:
    """Of Nestler, github.com/HomebrewML/revlib, in its default memory mode."""
    library = import_module("revlib")
    return TwoStreams(library.ReversibleSequential(*branches_of(subject), split_dim=1), 1)


def revtorch(subject: Subject) -> nn.Module:
    """Of Brügger et al., MICCAI 2019."""
    library = import_module("revtorch")
    blocks = [library.ReversibleBlock(f, g, split_along_dim=1) for f, g in pairs_of(subject)]
    return TwoStreams(library.ReversibleSequence(nn.ModuleList(blocks)), 1)


def reformer(subject: Subject) -> nn.Module:
    """The runtime of reformer-pytorch, which cuts dimension 2."""
    library = import_module("reformer_pytorch.reversible")
    return TwoStreams(library.ReversibleSequence(pairs_of(subject)), 2)


def momentumnet(subject: Subject) -> nn.Module:
    """Of Sander et al., ICML 2021, with its memory trick."""
    library = import_module("momentumnet")
    chain: nn.Module = library.MomentumNet(branches_of(subject), gamma=0.9, use_backprop=False)
    return chain


# ---- rewire --------------------------------------------------------------------------------


def rewired(
    subject: Subject, chunks: int | str | None = None, *, compile: bool = False
) -> nn.Module:
    """Two streams, branches run in parts, or compiled, where asked."""
    return rewire.make_reversible(subject.model, subject.x, chunks=chunks, compile=compile)


def budgeted(subject: Subject, rival: str) -> nn.Module:
    """Two streams, in the memory that another way takes."""
    peaks = []
    for name in (rival, "plain"):
        zero_gradients(subject.leaves)
        model = make(name, subject)
        step(model, subject.x)  # what is made once (compiled code, tables) is no cost of a step
        peaks.append(step_bytes(model, subject.x).peak)
    share = min(1.0, peaks[0] / peaks[1])
    return rewire.make_reversible(subject.model, subject.x, budget=share)


# ---- all of them -------------------------------------------------------------------------

COMPILED: dict[str, Callable[[Subject], nn.Module]] = {
    "compile": compiled,
    "compile-0.5": partial(compiled, budget=0.5),
    "compile-0": partial(compiled, budget=0.0),
    "rewire-compile": partial(rewired, compile=True),
}
LIBRARIES: dict[str, Callable[[Subject], nn.Module]] = {
    "memcnn": memcnn,
    "revlib": revlib,
    "revtorch": revtorch,
    "reformer": reformer,
    "momentumnet": momentumnet,
}
CHUNKED: dict[str, Callable[[Subject], nn.Module]] = {
    f"rewire-{chunks}": partial(rewired, chunks=chunks) for chunks in (2, 4, 8, "auto")
}
BUDGETED: dict[str, Callable[[Subject], nn.Module]] = {
    f"budget-{rival}": partial(budgeted, rival=rival)
    for rival in ("checkpoint", "checkpoint-sqrt", "compile", "compile-0.5", "compile-0")
}
WAYS: dict[str, Callable[[Subject], nn.Module]] = {
    "plain": lambda subject: subject.model,
    "checkpoint": checkpointed,
    "checkpoint-sqrt": checkpointed_sqrt,
    **COMPILED,
    "offload": lambda subject: Offloaded(subject.model),
    **LIBRARIES,
    "rewire": rewired,
    **CHUNKED,
    **BUDGETED,
}
REMARKS = {
    "offload": "activations on the host are not counted",
    "momentumnet": "another function: momentum 0.9",
}


def make(name: str, subject: Subject) -> nn.Module:
    """The model that trains in a way, autocast included.

    Raises:
        CannotApply: The way is not for this model.
        Exception: Whatever a library raises, ImportError where it is not installed.
    """
    way = WAYS[name](subject)
    # A library's branches enter autocast by themselves.
    inside = name in LIBRARIES or subject.dtype == torch.float32
    return way if inside else Autocast(way, subject.dtype)


def applicable(subject: Subject, *, compilers: bool) -> Sequence[str]:
    """Names of the ways worth running for a model, compiled ones where asked."""
    left_out = {
        **({} if compilers else COMPILED),
        **BUDGETED,  # where asked for
        **({} if isinstance(subject.model, Stack) else LIBRARIES),
        **({} if subject.x.is_cuda else {"offload": None}),  # the CPU's memory is the host's
    }
    return [name for name in WAYS if name not in left_out]
