"""Small networks, one for each way to write a residual module, with the chains they hold.

Each is at most twenty lines. `SPECIMENS` is run through every stage by the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

DIM = 8


@dataclass(frozen=True)
class Specimen:
    """A network, an example, the lengths of its chains, and reasons among the skips."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    chains: tuple[int, ...]
    reasons: tuple[str, ...] = ()
    random: bool = False


def rows() -> Tensor:
    """[4, 6, DIM]."""
    return torch.randn(4, 6, DIM, dtype=torch.float64)


def image() -> Tensor:
    """[4, DIM, 6, 6]."""
    return torch.randn(4, DIM, 6, 6, dtype=torch.float64)


def mlp() -> nn.Sequential:
    """LayerNorm, Linear, GELU, Linear."""
    return nn.Sequential(
        nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM)
    )


class Loop(nn.Module):
    """A loop over blocks in the forward of the root."""

    def __init__(self, block: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def spelled(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A loop of blocks whose sum is written as `function(x, F(x))`."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.gamma = nn.Parameter(torch.full((DIM,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self.gamma * self.body(x))

    return lambda: Loop(Block)


def add_in_place(x: Tensor, f: Tensor) -> Tensor:
    """x += F(x) on a copy."""
    f += x
    return f


class RootLoop(nn.Module):
    """The adds stand in the root's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 2)
        self.bodies = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for body in self.bodies:
            x = x + body(x)
        return self.head(x)


class Attention(nn.Module):
    """Self-attention with an optional mask, and its weights as a second result."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result, weights = self.inner(x, x, x, attn_mask=mask)
        return result, weights


class TupleBlock(nn.Module):
    """Two residual modules, a mask, a dict of options, a tuple as the result."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.body = nn.LayerNorm(DIM), Attention(), mlp()

    def forward(self, x: Tensor, *, mask: Tensor | None, options: dict[str, Any]) -> Any:
        attended, weights = self.attention(self.norm(x), mask)
        x = x + options["scale"] * attended
        x = x + self.body(x)
        return (x, weights) if options["weights"] else (x,)


class TupleNet(nn.Module):
    """Blocks with side inputs that return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TupleBlock() for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(6, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=x.dtype)
        for block in self.blocks:
            x, weights = block(x, mask=self.bias, options={"scale": 0.5, "weights": True})
            total = total + weights.square().mean()
        return x, total


class Parallel(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.body = nn.LayerNorm(DIM), Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y)[0] + self.body(y)


class SelfOutput(nn.Module):
    """An add in a submodule that is handed the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(DIM, DIM)

    def forward(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return self.dense(hidden) + skip


class HandedSkip(nn.Module):
    """Pre-norm, with the add in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.output = nn.LayerNorm(DIM), mlp(), SelfOutput()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(self.norm(x)), x)


class PostNorm(nn.Module):
    """norm(x + F(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.body(x))


class PostBatchNorm(nn.Module):
    """relu(norm(x + F(x))): an activation behind the normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.BatchNorm2d(DIM), nn.Conv2d(DIM, DIM, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(x + self.body(x)))


class ChannelNorm(nn.LayerNorm):
    """Over the channels of pictures, by permuting them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PostChannelNorm(PostBatchNorm):
    """norm(x + F(x)) where the normalisation turns the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = ChannelNorm(DIM)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.body(x))


class PostGroupNorm(PostChannelNorm):
    """norm(x + F(x)) with groups of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, DIM)  # type: ignore[assignment]


class PostRmsNorm(PostNorm):
    """norm(x + F(x)) without a mean, called as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x + self.body(x), (DIM,), self.norm.weight)


class GatedNorm(nn.Module):
    """Something else reads the sum than its normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body = nn.LayerNorm(DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.body(x)
        return self.norm(y) * torch.sigmoid(y)


class Bottleneck(nn.Module):
    """relu(x + F(x)) with BatchNorm and everything in place, as in ResNets."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(DIM, DIM, 3, padding=1), nn.BatchNorm2d(DIM)
        self.conv2, self.norm2 = nn.Conv2d(DIM, DIM, 3, padding=1), nn.BatchNorm2d(DIM)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += identity
        return self.relu(out)


class PreActivation(nn.Module):
    """The skip comes from behind an activation: t = relu(x), t + F(t)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(x)
        return x + self.body(x)


class InPlaceStart(nn.Module):
    """The branch begins with an operation in place on the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        return x + self.body(functional.relu_(x))


