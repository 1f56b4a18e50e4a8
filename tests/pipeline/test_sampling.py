import numpy as np
import pytest

from pipeline.sampling import repeat_counts, row_repeats, rows_an_epoch
from pipeline.shards import ShardSet
from pipeline.training_plan import make_plan
from tests.pipeline.factories import Prepared, experiment

# 100 images: class 1 in all but the last ten, class 2 in four of them, class 3 in one; ten without objects.
ROWS = [[1, 1]] * 85 + [[1, 2]] * 4 + [[3, 1, 3]] + [[]] * 10


def test_lvis_repeat_factors_on_a_worked_example() -> None:
    """t = 0.16: class 1 is frequent, class 2 (f = 0.04) has sqrt(0.16 / 0.04) = 2, class 3 (f = 0.01) has 4."""
    repeats = row_repeats(ROWS, repeat_threshold=0.16, empty_images_fraction=0.5)
    np.testing.assert_allclose(repeats, [1] * 85 + [2] * 4 + [4] + [0.5] * 10)
    assert rows_an_epoch(repeats) == 85 + 8 + 4 + 5


def test_without_a_threshold_every_row_stands_once() -> None:
    np.testing.assert_array_equal(row_repeats(ROWS, 0.0, 1.0), np.ones(100))
    np.testing.assert_array_equal(row_repeats(ROWS, 0.0, 0.0), [1] * 90 + [0] * 10)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(repeat_counts(np.ones(100), rng), np.ones(100))


@pytest.mark.parametrize("threshold", [0.03, 0.1, 0.5])
def test_counts_are_the_repeats_on_average_and_their_sum_is_fixed(threshold: float) -> None:
    repeats = row_repeats(ROWS, threshold, 0.3)
    counts = np.array([repeat_counts(repeats, np.random.default_rng(seed)) for seed in range(4000)])
    assert set(counts.sum(axis=1).tolist()) == {rows_an_epoch(repeats)}
    assert (counts >= np.floor(repeats)).all()
    assert (counts <= np.ceil(repeats)).all()
    # What rounding the sum takes or gives is shared by the fractions.
    fractions = repeats % 1
    stretch = round(fractions.sum()) / max(fractions.sum(), 1e-9)
    np.testing.assert_allclose(counts.mean(axis=0), np.floor(repeats) + fractions * stretch, atol=0.04)


def test_which_rows_are_rounded_up_is_drawn_anew() -> None:
    repeats = np.full(20, 0.5)
    epochs = {tuple(repeat_counts(repeats, np.random.default_rng(seed)).tolist()) for seed in range(50)}
    assert len(epochs) > 45
    assert {sum(epoch) for epoch in epochs} == {10}


@pytest.mark.cluster
def test_the_plan_repeats_by_the_objects_that_the_rows_hold(prepared: Prepared) -> None:
    """Crowds count for nothing: the manifest's classes are those of a look at every row."""
    shards = ShardSet(prepared.data.training)
    rows = list(shards.read_rows(range(len(shards))))
    assert any(values["is_crowd"].any() for values in rows)
    found = [sorted({int(c) for c in values["classes"][~values["is_crowd"].astype(bool)]}) for values in rows]
    assert shards.manifest.row_classes() == found
    assert any(set(values["classes"]) != set(classes) for values, classes in zip(rows, found, strict=True))
    config = experiment(prepared.root, prepared.root, repeat_threshold=0.9, empty_images_fraction=0.5)
    repeats = make_plan(config, shards).row_repeats
    assert repeats is not None
    np.testing.assert_array_equal(repeats, row_repeats(found, 0.9, 0.5))
    assert repeats.min() == 0.5
    assert repeats.max() > 1
