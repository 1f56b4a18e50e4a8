"""What a sweep needs beside its trials' patience: room in the cluster, and on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import torch

from model.mask_rcnn import MaskRCNN
from pipeline import checkpoint_writer, storage
from pipeline.checkpoint_store import NAME as CHECKPOINT
from pipeline.cluster import MIN_CPUS_FOR_DATA, Placement
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.freezing import freeze
from pipeline.optim import build_optimizer
from pipeline.search_space import Point, Space, apply_point
from pipeline.sweep_config import SweepSettings

Say = Callable[[str], None]
GIGABYTE = 10**9
KEYS_OF_SIZE = (
    "model.backbone.", "model.fpn.", "model.anchors.ratios", "model.norms.", "model.rpn.channels",
    "model.rpn.num_convolutions", "model.rpn.objectness", "model.box_head.", "model.mask_head.", "optim.name",
    "optim.ema_decay", "train.trainable_layers",
)  # fmt: skip
"""What decides how large a checkpoint is."""


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
    nodes: Sequence[dict[str, float]], num_workers: int, alone: Placement, wanted: int | None, most: int
) -> tuple[int, Placement]:
    """How many trials run at once, and what the workers of each get.

    Args:
        nodes: resources of each.
        num_workers: of a trial.
        alone: what one trial gets that has the cluster for itself.
        wanted: `sweep.max_concurrent_trials`.
        most: trials that there can be.

    Raises:
        UserError: they do not fit, with the arithmetic.
    """
    resources = alone.resources_per_worker
    fit = max_concurrent(nodes, num_workers, resources)
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    number = min(fit if wanted is None else wanted, most)
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


def checkpoint_bytes(config: ExperimentConfig, num_classes: int) -> int:
    """About how large a checkpoint of a training is; no weight is made."""
    with torch.device("meta"):
        network = MaskRCNN(config.model, num_classes)
    freeze(network, config.train.trainable_layers)
    averaged = network if config.optim.ema_decay is not None else None
    return checkpoint_writer.checkpoint_bytes(network, build_optimizer(network, config.optim), averaged)


def disk_bytes(config: ExperimentConfig, space: Space, settings: SweepSettings, trials: int, num_classes: int) -> int:
    """Most that the checkpoints of a sweep take at once.

    Args:
        config: what is varied; each run keeps `keep_best` and `keep_last` checkpoints, and writes one more before it
            drops one.
        space: knobs may make the model larger, or the optimiser's state; of each its largest value counts.
        settings: checkpoints of losers go when they end.
        trials: at once.
        num_classes: C, with the background.
    """
    largest_point: Point = {}
    largest = checkpoint_bytes(config, num_classes)
    for knob in space.knobs:
        if knob.name.startswith(KEYS_OF_SIZE):
            sizes = [(_bytes_at(config, {knob.name: value}, num_classes), value) for value in knob.corners()]
            size, value = max(sizes, key=lambda entry: entry[0])
            largest = max(largest, size)
            largest_point[knob.name] = value
    largest = max(largest, _bytes_at(config, largest_point, num_classes))
    kept = config.checkpoints.keep_best + config.checkpoints.keep_last
    return largest * (trials * (kept + 1) + settings.keep_checkpoints * kept)


def _bytes_at(config: ExperimentConfig, point: Point, num_classes: int) -> int:
    """0 where the values do not go together."""
    try:
        return checkpoint_bytes(apply_point(config, point), num_classes)
    except ValueError:
        return 0


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
    of_this_sweep = sum(
        int(stamp.split()[0])
        for path, stamp in storage.list_stamps(folder).items()
        if CHECKPOINT.match(path.partition("/")[2])
    )
    free = shutil.disk_usage(existing).free + of_this_sweep
    if free < needed:
        raise UserError(
            f"{folder}: the checkpoints of the sweep take up to {needed / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB "
            "are free; lower --checkpoints.keep_last, --sweep.keep_checkpoints or --sweep.max_concurrent_trials, "
            "or name another --run.storage_path"
        )
    say(f"sweep: checkpoints take up to {needed / GIGABYTE:.1f} GB, {free / GIGABYTE:.1f} GB are free")
