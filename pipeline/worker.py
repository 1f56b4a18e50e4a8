"""What each training process does: restore, step, log, evaluate, checkpoint (a Ray Train worker)."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator
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
from pipeline.batches import PlannedBatches
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
from pipeline.checkpoint_writer import CheckpointWriter, checkpoint_bytes
from pipeline.cluster import cpus_beside
from pipeline.cluster_metrics import ClusterMetrics
from pipeline.config import ExperimentConfig
from pipeline.ema import averaged_copy, update_average
from pipeline.errors import SharedError, UserError
from pipeline.evaluation import average_precision, evaluate_rows, predict_rows, proposal_recall, rows_of_worker
from pipeline.freezing import freeze
from pipeline.gradient_exchange import adds_in_fixed_order, exchange_gradients, pin_arithmetic
from pipeline.initial_weights import load_initial_weights
from pipeline.ledger import StepLedger, peak_memory_megabytes
from pipeline.nonfinite import is_bad
from pipeline.optim import build_optimizer, learning_rate, scale_to_batch
from pipeline.prepare import PreparedData
from pipeline.report import draw_comparison
from pipeline.shards import ShardSet
from pipeline.stopping import JUDGED_METRICS, stop_reason
from pipeline.stream import LoadBlock, planned_blocks, split_stream, steps_per_block
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

NUM_PICTURES = 4
EVALUATION_BATCH_SIZE = 8
JOURNAL_SECONDS = 30.0  # a checkpoint waits at most so long for the metrics before it to be on a disk
MESSAGE_LENGTH = 900  # Ray Train broadcasts less than 1 kB
MAX_BLOCKS_PER_STREAM = 4096  # each costs the driver of the stream about a millisecond before the first batch comes


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
        self.shards, self.validation = ShardSet(self.data.training), ShardSet(self.data.validation)
        self.cpus_for_data: float = settings["cpus_for_data"]
        self.initial_weights: str | None = settings["initial_weights"]
        self.judge = SweepJudge(*settings["trial"]) if settings["trial"] is not None else None
        run_actor = ray.get_actor(settings["tracker"], namespace=NAMESPACE)
        self.tracker = run_actor if self.rank == 0 else None
        group = ray.train.collective.broadcast_from_rank_zero(uuid.uuid4().hex)
        beat = first_beat(group, self.rank, self.num_workers, ray.get_runtime_context().get_node_id())
        self.pulse = Pulse(beat, run_actor.beat.options(concurrency_group=SHOW_GROUP).remote)
        images = self.config.train.batch_size_per_worker
        self.share = batch_share(self.config.global_batch_size, self.num_workers, images)

        self.cluster_metrics = ClusterMetrics(self.config.run.name)
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
        self.store = CheckpointStore(settings["run_folder"])
        self.writer = CheckpointWriter(self.store, self.config.checkpoints) if self.rank == 0 else None
        self.unreported: dict[str, Any] | None = None
        self.last_logged: Any = None
        self.gloo = self._object_group()
        shared = (self.store.run_folder, self.last_step, self.rank, self.num_workers, self.share.passes, self.dtype)
        self.bad_steps = BadSteps(self.config, self.plan, self._load_block(), self.shards, *shared, self.gloo)
        self.ledger: StepLedger | None = None

    def restore(self) -> None:
        """Go on from the newest whole checkpoint of the run, else begin with the run's initial weights.

        Raises:
            SharedError: the disk has no room for checkpoints.
        """
        newest = self._newest_checkpoint()
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

    def _newest_checkpoint(self) -> str | None:
        """Rank 0 looks, all agree; what it refuses it says aloud."""
        import ray.train.collective

        newest, problem = None, None
        if self.rank == 0:
            self.store.remove_unfinished()
            newest = self.store.newest_whole(self._warn)
            keep = self.config.checkpoints.keep_best + self.config.checkpoints.keep_last
            try:
                self.store.check_room(checkpoint_bytes(self.model, self.optimizer, self.averaged), keep)
            except UserError as error:
                problem = str(error)
        self._stop_together(problem)
        agreed: str | None = ray.train.collective.broadcast_from_rank_zero(newest)
        return agreed

    def _stop_together(self, problem: str | None) -> None:
        """Raise on all workers what rank 0 has found.

        Raises:
            SharedError: there is a problem.
        """
        import ray.train.collective

        problem = ray.train.collective.broadcast_from_rank_zero(problem[:MESSAGE_LENGTH] if problem else None)
        if problem is not None:
            raise SharedError(problem)

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
        evaluations = epoch_ends(self.plan, self.last_step, self.config.train.evaluate_every_epochs)
        checkpoints = evaluations | epoch_ends(self.plan, self.last_step, self.config.checkpoints.every_epochs)
        if self.config.checkpoints.every_steps is not None:
            checkpoints |= set(
                range(self.config.checkpoints.every_steps, self.last_step, self.config.checkpoints.every_steps)
            )
        checkpointed_at = time.monotonic()
        fetched: list[Tensor] = []
        pace = _Pace()
        batches = self._batches()
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
            if self.step not in checkpoints and self.step % self.config.train.log_every_steps and not is_known_bad:
                continue
            overdue = time.monotonic() - checkpointed_at > self.config.checkpoints.every_minutes * 60
            checkpoint_now = self._log_steps(fetched, pace, overdue) or self.step in checkpoints
            notice = self._has_notice()
            if self.step in evaluations:
                self._evaluate()
            if checkpoint_now or notice:
                self._checkpoint(evaluated=self.step in evaluations, wait=notice)
                checkpointed_at = time.monotonic()
            fetched, pace = [], _Pace()
        if not self.stopped and next(batches, None) is not None:
            raise RuntimeError("the stream goes on after the last step")

    def _train_step(self, parallel: nn.Module, batches: list[Batch]) -> Tensor:
        arguments = (self.optimizer, self.config, self.step, self.last_step, self.dtype, self.scaler, self.guard)
        return train_step(parallel, batches, *arguments)

    def summary(self) -> dict[str, Any]:
        """How far and how fast it went."""
        return {
            "steps": self.step,
            "images_per_second": round(self._speed(), 2),
            "step_seconds": self.ledger.means() if self.ledger is not None else {},
            "first_batch_seconds": self.ledger.first_batch_seconds if self.ledger is not None else None,
            "peak_memory_megabytes": round(peak_memory_megabytes(self.device)),
            "metrics": self.metrics,
            "stopped": self.stopped,
        }

    def _on_device(self, batch: Batch) -> Batch:
        return batch.pin_memory().to(self.device) if self.device.type == "cuda" else batch

    def _batches(self) -> Iterator[Batch]:
        """Batches of this worker from the present step to the last."""
        per_block = steps_per_block(self.shards.manifest.canvases, self.share.images * self.share.passes)
        steps = max(1, MAX_BLOCKS_PER_STREAM // self.num_workers) * per_block
        for first_step in range(self.step, self.last_step, steps):
            yield from self._stream(first_step, min(first_step + steps, self.last_step), per_block)

    def _stream(self, first_step: int, last_step: int, per_block: int) -> PlannedBatches:
        """Batches of this worker for some steps; rank 0 builds the stream for all.

        Not through `datasets=` of the trainer: only here is it known from which checkpoint the run goes on.
        """
        import ray.train.collective

        iterators = None
        if self.rank == 0:
            blocks = planned_blocks(self.plan, first_step, last_step, self.num_workers, per_block)
            load = self._load_block()
            store_bytes = self.config.data.object_store_megabytes * 1024 * 1024
            cpus = min(self.cpus_for_data, cpus_beside(self.num_workers * self.config.scaling.cpus_per_worker))
            iterators = split_stream(blocks, load, self.num_workers, cpus, store_bytes)
        iterators = ray.train.collective.broadcast_from_rank_zero(iterators)
        return PlannedBatches(
            iterators[self.rank],
            self.shards.manifest.active_classes(),
            first_step,
            last_step,
            self.rank,
            self.share.images,
            self.num_workers,
            self.share.passes,
        )

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
        # The wait for the very first batch does not come again.
        steady = seconds - pace.waited if self.images_trained == pace.steps * self.config.global_batch_size else seconds
        rows = values.tolist()
        schedule = scale_to_batch(self.config.optim, self.config.global_batch_size)
        step_seconds = self.ledger.means() if self.ledger is not None else {}
        to_log: list[tuple[int, dict[str, float]]] = []
        for offset, row in enumerate(rows):
            if is_bad(row):
                self._warn(self.bad_steps.take(first_step + offset, row, self.model, self.scaler, self.step))
            self.step_metrics = {
                **dict(zip(STEP_METRICS, row, strict=True)),
                "learning_rate": learning_rate(first_step + offset, self.last_step, schedule),
                "images_per_second": images_per_second,
                "data_wait_fraction": pace.waited / seconds,
                **step_seconds,
            }
            to_log.append((first_step + offset + 1, self.step_metrics))
        self._log_rows(to_log)
        check_scale(self.scaler, self.step)
        self._show(
            losses=dict(zip(STEP_METRICS, rows[-1], strict=True)),
            images_per_second=images_per_second,
            data_wait_fraction=pace.waited / seconds,
            seconds_left=(self.last_step - self.step) * steady / pace.steps,
        )
        return bool(decision.item() > 0)

    def _evaluate(self) -> None:
        """COCO AP on the validation rows, shared out among the workers."""
        self.pulse.at(self.step, "evaluation")
        if self.num_workers > 1:
            # Norm statistics are each worker's own since the last forward pass; rank 0's go into the checkpoint.
            for buffer in [*self.model.buffers(), *(self.averaged.buffers() if self.averaged else ())]:
                torch.distributed.broadcast(buffer, src=0)
        rows = rows_of_worker(len(self.validation), self.rank, self.num_workers)
        recall = self.config.train.rpn_recall
        seen = evaluate_rows(self._judged(), self.validation, rows, EVALUATION_BATCH_SIZE, self.dtype, recall)
        everything: list[Any] | None = [None] * self.num_workers if self.rank == 0 else None
        if self.num_workers > 1:
            torch.distributed.gather_object(seen, everything, dst=0, group=self.gloo)
        else:
            everything = [seen]
        message: list[Any] = [None, None]  # metrics, and the sweep's reason to stop
        if self.rank == 0:
            assert everything is not None
            together = [entry for part in everything for entry in part]
            manifest = self.validation.manifest
            precision = average_precision(together, manifest.num_rows, manifest.num_classes)
            message[0] = {**precision, **proposal_recall(together)}
            if self.judge is not None:
                is_last = self.step >= self.last_step
                message[1] = self.judge.judge(self.step, self._epoch(), is_last, {**self.step_metrics, **message[0]})
        if self.num_workers > 1:
            torch.distributed.broadcast_object_list(message, src=0, group=self.gloo)
        self.metrics = message[0]
        self.evaluations.append({name: self.metrics[name] for name in JUDGED_METRICS})
        self.stopped = stop_reason(self.evaluations, self.config.train) or message[1]
        self._log(self.step, {**self.metrics, "epoch": self._epoch()})
        if self.tracker is not None:
            self._show(evaluated=self.metrics)
            self._draw_pictures()

    def _judged(self) -> MaskRCNN:
        """The weights that are evaluated and predicted with."""
        return self.averaged or self.model

    def _draw_pictures(self) -> None:
        """The first validation images with objects, predictions beside ground truth, to MLflow."""
        with_objects = (row for row in range(len(self.validation)) if len(self.validation.read_row(row)["classes"]))
        rows = [row for row, _ in zip(with_objects, range(NUM_PICTURES), strict=False)]
        if not rows or self.tracker is None:
            return
        model = self._judged().eval()
        found = list(predict_rows(model, self.validation, rows, EVALUATION_BATCH_SIZE, self.dtype))
        model.train()
        picture = draw_comparison(found, self.validation.manifest.class_names)
        self.tracker.log_picture.remote(picture, f"step-{self.step:07d}.png")

    def _has_notice(self) -> bool:
        """Whether a node of this run is about to be taken back and the state has not been saved for that."""
        import ray.train

        info = ray.train.get_preemption_info()  # the same for all workers
        if info is None or set(info.preempted_node_ids) <= self.noticed:
            return False
        self.noticed |= set(info.preempted_node_ids)
        if self.rank == 0:
            self._warn(f"a node is about to be taken back; the state of step {self.step} is saved")
        return True

    def _checkpoint(self, evaluated: bool, wait: bool = False) -> None:
        """Save the state; an evaluated one is waited for, others are written while the training goes on."""
        self.pulse.at(self.step, "checkpoint")
        self._finish_checkpoint()
        if self.writer is not None:
            description = Description(
                step=self.step,
                epoch=self._epoch(),
                images_per_second=self._speed(),
                metrics=self.metrics if evaluated else {},
                class_names=list(self.shards.manifest.class_names),
                manifest_digest=self.shards.manifest.digest,
                config=self.config.model_dump(mode="json"),
                evaluations=list(self.evaluations),
                gradient_scaler=self.scaler.state_dict(),
                skipped_steps=self.bad_steps.skipped,
            )
            state = capture(self.model, self.optimizer, self.averaged)
            self.writer.start(state, description, self._wait_for_journal(self.last_logged))
        score = self.metrics["segm_AP"] if evaluated else -1.0  # what was not evaluated is never the best
        self.unreported = {"step": self.step, "segm_AP": score, "checkpoint_path": self.store.path(self.step)}
        if evaluated or wait:
            self._finish_checkpoint()

    def _finish_checkpoint(self) -> None:
        """Wait for the checkpoint under way and report it to Ray Train, which keeps none itself.

        Raises:
            SharedError: it could not be written.
        """
        import ray.train

        if self.unreported is None:
            return
        self._stop_together(self.writer.finish() if self.writer is not None else None)
        report, self.unreported = self.unreported, None
        ray.train.report(report)

    def _wait_for_journal(self, last_logged: Any) -> Callable[[], None]:
        """What a checkpoint waits for before it counts: a resume from it would not log the steps before it again."""
        import ray

        def wait() -> None:
            if last_logged is not None:
                with contextlib.suppress(ray.exceptions.RayError):  # without a tracker there is nobody to tell
                    ray.get(last_logged, timeout=JOURNAL_SECONDS)

        return wait

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        self._log_rows([(step, metrics)])

    def _log_rows(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Send metrics of steps to the tracker, without waiting."""
        if self.tracker is not None:
            self.last_logged = self.tracker.log_rows.remote(rows)
            for step, metrics in rows:
                self.cluster_metrics.show(step, metrics)

    def _warn(self, text: str) -> None:
        """Have the driver tell the user."""
        if self.tracker is not None:
            self.tracker.warn.options(concurrency_group=SHOW_GROUP).remote(text)

    def _show(self, **news: Any) -> None:
        """Tell the driver where the training is."""
        if self.tracker is not None:
            place = {"step": self.step, "last_step": self.last_step, "epoch": self._epoch()}
            self.tracker.set_progress.options(concurrency_group=SHOW_GROUP).remote({**place, **news})

    def _speed(self) -> float:
        """Images a second over the steps since this start, or those before where there are none."""
        return self.images_trained / self.seconds_trained if self.seconds_trained else self.speed_before

    def _epoch(self) -> float:
        return self.step * self.config.global_batch_size / self.plan.num_rows

    def _object_group(self) -> Any:
        """Process group that sends Python objects from memory to memory, also where tensors go over NCCL."""
        if self.num_workers > 1 and self.device.type == "cuda":
            return torch.distributed.new_group(backend="gloo")
        return None
