"""Ground truth and results of all validation rows, shared out among tasks of the cluster; every row exactly once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from model.mask_rcnn import MaskRCNN
from pipeline.cluster import Placement
from pipeline.config import ExperimentConfig
from pipeline.earlier_predictions import evaluated_rows
from pipeline.evaluation import EvaluatedRow, evaluate_rows, in_order, rows_of_worker
from pipeline.shards import ShardSet
from pipeline.training import autocast_dtype
from pipeline.views import Viewing

BATCH_SIZE = 8


def evaluate_model(
    config: ExperimentConfig, model: MaskRCNN, validation: str, placement: Placement
) -> list[EvaluatedRow]:
    """What a model finds in the validation rows, beside what is there.

    Args:
        config: scaling, train.precision, and of predict test-time augmentation.
        model: on the CPU, of the data's classes.
        validation: folder of shards.
        placement: what a task gets.

    Returns:
        All rows, in order.
    """
    import ray

    shards = ShardSet(validation)
    sent = ray.put(model)  # not its file: that may be on this node alone
    device = "cuda" if placement.use_gpu else "cpu"
    num_tasks = min(config.scaling.num_workers, len(shards))
    task = ray.remote(_evaluate_part).options(**placement.options())
    dumped = config.model_dump(mode="json")
    parts = ray.get([task.remote(dumped, sent, device, validation, part, num_tasks) for part in range(num_tasks)])
    return in_order([entry for part in parts for entry in part], len(shards))


def evaluate_predictions(
    config: ExperimentConfig, output: str, validation: str, keys: dict[str, int]
) -> list[EvaluatedRow]:
    """What jobs/predict.py has found in the validation rows, beside what is there.

    Args:
        config: scaling.
        output: of the prediction, absolute path or URL.
        validation: folder of shards.
        keys: see `pipeline.earlier_predictions.match_keys`.

    Returns:
        All rows, in order.
    """
    import ray

    shards = ShardSet(validation)
    sent = ray.put(keys)
    num_tasks = min(config.scaling.num_workers, len(shards))
    task = ray.remote(evaluated_rows).options(num_cpus=1)
    rows = [list(rows_of_worker(len(shards), part, num_tasks)) for part in range(num_tasks)]
    names = shards.manifest.class_names
    parts: Sequence[list[EvaluatedRow]] = ray.get([task.remote(output, validation, r, sent, names) for r in rows])
    return in_order([entry for part in parts for entry in part], len(shards))


def augmented_viewing(config: ExperimentConfig, shards: ShardSet) -> Viewing | None:
    """How to look at rows with test-time augmentation; None where none is asked for.

    The whole images of the shards are looked at: tiles need the files, see jobs/predict.py.
    """
    settings = config.predict
    if not settings.flip and settings.scales == (1.0,):
        return None
    manifest = shards.manifest
    whole = settings.model_copy(update={"tiling": None, "canvases": None})
    return Viewing(manifest.canvases, manifest.short_side, config.data.resize_method).augmented(whole)


def _evaluate_part(
    dumped: dict[str, Any], model: MaskRCNN, device_type: str, validation: str, part: int, num_parts: int
) -> list[EvaluatedRow]:
    """Ray task: evaluate every num_parts-th row."""
    config = ExperimentConfig.model_validate(dumped)
    shards = ShardSet(validation)
    device = torch.device(device_type)
    if device.type == "cpu":
        torch.set_num_threads(config.scaling.cpus_per_worker)
    model = copy.deepcopy(model)  # what comes out of the object store is read-only
    model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    rows = rows_of_worker(len(shards), part, num_parts)
    dtype = autocast_dtype(config.train.precision, device.type)
    recall = config.train.rpn_recall
    return evaluate_rows(model, shards, rows, BATCH_SIZE, dtype, recall, augmented_viewing(config, shards))
