"""How often a row stands in an epoch: rows with rare classes more than once, rows without objects less."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]


def row_repeats(
    row_classes: Sequence[Sequence[int]], repeat_threshold: float, empty_images_fraction: float
) -> Float64Array:
    """Mean number of times that each row stands in an epoch.

    Repeat factors of LVIS (Gupta, Dollar, Girshick 2019, section 4.2): a class in a share f of the images has the
    factor max(1, sqrt(t / f)), a row the largest factor of its classes. Images without objects count among the images
    by the share of them that is kept, so that f is a share of what the model sees.

    Args:
        row_classes: classes of the objects of each row, with or without repetitions; crowds do not count.
        repeat_threshold: t; classes in a smaller share of the images are repeated, 0 for none.
        empty_images_fraction: what rows without objects get.

    Returns:
        (num_rows,) at least 1 for a row with objects.
    """
    images_of_class: dict[int, int] = {}
    for classes in row_classes:
        for class_id in set(classes):
            images_of_class[class_id] = images_of_class.get(class_id, 0) + 1
    num_images = sum(1.0 if classes else empty_images_fraction for classes in row_classes)
    factors = {
        class_id: max(1.0, math.sqrt(repeat_threshold * num_images / images))
        for class_id, images in images_of_class.items()
    }
    repeats = [max((factors[c] for c in set(classes)), default=empty_images_fraction) for classes in row_classes]
    return np.array(repeats, dtype=np.float64)


def rows_an_epoch(repeats: Float64Array) -> int:
    """Places in an epoch, the same in every epoch: the whole repeats, and the sum of their fractions rounded."""
    return int(np.floor(repeats).sum()) + _extra_places(repeats)


def _extra_places(repeats: Float64Array) -> int:
    return round(float((repeats % 1).sum()))


def repeat_counts(repeats: Float64Array, rng: np.random.Generator) -> Int64Array:
    """How often each row stands in one epoch: its repeats, rounded up or down by chance so that the sum is the same.

    Systematic sampling: the chances of being rounded up are laid end to end in a drawn order; marks stand one apart
    from a drawn start on, and a row gets the one that falls on it, if any.

    Args:
        repeats: (num_rows,) from `row_repeats`.
        rng: of the epoch.
    """
    counts = np.floor(repeats).astype(np.int64)
    places = _extra_places(repeats)
    if places:
        order = rng.permutation(np.flatnonzero(repeats % 1))
        ends = np.cumsum(_chances(repeats[order] % 1, places))
        ends[-1] = places  # what its sum is but for rounding
        marks = np.arange(places) + rng.random()
        marked = order[np.searchsorted(ends, marks, side="right")]
        np.add.at(counts, marked, 1)  # each mark counts, also where rounding lets two fall on one row
    return counts


def _chances(fractions: Float64Array, places: int) -> Float64Array:
    """The fractions, above 0 and below 1, brought to a whole sum, none above 1.

    A sum above `places` is shrunk; of one below it the way that is left to 1 is shrunk.
    """
    total = float(fractions.sum())
    if total >= places:
        factor = places / total
        chances: Float64Array = fractions * factor
    else:
        factor = (len(fractions) - places) / (len(fractions) - total)
        chances = 1 - (1 - fractions) * factor
    return chances
