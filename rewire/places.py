"""Where in a model's code something happens: file and line."""

from __future__ import annotations

import sys
from types import FrameType

from torch import nn


def current_line() -> str:
    """File and line of the innermost frame of a model's code (torch's own modules have some)."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not is_model_code(frame):
        frame = frame.f_back
    return line_of(frame, frame.f_lineno)


def is_model_code(frame: FrameType) -> bool:
    """Whether a frame runs a model's code: neither ours nor torch's, but for torch's layers."""
    module = frame.f_globals.get("__name__", "")
    layer = module.startswith("torch.nn.modules.") and module != nn.Module.__module__
    return layer or module.partition(".")[0] not in ("torch", __package__)


def line_of(frame: FrameType, number: int) -> str:
    """File, with the two folders above it, and line."""
    path = frame.f_code.co_filename.replace("\\", "/")
    return f"{'/'.join(path.rsplit('/', 3)[-3:])}:{number}"
