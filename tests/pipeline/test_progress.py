"""The line that shows where a training is."""

import pytest

from model.losses import LOSS_NAMES
from pipeline.progress import (
    ProgressDisplay,
    duration,
    evaluation_line,
    seconds_left,
    settled_paces,
    step_line,
)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3600, "1:00:00"), (37230, "10:20:30")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_a_step_shows_epoch_step_losses_speed_and_time_left() -> None:
    line = step_line(
        {
            "epoch": 1.25,
            "step": 50,
            "last_step": 200,
            "losses": {
                "loss": 1.5,
                "rpn_class_loss": 0.1,
                "rpn_bbox_loss": 0.2,
                "mrcnn_class_loss": 0.3,
                "mrcnn_bbox_loss": 0.4,
                "mrcnn_mask_loss": 0.5,
            },
            "images_per_second": 12.34,
            "data_wait_fraction": 0.015,
            "seconds_left": 97,
        }
    )
    assert line == (
        "epoch 1.25  step 50/200  loss 1.500 = rpn_class_loss 0.100  rpn_bbox_loss 0.200  mrcnn_class_loss 0.300  "
        "mrcnn_bbox_loss 0.400  mrcnn_mask_loss 0.500  12.3 images/s  data wait 1.5%  1:37 left"
    )


@pytest.mark.parametrize(
    ("paces", "settled"),
    [([], []), ([9], []), ([9, 8], [8]), ([9, 8, 7, 6], [7, 6]), ([9] * 5 + [1] * 5, [9, 9] + [1] * 5)],
)
def test_the_first_steps_are_not_as_the_rest(paces: list[float], settled: list[float]) -> None:
    assert list(settled_paces(paces)) == settled


def test_the_time_left_goes_by_the_steps_of_late() -> None:
    assert seconds_left(7, [9.0]) is None
    assert seconds_left(0, []) == 0.0
    assert seconds_left(7, [90.0, 2.0]) == 14.0
    assert seconds_left(7, [5.0] * 100 + [2.0] * 10) == 14.0


def test_the_time_left_waits_for_steps_that_are_as_the_rest() -> None:
    losses = dict.fromkeys(("loss", *LOSS_NAMES), 1.0)
    progress = {"epoch": 0.1, "step": 2, "last_step": 200, "losses": losses, "images_per_second": 1.0}
    assert step_line({**progress, "data_wait_fraction": 0.5, "seconds_left": None}).endswith(
        "  time left not known yet"
    )


def test_an_evaluation_shows_the_four_figures() -> None:
    metrics = {"bbox_AP": 0.1, "bbox_AP50": 0.2, "segm_AP": 0.3, "segm_AP50": 0.4, "segm_AP75": 0.5}
    line = evaluation_line({"epoch": 2.0, "step": 80, "last_step": 200, "evaluated": metrics})
    assert line == "epoch 2.00  step 80/200  bbox_AP 0.100  bbox_AP50 0.200  segm_AP 0.300  segm_AP50 0.400"


def test_what_the_user_is_to_be_told_is_told_once() -> None:
    said: list[str] = []
    display = ProgressDisplay(None, said.append)
    display._show({"step": 1, "link": None, "problem": None, "notices": ["one"]})
    display._show({"step": 2, "link": "http://page", "problem": "away", "notices": ["one", "two"]})
    display._show({"step": 3, "link": "http://page", "problem": "away", "notices": ["one", "two"]})
    assert said == ["warning: one", "warning: away", "warning: two", "mlflow: http://page"]
