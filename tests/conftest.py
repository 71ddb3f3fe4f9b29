"""One thread of torch in each worker: they share the cores."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is later


def pytest_collection_finish() -> None:
    """What is imported lives on; collectors, which many tests call, need not walk it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Python's own shutdown collects once more."""
    gc.unfreeze()
