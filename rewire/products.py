"""The dear results of a branch, kept so that running it again computes only what is cheap.

Matrix products, convolutions and attention take nearly all of the time of a branch; what lies
between them (normalisations, activations, casts) takes little of it, and is much of what autograd
saves. A run under `Products.kept` keeps the results of the former, and a rerun under
`Products.given` is given them instead of computing them: selective checkpointing, as
`torch.utils.checkpoint` has it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from rewire.meters import formula_of
from rewire.replay import version


class Products:
    """Results of the products in one run of a branch, in order; None where one is not kept."""

    def __init__(self) -> None:
        self._results: list[tuple[Any, Any, list[int]] | None] = []
        self._needed = 0

    def kept(self) -> TorchDispatchMode:
        """Keep the results of what runs inside."""
        return _Keeping(self._results)

    def saved(self) -> None:
        """Autograd saves a tensor: a rerun comes to it through all products so far."""
        self._needed = len(self._results)

    def settle(self) -> None:
        """Forget what no rerun comes to, and what was changed in place since it was made."""
        del self._results[self._needed :]
        for number, row in enumerate(self._results):
            if row is not None and _versions(row[1]) != row[2]:
                self._results[number] = None

    def given(self) -> TorchDispatchMode:
        """Give the results to what runs inside."""
        return _Giving(self._results)


class _Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, results: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results = results

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _repeats(func, args, kwargs or {}):
            alone = tree_map_only(Tensor, _alias, result)
            self._results.append((func, alone, _versions(alone)))
        return result


class _Giving(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, results: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results, self._met = results, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        row = None
        if _repeats(func, args, kwargs or {}):
            row = self._results[self._met] if self._met < len(self._results) else None
            self._met += 1
        if row is None or row[0] is not func:
            return func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, _alias, row[1])


def _repeats(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is a product, and draws nothing: attention's dropout is drawn again."""
    if formula_of(func) is None:
        return False
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return True
    for number, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[number] if number < len(args) else argument.default_value
            return not kwargs.get("dropout_p", given)
    return False


def _alias(tensor: Tensor) -> Tensor:
    """The tensor under another object, which shares its version counter."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(result: Any) -> list[int]:
    return [version(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
