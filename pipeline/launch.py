"""A training from the driver's side: place it, record it, run it, show it, sum it up."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline import allocator, run_state, storage
from pipeline.checkpoint_store import CheckpointStore, best, check_writable
from pipeline.cluster import GROUP_START_SECONDS, Placement, place_workers
from pipeline.config import ExperimentConfig, ScalingSettings
from pipeline.doctor import check_at_start
from pipeline.errors import Terminated, UserError, last_line
from pipeline.initial_weights import InitialWeights
from pipeline.mlflow_place import tracking_uri
from pipeline.optim import explain_scaling, scale_to_batch
from pipeline.prepare import PreparedData
from pipeline.progress import ProgressDisplay
from pipeline.shards import ShardSet
from pipeline.smoke import is_smoke
from pipeline.training_plan import make_plan, total_steps
from pipeline.training_record import (
    begin_run,
    deliver_the_rest,
    end_run,
    record_checkpoints,
    start_tracker,
    write_down_run_id,
)
from pipeline.worker import train_worker

Say = Callable[[str], None]
SUMMARY_METRICS = ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50")


@dataclass(frozen=True)
class TrialOfSweep:
    """What a training that is a trial of a sweep has from it."""

    number: int
    ledger: str
    """Name of the actor that judges it, see `pipeline.trials.Ledger`."""
    placement: Placement
    """Its share of the cluster."""
    parent_run_id: str | None
    """MLflow run of the sweep."""


def finished_summary(config: ExperimentConfig, say: Say, with_data: bool = False) -> dict[str, Any] | None:
    """Summary of a run that has nothing left to do, None for every other.

    Args:
        config: whole.
        say: takes lines for a person to read.
        with_data: look at the annotation files; a finished run whose files are not what they were gives None, too, so
            that its data are looked at like those of every other (`run_state.has_annotations_of`).

    Raises:
        UserError: the run was begun with another configuration.
    """
    tracking_uri(config)  # shown before anything is read or started
    folder = run_state.run_folder(config)
    state, result = run_state.read_run(folder), run_state.read_result(folder)
    if state is not None:
        run_state.check_unchanged(state, config, folder)
    if state is None or result is None or result.length != _length(config):
        return None
    if with_data and not run_state.has_annotations_of(state, config):
        return None
    deliver_the_rest(config, folder, say)
    say(f"run {config.run.name} in {folder} is finished ({result.summary['steps']} steps); nothing to do")
    return result.summary


def check_storage(config: ExperimentConfig) -> None:
    """See that the run's folder can be written, before anything is read or started.

    Raises:
        UserError: it cannot.
    """
    check_writable(run_state.run_folder(config))


def train(
    config: ExperimentConfig,
    data: PreparedData,
    weights: InitialWeights | None,
    say: Say,
    trial: TrialOfSweep | None = None,
) -> dict[str, Any]:
    """Run a training to its end, or go on with it; Ray has to be running.

    Args:
        config: whole.
        data: shards.
        weights: to begin with, None for random ones.
        say: takes lines for a person to read.
        trial: where it is one of a sweep's; its checkpoints then stay out of MLflow.

    Returns:
        The summary that the job prints as JSON.

    Raises:
        UserError: what the user can mend.
    """
    started = time.monotonic()
    folder = run_state.run_folder(config)
    shards, validation = ShardSet(data.training), ShardSet(data.validation)
    _check_data(config, shards, validation)
    if trial is None:
        placement = place_workers(config.scaling, say)
        check_at_start(config, say)
    else:
        placement = trial.placement  # of a cluster that the sweep has looked at
    state = run_state.read_run(folder)
    if state is not None:
        run_state.check_unchanged(state, config, folder)
        run_state.check_same_data(state, config, shards.manifest.digest, validation.manifest.digest, folder)
    _explain(config, shards, validation, placement, folder, state, say)
    if weights is not None:
        weights.write()

    tracker_name = f"tracker-{uuid.uuid4().hex}"
    parent_run_id = trial.parent_run_id if trial is not None else None
    tracker = start_tracker(config, folder, tracker_name, state, data.training, parent_run_id)
    begin_run(tracker, config, state, folder, shards, validation)
    if weights is not None and weights.report is not None:
        tracker.log_text.remote("\n".join(weights.report.lines(most_names=None)), "initial_weights.txt")
    status = "FAILED"
    try:
        with _followed(tracker, say) if trial is None else contextlib.nullcontext():
            result = _fit(config, data, weights, placement, tracker_name, trial)
        if "error" in result.return_value:
            raise UserError(f"training failed: {result.return_value['error']}")
        if result.return_value["stopped"]:
            say(f"train: stopped at step {result.return_value['steps']}: {result.return_value['stopped']}")
        if trial is None and not is_smoke(config):  # of ten steps there is nothing to keep
            record_checkpoints(tracker, folder)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run_id = end_run(tracker, status, say, shown=trial is None)
    summary = _summarise(folder, result, run_id, time.monotonic() - started)
    write_down_run_id(folder, run_id)
    run_state.write_result(folder, run_state.RunResult(_length(config), summary))
    return summary


def register(config: ExperimentConfig, name: str, summary: dict[str, Any], say: Say) -> dict[str, Any]:
    """Put the best checkpoint of a finished run into the registry.

    Returns:
        What the job adds to its summary.

    Raises:
        UserError: MLflow does not know the run, or refuses.
    """
    from pipeline import registry

    state = run_state.read_run(run_state.run_folder(config))
    digest = state.validation_digest if state is not None else ""
    registered = registry.register(tracking_uri(config), name, summary["mlflow_run_id"], summary["segm_AP"], digest)
    say(registered.line)
    return {"registered": f"models:/{name}/{registered.version}", "champion": registered.champion}


def _length(config: ExperimentConfig) -> str:
    """How long the configuration wants to train, in its own terms."""
    train = config.train
    ends = {"target_bbox_AP": train.target_bbox_AP, "target_segm_AP": train.target_segm_AP, "patience": train.patience}
    early = "".join(f", {name} {value:g}" for name, value in ends.items() if value is not None)
    return f"epochs {train.epochs:g}, max_steps {train.max_steps}{early}"


def _in_words(length: str) -> str:
    """What `_length` says, without what is not set."""
    return length.replace(", max_steps None", "")


def _check_data(config: ExperimentConfig, shards: ShardSet, validation: ShardSet) -> None:
    if len(shards) < 1 or len(validation) < 1:
        raise UserError("training and validation need at least one image each")
    for name, manifest in (("training", shards.manifest), ("validation", validation.manifest)):
        if (manifest.canvases, manifest.short_side) != (config.data.canvases, config.data.short_side):
            raise UserError(
                f"the {name} shards were made for other data.canvases or another data.short_side; "
                "run jobs/prepare.py with this configuration"
            )


def _explain(
    config: ExperimentConfig,
    shards: ShardSet,
    validation: ShardSet,
    placement: Placement,
    folder: str,
    state: run_state.RunState | None,
    say: Say,
) -> None:
    steps = total_steps(config, make_plan(config, shards))
    device = "GPU" if placement.use_gpu else "CPU"
    passes = f" x {config.train.accumulation_steps} passes" if config.train.accumulation_steps > 1 else ""
    say(
        f"train: {len(shards)} images, {shards.manifest.num_classes - 1} classes, {len(validation)} to validate on; "
        f"{config.scaling.num_workers} workers ({device}) x {config.train.batch_size_per_worker} images{passes} = "
        f"{config.global_batch_size} a step, {steps} steps"
    )
    say(f"train: {explain_scaling(config.optim, config.global_batch_size)}")
    warmup_steps = scale_to_batch(config.optim, config.global_batch_size).warmup_steps
    if warmup_steps >= steps and not is_smoke(config):
        say(
            f"train: warning: a warm-up of {warmup_steps} steps is as long as the training of {steps}, so the learning "
            "rate never gets to its peak; lower optim.warmup_steps"
        )
    say(f"train: {_where_it_begins(config, steps, folder, state)}")


def _where_it_begins(config: ExperimentConfig, steps: int, folder: str, state: run_state.RunState | None) -> str:
    """Whether a run is new, and if not, how far it is and what is left."""
    run = f"run {config.run.name} in {folder}"
    if state is None:
        return f"beginning {run}"
    stored, result = CheckpointStore(folder).list(), run_state.read_result(folder)
    step = stored[-1].description.step if stored else 0
    asked = _in_words(_length(config))
    if step >= steps:
        return f"{run} has {step} steps already, and {asked} makes {steps}: no step is left to train"
    if result is not None and step <= result.summary["steps"]:  # not cut off since
        return (
            f"going on with {run}, which had finished at step {step} ({_in_words(result.length)}): "
            f"{steps - step} steps more, since {asked} is asked now"
        )
    return f"going on with {run}, whose last checkpoint is of step {step} of {steps}"


@contextlib.contextmanager
def _followed(tracker: Any, say: Say) -> Iterator[None]:
    """A job's main thread waits for its training: it shows where that is, and ends it in order when it is to end."""
    with ending_on_sigterm(), ProgressDisplay(tracker, say):
        yield


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Have SIGTERM raise `Terminated`; Ray's own handler, set with its start, would end the process at once.

    Inside of a wait for Ray it comes out as a plain KeyboardInterrupt, or as whatever Ray makes of that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = threading.Event()

    def end(*_: object) -> None:
        asked.set()
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if asked.is_set() and not isinstance(interrupt, Terminated):
            raise Terminated from interrupt
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _fit(
    config: ExperimentConfig,
    data: PreparedData,
    weights: InitialWeights | None,
    placement: Placement,
    tracker_name: str,
    trial: TrialOfSweep | None,
) -> Any:
    """Run the workers; Ray Train restarts them from the latest checkpoint when some are lost."""
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "run_folder": run_state.run_folder(config),
            "training": data.training,
            "validation": data.validation,
            "initial_weights": weights.path if weights is not None else None,
            "tracker": tracker_name,
            "cpus_for_data": placement.cpus_for_data,
            "trial": (trial.ledger, trial.number) if trial is not None else None,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=_worker_range(config.scaling),
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.resources_per_worker,
            elastic_resize_monitor_interval_s=config.scaling.grow_minutes * 60,
        ),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=storage.absolute(config.run.storage_path),
            worker_runtime_env=allocator.runtime_environment(),
            failure_config=ray.train.FailureConfig(
                max_failures=config.run.max_failures,
                controller_failure_limit=config.run.max_failures + _starts_while_waiting(config.scaling),
                max_preemption_failures=config.run.max_preemptions,
            ),
        ),
    )
    handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        reasons = sorted({last_line(failure) for failure in failures.values()}) or [last_line(error)]
        where = f" on workers {sorted(failures)}" if failures else ""
        raise UserError(f"training failed{where}: {'; '.join(reasons)}") from error
    except SystemExit as stopped:  # Ray Train's own handler of Ctrl-C has aborted the run
        raise KeyboardInterrupt from stopped
    finally:
        if threading.current_thread() is threading.main_thread():  # a trial runs in another, where none was replaced
            signal.signal(signal.SIGINT, handler)


