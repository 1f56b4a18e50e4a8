"""Which point a sweep tries next: given ones first, then drawn, in order, or by Optuna's TPE.

The next point is a function of the seed, its number and the trials before it: no state that a crash could lose.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.search_space import ADVISED, Knob, Point, Space, label
from pipeline.sweep_config import SweepSettings

if TYPE_CHECKING:
    import optuna

STARTUP_TRIALS = 4  # that TPE needs before it has something to go by
DRAWS = 20  # tries to find a point that has not been tried


@dataclass(frozen=True)
class Tried:
    """A point and what came of it."""

    point: Point
    value: float | None
    """Objective; None while it runs, or where it failed."""
    is_running: bool = False


def next_point(
    space: Space, settings: SweepSettings, start_points: Sequence[Mapping[str, Any]], tried: Sequence[Tried]
) -> Point | None:
    """The point of trial number `len(tried)`, None where there is none left that has not been tried.

    Args:
        space: whose values are known.
        settings: search, seed, mode.
        start_points: to begin with; knobs that one leaves out are drawn.
        tried: all trials so far, in order.
    """
    number = len(tried)
    known = {point_key(entry.point) for entry in tried}
    if settings.search == "grid":
        whole = [point for point in start_points if len(point) == len(space.knobs)]  # nothing is drawn here
        ordered = itertools.chain(whole, space.listed_points())
        return next((dict(point) for point in ordered if point_key(point) not in known), None)
    for given in _given(space, start_points, number):
        for draw in range(DRAWS):
            point = _ask(space, settings, given, tried, seed=(settings.seed * 1_000_003 + number) * DRAWS + draw)
            if point_key(point) not in known:
                return point
        if not space.is_finite and number >= len(start_points):
            return point  # repeats a point that is all but one of infinitely many
    if not space.is_finite:
        return None
    return next((point for point in space.all_points() if point_key(point) not in known), None)


def _given(space: Space, start_points: Sequence[Mapping[str, Any]], number: int) -> Iterator[Mapping[str, Any]]:
    """What is not drawn of this point: a start point, or the turn of the grid knobs."""
    if number < len(start_points):
        yield start_points[number]
    grid = space.points(["grid"])
    yield grid[max(number - len(start_points), 0) % len(grid)]


def _ask(space: Space, settings: SweepSettings, given: Mapping[str, Any], tried: Sequence[Tried], seed: int) -> Point:
    import optuna

    study = study_of(space, tried, settings.larger_is_better)
    seed %= 2**32
    if settings.search == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=True)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    study.enqueue_trial({name: _encode(space[name], value) for name, value in given.items()})
    drawn = study.ask(_distributions(space)).params
    return {knob.name: _decode(knob, drawn[knob.name]) for knob in space.knobs}


def study_of(space: Space, tried: Sequence[Tried], larger_is_better: bool) -> optuna.Study:
    """An Optuna study of the trials so far; failed ones are left out."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if larger_is_better else "minimize")
    distributions = _distributions(space)
    states = optuna.trial.TrialState
    for entry in tried:
        if entry.value is None and not entry.is_running:
            continue
        params = {name: _encode(space[name], value) for name, value in entry.point.items()}
        state = states.RUNNING if entry.value is None else states.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(state=state, value=entry.value, params=params, distributions=distributions)
        )
    return study


def _distributions(space: Space) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    distributions: dict[str, Any] = {}
    for knob in space.knobs:
        if knob.is_listed:
            assert not knob.is_advised, f"{knob.name}: {ADVISED} values are not known yet"
            distributions[knob.name] = CategoricalDistribution([label(value) for value in knob.values])
        elif knob.kind == "integer":
            distributions[knob.name] = IntDistribution(int(knob.low), int(knob.high))
        else:
            distributions[knob.name] = FloatDistribution(knob.low, knob.high, log=knob.kind == "loguniform")
    return distributions


def _encode(knob: Knob, value: Any) -> Any:
    """A value as Optuna takes it: it knows no lists."""
    return label(value) if knob.is_listed else value


def _decode(knob: Knob, value: Any) -> Any:
    return next(known for known in knob.values if label(known) == value) if knob.is_listed else value


def point_key(point: Mapping[str, Any]) -> str:
    """Equal for equal points."""
    return json.dumps({name: label(value) for name, value in point.items()}, sort_keys=True)


def draw_points(space: Space, settings: SweepSettings, start_points: Sequence[Mapping[str, Any]]) -> list[Point]:
    """All points of a sweep that learns nothing from one for the next, at most `max_trials`."""
    tried: list[Tried] = []
    while len(tried) < settings.max_trials:
        point = next_point(space, settings, start_points, tried)
        if point is None:
            break
        tried.append(Tried(point, None))
    return [entry.point for entry in tried]
