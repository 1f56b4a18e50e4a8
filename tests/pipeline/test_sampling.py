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
    repeats = row_repeats(ROWS, repeat_threshold=0.16, empty_images_fraction=1.0)
    np.testing.assert_allclose(repeats, [1] * 85 + [2] * 4 + [4] + [1] * 10)
    assert rows_an_epoch(repeats) == 85 + 8 + 4 + 10


def test_images_that_are_left_out_are_none_of_the_images() -> None:
    """As if the images without objects were not there, and half of them as if there were half as many."""
    for fraction, empty in ((0.0, 0), (0.5, 5)):
        expected = row_repeats(ROWS[:90] + [[]] * empty, 0.16, 1.0)
        np.testing.assert_allclose(row_repeats(ROWS, 0.16, fraction)[:90], expected[:90])
    repeats = row_repeats(ROWS, 0.16, 0.0)
    np.testing.assert_allclose(repeats[[85, 89]], [np.sqrt(0.16 * 90 / 4), np.sqrt(0.16 * 90 / 1)])
    np.testing.assert_array_equal(repeats[90:], np.zeros(10))


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
    # What rounding the sum takes or gives is shared by the rows: less than one place for all.
    difference = counts.mean(axis=0) - repeats
    assert abs(difference.sum()) < 0.5 + 1e-9
    assert (difference * np.sign(difference.sum()) > -0.04).all()
    assert np.abs(difference).max() < 0.11


@pytest.mark.parametrize(
    ("repeats", "sums", "means"),
    [
        ([1.9, 1.9, 1.9], 6, [2, 2, 2]),  # 5.7 rows: none of them three times
        # Fractions of 1.6 for 2 places: 0.4 of the 1.4 that is left to one each, so 0.1, 0.5 and 0.8 shrink by 1 / 1.4.
        ([1.9, 1.5, 1.2, 1.0], 6, [1.9286, 1.6429, 1.4286, 1.0]),
        ([0.4, 0.4, 0.4], 1, [1 / 3, 1 / 3, 1 / 3]),
        ([2.3, 1.0, 0.0], 3, [2, 1, 0]),
        ([2.7, 1.0, 0.0], 4, [3, 1, 0]),
    ],
)
def test_a_row_is_never_rounded_beyond_the_next_whole_number(
    repeats: list[float], sums: int, means: list[float]
) -> None:
    assert rows_an_epoch(np.array(repeats)) == sums
    counts = np.array([repeat_counts(np.array(repeats), np.random.default_rng(seed)) for seed in range(4000)])
    assert set(counts.sum(axis=1).tolist()) == {sums}
    assert (counts <= np.ceil(repeats)).all()
    assert (counts >= np.floor(repeats)).all()
    np.testing.assert_allclose(counts.mean(axis=0), means, atol=0.03)


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
