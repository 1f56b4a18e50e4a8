"""Reads a search space and refuses a bad one with the name of its knob, before anything is imported or started."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from model.config import AnchorConfig
from pipeline.command_line import ConfigurationError
from pipeline.config import ExperimentConfig
from pipeline.key_mistakes import explain_validation, known_keys, unknown_key
from pipeline.search_space import (
    ADVISED,
    ANCHOR_KNOBS,
    LISTED,
    RANGES,
    Knob,
    Point,
    Space,
    apply_point,
    label,
    show_point,
    touches_shards,
)
from pipeline.sweep_config import RECALL_OBJECTIVES, SweepSettings

SHARED_KEYS = (
    "run.", "scaling.", "checkpoints.", "data.root", "data.shards", "data.verify_shards", "data.synthetic",
    "data.validation_sources", "data.validation_fraction", "predict.",
)  # fmt: skip
"""What all trials of a sweep have in common."""
THRESHOLD_KNOBS = (
    "model.rpn.nms_threshold",
    "model.rpn.pre_nms_top_k",
    "model.rpn.pre_nms_top_k_inference",
    "model.rpn.proposals_inference",
    "model.rpn.min_size",
    "model.detections.score_threshold",
    "model.detections.nms_threshold",
    "model.detections.max_per_image",
    "model.detections.min_size",
    "model.detections.best_class_only",
)
"""What can be varied without training (`model.variants.VARIABLE_KEYS`)."""
MAX_COMBINATIONS = 256
MAX_VALUES = 100  # of a range of whole numbers, evenly picked, that are looked at one by one
MAX_CORNERS = 9  # of a range of whole numbers, evenly picked, that are combined with other knobs
LARGEST = 2**53  # whole numbers beyond it are not exact everywhere
SCALES = (0.01, 1e5)  # pixels


def parse_space(settings: Mapping[str, Any], experiment: ExperimentConfig) -> Space:
    """Read and check a search space.

    Args:
        settings: `SweepSettings.space`.
        experiment: what is varied.

    Raises:
        ConfigurationError: a knob that there is not, or values that its key or the others do not allow.
    """
    if not settings:
        raise ConfigurationError("sweep.space: is empty; name what to vary, such as {model.rpn.nms_threshold: ...}")
    space = Space(tuple(_parse_knob(name, given) for name, given in settings.items()))
    check_space(space, experiment)
    return space


def with_advice(space: Space, candidates: Sequence[Mapping[str, Any]], experiment: ExperimentConfig) -> Space:
    """The space with what the anchor advisor suggests in the place of `advised`.

    Args:
        space: from `parse_space`.
        candidates: scales and ratios of each, the configured ones first.
        experiment: what is varied.

    Raises:
        ConfigurationError: as `parse_space`.
    """
    if not any(knob.is_advised for knob in space.knobs):
        return space
    knobs = []
    possible = [entry for entry in candidates if _can_match(experiment, entry)]
    for knob in space.knobs:
        if knob.is_advised and not possible:
            why = (
                "none of the advised anchors could match an object" if candidates else "there is no report of the data"
            )
            raise ConfigurationError(f"sweep.space.{knob.name}: {ADVISED}, but {why}; give it a choice")
        if knob.is_advised:
            found = {label(entry[knob.name.split(".")[-1]]): entry[knob.name.split(".")[-1]] for entry in possible}
            knob = replace(knob, values=tuple(list(values) for values in found.values()))
        knobs.append(knob)
    known = Space(tuple(knobs))
    check_space(known, experiment)
    return known


def _parse_knob(name: str, given: Any) -> Knob:
    if name not in known_keys():
        raise ConfigurationError(f"sweep.space: {unknown_key(name)}")
    if name.startswith(SHARED_KEYS):
        raise ConfigurationError(f"sweep.space.{name}: is the same for all trials; set it outside of the space")
    kinds = list(given) if isinstance(given, Mapping) else []
    if len(kinds) != 1 or kinds[0] not in (*LISTED, *RANGES):
        raise ConfigurationError(
            f"sweep.space.{name}: expected one of {', '.join((*LISTED, *RANGES))} with its values, "
            f"such as {{choice: [...]}} or {{uniform: [low, high]}}, got {given}"
        )
    kind, values = kinds[0], given[kinds[0]]
    if kind in LISTED:
        return _parse_list(name, kind, values)
    if touches_shards(name):
        raise ConfigurationError(
            f"sweep.space.{name}: changes the prepared data, which are made before the first trial; give it a choice"
        )
    return _parse_range(name, kind, values)


def _parse_list(name: str, kind: str, values: Any) -> Knob:
    if values == ADVISED:
        if name not in ANCHOR_KNOBS:
            raise ConfigurationError(f"sweep.space.{name}: only {' and '.join(ANCHOR_KNOBS)} can be advised")
        return Knob(name, kind)
    if not isinstance(values, list | tuple) or not values:
        raise ConfigurationError(f"sweep.space.{name}: {kind} needs a list of values, got {values}")
    for value in values:
        _check_plain(name, value)
    if len(set(map(label, values))) < len(values):
        raise ConfigurationError(f"sweep.space.{name}: {kind} {list(values)} has a value twice")
    return Knob(name, kind, tuple(values))


def _check_plain(name: str, value: Any) -> None:
    """Refuse what JSON cannot hold, and whole numbers that are not exact in every place they come to."""
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        raise ConfigurationError(f"sweep.space.{name}: a {type(value).__name__} is no value for a key") from None
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, int) and abs(number) > LARGEST:
            raise ConfigurationError(f"sweep.space.{name}: a whole number is larger than {LARGEST}")


def _parse_range(name: str, kind: str, values: Any) -> Knob:
    wanted = (int,) if kind == "integer" else (int, float)
    for value in values if isinstance(values, list | tuple) else ():
        _check_plain(name, value)
    are_numbers = isinstance(values, list | tuple) and all(
        isinstance(value, wanted) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
    if not are_numbers or len(values) != 2 or values[0] >= values[1]:
        numbers = "whole numbers" if kind == "integer" else "numbers"
        raise ConfigurationError(f"sweep.space.{name}: {kind} needs two {numbers}, low and high, got {values}")
    if kind == "loguniform" and values[0] <= 0:
        raise ConfigurationError(f"sweep.space.{name}: loguniform needs numbers above 0, got {values}")
    return Knob(name, kind, low=values[0], high=values[1])


def check_space(space: Space, experiment: ExperimentConfig) -> None:
    """Refuse knobs with values that the configuration does not allow, alone or together.

    Raises:
        ConfigurationError: names the knob, or the combination.
    """
    known = Space(tuple(knob for knob in space.knobs if not knob.is_advised))
    for knob in known.knobs:
        if knob.name == "model.anchors.scales":
            _check_anchor_lists(knob)
        for value in knob.values if knob.is_listed else _some_values(knob, MAX_VALUES):
            _check_alone(knob, value, experiment)
        if knob.kind in ("uniform", "loguniform"):
            _check_alone(knob, knob.low + (knob.high - knob.low) / math.pi, experiment)  # no whole number
    for point in combinations(known):
        config = _checked_point(experiment, point, "sweep.space")
        if len(known.knobs) == len(space.knobs):  # else the anchors are not known yet
            _check_anchors(config, point)


def _checked_point(experiment: ExperimentConfig, point: Point, where: str) -> ExperimentConfig:
    """The configuration of a point whose values go together."""
    try:
        return apply_point(experiment, point)
    except ValidationError as error:
        raise ConfigurationError(f"{where}: {show_point(point)}: {explain_validation(error)}") from error


def _some_values(knob: Knob, most: int) -> Sequence[Any]:
    """Values of a range: both ends, and of whole numbers some between: a key may allow 18 and 50, and not 19."""
    values = knob.all_values()
    if values is None or len(values) <= most:
        return values or knob.corners()
    return [*values[:: -(-len(values) // most)], values[-1]]


def _check_alone(knob: Knob, value: Any, experiment: ExperimentConfig) -> None:
    """Whether the key allows this value; what other keys say to it is found by the combinations."""
    try:
        apply_point(experiment, {knob.name: value})
    except ValidationError as error:
        path = knob.name.split(".")
        of_key = [finding for finding in error.errors() if list(map(str, finding["loc"][: len(path)])) == path]
        if not of_key:
            return
        hint = "; integer draws whole numbers" if knob.kind != "integer" and "integer" in of_key[0]["msg"] else ""
        text = "; ".join(
            part for part in explain_validation(error).split("; ") if part.startswith(knob.name)
        ).removeprefix(f"{knob.name}: ")
        raise ConfigurationError(f"sweep.space.{knob.name}: {knob}: {label(value)}: {text}{hint}") from error


def _check_anchor_lists(knob: Knob) -> None:
    levels = len(AnchorConfig().scales)
    for value in knob.values:
        if not isinstance(value, list | tuple) or len(value) != levels:
            raise ConfigurationError(
                f"sweep.space.{knob.name}: expected lists of {levels} numbers, one for each of P2 to P6, got {value}"
            )
        numbers = [number for number in value if isinstance(number, int | float) and not isinstance(number, bool)]
        low, high = SCALES
        if len(numbers) == levels and min(numbers) > 0 and not low <= min(numbers) <= max(numbers) <= high:
            raise ConfigurationError(
                f"sweep.space.{knob.name}: impossible anchors: {label(value)}: a scale is less than {low:g} or more "
                f"than {high:g} pixels"
            )
        if len(numbers) == levels and numbers != sorted(numbers):
            raise ConfigurationError(
                f"sweep.space.{knob.name}: impossible anchors: {label(value)}: scales have to rise from P2 to P6, "
                "whose cells grow"
            )


def _can_match(experiment: ExperimentConfig, anchors: Mapping[str, Any]) -> bool:
    """Whether some object that fits onto a canvas could match anchors of these scales and ratios."""
    known = {f"model.anchors.{name}": anchors[name] for name in ("scales", "ratios")}
    return _best_iou(apply_point(experiment, known)) >= experiment.model.rpn.positive_iou


def _best_iou(config: ExperimentConfig) -> float:
    """See `best_possible_iou`, of any of the anchors on any canvas."""
    anchors = config.model.anchors
    return max(
        best_possible_iou(scale, ratio, canvas)
        for scale, ratio, canvas in itertools.product(anchors.scales, anchors.ratios, config.data.canvases)
    )


def _check_anchors(config: ExperimentConfig, point: Point, where: str = "sweep.space.") -> None:
    """Refuse anchors that no object which fits onto a canvas could ever match."""
    anchors, threshold = config.model.anchors, config.model.rpn.positive_iou
    best = _best_iou(config)
    if best < threshold:
        names = [name for name in (*ANCHOR_KNOBS, "data.canvases", "model.rpn.positive_iou") if name in point]
        place = f"{where}{names[0]}" if names else ANCHOR_KNOBS[0]
        raise ConfigurationError(
            f"{place}: impossible anchors: scales {list(anchors.scales)} with ratios {list(anchors.ratios)} overlap no "
            f"object on canvases {[list(c) for c in config.data.canvases]} by more than IoU {best:.2g}, and "
            f"model.rpn.positive_iou is {threshold:g}"
        )


def best_possible_iou(scale: float, ratio: float, canvas: tuple[int, int]) -> float:
    """Largest IoU of an anchor with any box that lies on the canvas and has sides of a pixel or more.

    Args:
        scale: square root of the anchor's area, pixels.
        ratio: width / height.
        canvas: height and width, pixels.
    """
    width, height = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
    box_width, box_height = max(min(width, canvas[1]), 1.0), max(min(height, canvas[0]), 1.0)
    inside = min(width, box_width) * min(height, box_height)
    return inside / (width * height + box_width * box_height - inside)


def combinations(space: Space) -> Iterator[Point]:
    """Combinations of the knobs' corners: all of them, or each once, the extremes of every two, and some drawn ones."""
    corners = [knob.values if knob.is_listed else _some_values(knob, MAX_CORNERS) for knob in space.knobs]
    names = [knob.name for knob in space.knobs]
    if math.prod(map(len, corners)) <= MAX_COMBINATIONS:
        yield from (dict(zip(names, values, strict=True)) for values in itertools.product(*corners))
        return
    draws = random.Random(0)
    pairs = [
        {one.name: first, other.name: second}
        for one, other in itertools.combinations(space.knobs, 2)
        for first, second in itertools.product(_extremes(one), _extremes(other))
    ]
    each = [
        {knob.name: value}
        for knob, values in zip(space.knobs, corners, strict=True)
        for value in values
        if value not in _extremes(knob)
    ]
    for pair in [*each, *pairs, *[{}] * (MAX_COMBINATIONS - len(pairs))]:
        yield {name: draws.choice(values) for name, values in zip(names, corners, strict=True)} | pair