def _worker_range(scaling: ScalingSettings) -> int | tuple[int, int]:
    least = scaling.min_workers
    return scaling.num_workers if least in (None, scaling.num_workers) else (least, scaling.num_workers)


def _starts_while_waiting(scaling: ScalingSettings) -> int:
    """How often Ray Train looks in vain for room for its workers while a lost node is waited for."""
    seconds = float(os.environ.get("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", GROUP_START_SECONDS))
    return math.ceil(scaling.wait_for_nodes_minutes * 60 / seconds)


def _summarise(folder: str, result: Any, run_id: str | None, seconds: float) -> dict[str, Any]:
    """What the job prints; the metrics are those of the checkpoint that it names, the best one."""
    chosen = best(CheckpointStore(folder).list())
    assert chosen is not None, "a training ends with a checkpoint"
    metrics = chosen.description.metrics or result.return_value["metrics"]
    return {
        **{name: round(metrics[name], 4) for name in SUMMARY_METRICS},
        "images_per_second": result.return_value["images_per_second"],
        "seconds_a_step": result.return_value["seconds_a_step"],
        "step_seconds": {name: round(value, 5) for name, value in result.return_value["step_seconds"].items()},
        "first_batch_seconds": result.return_value["first_batch_seconds"],
        "peak_memory_megabytes": result.return_value["peak_memory_megabytes"],
        "steps": result.return_value["steps"],
        "stopped": result.return_value["stopped"],
        "seconds": round(seconds, 1),
        "mlflow_run_id": run_id,
        "checkpoint": chosen.path,
    }