class Windows(nn.Module):
    """Views on the trunk, and padding that depends on the size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.body, self.inner = nn.LayerNorm(DIM), mlp(), nn.Linear(4 * DIM, 4 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        pad = (4 - length % 4) % 4
        y = self.norm(x)
        if pad:
            y = functional.pad(y, (0, 0, 0, pad))
        y = self.inner(y.reshape(batch, -1, 4 * dim)).reshape(batch, -1, dim)[:, :length]
        x = x + y
        x = x.reshape(batch * length, dim)
        x = x + self.body(x)
        return x.reshape(batch, length, dim)


class Positions(nn.Module):
    """A position embedding, x + x, a lateral sum and a projection: none is residual."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6, DIM))
        self.left, self.right, self.body = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        x = self.left(x) + self.right(x)
        x = torch.cat([x, x], -1)[..., :DIM]
        x = self.body(x)
        return x + x


class Dropped(nn.Module):
    """Dropout in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.dropout = mlp(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.body(x))


class Shared(nn.Module):
    """One block used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Dropped()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.block(x)
        return x


class Hidden(Loop):
    """Returns all hidden states, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__(Dropped, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = [x]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return {"last": hidden[-1], "hidden": tuple(hidden)}


class Functional(nn.Module):
    """A residual module in an `nn.Sequential`, with a branch torch.fx could not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(DIM, DIM)

    def branch(self, x: Tensor) -> Tensor:
        return self.body(x).tanh() * 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


SPECIMENS = {
    "plus": Specimen(spelled(lambda x, f: x + f), rows, (3,)),
    "skip on the right": Specimen(spelled(lambda x, f: f + x), rows, (3,)),
    "iadd": Specimen(spelled(add_in_place), rows, (3,)),
    "torch.add": Specimen(spelled(torch.add), rows, (3,)),
    "method add": Specimen(spelled(lambda x, f: x.add(f)), rows, (3,)),
    "add_": Specimen(spelled(lambda x, f: f.add_(x)), rows, (3,)),
    "three terms": Specimen(spelled(lambda x, f: x + f + f.tanh()), rows, (3,)),
    "three terms, skip last": Specimen(spelled(lambda x, f: (f + f.tanh()) + x), rows, (3,)),
    "scaled skip": Specimen(spelled(lambda x, f: 0.5 * x + f), rows, (3,)),
    "add with alpha": Specimen(
        spelled(lambda x, f: torch.add(x, f, alpha=2)), rows, (), ("scaled add",)
    ),
    "root loop": Specimen(RootLoop, rows, (4,)),
    "sequential": Specimen(lambda: nn.Sequential(*(Functional() for _ in range(3))), rows, (3,)),
    "tuples and masks": Specimen(TupleNet, rows, (4,), random=True),
    "parallel": Specimen(lambda: Loop(Parallel), rows, (3,)),
    "handed skip": Specimen(lambda: Loop(HandedSkip), rows, (3,)),
    "post-norm": Specimen(lambda: Loop(PostNorm), rows, (3,)),
    "post-norm, BatchNorm": Specimen(lambda: Loop(PostBatchNorm, 4), image, (4,)),
    "post-norm, permuting": Specimen(lambda: Loop(PostChannelNorm, 4), image, (4,)),
    "post-norm, groups": Specimen(lambda: Loop(PostGroupNorm, 4), image, (4,)),
    "post-norm, function": Specimen(lambda: Loop(PostRmsNorm), rows, (3,)),
    "gated norm": Specimen(lambda: Loop(GatedNorm), rows, (), ("too short",)),
    "bottlenecks": Specimen(lambda: Loop(Bottleneck, 4), image, (4,)),
    "pre-activation": Specimen(lambda: Loop(PreActivation, 4), rows, (4,)),
    "in-place start": Specimen(lambda: Loop(InPlaceStart), rows, (3,)),
    "windows": Specimen(lambda: Loop(Windows), rows, (6,)),
    "positions": Specimen(Positions, rows, (), ("constant", "x + x")),
    "dropout": Specimen(lambda: Loop(Dropped), rows, (3,), random=True),
    "shared": Specimen(Shared, rows, (3,), random=True),
    "hidden states": Specimen(Hidden, rows, (3,), random=True),
    "encoder, post-norm": Specimen(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, batch_first=True), 2
        ),
        rows,
        (4,),
        random=True,
    ),
    "encoder": Specimen(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(DIM, 2, 2 * DIM, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        ),
        rows,
        (4,),
        random=True,
    ),
}