def _extremes(knob: Knob) -> list[Any]:
    """The smallest and the largest of its numbers; of other values the first and the last."""
    values = knob.corners()
    if all(isinstance(value, int | float) for value in values):
        return [min(values), max(values)]
    return [values[0], values[-1]]


def check_search(space: Space, settings: SweepSettings, experiment: ExperimentConfig) -> None:
    """Refuse a search that cannot be made in this space, and start points outside of it.

    Args:
        space: from `parse_space`.
        settings: of the sweep.
        experiment: what is varied.

    Raises:
        ConfigurationError: names the knob.
    """
    for knob in space.knobs:
        if settings.search == "grid" and not knob.is_listed:
            raise ConfigurationError(f"sweep.space.{knob.name}: {knob}: a grid search needs a choice")
        if settings.search == "tpe" and knob.kind == "grid":
            raise ConfigurationError(f"sweep.space.{knob.name}: tpe does not walk a grid; make it a choice")
        if settings.checkpoint is not None and knob.name not in THRESHOLD_KNOBS:
            raise ConfigurationError(
                f"sweep.space.{knob.name}: needs a training, so it cannot be varied with sweep.checkpoint; "
                f"without training one can vary {', '.join(THRESHOLD_KNOBS)}"
            )
    recall = [name for name in RECALL_OBJECTIVES if name in (settings.objective, settings.early_objective)]
    if recall and "train.rpn_recall" in space and space["train.rpn_recall"].values != (True,):
        raise ConfigurationError(f"sweep.space.train.rpn_recall: sweep.objective {', '.join(recall)} needs true always")
    check_start_points(settings.start_points, space)
    for index, point in enumerate(settings.start_points):
        where = f"sweep.start_points.{index}"
        for knob in space.knobs:
            if knob.is_advised and knob.name in point:  # whether it is advised shows later
                _check_given(replace(knob, values=(point[knob.name],)), experiment, where)
        if len(point) == len(space.knobs):  # else the others are drawn
            _check_anchors(_checked_point(experiment, dict(point), where), dict(point), f"{where}: ")
        if settings.search == "grid" and len(point) < len(space.knobs):
            raise ConfigurationError(f"{where}: a grid search draws nothing; name all knobs")


def _check_given(knob: Knob, experiment: ExperimentConfig, where: str) -> None:
    """Refuse the one value of a knob that a start point gives, under the point's name."""
    try:
        check_space(Space((knob,)), experiment)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {str(error).removeprefix('sweep.space.')}") from error


def check_start_points(points: Sequence[Mapping[str, Any]], space: Space) -> None:
    """Refuse points outside the space.

    Raises:
        ConfigurationError: names the knob.
    """
    for index, point in enumerate(points):
        for name, value in point.items():
            if name not in space:
                raise ConfigurationError(f"sweep.start_points.{index}: {name}: is not in sweep.space")
            if not space[name].is_advised and not space[name].contains(value):
                raise ConfigurationError(
                    f"sweep.start_points.{index}: {name}: {label(value)} is not in the space, {space[name]}"
                )
