"""Amounts of memory, in words and in bytes."""

from __future__ import annotations

import math
import re


def human_bytes(count: float) -> str:
    """Bytes in words, e.g. `41.5 MB` (powers of 1000, as in the README's tables).

    >>> human_bytes(41_500_000)
    '41.5 MB'
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30}


def bytes_of(text: str) -> int:
    """Bytes from words: 24GB, 16GiB, 800 MB.

    Raises:
        ValueError: They are no such words.

    Example:
        >>> bytes_of("24GB"), bytes_of("1.5 GiB")
        (24000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise ValueError(f"{text!r} is no amount of memory such as 24GB or 16GiB.")
    return int(float(found[1]) * unit)


def budget_of(given: str | float) -> float:
    """A budget in numbers: a share from 0 to 1, or bytes.

    Args:
        given: Such a number, or bytes in words.

    Raises:
        ValueError: It is neither.

    Example:
        >>> budget_of("0.3"), budget_of("8GB")
        (0.3, 8000000000.0)
    """
    try:
        amount = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        try:
            amount = float(max(bytes_of(str(given)), 2))
        except ValueError:
            amount = math.nan
    if not (0 <= amount <= 1 or 1000 <= amount < math.inf):
        raise ValueError(
            f"budget={given!r}: give a share of the original's activations from 0 to 1, or the "
            "bytes of a whole step, such as 8GB."
        )
    return amount
