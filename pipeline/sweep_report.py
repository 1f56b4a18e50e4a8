"""What a sweep leaves for people: a table of its trials, and pictures."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.search import Tried, study_of
from pipeline.search_space import Knob, Point, Space, label
from pipeline.sweep_config import SweepSettings
from pipeline.trials import Trial, ranked

MAX_LINES = 30
COLOURS = {"finished": "tab:blue", "stopped": "tab:orange", "failed": "tab:red", "running": "tab:gray"}
MAX_LABEL = 34  # characters of a value beside an axis


def table_file(trials: Sequence[Trial], space: Space, settings: SweepSettings, num_workers: int) -> bytes:
    """All trials as Parquet: one row each, knobs and metrics of the best evaluation in columns of their names."""
    metrics = sorted({name for trial in trials for entry in trial.evaluations for name in entry})
    rows = []
    for trial in trials:
        best = best_evaluation(trial, settings)
        rows.append(
            {
                "trial": trial.name,
                "state": trial.state,
                "reason": trial.reason,
                "evaluations": len(trial.evaluations),
                "worker_hours": trial.seconds * num_workers / 3600,
                "mlflow_run_id": trial.summary.get("mlflow_run_id"),
                "checkpoint": trial.summary.get("checkpoint"),
                "rungs": json.dumps([entry.get(settings.objective) for entry in trial.evaluations]),
                **{knob.name: _column_value(knob, trial.point[knob.name]) for knob in space.knobs},
                **{name: best.get(name) for name in metrics if name not in space},
            }
        )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def _column_value(knob: Knob, value: Any) -> Any:
    """Numbers as numbers where a knob has nothing else, else text."""
    if knob.is_listed and not all(isinstance(v, int | float) and not isinstance(v, bool) for v in knob.values):
        return label(value)
    return int(value) if knob.kind == "integer" else float(value)


def best_evaluation(trial: Trial, settings: SweepSettings) -> dict[str, float]:
    """Metrics of the evaluation that a trial counts with; empty where there is none."""
    judged = [entry for entry in trial.evaluations if settings.objective in entry]
    sign = 1.0 if settings.larger_is_better else -1.0
    return max(judged, key=lambda entry: sign * entry[settings.objective], default={})


def table_lines(trials: Sequence[Trial], space: Space, settings: SweepSettings) -> list[str]:
    """The trials for the screen, the best first."""
    best_first = ranked(trials, settings)
    others = [trial for trial in trials if trial not in best_first]
    names = short_names([knob.name for knob in space.knobs])
    header = ["trial", "state", settings.objective, "evaluations", *names.values()]
    rows = [
        [
            trial.name,
            trial.state,
            "-" if (value := trial.value(settings)) is None else f"{value:.4f}",
            str(len(trial.evaluations)),
            *(_rounded(trial.point[name]) for name in names),
        ]
        for trial in [*best_first, *others]
    ]
    lines = aligned([header, *rows[:MAX_LINES]])
    return [*lines, f"... and {len(rows) - MAX_LINES} more"] if len(rows) > MAX_LINES else lines


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Of each dotted name the shortest end of two parts or more that no other one has too."""
    short = {}
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-count:]) for count in range(min(2, len(parts)), len(parts) + 1)]
        short[name] = next(
            (end for end in ends if not any(o != name and f".{o}".endswith(f".{end}") for o in names)), name
        )
    return short


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else label(value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL - 1]}…"


def draw_objective(trials: Sequence[Trial], settings: SweepSettings) -> bytes:
    """Objective over trials, every evaluation as a dot, and the best so far; a PNG file."""
    figure, axes = _figure(max(7.0, 0.12 * len(trials) + 3), 4.5)
    best: list[tuple[int, float]] = []
    for trial in trials:
        values = [entry[settings.objective] for entry in trial.evaluations if settings.objective in entry]
        colour = COLOURS[trial.state]
        axes.plot([trial.number] * len(values), values, color=colour, alpha=0.35, marker="o", markersize=3, linewidth=1)
        value = trial.value(settings)
        if value is not None:
            axes.plot([trial.number], [value], color=colour, marker="o", markersize=7, linestyle="none")
            before = best[-1][1] if best else value
            best.append((trial.number, max(before, value) if settings.larger_is_better else min(before, value)))
    if best:
        axes.step(*zip(*best, strict=True), where="post", color="black", linewidth=1, label="best so far")
    low = axes.get_ylim()[0]
    for trial in trials:
        if trial.value(settings) is None:
            axes.plot([trial.number], [low], color=COLOURS[trial.state], marker="x", markersize=8, linestyle="none")
    for state in dict.fromkeys(trial.state for trial in trials):
        marker = "x" if state == "failed" else "o"
        axes.plot([], [], color=COLOURS[state], marker=marker, linestyle="none", label=state)
    axes.set_xlabel("trial")
    axes.set_ylabel(settings.objective)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.04)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    axes.set_title(f"{settings.objective} of every trial: dots are evaluations, the large one its best", fontsize=10)
    return _png(figure)


