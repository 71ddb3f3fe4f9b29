"""Couplings: the arithmetic of the two streams, and nothing else.

Every coupling is x_{i+1} = a x_i + b x_{i-1} + c F_i(x_i) with x_{-1} = x_0; an activation T on
the trunk makes it x_{i+1} = a x_i + b x_{i-1} + c (F_i(T(x_i)) + T(x_i) - x_i). Its inverse is
x_{i-1} = (x_{i+1} - a x_i - c F_i) / b. Dividing by b loses log2(1 / |b|) bits of each element,
which a packed correction keeps, so that the inverse is exact:

| coupling | a, b, c | bits | merge | from |
|---|---|---|---|---|
| `Re2()` | 0, 1, 1 | 0 | mean, sum, last | Re2TAL, arXiv 2211.14053 |
| `Consistent(γ)` | 1 - γ, γ, 1 + γ | log2(1/γ) | last | BDIA's family, arXiv 2407.09093 |
| `Dr2(α, β)` | α, β, 1 | log2(1/β) | last | Dr2Net, arXiv 2401.04105 |
| `Bdia()` | as consistent, γ = ±½ in training, 0 in eval | 1 | last | BDIA, arXiv 2407.09093 |

A coupling of your own is a frozen dataclass with a `name` and `coefficients`; where its b is a
tensor, also with a `factor`, the smallest |b|.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor

from rewire.errors import RewireError
from rewire.fused import merge
from rewire.integers import Coefficients

WHOLE = 32  # bits: the older stream itself is kept
_MOST_BITS = 22
_SLACK = 2


@dataclass(frozen=True)
class Coupling:
    """x_{i+1} = a x_i + b x_{i-1} + c F_i(x_i). Subclasses say what a, b and c are.

    Example:
        A coupling of your own:

        >>> @dataclass(frozen=True)
        ... class Leapfrog(Coupling):
        ...     name = "leapfrog"
        ...
        ...     def coefficients(self, x, training):
        ...         return Coefficients(0.0, 1.0, 2.0)
        >>> str(Leapfrog()), Leapfrog().bits
        ('leapfrog', 0)
    """

    name: ClassVar[str] = ""
    merges_input: ClassVar[bool] = False

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        """a, b, c of one step. `x` is the newest stream, [N, *S]."""
        raise NotImplementedError(
            f"{type(self).__qualname__}: add a method coefficients(self, x, training) that gives "
            "rewire.Coefficients(a, b, c)."
        )

    def merge(self, newest: Tensor, older: Tensor, first: Tensor) -> Tensor:
        """The chain's output from x_n, x_{n-1} and (where `merges_input`) x_0: the last, x_n."""
        return newest

    @property
    def factor(self) -> float:
        """The smallest |b|, from which follows how many bits are kept.

        Raises:
            RewireError: b is a tensor. The class must say then what its smallest |b| is.
        """
        b = self._typical().b
        if isinstance(b, Tensor):
            raise RewireError(
                f"coupling {self.name}: its b is a tensor. Add a property `factor` that gives the "
                "smallest |b|, in training and in eval mode."
            )
        return abs(float(b))

    @property
    def slack(self) -> int:
        """By how many steps of the grid rounding leads astray when b multiplies and divides.

        0 where b is a power of two; of a class that says its own `factor` that is not assumed.
        """
        return slack_of(self.factor) if type(self).factor is Coupling.factor else _SLACK

    @property
    def bits(self) -> int:
        """Bits of correction that an exact inverse needs, per element and residual module.

        From 23 on the older stream is kept itself, in float32: 32 bits.
        """
        return width_of(self.factor, self.slack)

    @property
    def gain(self) -> float:
        """Factor by which the streams grow in one module where the branches add nothing.

        The largest root, in absolute value, of r^2 = a r + b; 1 where these are tensors.
        """
        roots = self._roots()
        return max(roots) if roots else 1.0

    @property
    def growth(self) -> float:
        """Largest factor ρ by which an error of the inverse grows in one module.

        The largest root, in absolute value, of b r^2 + a r = 1: one over the smallest root of
        r^2 = a r + b. Infinite where b is 0, or a or b is a tensor.
        """
        smallest = min(self._roots(), default=0.0)
        return 1 / smallest if smallest else math.inf

    def _roots(self) -> tuple[float, ...]:
        """Absolute values of the roots of r^2 = a r + b; none where these are tensors."""
        a, b, _ = self._typical()
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return ()
        root = complex(a * a + 4 * b) ** 0.5
        return abs((a + root) / 2), abs((a - root) / 2)

    def _typical(self) -> Coefficients:
        """Coefficients of some step in training; the generators stay as they are."""
        with torch.random.fork_rng(devices=[]):
            k = self.coefficients(torch.zeros(1), True)
        if not isinstance(k, Coefficients):
            raise RewireError(
                f"coupling {self.name}: its coefficients are {k!r}, and must be "
                "rewire.Coefficients(a, b, c)."
            )
        return k

    def __str__(self) -> str:
        fields = [field.name for field in dataclasses.fields(self) if _shown(self, field)]
        values = [_spelled(getattr(self, name)) for name in fields]
        return f"{self.name}({', '.join(values)})" if values else self.name


