"""The next point of a sweep: given ones first, none twice, the same again after a crash."""

import math
from typing import Any

import pytest

from pipeline.search import Tried, draw_points, next_point, point_key, study_of
from pipeline.search_space import Knob, Point, Space
from pipeline.sweep_config import SweepSettings

SCALES = Knob("model.anchors.scales", "choice", ([4, 8, 16, 32, 64], [8, 16, 32, 64, 128], [16, 32, 64, 128, 256]))
THRESHOLD = Knob("model.rpn.nms_threshold", "uniform", low=0.3, high=0.9)
RATE = Knob("optim.learning_rate", "loguniform", low=1e-5, high=1e-1)
TOP_K = Knob("model.rpn.pre_nms_top_k", "integer", low=1, high=10)
SPACE = Space((SCALES, THRESHOLD, RATE, TOP_K))


def settings(**changes: Any) -> SweepSettings:
    return SweepSettings.model_validate(changes)


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_points_lie_in_the_space_and_differ(search: str) -> None:
    points = draw_points(SPACE, settings(search=search, max_trials=30), [])
    assert len({point_key(point) for point in points}) == 30
    for point in points:
        assert list(point) == [knob.name for knob in SPACE.knobs]
        assert all(SPACE[name].contains(value) for name, value in point.items())
    assert {tuple(point[SCALES.name]) for point in points} == {tuple(value) for value in SCALES.values}
    assert isinstance(points[0][TOP_K.name], int)
    rates = sorted(math.log10(point[RATE.name]) for point in points)
    assert rates[0] < -4, "drawn evenly in the logarithm"
    assert rates[-1] > -2


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_the_same_trials_give_the_same_next_point(search: str) -> None:
    tried = [Tried(point, index / 9) for index, point in enumerate(draw_points(SPACE, settings(), []))]
    first, again = (next_point(SPACE, settings(search=search, seed=5), [], tried) for _ in range(2))
    other = next_point(SPACE, settings(search=search, seed=6), [], tried)
    assert first is not None
    assert other is not None
    assert first == again
    assert point_key(first) != point_key(other)


def test_start_points_come_first_and_what_they_leave_out_is_drawn() -> None:
    starts: list[Point] = [{SCALES.name: SCALES.values[2], TOP_K.name: 3}, {THRESHOLD.name: 0.7}]
    points = draw_points(SPACE, settings(max_trials=3), starts)
    assert points[0][SCALES.name] == SCALES.values[2]
    assert points[0][TOP_K.name] == 3
    assert 0.3 <= points[0][THRESHOLD.name] <= 0.9
    assert points[1][THRESHOLD.name] == 0.7


def test_a_start_point_that_was_tried_is_not_tried_again() -> None:
    whole = {SCALES.name: SCALES.values[0], THRESHOLD.name: 0.7, RATE.name: 0.01, TOP_K.name: 2}
    points = draw_points(SPACE, settings(max_trials=3), [whole, whole])
    assert points[0] == whole
    assert len({point_key(point) for point in points}) == 3


def test_a_grid_is_walked_in_order_after_the_start_points() -> None:
    space = Space((Knob("a", "choice", (1, 2, 3)), Knob("b", "grid", ("x", "y"))))
    points = draw_points(space, settings(search="grid", max_trials=100), [{"a": 2, "b": "y"}])
    assert [(p["a"], p["b"]) for p in points] == [(2, "y"), (1, "x"), (1, "y"), (2, "x"), (3, "x"), (3, "y")]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_finite_space_ends(search: str) -> None:
    space = Space((Knob("a", "choice", (1, 2, 3)), Knob("b", "choice", (True, False))))
    points = draw_points(space, settings(search=search, max_trials=100), [])
    assert len(points) == 6
    assert len({point_key(point) for point in points}) == 6


def test_grid_knobs_take_turns_where_others_are_drawn() -> None:
    space = Space((THRESHOLD, Knob("b", "grid", (1, 2, 3))))
    assert [point["b"] for point in draw_points(space, settings(max_trials=6), [])] == [1, 2, 3, 1, 2, 3]


def test_tpe_learns_where_it_is_good() -> None:
    """The objective falls with the distance from 0.8: later points crowd there, unlike drawn ones."""
    space = Space((THRESHOLD,))

    def distances(search: str) -> float:
        tried: list[Tried] = []
        for _ in range(25):
            point = next_point(space, settings(search=search), [], tried)
            assert point is not None
            tried.append(Tried(point, -abs(point[THRESHOLD.name] - 0.8)))
        return sum(-(entry.value or 0) for entry in tried[10:]) / 15

    assert distances("tpe") < 0.6 * distances("random")


def test_running_and_failed_trials() -> None:
    points = draw_points(SPACE, settings(max_trials=3), [])
    tried = [Tried(points[0], 0.5), Tried(points[1], None, is_running=True), Tried(points[2], None)]
    study = study_of(SPACE, tried, larger_is_better=True)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING"]
    assert study.best_value == 0.5
    assert next_point(SPACE, settings(search="tpe"), [], tried) is not None


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_whole_numbers_are_tried_once_each(search: str) -> None:
    space = Space((Knob("a", "integer", low=1, high=3), Knob("b", "choice", (True, False))))
    points = draw_points(space, settings(search=search, max_trials=100), [])
    assert sorted((point["a"], point["b"]) for point in points) == [(a, b) for a in (1, 2, 3) for b in (False, True)]
