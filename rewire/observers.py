"""Looking on while something runs: an observer is a list that it writes into, or is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Seen = TypeVar("Seen")

# Called with "begins" and "ends" in forward, "again" and "done" in backward around what runs again,
# and the name of the residual module, or of the first module of a stretch (whose "ends" nobody
# tells).
Watcher = Callable[[str, str], None]


class _Watchers(threading.local):
    """Those of each thread: others may train models of their own."""

    def __init__(self) -> None:
        self.all: list[Watcher] = []


_watchers = _Watchers()


@contextmanager
def watching_runs(watcher: Watcher) -> Iterator[None]:
    """Have `watcher` called of what this thread runs, until the context ends."""
    _watchers.all.append(watcher)
    try:
        yield
    finally:
        _watchers.all.remove(watcher)


def tell(event: str, name: str) -> None:
    """Tell all watchers of this thread."""
    for watcher in _watchers.all:
        watcher(event, name)


@contextmanager
def running_again(name: str) -> Iterator[None]:
    """Tell them that backward runs a piece again inside."""
    tell("again", name)
    try:
        yield
    finally:
        tell("done", name)


@contextmanager
def observing(observers: list[list[Seen]]) -> Iterator[list[Seen]]:
    """Add a list of one's own to `observers`, until the context ends."""
    own: list[Seen] = []
    observers.append(own)
    try:
        yield own
    finally:
        observers[:] = [other for other in observers if other is not own]
