"""Small integers, packed: what the inverse of a step cannot know.

Where a step loses bits (a factor below one, a normalisation), forward keeps the difference
between what it had and what the inverse will give, in steps of the grid. Backward adds it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

WORD = 64  # bits
_WIDEST = 16  # wider channels are kept as they are
_ORDINARY = 3.0  # bits that a channel of real networks needs: 2.2 to 3.3 were measured
_FARTHEST = 2.0**20  # as are those whose guess lies farther off: sums of floats must stay exact


def pack(digits: Tensor, width: int) -> Tensor:
    """Non-negative integers below 2^width in 64-bit words.

    Args:
        digits: [N], of any dtype; integral values.
        width: Bits for each.

    Returns:
        int64 [ceil(N / k)], k = 64 // width digits in each word.

    Example:
        >>> unpack(pack(torch.tensor([1.0, 7.0, 5.0]), 3), 3, 3)
        tensor([1., 7., 5.])
    """
    each = WORD // width
    count = -(-digits.numel() // each)
    words = torch.zeros(count, dtype=torch.int64, device=digits.device)
    narrow = digits.to(torch.int32) & ((1 << width) - 1)  # NaN must not reach its neighbours
    for place, part in enumerate(torch.split(narrow, count) if count else ()):
        words[: part.numel()] |= part.to(torch.int64).bitwise_left_shift_(place * width)
    return words


def unpack(words: Tensor, width: int, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `pack`: [count] in `dtype`."""
    digits = torch.empty(count, dtype=dtype, device=words.device)
    for place, part in enumerate(torch.split(digits, words.numel()) if count else ()):
        part.copy_(_digit(words[: part.numel()], place, width))
    return digits


def _digit(words: Tensor, place: int, width: int) -> Tensor:
    return (words >> (place * width)).bitwise_and_((1 << width) - 1)


@dataclass(frozen=True, slots=True)
class Digits:
    """One integer of at most `levels` values for each element of a stream."""

    words: Tensor
    width: int

    @classmethod
    def of(cls, digits: Tensor, width: int) -> Digits:
        """Pack the digits of a stream, [*S], in the order of its memory."""
        return cls(pack(_flat(digits), width), width)

    def add_(self, stream: Tensor) -> Tensor:
        """Add the digits to a stream in place, in slices: no second stream is made."""
        flat = _flat(stream)
        for place, part in enumerate(torch.split(flat, self.words.numel()) if len(flat) else ()):
            part += _digit(self.words[: part.numel()], place, self.width)
        return stream

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self.words.nbytes


@dataclass(frozen=True, slots=True)
class Columns:
    """Integers whose range differs from channel to channel, each packed as narrow as it goes.

    Attributes:
        dim: The channels' dimension.
        low: Smallest integer of each channel, [C].
        packed: (channels, width, words); width 0: all digits of the channel are `low`.
        whole: Channels kept as they were.
        values: Their values.
    """

    dim: int
    low: Tensor
    packed: tuple[tuple[Tensor, int, Tensor], ...]
    whole: Tensor
    values: Tensor

    @classmethod
    def of(cls, digits: Tensor, stream: Tensor, dim: int) -> Columns:
        """Measure each channel's range and pack what pays.

        The widths decide what is allocated, so this waits for the device, once per normalisation.

        Args:
            digits: [*S], integral; NaN or huge where the inverse knows nothing. Overwritten.
            stream: [*S], what the inverse has to give.
            dim: The channels' dimension.
        """
        others = [d for d in range(digits.dim()) if d != dim]
        low, high = digits.amin(others), digits.amax(others)
        far = torch.maximum(low.abs(), high.abs()) > _FARTHEST
        levels = (high - low + 1).nan_to_num_(torch.inf, torch.inf, torch.inf)
        levels.masked_fill_(far, torch.inf)
        widths = _listed(torch.ceil(torch.log2(levels)).clamp_(max=_WIDEST + 1))
        classes: dict[int, list[int]] = {}
        for channel, width in enumerate(widths):
            classes.setdefault(int(width), []).append(channel)
        raw = classes.pop(_WIDEST + 1, [])
        whole = torch.tensor(raw, device=digits.device, dtype=torch.int64)
        low = low.nan_to_num(0.0, 0.0, 0.0)
        digits -= _along(low, dim, digits.dim())
        packed = []
        for width, channels in sorted(classes.items()):
            if width == 0:
                continue
            index = torch.tensor(channels, device=digits.device)
            chosen = digits if len(channels) == len(widths) else digits.index_select(dim, index)
            packed.append((index, width, pack(chosen.reshape(-1), width)))
        return cls(dim, low, tuple(packed), whole, stream.index_select(dim, whole))

    def add_(self, stream: Tensor) -> Tensor:
        """Add the integers to a stream in steps of the grid, in place."""
        stream += _along(self.low, self.dim, stream.dim())
        shape = list(stream.shape)
        for index, width, words in self.packed:
            shape[self.dim] = index.numel()
            digits = unpack(words, width, _product(shape), stream.dtype).view(shape)
            stream.index_add_(self.dim, index, digits)
        return stream

    def restore_(self, stream: Tensor) -> Tensor:
        """Put the channels that were kept whole back."""
        return stream.index_copy_(self.dim, self.whole, self.values) if len(self.whole) else stream

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        tensors = [self.low, self.whole, self.values]
        tensors += [t for index, _, words in self.packed for t in (index, words)]
        return sum(tensor.nbytes for tensor in tensors)


def _listed(widths: Tensor) -> list[float]:
    """The widths of all channels; of a fake tensor, whose values nobody knows, an ordinary one."""
    return [_ORDINARY] * len(widths) if isinstance(widths, FakeTensor) else widths.tolist()


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _along(values: Tensor, dim: int, dims: int) -> Tensor:
    """[C] so that it broadcasts along a dimension."""
    shape = [1] * dims
    shape[dim] = -1
    return values.view(shape)


def _flat(stream: Tensor) -> Tensor:
    """All elements of a dense stream in the order of its memory, as a view."""
    return stream.as_strided((stream.numel(),), (1,), stream.storage_offset())
