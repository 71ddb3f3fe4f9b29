"""What rewire raises: one root, one kind for each thing that can go wrong.

Every message says where, what (with the numbers) and what to do next.
"""

from __future__ import annotations


class RewireError(Exception):
    """Root of all errors raised by rewire on purpose."""


class CannotTrace(RewireError):
    """A model, or the module that owns a residual add, could not be followed."""


class CannotLink(CannotTrace):
    """A residual module's own code can be cut, but not as a part of the chain it was drafted into.

    Attributes:
        link: Name of the residual module, and whether it is the way on from it that fails, or
            the way to it.
    """

    def __init__(self, said: str, name: str, *, onwards: bool) -> None:
        super().__init__(said)
        self.link = name, onwards


class NothingToRewire(RewireError):
    """A model holds no chain of residual modules; the message names the nearest miss."""


class StreamMismatch(RewireError):
    """A tensor that should carry a stream of a reversible chain does not."""


class NotRepeatable(RewireError):
    """A branch computed something else when it was run again in backward."""


class BadFile(RewireError):
    """A file or a model's name could not be read, trusted or rebuilt."""


class AlreadyRewired(BadFile):
    """A file that `rewire convert` wrote, where one of an original was expected.

    Attributes:
        path: Of the file.
    """

    def __init__(self, path: object) -> None:
        super().__init__(
            f"{path}: already rewired. rewire inspect {path} shows its plan, rewire verify {path} "
            "checks it."
        )
        self.path = str(path)
