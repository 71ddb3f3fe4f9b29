"""What to checkpoint outside of the chains: the stretches where it lowers the peak of a step.

Where chains are free, stems, downsampling, first blocks of stages and heads are what a step holds.
Of every part of the network that holds no residual module of a chain a survey tells what autograd
keeps; from that follow the bytes that are there when backward comes to each part. Checkpointing a
part frees its bytes while backward is elsewhere, and not while it is there: so the last part
gains nothing, and one that is large by itself is taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from rewire.inputs import Example
from rewire.plans import Chain, Checkpointed
from rewire.survey import survey
from rewire.timeline import Part, Timeline, stretches

CHOICES = ("store", "checkpoint")

# Of the bytes by which the peak can be lowered this share is given up, where they cost the most
# operations to free.
SPARED = 0.05
# A peak that falls by less than this share of it is not worth running anything twice.
LEAST = 0.02
_MOST_CUTS = 100

Names = tuple[str, ...]


def checkpointed(
    model: nn.Module,
    example: Example,
    chains: Sequence[Chain],
    refuse: Callable[[str, nn.Module], bool],
) -> tuple[Checkpointed, ...]:
    """The stretches outside of the chains whose activations shall not be stored.

    Args:
        model: The model, as its author wrote it.
        example: What it runs on.
        chains: What will be reversible.
        refuse: Whether a module, told by its name and itself, is to be left as it is.

    Raises:
        CannotTrace: It does not run with gradients on the example.
    """
    modules = dict(model.named_modules())

    def is_free(name: str) -> bool:
        return next(modules[name].parameters(), None) is None

    surveyed = survey(model, example)
    timeline = Timeline(surveyed, chains, lambda name: refuse(name, modules[name]), is_free)
    for _ in range(_MOST_CUTS):
        if not _cut(timeline):
            break
    chosen = _paying(timeline)
    _spare(timeline, chosen, {weights: _limit(timeline, weights) for weights in (False, True)})
    return tuple(_row(timeline, chosen, parts) for parts in _in_order(timeline, chosen))


def _paying(timeline: Timeline) -> set[Names]:
    """Stretches in which there is anything to free."""
    found = stretches(timeline.parts)
    return {names for names, parts in found.items() if any(map(timeline.freed, parts))}


def _in_order(timeline: Timeline, chosen: set[Names]) -> list[list[Part]]:
    return [parts for names, parts in stretches(timeline.parts).items() if names in chosen]


def _cut(timeline: Timeline) -> bool:
    """Take the stretch apart in whose backward the peak is, if that lowers the peak."""
    before = timeline.parts
    height, highest = timeline.highest(_paying(timeline))
    if not highest.visits:
        return False
    best = height, before
    for ways in timeline.opened(highest):
        timeline.parts = [p for part in before for p in (ways if part is highest else [part])]
        best = min(best, (timeline.peak(_paying(timeline)), timeline.parts), key=lambda row: row[0])
    timeline.parts = best[1]
    return best[0] < height


def _limit(timeline: Timeline, weights: bool) -> float:
    """How high the peak may be."""
    stored = timeline.peak((), weights=weights)
    lowest = timeline.peak(_paying(timeline), weights=weights)
    pays = stored - lowest >= LEAST * stored
    return lowest + SPARED * (stored - lowest) if pays else stored


def _spare(timeline: Timeline, chosen: set[Names], limits: dict[bool, float]) -> None:
    """Leave out what the peak does not need to be within its limits, the dearest first.

    Args:
        timeline: What the step holds.
        chosen: Names of stretches; is changed.
        limits: With the gradient of a weight counted or not: that does not grow with the batch,
            and the example may be larger or smaller than what will be trained on.
    """
    costs = {}
    for names, parts in stretches(timeline.parts).items():
        freed = sum(map(timeline.freed, parts))
        costs[names] = sum(part.operations for part in parts) / max(1, freed)
    for names in sorted(chosen, key=lambda names: -costs[names]):
        fewer = chosen - {names}
        if all(timeline.peak(fewer, weights=w) <= limit for w, limit in limits.items()):
            chosen.remove(names)


def _row(timeline: Timeline, chosen: set[Names], parts: Sequence[Part]) -> Checkpointed:
    names = parts[0].names
    saved = sum(map(timeline.saved_bytes, parts))
    freed = sum(map(timeline.freed, parts))
    more = max(
        timeline.peak(chosen - {names}, weights=w) / timeline.peak(chosen, weights=w) - 1
        for w in (False, True)
    )
    return Checkpointed(names, saved, saved - freed, f"without it the peak is {more:.0%} higher")