def draw_parallel_coordinates(trials: Sequence[Trial], space: Space, settings: SweepSettings) -> bytes:
    """A line a trial across an axis a knob and the objective, coloured by the objective; a PNG file."""
    import matplotlib

    reached = ranked(trials, settings)
    columns: list[tuple[str, Knob | None]] = [*((knob.name, knob) for knob in space.knobs), (settings.objective, None)]
    names = short_names([name for name, _ in columns])
    figure, axes = _figure(2.6 * len(columns) + 2, 5.2)
    values = [trial.value(settings) or 0.0 for trial in reached]
    colours = matplotlib.colormaps["viridis"]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    for trial, value in sorted(zip(reached, values, strict=True), key=lambda pair: pair[1]):
        heights = [_height(knob, trial.point[knob.name]) for knob in space.knobs]
        heights.append((value - low) / (high - low) if high > low else 0.5)
        axes.plot(range(len(columns)), heights, color=colours(heights[-1]), linewidth=1.6, alpha=0.85)
    for place, (_, knob) in enumerate(columns):
        axes.axvline(place, color="black", linewidth=0.8)
        ticks = _ticks(knob) if knob is not None else [(0.0, f"{low:.3f}"), (1.0, f"{high:.3f}")]
        for height, text in ticks:
            axes.annotate(
                _cut(text), (place, height), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip
    axes.set_xticks(range(len(columns)), [names[name] for name, _ in columns])
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.06)
    axes.set_xlim(-0.15, len(columns) - 0.45)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"{len(reached)} trials, coloured by {settings.objective}", fontsize=10)
    return _png(figure)


def _height(knob: Knob, value: Any) -> float:
    """Place of a value on its axis, 0 to 1."""
    if knob.is_listed:
        labels = [label(known) for known in knob.values]
        return labels.index(label(value)) / max(len(labels) - 1, 1)
    if knob.kind == "loguniform":
        return math.log(value / knob.low) / math.log(knob.high / knob.low)
    return float((value - knob.low) / (knob.high - knob.low))


def _ticks(knob: Knob) -> list[tuple[float, str]]:
    if knob.is_listed:
        return [(_height(knob, value), label(value)) for value in knob.values]
    return [(0.0, f"{knob.low:g}"), (1.0, f"{knob.high:g}")]


def importances(trials: Sequence[Trial], space: Space, settings: SweepSettings) -> dict[str, float]:
    """Share of the differences in the objective that each knob explains (fANOVA), the largest first.

    Returns:
        Empty where there are too few trials, or none differs, to say.
    """
    import optuna

    tried = [Tried(trial.point, trial.value(settings)) for trial in trials]
    values = {entry.value for entry in tried if entry.value is not None}
    if len(values) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            found = optuna.importance.get_param_importances(
                study_of(space, tried, settings.larger_is_better), evaluator=evaluator
            )
        except RuntimeError:  # of trials of one and the same point, which differ by chance alone
            return {}
    return {name: float(share) for name, share in found.items()}


def draw_importances(trials: Sequence[Trial], space: Space, settings: SweepSettings) -> bytes | None:
    """How much each knob decides; a PNG file, None where there is too little to say."""
    found = importances(trials, space, settings)
    if not found:
        return None
    names = short_names(list(found))
    figure, axes = _figure(7.5, 0.5 * len(found) + 1.8)
    places = np.arange(len(found))[::-1]
    bars = axes.barh(places, list(found.values()), color="tab:blue", height=0.6)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    axes.set_yticks(places, [names[name] for name in found])
    axes.set_xlim(0, max(1e-9, *found.values()) * 1.15)
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel("share of the variance that it explains (fANOVA)")
    count = len(ranked(trials, settings))
    axes.set_title(f"importance of knobs for {settings.objective}, {count} trials with what each reached", fontsize=10)
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.15)  # the box around all labels
    return buffer.getvalue()


def points_as_trials(points: Sequence[Point], metrics: Sequence[dict[str, float]]) -> list[Trial]:
    """Points of a sweep without training in the form of trials, each evaluated once."""
    return [
        Trial(number, point, "finished", evaluations=[dict(values)])
        for number, (point, values) in enumerate(zip(points, metrics, strict=True))
    ]