@dataclass(frozen=True)
class Re2(Coupling):
    """x_{i+1} = x_{i-1} + F_i(x_i).

    Args:
        merge_by: "mean" (x_n + x_{n-1}) / 2, the paper's; "sum" x_n + x_{n-1} - x_0, which is
            the original's output to first order; "last" x_n.

    Source: Re2TAL, arXiv 2211.14053, section 3.
    """

    name: ClassVar[str] = "re2"
    merge_by: str = "mean"

    def __post_init__(self) -> None:
        if self.merge_by not in ("mean", "sum", "last"):
            raise ValueError(f"Re2: merge {self.merge_by!r}; choose 'mean', 'sum' or 'last'.")

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        """(0, 1, 1)."""
        return Coefficients(0.0, 1.0, 1.0)

    @property
    def merges_input(self) -> bool:  # type: ignore[override]
        """Whether `merge` reads x_0."""
        return self.merge_by == "sum"

    def merge(self, newest: Tensor, older: Tensor, first: Tensor) -> Tensor:
        """The chain's output."""
        if self.merge_by == "last":
            return newest
        return merge(newest, older, None if self.merge_by == "mean" else first)


@dataclass(frozen=True)
class Consistent(Coupling):
    """x_{i+1} = (1 - γ) x_i + γ x_{i-1} + (1 + γ) F_i(x_i).

    Streams that move steadily move as in the original, to first order; the smaller γ, the
    nearer the original and the more bits: γ = 1/2, 1/4, 1/8 need 1, 2, 3.

    Source: the family of BDIA, arXiv 2407.09093, with a fixed γ.
    """

    name: ClassVar[str] = "consistent"
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"Consistent: γ = {self.gamma}; choose 0 < γ <= 1, e.g. 1/4.")

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        """(1 - γ, γ, 1 + γ)."""
        return Coefficients(1.0 - self.gamma, self.gamma, 1.0 + self.gamma)


@dataclass(frozen=True)
class Dr2(Coupling):
    """x_{i+1} = α x_i + β x_{i-1} + F_i(x_i).

    (1, 0) is the original and (0, 1) is re2. `rewire.Dr2Schedule` moves from one to the other
    while finetuning.

    Source: Dr2Net, arXiv 2401.04105. The paper's own schedule could not be verified.
    """

    name: ClassVar[str] = "dr2"
    alpha: float = 0.9
    beta: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise ValueError(f"Dr2: α = {self.alpha}; choose a number, e.g. 0.9.")
        if not 0 < abs(self.beta) < math.inf:
            raise ValueError(f"Dr2: β = {self.beta}; the inverse divides by it, e.g. 0.1.")

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        """(α, β, 1)."""
        return Coefficients(self.alpha, self.beta, 1.0)


