"""The plan: what will be rewired and what is left alone, as plain data.

Holds names, numbers and reasons only (no modules, no tensors), so that it prints,
compares, and goes through JSON unchanged. It imports nothing of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# What backward does at a residual module.
WAYS = ("reverse", "checkpoint", "select", "store")


@dataclass(frozen=True)
class Residual:
    """One residual module y = x + F(x).

    Attributes:
        name: Qualified name, unique in the plan, e.g. `blocks.0.attn`.
        home: Qualified name of the module whose forward holds fork, branch and add
            (`""` is the model itself).
        where: File and line of the add.
        add: Rank of the add among the tensor adds of its home's own code.
        skip: Which operand is the skip: 0 or 1 at each level of a sum of several terms.
        inlined: Names, relative to the home, of children whose forward is part of its code.
        adds: Number of tensor adds in that code; a trace with another number is refused.
        trunk: What stands on the trunk before this module: "identity", "view", "activation".
        entry: Where the skip comes from: "fork" (the module starts its chain), "home" (a sum
            in the same home) or "outside" (handed to the home, or a child home's result).
        head: An activation in the home leads from the previous sum (or the fork) to the skip.
        tail: An activation follows the sum before its home returns.
        leads: The sum is the skip of a module outside the home.
        norm: A normalisation stands on the sum (post-norm): x_{i+1} = T(sum).
        head_norm: The same of the previous sum, but it is this home's code that normalises it.
        block: A whole block as one residual module, F(x) = sum - x; `add` is its last add.
        branch: Names, relative to the home, of the modules the branch calls.
    """

    name: str
    home: str
    where: str
    add: int
    skip: tuple[int, ...]
    inlined: tuple[str, ...] = ()
    adds: int = 1
    trunk: str = "identity"
    entry: str = "outside"
    head: bool = False
    tail: bool = False
    leads: bool = False
    norm: bool = False
    head_norm: bool = False
    block: bool = False
    branch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """A run of residual modules in which each skip is the previous sum.

    Attributes:
        name: Qualified name shared by its modules.
        modules: The residual modules in the order in which they run. The same home may
            stand in it more than once (shared weights).
        shape: Shape of the stream in the example, for display only.
        trunk: "identity" for the exact two-stream form, or "inside": activations behind
            the adds are moved into the branches (Re2TAL's form for ResNets).
        taps: Modules whose value is used outside the chain too; there it is the newest stream.
        coupling: The equation of its steps, as spelled by `rewire.Coupling`.
        precision: Of its streams: "exact", "float64" or "fast".
        chunks: Into how many parts its branches are cut where they can be; 1: not at all.
        ways: For each module what backward does: "reverse" rebuilds its input and runs its branch
            again, "checkpoint" has kept its input and runs the branch as far as it must, "select"
            has kept the results of its products too and runs what is between them, "store" has
            kept the branch's activations. Empty: all are reversed.
        bits: Of correction, per element of the stream and module, that the coupling's inverse
            needs. What a normalisation on the trunk needs beside it is measured in each run.
        start: In words, why it does not go on from what stands before it.
    """

    name: str
    modules: tuple[Residual, ...]
    shape: tuple[int, ...] = ()
    trunk: str = "identity"
    taps: tuple[str, ...] = ()
    coupling: str = "re2"
    precision: str = "exact"
    chunks: int | str = 1
    ways: tuple[str, ...] = ()
    bits: int = 0
    start: str = ""

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[Residual]:
        return iter(self.modules)

    @property
    def norms(self) -> int:
        """Number of modules with a normalisation on the trunk."""
        return sum(module.norm + module.head_norm for module in self.modules)

    @property
    def homes(self) -> tuple[str, ...]:
        """Names of the homes, each once, in order."""
        return tuple(dict.fromkeys(module.home for module in self.modules))


@dataclass(frozen=True)
class Parts:
    """How one branch is run.

    Attributes:
        name: Of the residual module.
        along: Dimensions of the stream that it is cut along, with the number of parts of each.
        saved_bytes: What the whole branch saves for backward.
        reason: Why it is not cut, or not into more parts; "" where nothing stands against it.
    """

    name: str
    along: tuple[tuple[int, int], ...]
    saved_bytes: int
    reason: str = ""

    @property
    def count(self) -> int:
        """The number of parts."""
        total = 1
        for _, parts in self.along:
            total *= parts
        return total

    def __str__(self) -> str:
        size = f"{self.saved_bytes / 1e6:.1f} MB"
        if not self.along:
            return f"{self.name}: whole: {self.reason}"
        along = " × ".join(f"{parts} along dimension {dim}" for dim, parts in self.along)
        return f"{self.name}: {along} ({size} whole)"


@dataclass(frozen=True)
class Skipped:
    """An add that is left alone.

    Attributes:
        where: Qualified name of the module that runs the add.
        line: File and line of the add.
        reason: One of a few kinds ("projection", "post-norm", "too short", ...).
        detail: The reason in words, with names and numbers.
    """

    where: str
    line: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Checkpointed:
    """A stretch of modules outside the chains whose activations are not stored.

    Backward runs it again, from what it began with.

    Attributes:
        modules: Qualified names, in the order in which they run; each is handed the result of the
            one before.
        saved_bytes: What autograd would keep in it for backward, in the example.
        kept_bytes: What stays of that: what it begins with, and what others keep anyway.
        reason: Why it pays, in words.
    """

    modules: tuple[str, ...]
    saved_bytes: int = 0
    kept_bytes: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Budget:
    """What a plan was given of memory, and what it takes of it; estimated for the example.

    Attributes:
        asked: As it was asked for.
        limit_bytes: What that leaves for a step at its peak, beside what stands.
        peak_bytes: The step's peak.
        plain_bytes: The original's.
        standing_bytes: Parameters, gradients, the optimizer's state, inputs.
        time: Of a step, as a multiple of the original's.
        least_bytes: The step's peak if all were reversed, in as many parts.
        least_time: Its time then.
    """

    asked: str
    limit_bytes: int
    peak_bytes: int
    plain_bytes: int
    standing_bytes: int
    time: float
    least_bytes: int
    least_time: float


@dataclass(frozen=True)
class Plan:
    """What `make_reversible` will do.

    Attributes:
        model: Class of the model.
        chains: The chains to be rewired, in the order in which they run.
        skipped: Every residual-looking add left alone, with its reason.
        inputs: The example the plan was made with, in words, and where it came from.
        parameters: Number of parameters of the model.
        outside: What is checkpointed outside of the chains.
        budget: The memory that it keeps to, where it was given a budget.
    """

    model: str
    chains: list[Chain]
    skipped: list[Skipped]
    inputs: str = ""
    parameters: int = 0
    outside: tuple[Checkpointed, ...] = ()
    budget: Budget | None = None

    @property
    def modules(self) -> list[Residual]:
        """All residual modules of all chains."""
        return [module for chain in self.chains for module in chain]

    def to_dict(self) -> dict[str, Any]:
        """The plan as lists, dicts, strings and numbers: ready for JSON."""
        return _thawed(dataclasses.asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: `data` has not the form that `to_dict` gives.
        """
        chains = []
        for chain in data["chains"]:
            modules = tuple(Residual(**_frozen(module)) for module in chain["modules"])
            chains.append(Chain(**{**_frozen(chain), "modules": modules}))
        skipped = [Skipped(**_frozen(row)) for row in data["skipped"]]
        outside = tuple(Checkpointed(**_frozen(row)) for row in data.get("outside", ()))
        budget = None if data.get("budget") is None else Budget(**data["budget"])
        made = {"chains": chains, "skipped": skipped, "outside": outside, "budget": budget}
        return cls(**{**data, **made})

    def __str__(self) -> str:
        chains = "1 chain" if len(self.chains) == 1 else f"{len(self.chains)} chains"
        lines = [f"{self.model}: {chains}, {len(self.modules)} residual modules"]
        for chain in self.chains:
            how = f"{len(chain)} modules, {chain.coupling}, {chain.precision}"
            lines.append(f"  {chain.name or '(model)'}: {how}")
        lines += [f"  checkpointed: {', '.join(row.modules)}" for row in self.outside]
        lines += [f"  left alone: {row.where or '(model)'} ({row.reason})" for row in self.skipped]
        return "\n".join(lines)


def _thawed(value: Any) -> Any:
    """`value` with tuples as lists, as JSON would give it back."""
    if isinstance(value, dict):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_thawed(item) for item in value]
    return value


def _frozen(row: Mapping[str, Any]) -> dict[str, Any]:
    """`row` with lists of plain values as tuples."""
    return {key: tuple(item) if isinstance(item, list) else item for key, item in row.items()}
