"""What each training process does: restore, step, log, evaluate, checkpoint (a Ray Train worker)."""

from __future__ import annotations

import functools
import statistics
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from model.synchronised_norm import synchronise_norms
from pipeline.bad_steps import BadSteps, check_scale
from pipeline.batch_shares import batch_share
from pipeline.checkpoint import (
    AVERAGE_FILE,
    Description,
    capture,
    check_same_classes,
    load_model_state,
    load_optimizer_state,
    read_description,
)
from pipeline.checkpoint_store import CheckpointStore, local_folder
from pipeline.checkpoint_writer import checkpoint_bytes
from pipeline.config import ExperimentConfig
from pipeline.ema import averaged_copy, update_average
from pipeline.errors import SharedError
from pipeline.freezing import freeze
from pipeline.gradient_exchange import adds_in_fixed_order, exchange_gradients, pin_arithmetic
from pipeline.initial_weights import load_initial_weights
from pipeline.ledger import StepLedger, peak_memory_megabytes
from pipeline.nonfinite import is_bad
from pipeline.optim import build_optimizer, learning_rate, scale_to_batch
from pipeline.prepare import PreparedData
from pipeline.progress import seconds_left, settled_paces
from pipeline.shards import ShardSet
from pipeline.stopping import JUDGED_METRICS, stop_reason
from pipeline.stream import LoadBlock
from pipeline.tracking import NAMESPACE, SHOW_GROUP
from pipeline.training import (
    STEP_METRICS,
    NonFiniteLossError,
    autocast_dtype,
    data_parallel_options,
    gradient_scaler,
    train_step,
)
from pipeline.training_plan import epoch_ends, make_plan, total_steps
from pipeline.trials import SweepJudge
from pipeline.update_guard import UpdateGuard
from pipeline.watchdog import Pulse, first_beat
from pipeline.worker_batches import WorkerBatches
from pipeline.worker_checkpoints import WorkerCheckpoints
from pipeline.worker_evaluation import WorkerEvaluation
from pipeline.worker_voice import WorkerVoice


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Train from the latest checkpoint of the run to its last step.

    Args:
        settings: config (as from `model_dump`), run_folder, training and validation (folders of shards),
            initial_weights (file, or None for random ones), tracker (actor name), cpus_for_data, trial (arguments of
            `SweepJudge`, None where it is not one of a sweep's).

    Returns:
        Of rank 0: the steps done, images_per_second, and the metrics of the last evaluation; or an error that another
        attempt would only repeat.
    """
    worker = Worker(settings)
    try:
        worker.restore()
        worker.train()
    except (NonFiniteLossError, SharedError) as error:
        # All workers see the same and stop together; raised, it would be tried again, to the same end.
        return {"error": str(error)}
    finally:
        worker.pulse.stop()
    return worker.summary()


@dataclass
class _Pace:
    """Time since the last time that metrics were fetched."""

    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    steps: int = 0


class Worker:
    """State of one training process; rank 0 also logs and writes."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import ray.train
        import ray.train.collective
        import ray.train.torch

        context = ray.train.get_context()
        self.rank, self.num_workers = context.get_world_rank(), context.get_world_size()
        self.config = ExperimentConfig.model_validate(settings["config"])
        self.device = ray.train.torch.get_device()
        pin_arithmetic(self.config, self.device.type)
        self.data = PreparedData(settings["training"], settings["validation"])
        self.shards, validation = ShardSet(self.data.training), ShardSet(self.data.validation)
        self.initial_weights: str | None = settings["initial_weights"]
        self.judge = SweepJudge(*settings["trial"]) if settings["trial"] is not None else None
        run_actor = ray.get_actor(settings["tracker"], namespace=NAMESPACE)
        self.voice = WorkerVoice(run_actor if self.rank == 0 else None, self.config.run.name)
        group = ray.train.collective.broadcast_from_rank_zero(uuid.uuid4().hex)
        beat = first_beat(group, self.rank, self.num_workers, ray.get_runtime_context().get_node_id())
        self.pulse = Pulse(beat, run_actor.beat.options(concurrency_group=SHOW_GROUP).remote)
        images = self.config.train.batch_size_per_worker
        self.share = batch_share(self.config.global_batch_size, self.num_workers, images)

        self.plan = make_plan(self.config, self.shards)
        self.last_step = total_steps(self.config, self.plan)
        self.dtype = autocast_dtype(self.config.train.precision, self.device.type)
        compression = self.config.train.gradient_compression
        self.scaler = gradient_scaler(self.dtype, self.device.type, compression)
        torch.manual_seed(self.config.train.seed)  # initial weights; all later draws are functions of the plan
        self.model = MaskRCNN(self.config.model, self.shards.manifest.num_classes)
        if self.config.train.synchronise_norms:
            synchronise_norms(self.model)
        self.model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        freeze(self.model, self.config.train.trainable_layers)
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.averaged = averaged_copy(self.model) if self.config.optim.ema_decay is not None else None
        self.noticed: set[str] = set()
        self.guard = UpdateGuard(self.config.train.nonfinite)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.step_metrics: dict[str, float] = {}
        self.evaluations: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.images_trained, self.seconds_trained, self.speed_before = 0, 0.0, 0.0
        self.paces: list[float] = []  # seconds a step, each over the steps logged together
        run_folder: str = settings["run_folder"]
        self.checkpoints = WorkerCheckpoints(CheckpointStore(run_folder), self.config.checkpoints, self.rank)
        self.evaluation = WorkerEvaluation(validation, self.rank, self.num_workers, self.device, self.dtype)
        load, place = self._load_block(), (self.rank, self.num_workers)
        cpus = settings["cpus_for_data"]
        self.batches = WorkerBatches(self.config, self.shards, self.plan, load, self.share, *place, cpus)
        shared = (run_folder, self.last_step, *place, self.share.passes, self.dtype, self.evaluation.group)
        self.bad_steps = BadSteps(self.config, self.plan, load, self.shards, *shared)
        self.ledger: StepLedger | None = None

    def restore(self) -> None:
        """Go on from the newest whole checkpoint of the run, else begin with the run's initial weights.

        Raises:
            SharedError: the disk has no room for checkpoints.
        """
        newest = self.checkpoints.newest(checkpoint_bytes(self.model, self.optimizer, self.averaged), self.voice.warn)
        if newest is None:
            if self.initial_weights is not None:
                load_initial_weights(self.initial_weights, self.model)
                if self.averaged is not None:
                    load_initial_weights(self.initial_weights, self.averaged)
            return
        with local_folder(newest) as folder:
            description = read_description(folder)
            check_same_classes(description, list(self.shards.manifest.class_names), newest)
            load_model_state(folder, self.model)
            load_optimizer_state(folder, self.optimizer)
            if self.averaged is not None:
                load_model_state(folder, self.averaged, AVERAGE_FILE)
            if description.gradient_scaler:
                self.scaler.load_state_dict(description.gradient_scaler)
        self.step, self.metrics = description.step, description.metrics
        self.bad_steps.skipped = description.skipped_steps
        self.evaluations = description.evaluations
        self.stopped = stop_reason(self.evaluations, self.config.train)
        if self.judge is not None:
            self.stopped = self.stopped or self.judge.verdict()
        self.speed_before = description.images_per_second

    def train(self) -> None:
        """Step through the rest of the plan."""
        if self.step >= self.last_step or self.stopped:
            if not self.metrics:  # it was saved between evaluations, and the training shortened to end here
                self._evaluate()
                self._checkpoint(evaluated=True)
            return
        import ray.train.torch

        options = data_parallel_options(self.share.passes)
        parallel: nn.Module = ray.train.torch.prepare_model(
            self.model, move_to_device=False, parallel_strategy_kwargs=options
        )
        fixed_order = adds_in_fixed_order(self.config, self.device.type, self.num_workers)
        exchange_gradients(parallel, self.config.train.gradient_compression, fixed_order)
        ledger = self.ledger = StepLedger(parallel, self.optimizer, self.device)
        parallel.train()
        evaluated_at = epoch_ends(self.plan, self.last_step, self.config.train.evaluate_every_epochs)
        saved_at = evaluated_at | epoch_ends(self.plan, self.last_step, self.config.checkpoints.every_epochs)
        if self.config.checkpoints.every_steps is not None:
            saved_at |= set(
                range(self.config.checkpoints.every_steps, self.last_step, self.config.checkpoints.every_steps)
            )
        checkpointed_at = time.monotonic()
        fetched: list[Tensor] = []
        pace = _Pace()
        batches = self.batches.of_steps(self.step, self.last_step)
        while self.step < self.last_step and not self.stopped:
            waiting_since = time.monotonic()
            self.pulse.at(self.step, "waiting for data of step")
            passes = range(self.share.passes)
            of_step = [ledger.next_batch(self.step, batches, self._on_device) for _ in passes]
            pace.waited += time.monotonic() - waiting_since
            self.pulse.at(self.step, "step")
            fetched.append(self._train_step(parallel, of_step))
            if self.averaged is not None and self.config.optim.ema_decay is not None:
                update_average(self.averaged, self.model, self.step, self.config.optim.ema_decay)
            self.step += 1
            pace.steps += 1
            # On a CPU nothing has to be waited for to see at once whether the step was bad.
            is_known_bad = self.device.type == "cpu" and is_bad(fetched[-1][-1:].tolist())
            if self.step not in saved_at and self.step % self.config.train.log_every_steps and not is_known_bad:
                continue
            overdue = time.monotonic() - checkpointed_at > self.config.checkpoints.every_minutes * 60
            checkpoint_now = self._log_steps(fetched, pace, overdue) or self.step in saved_at
            notice = self._has_notice()
            if self.step in evaluated_at:
                self._evaluate()
            if checkpoint_now or notice:
                self._checkpoint(evaluated=self.step in evaluated_at, wait=notice)
                checkpointed_at = time.monotonic()
            fetched, pace = [], _Pace()
        if not self.stopped and next(batches, None) is not None:
            raise RuntimeError("the stream goes on after the last step")

    def _train_step(self, parallel: nn.Module, batches: list[Batch]) -> Tensor:
        arguments = (self.optimizer, self.config, self.step, self.last_step, self.dtype, self.scaler, self.guard)
        return train_step(parallel, batches, *arguments)

    def summary(self) -> dict[str, Any]:
        """How far and how fast it went."""
        settled = settled_paces(self.paces)
        return {
            "steps": self.step,
            "images_per_second": round(self._speed(), 2),
            "seconds_a_step": round(statistics.median(settled), 5) if settled else None,
            "step_seconds": self.ledger.means() if self.ledger is not None else {},
            "first_batch_seconds": self.ledger.first_batch_seconds if self.ledger is not None else None,
            "peak_memory_megabytes": round(peak_memory_megabytes(self.device)),
            "metrics": self.metrics,
            "stopped": self.stopped,
        }

    def _on_device(self, batch: Batch) -> Batch:
        return batch.pin_memory().to(self.device) if self.device.type == "cuda" else batch

    def _load_block(self) -> LoadBlock:
        """What turns planned rows into samples."""
        config, digest = self.config, self.shards.manifest.digest
        return LoadBlock(self.data.training, digest, config.augment, config.train.seed, config.data.mini_masks)

    def _log_steps(self, fetched: list[Tensor], pace: _Pace, overdue: bool) -> bool:
        """Average the metrics of the latest steps over the workers and log them.

        Returns:
            Whether to write a checkpoint now: rank 0 decides, since clocks differ.
        """
        first_step = self.step - len(fetched)
        values = torch.stack(fetched)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - pace.started
        self.seconds_trained += seconds
        self.images_trained += pace.steps * self.config.global_batch_size
        decision = torch.full((1,), float(overdue and self.rank == 0), device=self.device)
        if self.num_workers > 1:
            torch.distributed.all_reduce(values)
            torch.distributed.all_reduce(decision)
            values /= self.num_workers
        images_per_second = pace.steps * self.config.global_batch_size / seconds
        self.paces.append(seconds / pace.steps)
        rows = values.tolist()
        schedule = scale_to_batch(self.config.optim, self.config.global_batch_size)
        step_seconds = self.ledger.means() if self.ledger is not None else {}
        to_log: list[tuple[int, dict[str, float]]] = []
        for offset, row in enumerate(rows):
            if is_bad(row):
                self.voice.warn(self.bad_steps.take(first_step + offset, row, self.model, self.scaler, self.step))
            self.step_metrics = {
                **dict(zip(STEP_METRICS, row, strict=True)),
                "learning_rate": learning_rate(first_step + offset, self.last_step, schedule),
                "images_per_second": images_per_second,
                "data_wait_fraction": pace.waited / seconds,
                **step_seconds,
            }
            to_log.append((first_step + offset + 1, self.step_metrics))
        self.voice.log_rows(to_log)
        check_scale(self.scaler, self.step)
        self._show(
            losses=dict(zip(STEP_METRICS, rows[-1], strict=True)),
            images_per_second=images_per_second,
            data_wait_fraction=pace.waited / seconds,
            seconds_left=seconds_left(self.last_step - self.step, self.paces),
        )
        return bool(decision.item() > 0)

    def _evaluate(self) -> None:
        """COCO AP on the validation rows, shared out among the workers."""
        self.pulse.at(self.step, "evaluation")
        self.evaluation.share_statistics(self.model, self.averaged)
        message: list[Any] = [self.evaluation.metrics(self._judged(), self.config.train.rpn_recall), None]
        if self.rank == 0 and self.judge is not None:
            is_last = self.step >= self.last_step
            message[1] = self.judge.judge(self.step, self._epoch(), is_last, {**self.step_metrics, **message[0]})
        message = self.evaluation.from_first(message)  # metrics, and the sweep's reason to stop
        self.metrics = message[0]
        self.evaluations.append({name: self.metrics[name] for name in JUDGED_METRICS})
        self.stopped = stop_reason(self.evaluations, self.config.train) or message[1]
        self.voice.log(self.step, {**self.metrics, "epoch": self._epoch()})
        self._show(evaluated=self.metrics)
        picture = self.evaluation.picture(self._judged()) if self.rank == 0 else None
        if picture is not None:
            self.voice.log_picture(picture, f"step-{self.step:07d}.png")

    def _judged(self) -> MaskRCNN:
        """The weights that are evaluated and predicted with."""
        return self.averaged or self.model

    def _has_notice(self) -> bool:
        """Whether a node of this run is about to be taken back and the state has not been saved for that."""
        import ray.train

        info = ray.train.get_preemption_info()  # the same for all workers
        if info is None or set(info.preempted_node_ids) <= self.noticed:
            return False
        self.noticed |= set(info.preempted_node_ids)
        self.voice.warn(f"a node is about to be taken back; the state of step {self.step} is saved")
        return True

    def _checkpoint(self, evaluated: bool, wait: bool = False) -> None:
        """Save the state; an evaluated one is waited for, others are written while the training goes on."""
        self.pulse.at(self.step, "checkpoint")
        description = Description(
            step=self.step,
            epoch=self._epoch(),
            images_per_second=self._speed(),
            metrics=self.metrics if evaluated else {},  # what was not evaluated is never the best
            class_names=list(self.shards.manifest.class_names),
            manifest_digest=self.shards.manifest.digest,
            config=self.config.model_dump(mode="json"),
            evaluations=list(self.evaluations),
            gradient_scaler=self.scaler.state_dict(),
            skipped_steps=self.bad_steps.skipped,
        )
        state = functools.partial(capture, self.model, self.optimizer, self.averaged)
        self.checkpoints.save(state, description, self.voice.journal())
        if evaluated or wait:
            self.checkpoints.finish()

    def _show(self, **news: Any) -> None:
        """Tell the driver where the training is."""
        self.voice.show({"step": self.step, "last_step": self.last_step, "epoch": self._epoch(), **news})

    def _speed(self) -> float:
        """Images a second over the steps since this start, or those before where there are none."""
        return self.images_trained / self.seconds_trained if self.seconds_trained else self.speed_before

    def _epoch(self) -> float:
        return self.step * self.config.global_batch_size / self.plan.num_rows
