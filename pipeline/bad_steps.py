"""What a worker does about a step whose numbers are not finite: record it with the others, then stop or go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed

from model.mask_rcnn import MaskRCNN
from pipeline.config import ExperimentConfig
from pipeline.nonfinite import (
    SMALLEST_SCALE,
    computed_again,
    planned_step,
    record_path,
    write_batches,
    write_record,
)
from pipeline.optim import learning_rate, scale_to_batch
from pipeline.shards import ShardSet
from pipeline.stream import LoadBlock, StreamPlan
from pipeline.training import NonFiniteLossError, check_finite


@dataclass
class BadSteps:
    """Of one worker; all workers call it for the same steps."""

    config: ExperimentConfig
    plan: StreamPlan
    load_block: LoadBlock
    shards: ShardSet
    run_folder: str
    last_step: int
    rank: int
    num_workers: int
    passes: int
    """Batches that a worker's part of a step is cut into."""
    dtype: torch.dtype | None
    """See `autocast_dtype`."""
    group: Any
    """Process group that sends Python objects; None for the default one."""
    skipped: int = 0
    """Steps left out so far in this training."""

    def take(
        self, step: int, values: list[float], model: MaskRCNN, scaler: torch.amp.GradScaler, steps_done: int
    ) -> str:
        """Record a bad step and count it.

        Args:
            step: its number.
            values: of all workers, in the order of `STEP_METRICS`.
            model: with the weights of now.
            scaler: see `gradient_scaler`.
            steps_done: those of now.

        Returns:
            What the user is to be told, where the training goes on.

        Raises:
            NonFiniteLossError: it does not.
        """
        self._record(step, values, model, scaler, steps_done)
        self.skipped += 1
        settings, path = self.config.train, record_path(self.run_folder, step)
        try:
            check_finite(values, step)
        except NonFiniteLossError as error:
            told = f"{error}; recorded in {path}, computed again by: python jobs/replay.py --step_file {path}"
            if settings.nonfinite == "skip" and self.skipped <= settings.nonfinite_skips:
                return f"{told}; left out, number {self.skipped} of at most {settings.nonfinite_skips}"
            raise NonFiniteLossError(told) from error
        raise AssertionError(f"step {step} is finite: {values}")

    def _record(
        self, step: int, values: list[float], model: MaskRCNN, scaler: torch.amp.GradScaler, steps_done: int
    ) -> None:
        """Every worker writes its batches and computes them alone, rank 0 the rest; see `pipeline.nonfinite`."""
        planned = planned_step(self.plan, self.load_block, self.shards, step, self.rank, self.num_workers, self.passes)
        device = next(model.parameters()).device
        mine = {
            "rank": self.rank,
            "images": planned.images,
            "batches": write_batches(self.run_folder, step, self.rank, planned.batches),
            **computed_again(model, [batch.to(device) for batch in planned.batches], self.config, self.dtype),
        }
        workers: list[Any] = [mine]
        if self.num_workers > 1:
            workers = [None] * self.num_workers
            torch.distributed.all_gather_object(workers, mine, group=self.group)
        if self.rank != 0:
            return
        schedule = scale_to_batch(self.config.optim, self.config.global_batch_size)
        is_exact = self.config.train.nonfinite == "stop" or steps_done == step + 1
        further = {
            "learning_rate": learning_rate(step, self.last_step, schedule),
            "loss_scale": scaler.get_scale() if scaler.is_enabled() else None,
            "weights_of_step": step if is_exact else steps_done,
            "device": device.type,
            "precision": {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[self.dtype],
            "class_names": list(self.shards.manifest.class_names),
            "config": self.config.model_dump(mode="json"),
        }
        write_record(self.run_folder, step, values, workers, model, further)


def check_scale(scaler: torch.amp.GradScaler, step: int) -> None:
    """Notice a training in fp16 that learns nothing any more, because every step is left out.

    Raises:
        NonFiniteLossError: the loss scale has fallen below what any gradient needs.
    """
    if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
        raise NonFiniteLossError(
            f"step {step}: the loss scale of fp16 has fallen to {scaler.get_scale():g}, every gradient overflows; "
            "take --train.precision bf16 or fp32"
        )
