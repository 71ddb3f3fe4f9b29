"""Looking on while something runs: an observer is a list that it writes into, or is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Seen = TypeVar("Seen")

# Called with "begins", "ends" (both in forward) or "again" (in backward), and the name of the
# residual module, or of the first module of a stretch (of which nobody tells the end).
Watcher = Callable[[str, str], None]

_watchers: list[Watcher] = []


@contextmanager
def watching_runs(watcher: Watcher) -> Iterator[None]:
    """Have `watcher` called, until the context ends."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def tell(event: str, name: str) -> None:
    """Tell all watchers."""
    for watcher in _watchers:
        watcher(event, name)


@contextmanager
def observing(observers: list[list[Seen]]) -> Iterator[list[Seen]]:
    """Add a list of one's own to `observers`, until the context ends."""
    own: list[Seen] = []
    observers.append(own)
    try:
        yield own
    finally:
        observers[:] = [other for other in observers if other is not own]
