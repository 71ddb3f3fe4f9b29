"""The models of the zoo: how each is built, small, with random weights, and what it is called with.

A `Specimen` names a model of a library; nothing is built until it is asked for.
"""

from __future__ import annotations

from benchmarks.menagerie import (
    diffusers_models,
    monai_models,
    timm_models,
    torchvision_models,
    transformers_models,
)
from benchmarks.menagerie.specimen import Specimen, truth

__all__ = ["Specimen", "specimens", "truth"]


def specimens() -> list[Specimen]:
    """All models of the zoo, library by library."""
    libraries = (
        torchvision_models,
        timm_models,
        transformers_models,
        diffusers_models,
        monai_models,
    )
    return [one for library in libraries for one in library.specimens()]
