import dataclasses

import numpy as np
import pytest

from pipeline.repeat_factors import repeat_factors
from pipeline.shards import Manifest

ROWS = [[1], [1], [1, 2], [1], [], [1], [1], [1], [1, 3], [1]]  # class 1 in 9 of 10 rows, 2 and 3 in one each


def manifest(rows: list[list[int]]) -> Manifest:
    shards = tuple({"classes": part, "num_rows": len(part)} for part in (rows[:4], rows[4:]))
    return Manifest(("a", "b", "c"), (), ((64, 64),), "raw", shards, (0, 0), "", "", "")


def test_factors_by_hand() -> None:
    """r(c) = max(1, sqrt(0.4 / f(c))): 1 for class 1, sqrt(4) = 2 for classes 2 and 3."""
    factors = repeat_factors(manifest(ROWS), 0.4)
    assert factors is not None
    np.testing.assert_allclose(factors, [1, 1, 2, 1, 1, 1, 1, 1, 2, 1])


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_no_rare_class_no_repeats(threshold: float) -> None:
    assert repeat_factors(manifest(ROWS), threshold) is None


def test_class_that_no_row_shows_and_no_rows() -> None:
    assert repeat_factors(dataclasses.replace(manifest([[1], [1], [2], []]), class_names=("a", "b", "x")), 0.0) is None
    factors = repeat_factors(manifest([[1], [1], [2], []]), 1.0)
    assert factors is not None
    np.testing.assert_allclose(factors, [2**0.5, 2**0.5, 2, 1])
    assert repeat_factors(manifest([]), 0.5) is None
