"""Table and pictures of a sweep: numbers by hand, pictures whole."""

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.search_space import Knob, Space
from pipeline.sweep_config import SweepSettings
from pipeline.sweep_report import (
    draw_importances,
    draw_objective,
    draw_parallel_coordinates,
    importances,
    points_as_trials,
    short_names,
    table_file,
    table_lines,
)
from pipeline.trials import Trial

SCALES = ([4, 8, 16, 32, 64], [8.1, 11.9, 15.2, 18.4, 24.7], [32, 64, 128, 256, 512])
SPACE = Space(
    (
        Knob("model.anchors.scales", "choice", SCALES),
        Knob("model.rpn.nms_threshold", "uniform", low=0.5, high=0.9),
        Knob("model.detections.nms_threshold", "grid", (0.3, 0.5)),
        Knob("model.rpn.pre_nms_top_k", "integer", low=100, high=1000),
        Knob("optim.learning_rate", "loguniform", low=1e-5, high=1e-1),
    )
)
SETTINGS = SweepSettings()


def make_trial(number: int, state: Any, *values: float, scale: int = 0) -> Trial:
    point = {
        "model.anchors.scales": SCALES[scale],
        "model.rpn.nms_threshold": 0.5 + 0.03 * number,
        "model.detections.nms_threshold": 0.5,
        "model.rpn.pre_nms_top_k": 100 + number,
        "optim.learning_rate": 10.0 ** (-5 + number % 4),
    }
    evaluations = [{"segm_AP": v, "bbox_AP": v / 2, "step": 10.0 * k, "epoch": k} for k, v in enumerate(values)]
    return Trial(number, point, state, None, evaluations, seconds=1800.0, summary={"mlflow_run_id": f"id{number}"})


TRIALS = [
    make_trial(0, "finished", 0.1, 0.3, 0.2),
    make_trial(1, "stopped", 0.05, scale=2),
    make_trial(2, "failed"),
    make_trial(3, "finished", 0.2, 0.4, 0.5, scale=1),
    make_trial(4, "stopped", 0.25, scale=1),
]


def test_the_table_has_a_row_for_every_trial() -> None:
    table = pq.read_table(io.BytesIO(table_file(TRIALS, SPACE, SETTINGS, num_workers=2)))
    assert table["trial"].to_pylist() == [f"trial-{n:04d}" for n in range(5)]
    assert table["state"].to_pylist() == ["finished", "stopped", "failed", "finished", "stopped"]
    assert table["segm_AP"].to_pylist() == [0.3, 0.05, None, 0.5, 0.25], "of the best evaluation"
    assert table["bbox_AP"].to_pylist()[0] == 0.15
    assert table["rungs"].to_pylist()[0] == "[0.1, 0.3, 0.2]"
    assert table["worker_hours"].to_pylist() == [1.0] * 5
    assert table["mlflow_run_id"].to_pylist()[3] == "id3"
    assert table["model.anchors.scales"].to_pylist()[3] == "[8.1, 11.9, 15.2, 18.4, 24.7]"
    assert table["model.rpn.nms_threshold"].to_pylist()[:2] == [0.5, 0.53]
    assert table["model.rpn.pre_nms_top_k"].to_pylist()[1] == 101


def test_the_table_on_screen_begins_with_the_best() -> None:
    lines = table_lines(TRIALS, SPACE, SETTINGS)
    assert [line.split()[0] for line in lines] == [
        "trial", "trial-0003", "trial-0000", "trial-0004", "trial-0001", "trial-0002",
    ]  # fmt: skip
    assert lines[1].split()[1:4] == ["finished", "0.5000", "3"]
    assert lines[-1].split()[1:3] == ["failed", "-"]
    many = points_as_trials([TRIALS[0].point] * 40, [{"segm_AP": n / 40} for n in range(40)])
    assert table_lines(many, SPACE, SETTINGS)[-1] == "... and 10 more"
    assert len(table_lines(many, SPACE, SETTINGS)) == 32


def test_short_names_stay_different() -> None:
    assert short_names(["model.rpn.nms_threshold", "model.detections.nms_threshold", "optim.name", "loss"]) == {
        "model.rpn.nms_threshold": "rpn.nms_threshold",
        "model.detections.nms_threshold": "detections.nms_threshold",
        "optim.name": "optim.name",
        "loss": "loss",
    }


def whole(png: bytes | None) -> Image.Image:
    """A picture that nothing is cut off of: its border is white."""
    assert png is not None
    picture = Image.open(io.BytesIO(png)).convert("L")
    pixels = np.asarray(picture)
    for border in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (border == 255).all()
    assert (pixels < 128).any()
    return picture


@pytest.mark.parametrize("trials", [TRIALS, TRIALS[:1], TRIALS[2:3], TRIALS * 20])
def test_pictures_are_whole(trials: list[Trial]) -> None:
    trials = [Trial(n, t.point, t.state, t.reason, t.evaluations) for n, t in enumerate(trials)]
    whole(draw_objective(trials, SETTINGS))
    assert whole(draw_parallel_coordinates(trials, SPACE, SETTINGS)).width > 1000


def test_the_knob_that_decides_is_the_most_important() -> None:
    trials = [make_trial(n, "finished", [0.1, 0.5, 0.3][n % 3] + 0.001 * n, scale=n % 3) for n in range(12)]
    found = importances(trials, SPACE, SETTINGS)
    assert next(iter(found)) == "model.anchors.scales"
    assert found["model.anchors.scales"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    whole(draw_importances(trials, SPACE, SETTINGS))


def test_too_little_to_say_what_is_important() -> None:
    assert draw_importances(TRIALS[:1], SPACE, SETTINGS) is None
    assert draw_importances([make_trial(n, "finished", 0.1) for n in range(3)], SPACE, SETTINGS) is None
