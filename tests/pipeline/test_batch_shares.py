"""The global batch stays as it is, however many workers share it out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batch_shares import BatchShare, batch_share, explain_division
from pipeline.config import ExperimentConfig


@pytest.mark.parametrize(
    ("workers", "expected"),
    [(8, BatchShare(2, 1)), (4, BatchShare(4, 1)), (2, BatchShare(4, 2)), (1, BatchShare(4, 4))],
)
def test_shares_by_hand(workers: int, expected: BatchShare) -> None:
    assert batch_share(16, workers, 4) == expected


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 16))
def test_shares_make_up_the_batch_within_the_memory_of_a_worker(mine: int, workers: int, most: int) -> None:
    share = batch_share(mine * workers, workers, most)
    assert share.images * share.passes * workers == mine * workers
    assert share.images <= most


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a global batch of 8 does not divide by 3 workers"):
        batch_share(8, 3, 4)
    with pytest.raises(ValueError, match="does not divide by 16 workers"):
        batch_share(8, 16, 4)
    assert explain_division(12, 1, 4) is None
    assert explain_division(8, 2, 4) == (
        "a global batch of 8 images does not divide by 3 workers (of 2 to 4, these divide: 2, 4)"
    )


def elastic(least: int, most: int, images: int) -> ExperimentConfig:
    return ExperimentConfig.model_validate(
        {"train": {"batch_size_per_worker": images}, "scaling": {"num_workers": most, "min_workers": least}}
    )


def test_a_configuration_whose_batch_cannot_be_shared_out_is_refused() -> None:
    assert elastic(1, 4, 3).global_batch_size == 12
    with pytest.raises(ValueError, match=r"does not divide by 3 workers \(of 2 to 4, these divide: 2, 4\)"):
        elastic(2, 4, 2)
    with pytest.raises(ValueError, match=r"scaling\.min_workers 3 is more than scaling\.num_workers 2"):
        elastic(3, 2, 2)
