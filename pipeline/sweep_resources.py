"""What a sweep needs beside its trials' patience: room in the cluster, and on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import torch

from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from pipeline import checkpoint_writer, storage
from pipeline.cluster import MIN_CPUS_FOR_DATA, Placement
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.freezing import freeze
from pipeline.optim import build_optimizer
from pipeline.search_space import Space, apply_point
from pipeline.sweep_config import SweepSettings

Say = Callable[[str], None]
GIGABYTE = 10**9
MAX_MODELS_MEASURED = 16


def max_concurrent(nodes: Sequence[dict[str, float]], num_workers: int, resources: dict[str, float]) -> int:
    """Trials that the nodes hold at once, so that none ever waits for what another one holds.

    Args:
        nodes: resources of each.
        num_workers: of a trial; a worker never spans nodes.
        resources: of a worker.

    Returns:
        0 where not even one fits. Each trial has a CPU for reading data beside those of its workers.
    """
    places = sum(int(min(node.get(name, 0.0) / amount for name, amount in resources.items())) for node in nodes)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    return min(places // num_workers, int(cpus // (num_workers * resources["CPU"] + MIN_CPUS_FOR_DATA)))


def trial_placement(
    nodes: Sequence[dict[str, float]], num_workers: int, alone: Placement, wanted: int | None
) -> tuple[int, Placement]:
    """How many trials run at once, and what the workers of each get.

    Args:
        nodes: resources of each.
        num_workers: of a trial.
        alone: what one trial gets that has the cluster for itself.
        wanted: `sweep.max_concurrent_trials`.

    Raises:
        UserError: they do not fit, with the arithmetic.
    """
    resources = alone.resources_per_worker
    fit = max_concurrent(nodes, num_workers, resources)
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    number = fit if wanted is None else wanted
    if fit < max(number, 1):
        worker = " + ".join(f"{amount:g} {name}" for name, amount in resources.items())
        one = num_workers * resources["CPU"] + MIN_CPUS_FOR_DATA
        raise UserError(
            f"{max(number, 1)} trials at once do not fit: a trial takes {num_workers} workers x ({worker}) + "
            f"{MIN_CPUS_FOR_DATA} CPU for reading data = {one:g} CPU"
            + (f" and {num_workers * resources['GPU']:g} GPU" if "GPU" in resources else "")
            + f", the cluster has {cpus:g} CPU and {gpus:g} GPU on {len(nodes)} nodes, which hold {fit}; "
            "lower --sweep.max_concurrent_trials or --scaling.num_workers"
        )
    spare = (cpus - number * num_workers * resources["CPU"]) / number
    return number, Placement(alone.use_gpu, resources, max(float(int(spare)), float(MIN_CPUS_FOR_DATA)))


def checkpoint_bytes(model: ModelConfig, config: ExperimentConfig, num_classes: int) -> int:
    """About how large a checkpoint of a model is; no weight is made."""
    with torch.device("meta"):
        network = MaskRCNN(model, num_classes)
    freeze(network, config.train.trainable_layers)
    averaged = network if config.optim.ema_decay is not None else None
    return checkpoint_writer.checkpoint_bytes(network, build_optimizer(network, config.optim), averaged)


def disk_bytes(config: ExperimentConfig, space: Space, settings: SweepSettings, trials: int, num_classes: int) -> int:
    """Most that the checkpoints of a sweep take at once.

    Args:
        config: what is varied; each run keeps `keep_best` and `keep_last` checkpoints, and writes one more before it
            drops one.
        space: knobs may make the model larger.
        settings: checkpoints of losers go when they end.
        trials: at once.
        num_classes: C, with the background.
    """
    models = {config.model: None}
    for knob in space.knobs:
        if knob.name.startswith("model."):
            models |= dict.fromkeys(_models_with(config, knob.name, knob.corners()))
    largest = max(checkpoint_bytes(model, config, num_classes) for model in list(models)[:MAX_MODELS_MEASURED])
    kept = config.checkpoints.keep_best + config.checkpoints.keep_last
    return largest * (trials * (kept + 1) + settings.keep_checkpoints * kept)


def _models_with(config: ExperimentConfig, name: str, values: Sequence[object]) -> list[ModelConfig]:
    found = []
    for value in values:
        try:
            found.append(apply_point(config, {name: value}).model)
        except ValueError:  # only allowed together with others of the space
            continue
    return found


def check_disk(folder: str, needed: int, say: Say) -> None:
    """Say what the checkpoints need, and refuse a local disk that has not got it.

    Raises:
        UserError: with the numbers.
    """
    if storage.is_url(folder):
        say(f"sweep: checkpoints take up to {needed / GIGABYTE:.1f} GB in {folder}")
        return
    existing = folder
    while not storage.exists(existing):
        existing = existing.rsplit("/", 1)[0] or "/"
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{folder}: the checkpoints of the sweep take up to {needed / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB "
            "are free; lower --checkpoints.keep_last, --sweep.keep_checkpoints or --sweep.max_concurrent_trials, "
            "or name another --run.storage_path"
        )
    say(f"sweep: checkpoints take up to {needed / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB are free")
