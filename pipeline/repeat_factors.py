"""Repeat factors: images with rare classes come more often (LVIS, arXiv 1908.03195, appendix B.2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.shards import Manifest


def repeat_factors(manifest: Manifest, threshold: float) -> npt.NDArray[np.float64] | None:
    """How often each row stands in an epoch, on average.

    With f(c) the share of rows that show class c, r(c) = max(1, sqrt(threshold / f(c))); a row's factor is the largest
    of its classes', 1 where it has no object. Crowds do not count.

    Args:
        manifest: of the training shards.
        threshold: t; 0 for no repeats.

    Returns:
        (num_rows,), or None where every row comes once.
    """
    of_rows = [classes for shard in manifest.shards for classes in shard["classes"]]
    shown = np.zeros(manifest.num_classes)
    for classes in of_rows:
        shown[classes] += 1
    fractions = shown / max(1, len(of_rows))
    of_classes = np.sqrt(np.maximum(1.0, threshold / np.maximum(fractions, np.finfo(float).tiny)))
    factors = np.array([of_classes[classes].max(initial=1.0) for classes in of_rows])
    return factors if (factors > 1).any() else None
