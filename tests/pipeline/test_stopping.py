import pytest

from pipeline.config import TrainSettings
from pipeline.stopping import stop_reason


def evaluations(*segm: float, bbox: float = 0.5) -> list[dict[str, float]]:
    return [{"bbox_AP": bbox, "segm_AP": value} for value in segm]


def test_a_target_stops_when_the_latest_evaluation_has_it() -> None:
    settings = TrainSettings(target_segm_AP=0.4)
    assert stop_reason([], settings) is None
    assert stop_reason(evaluations(0.1, 0.39), settings) is None
    assert stop_reason(evaluations(0.41, 0.39), settings) is None
    assert stop_reason(evaluations(0.39, 0.4), settings) == "reached segm_AP 0.4000 >= 0.4"


def test_both_targets_have_to_be_reached() -> None:
    settings = TrainSettings(target_bbox_AP=0.6, target_segm_AP=0.4)
    assert stop_reason(evaluations(0.5), settings) is None
    assert stop_reason(evaluations(0.3, bbox=0.7), settings) is None
    expected = "reached bbox_AP 0.7000 >= 0.6 and segm_AP 0.5000 >= 0.4"
    assert stop_reason(evaluations(0.5, bbox=0.7), settings) == expected


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([0.1], False),
        ([0.3, 0.2], False),
        ([0.3, 0.2, 0.1], True),
        ([0.3, 0.2, 0.31], False),
        ([0.3, 0.3, 0.3], True),  # as good as before is no gain
        ([0.1, 0.4, 0.3, 0.35], True),
        ([-1.0, -1.0, -1.0], True),
    ],
)
def test_patience_counts_evaluations_without_a_gain(values: list[float], stops: bool) -> None:
    reason = stop_reason(evaluations(*values), TrainSettings(patience=2))
    assert (reason is not None) == stops
    assert stop_reason(evaluations(*values), TrainSettings()) is None
    if values == [0.1, 0.4, 0.3, 0.35]:
        assert reason == "no segm_AP above 0.4000 in the last 2 evaluations"
