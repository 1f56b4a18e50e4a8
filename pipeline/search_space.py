"""The search space of a sweep: knobs by dotted name, and points of it.

A point is a value for each knob, as YAML and JSON hold it: {"model.rpn.nms_threshold": 0.6, ...}.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import ExperimentConfig

Point = dict[str, Any]

LISTED, RANGES = ("choice", "grid"), ("uniform", "loguniform", "integer")
ANCHOR_KNOBS = ("model.anchors.scales", "model.anchors.ratios")
ADVISED = "advised"
MOST_LISTED = 100_000  # values of a range of whole numbers, and points of a space
KEYS_OF_SHARDS = ("data.", "augment.short_side", "augment.short_side_step", "augment.large_scale_jitter")
NOT_OF_SHARDS = (
    "data.shuffle_window",
    "data.repeat_threshold",
    "data.empty_images_fraction",
    "data.mini_masks",
    "data.object_store_megabytes",
)


@dataclass(frozen=True)
class Knob:
    """One key of the configuration and the values that it may take."""

    name: str
    kind: str
    values: tuple[Any, ...] = ()
    """Of choice and grid; empty for advised anchors until they are known."""
    low: float = math.nan
    high: float = math.nan

    @property
    def is_listed(self) -> bool:
        """Whether its values are a list."""
        return self.kind in LISTED

    @property
    def is_advised(self) -> bool:
        """Whether the data have yet to say its values."""
        return self.is_listed and not self.values

    def contains(self, value: Any) -> bool:
        """Whether it may take this value."""
        if self.is_listed:
            return label(value) in map(label, self.values)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and (self.kind != "integer" or value == int(value))

    def corners(self) -> tuple[Any, ...]:
        """Values that stand for all of them: a list's own; both ends of a range."""
        return self.values if self.is_listed else (self.low, self.high)

    def all_values(self) -> Sequence[Any] | None:
        """Its values, in order; None where they are too many to list."""
        if self.is_listed:
            return self.values
        few = self.kind == "integer" and self.high - self.low < MOST_LISTED
        return range(int(self.low), int(self.high) + 1) if few else None

    def __str__(self) -> str:
        shown = (ADVISED if self.is_advised else list(self.values)) if self.is_listed else [self.low, self.high]
        return f"{self.kind} {shown}"


@dataclass(frozen=True)
class Space:
    """All knobs of a sweep."""

    knobs: tuple[Knob, ...]

    @property
    def num_points(self) -> int | None:
        """How many there are; None where they are too many to list."""
        values = [knob.all_values() for knob in self.knobs]
        number = math.prod(len(listed) for listed in values if listed is not None)
        return number if None not in values and number <= MOST_LISTED else None

    @property
    def is_finite(self) -> bool:
        """Whether all points can be listed."""
        return self.num_points is not None

    def all_points(self) -> Iterator[Point]:
        """All points of a finite space, the last knob changing fastest."""
        names = [knob.name for knob in self.knobs]
        for values in itertools.product(*(knob.all_values() or () for knob in self.knobs)):
            yield dict(zip(names, values, strict=True))

    def listed_points(self, kinds: Sequence[str] = LISTED) -> Iterator[Point]:
        """All combinations of the values of the listed knobs of these kinds, the last knob changing fastest."""
        listed = [knob for knob in self.knobs if knob.kind in kinds]
        for values in itertools.product(*(knob.values for knob in listed)):
            yield dict(zip((knob.name for knob in listed), values, strict=True))

    def points(self, kinds: Sequence[str] = LISTED) -> list[Point]:
        """`listed_points` as a list."""
        return list(self.listed_points(kinds))

    def only(self, names: Sequence[str]) -> Space:
        """Its knobs of these names."""
        return Space(tuple(knob for knob in self.knobs if knob.name in names))

    def __getitem__(self, name: str) -> Knob:
        return next(knob for knob in self.knobs if knob.name == name)

    def __contains__(self, name: str) -> bool:
        return any(knob.name == name for knob in self.knobs)


def label(value: Any) -> str:
    """A value in one short line; equal for equal ones, also for 32 and 32.0."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(label(item) for item in value)}]"
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value)


def apply_point(experiment: ExperimentConfig, point: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration with the values of a point.

    Raises:
        ValidationError: they do not go together.
    """
    settings = experiment.model_dump(mode="json")
    for name, value in point.items():
        *parents, last = name.split(".")
        section = settings
        for parent in parents:
            if section[parent] is None:  # an optional group that is switched off
                section[parent] = {}
            section = section[parent]
        section[last] = value
    return ExperimentConfig.model_validate(settings)


def touches_shards(name: str) -> bool:
    """Whether a key changes the prepared data."""
    return name.startswith(KEYS_OF_SHARDS) and not name.startswith(NOT_OF_SHARDS)


def shard_knobs(space: Space) -> Space:
    """The knobs that change the prepared data."""
    return space.only([knob.name for knob in space.knobs if touches_shards(knob.name)])


def advised_points(space: Space, candidates: Sequence[Mapping[str, Any]], experiment: ExperimentConfig) -> list[Point]:
    """The advisor's anchors as points, the configured ones first; other knobs as configured, where the space has that.

    Args:
        space: with the advice, see `with_advice`.
        candidates: scales and ratios of each.
        experiment: what is varied.

    Returns:
        None where the space has no anchors; anchors outside the space are left out.
    """
    anchors = [name for name in ANCHOR_KNOBS if name in space]
    if not anchors:
        return []
    rest = {
        knob.name: value
        for knob in space.knobs
        if knob.name not in anchors and knob.contains(value := configured_value(experiment, knob.name))
    }
    points: dict[str, Point] = {}
    for entry in candidates:
        values = {name: list(entry[name.split(".")[-1]]) for name in anchors}
        if all(space[name].contains(value) for name, value in values.items()):
            points.setdefault(show_point(values), {**values, **rest})
    return list(points.values())


def configured_value(experiment: ExperimentConfig, name: str) -> Any:
    """What the configuration holds under a dotted name, as JSON; None below a group that is switched off."""
    value: Any = experiment.model_dump(mode="json")
    for part in name.split("."):
        value = value[part] if value is not None else None
    return value


def show_point(point: Mapping[str, Any]) -> str:
    """A point in one line."""
    return ", ".join(f"{name} {label(value)}" for name, value in point.items())
