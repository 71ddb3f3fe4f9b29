"""Making a model reversible: plan, keep within a budget, rewrite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from rewire.budgets import budgeted
from rewire.compiling import Compile
from rewire.coupling import Coupling
from rewire.cuts import Chunks
from rewire.errors import RewireError
from rewire.planning import coupled
from rewire.planning import plan as make_plan
from rewire.plans import Plan
from rewire.rewriting import refuse_unfit, rewritten


def make_reversible(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    plan: Plan | None = None,
    coupling: str | Coupling | None = None,
    precision: str | None = None,
    check: str = "warn",
    chunks: Chunks | None = None,
    granularity: str = "module",
    trunk: str = "identity",
    outside: str = "store",
    budget: str | float | None = None,
    compile: Compile = False,
    include: Sequence[str] | str = (),
    exclude: Sequence[str] | str = (),
) -> nn.Module:
    """Rewire a residual network into a reversible one with the same parameters.

    In each chain of residual modules the input is duplicated into two streams and each skip
    jumps two modules, x_i = F_i(x_{i-1}) + x_{i-2}; the chain's output is the mean of both.
    Activations inside the branches are not stored: backward rebuilds them.

    Args:
        model: Any module. It is left as it is and stays usable. Wrap (DDP, FSDP2,
            `torch.compile`) what is returned, not what goes in.
        example_inputs: As for `rewire.plan`.
        plan: A plan made before, to be carried out as it is; then only `coupling`, `precision`,
            `chunks` or `budget` (with `exclude`), `compile` and `check` have an effect beside it.
        coupling: The equation of the two streams, an object (`rewire.Consistent(1 / 4)`) or its
            spelling (`"consistent(1/4)"`); "re2", the paper's, by default. The nearer to the
            original's function, the more bits of correction are kept: see `rewire.coupling`.
        precision: "exact" (default): the streams stand on a grid, so that they are rebuilt, and
            gradients come out, bit for bit as by ordinary autograd of the same forward, under
            autocast and in half precision too. "float64": exact, with float64 streams.
            "fast": plain float32 streams, whose rounding adds up along a chain.
        check: What to do in a backward whose rebuilt streams are not right (a branch that does
            not repeat itself, something changed since forward): "warn", "raise" or "off".
        chunks: Run each branch on parts of its input, one after the other, where its operations
            keep them apart (samples, tokens, windows), so that one part's activations are there
            at a time: "auto", as many as they are worth; a number of parts; 1, not at all;
            None (default), as the plan says, which is 1 unless told. What is random is drawn
            for each part by itself.
        granularity: As for `rewire.plan`.
        trunk: As for `rewire.plan`.
        outside: As for `rewire.plan`.
        budget: Memory for a training step, "8GB" (all of it, with Adam's state) or a share of the
            original's activations (0.3; 0 is the least): what backward does at each module, what
            is checkpointed outside, and how many parts are run, is then chosen so that the step
            is as fast as that allows. `example_inputs` must be of the size that will be trained
            on. `rewire.budgeted` makes such a plan for another optimizer or device. What an
            optimizer takes only while it steps is not counted.
        compile: Compile the branches with `torch.compile`: True, or its keyword arguments
            (`{"mode": "max-autotune-no-cudagraphs"}`). Branches of the same code are compiled
            once, without graph breaks; what cannot be runs as it is, with a warning, and so do
            modules of which a budget keeps the products. Each shape takes a compilation. No
            second derivatives, as with any compiled code. What compiled code saves is the
            compiler's: a stored module may take more than a budget has counted, measured up to
            28 %. It is not part of the plan, nor of files.
        include: As for `rewire.plan`.
        exclude: As for `rewire.plan`.

    Returns:
        A new module of the same class, with new module objects and the very same parameter and
        buffer objects: `state_dict` has the same keys in the same order, and training one
        trains the other. Only modules that own a residual add, or are checkpointed, run other code.

    Raises:
        NothingToRewire: No chain was found; the message names the nearest miss.
        CannotTrace: The model does not run on the example, or no example was found.
        RewireError: The budget is below the least that there is.

    Example:
        >>> import torchvision, rewire
        >>> rev = rewire.make_reversible(torchvision.models.resnet18())

    Source: Re2TAL, arXiv 2211.14053.
    """
    if budget is not None and (chunks is not None or outside != "store"):
        raise ValueError("a budget chooses `chunks` and `outside` itself: leave them out.")
    refuse_unfit(model)
    if plan is None:
        outside = outside if budget is None else "checkpoint"  # of these a budget chooses
        chosen = {"granularity": granularity, "trunk": trunk, "outside": outside}
        plan = make_plan(model, example_inputs, include=include, exclude=exclude, **chosen)
    plan = coupled(plan, coupling, precision, chunks)
    if budget is not None and plan.chains:
        if example_inputs is None:
            raise RewireError(
                f"budget={budget!r} needs example_inputs, of the batch and size that you train on: "
                "memory depends on it. On the meta device they take none."
            )
        plan = budgeted(plan, model, budget, example_inputs, exclude=exclude, coupling=coupling)
    return rewritten(model, plan, coupling, check, compile)
