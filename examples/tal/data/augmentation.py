"""What is done to the frames of a window: the same to all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.transforms import v2

Transform = Callable[[Tensor], Tensor]  # of frames [T, 3, H, W]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for every window in training.

    Attributes:
        crop: Least and largest share of the picture's area that is seen; empty: its middle.
        flip: Left and right are swapped in half of the windows. Not where classes tell them apart.
        jitter: Share by which brightness, contrast and saturation change at most.
        operations: Of RandAugment (Cubuk et al., 2020), one after the other.
    """

    crop: tuple[float, ...] = ()
    flip: bool = False
    jitter: float = 0.0
    operations: int = 0

    def __post_init__(self) -> None:
        if self.crop and not (len(self.crop) == 2 and 0 < self.crop[0] <= self.crop[1] <= 1):
            raise ValueError(f"augmentation: crop is two shares of the area, not {self.crop}.")


def middle(size: int) -> Transform:
    """The middle of the picture, size × size."""
    return v2.CenterCrop(size)


def augmented(given: Augmentation, size: int) -> Transform:
    """The transform of training; it draws from torch's generator."""
    steps: list[nn.Module] = [v2.CenterCrop(size)]
    if given.crop:
        scale = given.crop[0], given.crop[1]
        steps = [v2.RandomResizedCrop(size, scale=scale, antialias=True)]
    if given.flip:
        steps.append(v2.RandomHorizontalFlip())
    if given.operations:
        steps.append(v2.RandAugment(given.operations))
    if given.jitter:
        steps.append(v2.ColorJitter(given.jitter, given.jitter, given.jitter))
    return v2.Compose(steps)
