"""A sweep over thresholds of one checkpoint: all points from one evaluation's forward passes, on a cluster."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from pipeline import cluster, prepare, run_state
from pipeline.cluster import Placement
from pipeline.config import ExperimentConfig
from pipeline.doctor import check_at_start
from pipeline.evaluation import rows_of_worker
from pipeline.evaluation_tasks import BATCH_SIZE
from pipeline.inference import find_weights, load_weights
from pipeline.search import draw_points
from pipeline.search_space import Point, Space, apply_point
from pipeline.shards import ShardSet
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_report import points_as_trials
from pipeline.sweep_result import conclude
from pipeline.sweep_state import begin_parent, write_result
from pipeline.threshold_sweep import SweptRow, point_precision, sweep_rows
from pipeline.training import autocast_dtype

Say = Callable[[str], None]


def run(config: SweepConfig, space: Space, debug: bool, say: Say) -> dict[str, Any]:
    """Evaluate all points of a sweep without training and name the best.

    Args:
        config: whole, with `sweep.checkpoint`.
        space: checked.
        debug: show Ray's messages.
        say: takes lines for a person to read.

    Returns:
        The summary that the job prints as JSON.

    Raises:
        UserError: what the user can mend.
    """
    started = time.monotonic()
    base, folder = config.base(), run_state.run_folder(config)
    weights = find_weights(base, config.sweep.checkpoint)
    checked = prepare.check(base, say)
    model = load_weights(base, weights, checked.class_map.names, say)  # before Ray is started: mistakes show here
    points = draw_points(space, config.sweep, [dict(point) for point in config.sweep.start_points])
    cluster.connect(debug)
    placement = cluster.place_workers(config.scaling, say)
    check_at_start(base, say)  # when the nodes are there
    data = prepare.write(base, checked, say)
    say(f"sweep: {len(points)} points over {len(space.knobs)} knobs of {weights}, without training")
    looked = time.monotonic()
    metrics = evaluate_points(base, model, points, data.validation, placement)
    say(f"sweep: looked at every image once, {len(points)} points in {time.monotonic() - looked:.1f} s")
    parent = begin_parent(config, folder, say)
    status = "FAILED"
    try:
        if parent.run_id is not None:
            parent.record.log_series(parent.run_id, metrics)
        summary = conclude(config, space, points_as_trials(points, metrics), folder, parent, say)
        summary["seconds"] = round(time.monotonic() - started, 1)
        write_result(config, folder, summary)
        status = "FINISHED"
        return summary
    finally:
        parent.end(status)


def evaluate_points(
    config: ExperimentConfig, model: MaskRCNN, points: Sequence[Point], validation: str, placement: Placement
) -> list[dict[str, float]]:
    """COCO AP of every point, images shared out among tasks of the cluster, then points.

    Args:
        config: scaling, train.precision, and the model's thresholds where a point says nothing.
        model: on the CPU, of the data's classes.
        points: knobs of `THRESHOLD_KNOBS`.
        validation: folder of shards.
        placement: what a task gets.

    Returns:
        The numbers of `AP_METRICS` of each.
    """
    import ray

    manifest = ShardSet(validation).manifest
    variants = ray.put([apply_point(config, point).model for point in points])
    sent = ray.put(model)
    device = "cuda" if placement.use_gpu else "cpu"
    num_tasks = min(config.scaling.num_workers, manifest.num_rows)
    look = ray.remote(_look).options(**placement.options())
    dumped = config.model_dump(mode="json")
    parts = [look.remote(dumped, sent, variants, device, validation, part, num_tasks) for part in range(num_tasks)]
    swept = ray.put([row for part in ray.get(parts) for row in part])
    judge = ray.remote(_judge).options(num_cpus=placement.resources_per_worker["CPU"])
    numbers = [range(part, len(points), config.scaling.num_workers) for part in range(config.scaling.num_workers)]
    judged = ray.get([judge.remote(swept, list(some), manifest.num_rows, manifest.num_classes) for some in numbers])
    found = {number: values for part in judged for number, values in part}
    return [found[number] for number in range(len(points))]


def _look(
    dumped: dict[str, Any],
    model: MaskRCNN,
    variants: Sequence[ModelConfig],
    device_type: str,
    validation: str,
    part: int,
    num_parts: int,
) -> list[SweptRow]:
    """Ray task: every num_parts-th row with all points."""
    config = ExperimentConfig.model_validate(dumped)
    shards = ShardSet(validation)
    device = torch.device(device_type)
    if device.type == "cpu":
        torch.set_num_threads(config.scaling.cpus_per_worker)
    model = copy.deepcopy(model)  # what comes out of the object store is read-only
    model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    rows = rows_of_worker(len(shards), part, num_parts)
    return sweep_rows(model, shards, rows, BATCH_SIZE, autocast_dtype(config.train.precision, device.type), variants)


def _judge(
    swept: Sequence[SweptRow], numbers: Sequence[int], num_rows: int, num_classes: int
) -> list[tuple[int, dict[str, float]]]:
    """Ray task: AP of some points."""
    return [(number, point_precision(swept, number, num_rows, num_classes)) for number in numbers]