@dataclass(frozen=True)
class Bdia(Coupling):
    """x_{i+1} = (1 - γ) x_i + γ x_{i-1} + (1 + γ) F_i(x_i), γ = ±½ at random.

    The sign is drawn for each sample (dimension 0) and module while training; in eval mode γ
    is 0, the original function. With gradients enabled in eval mode the older stream is kept
    whole, for then the inverse knows nothing of it.

    Source: BDIA, arXiv 2407.09093.
    """

    name: ClassVar[str] = "bdia"
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"Bdia: γ = {self.gamma}; choose 0 < γ <= 1, e.g. 1/2.")

    def coefficients(self, x: Tensor, training: bool) -> Coefficients:
        """(1 - γ, γ, 1 + γ), γ of shape [N, 1, ...] in training."""
        if not training:
            return Coefficients(1.0, 0.0, 1.0)
        shape = (*x.shape[:1], *(1,) * (x.dim() - 1))
        gamma = (torch.randint(0, 2, shape, device=x.device) * 2 - 1).to(x.dtype) * self.gamma
        return Coefficients(1.0 - gamma, gamma, 1.0 + gamma)

    @property
    def factor(self) -> float:
        """|γ|."""
        return self.gamma

    @property
    def slack(self) -> int:
        """That of γ, whatever its sign."""
        return slack_of(self.gamma)

    @property
    def growth(self) -> float:
        """The larger of both signs'."""
        return max(Consistent(self.gamma).growth, Dr2(1 + self.gamma, -self.gamma).growth)


COUPLINGS: dict[str, type[Coupling]] = {c.name: c for c in (Re2, Consistent, Dr2, Bdia)}


def coupling_from(spec: str | Coupling) -> Coupling:
    """The coupling that a spelling such as "re2(sum)", "consistent(1/4)", "dr2(0.9, 0.1)" names.

    Raises:
        RewireError: The spelling names none.

    Example:
        >>> coupling_from("consistent(1/4)")
        Consistent(gamma=0.25)
    """
    if isinstance(spec, Coupling):
        return _named(spec)
    if isinstance(spec, type):
        raise RewireError(
            f"coupling {spec.__name__} is a class; pass an object, {spec.__name__}()."
        )
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", str(spec))
    kind = COUPLINGS.get(match[1]) if match else None
    if match is None or kind is None:
        raise RewireError(
            f"coupling {spec!r} is not known. Choose one of "
            + ", ".join(map(str, (cls() for cls in COUPLINGS.values())))
            + ", e.g. 'consistent(1/4)' or 're2(sum)', or pass a rewire.Coupling of your own, an "
            "object (a file that was saved with one: rewire.load(path, coupling=...))."
        )
    try:
        return kind(*(_value(part) for part in (match[2] or "").split(",") if part.strip()))
    except TypeError as error:
        raise RewireError(
            f"coupling {spec!r} cannot be read. Give {match[1]} its numbers alone, as in "
            f"{str(kind())!r}."
        ) from error
    except ValueError as error:
        raise RewireError(f"coupling {spec!r}: {error}") from error


def _named(coupling: Coupling) -> Coupling:
    """A coupling that its spelling cannot be mistaken for another's."""
    name, known = coupling.name, COUPLINGS.get(coupling.name)
    if not name or (known is not None and not isinstance(coupling, known)):
        raise RewireError(
            f"{type(coupling).__qualname__}: its name {name!r} is "
            + ("that of another coupling" if name else "missing")
            + ", and plans and files keep couplings by name. Add a class attribute `name`."
        )
    return coupling


def _value(text: str) -> Any:
    text = text.strip()
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        return ast.literal_eval(text) if text[:1] in "'\"" else text


def _shown(coupling: Coupling, field: dataclasses.Field[Any]) -> bool:
    """A coupling is spelled with its numbers; other fields only where they are not the default."""
    value = getattr(coupling, field.name)
    return value != field.default or isinstance(value, float)


def _spelled(value: Any) -> str:
    if isinstance(value, float):
        binary = Fraction(value)
        short = str(binary) if 1 < binary.denominator <= 64 else f"{value:g}"
        return short if float(Fraction(short)) == value else repr(value)
    return str(value)


def width_of(factor: float, slack: int) -> int:
    """Bits that tell apart the values of x_{i-1} whose share b x_{i-1} rounds to the same.

    `WHOLE` where they are so many that float32 cannot count them beside the share.
    """
    if factor in (0.0, 1.0):
        return 0 if factor else WHOLE
    if factor < 2.0**-_MOST_BITS:
        return WHOLE
    levels = max(1, math.ceil(1 / factor)) + 2 * slack
    width = math.ceil(math.log2(levels))
    return width if width <= _MOST_BITS else WHOLE


def slack_of(factor: float) -> int:
    """How far rounding of a product and a quotient by |b| may lead beside the guess."""
    return 0 if math.frexp(factor)[0] == 0.5 else _SLACK
