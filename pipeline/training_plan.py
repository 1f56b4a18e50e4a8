"""Which rows a training sees in which order, how many steps that is, and where its epochs end."""

from __future__ import annotations

from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.sampling import row_repeats, rows_an_epoch
from pipeline.shards import ShardSet
from pipeline.stream import StreamPlan


def make_plan(config: ExperimentConfig, shards: ShardSet) -> StreamPlan:
    """Order of the training rows.

    Raises:
        UserError: no row is left to train on.
    """
    repeats = None
    if config.data.repeat_threshold > 0 or config.data.empty_images_fraction < 1:
        classes = shards.manifest.row_classes()
        repeats = row_repeats(classes, config.data.repeat_threshold, config.data.empty_images_fraction)
        if rows_an_epoch(repeats) < 1:
            raise UserError("no training image has an object; keep some with data.empty_images_fraction")
    return StreamPlan(
        shards.manifest.row_canvases(),
        config.data.rows_per_shard,
        config.data.shuffle_window,
        config.global_batch_size,
        config.train.seed,
        repeats,
    )


def total_steps(config: ExperimentConfig, plan: StreamPlan) -> int:
    """Steps of the whole training."""
    steps = plan.steps_of_epochs(config.train.epochs)
    return min(steps, config.train.max_steps) if config.train.max_steps is not None else steps


def epoch_ends(plan: StreamPlan, last_step: int, every_epochs: int) -> set[int]:
    """Steps with which every so many epochs end, and the last step."""
    steps, epoch = {last_step}, every_epochs
    while plan.steps_of_epochs(epoch) < last_step:
        steps.add(plan.steps_of_epochs(epoch))
        epoch += every_epochs
    return steps
