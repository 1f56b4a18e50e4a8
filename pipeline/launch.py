"""A training from the driver's side: place it, record it, run it, show it, sum it up."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import run_state, storage
from pipeline.checkpoint_store import CheckpointStore, best, check_writable
from pipeline.cluster import GROUP_START_SECONDS, Placement, place_workers
from pipeline.config import ExperimentConfig, ScalingSettings
from pipeline.doctor import check_at_start
from pipeline.errors import Terminated, UserError
from pipeline.initial_weights import InitialWeights
from pipeline.mlflow_models import BEST_CHECKPOINT, LAST_CHECKPOINT
from pipeline.mlflow_runs import default_uri, flatten
from pipeline.optim import explain_scaling
from pipeline.prepare import PreparedData
from pipeline.progress import ProgressDisplay
from pipeline.run_actor import RunActor, RunActorSettings
from pipeline.shards import ShardSet
from pipeline.tracking import NAMESPACE, SHOW_GROUP, Tracker, journal_folder
from pipeline.worker import make_plan, total_steps, train_worker

Say = Callable[[str], None]
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
FINISH_SECONDS, KILLED_SECONDS = 60.0, 1.5  # for the last delivery to MLflow; Ray kills a stopped job after 3 s
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


def finished_summary(config: ExperimentConfig, say: Say) -> dict[str, Any] | None:
    """Summary of a run that has nothing left to do, None for every other.

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
    deliver_the_rest(config, folder, say)
    say(f"run {config.run.name} in {folder} is finished ({result.summary['steps']} steps); nothing to do")
    return result.summary


def check_storage(config: ExperimentConfig) -> None:
    """See that the run's folder can be written, before anything is read or started.

    Raises:
        UserError: it cannot.
    """
    check_writable(run_state.run_folder(config))


def deliver_the_rest(config: ExperimentConfig, folder: str, say: Say, seconds: float = FINISH_SECONDS) -> str | None:
    """Give MLflow what it was not there for when a run ended.

    Args:
        config: of the run.
        folder: of the run.
        say: told how that went, where there was something left.
        seconds: to try at most; 0 tries once.

    Returns:
        Id of the MLflow run; None where this machine has no journal of the run, or MLflow never answered.
    """
    if not Path(journal_folder(folder)).exists():
        return None
    tracker = Tracker(*_tracker_arguments(config, folder))
    if not tracker.everything_is_delivered:
        tracker.deliver(seconds)
        say(tracker.get_progress()["problem"] or f"MLflow at {tracking_uri(config)} has now got everything of the run")
    return tracker.run_id()


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
        run_state.check_same_data(state, shards.manifest.digest, validation.manifest.digest, folder)
    _explain(config, shards, validation, placement, folder, resumed=state is not None, say=say)
    if weights is not None:
        weights.write()

    tracker_name = f"tracker-{uuid.uuid4().hex}"
    parent_run_id = trial.parent_run_id if trial is not None else None
    tracker = _start_tracker(config, folder, tracker_name, state, data.training, parent_run_id)
    _begin_run(tracker, config, state, folder, shards, validation)
    _say_link(tracker, say)
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
        if trial is None:
            _record_checkpoints(tracker, folder)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run_id = _end_run(tracker, status, say, shown=trial is None)
    summary = _summarise(folder, result, run_id, time.monotonic() - started)
    _write_down_run_id(folder, run_id)
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
    resumed: bool,
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
    say(f"train: {'going on with' if resumed else 'beginning'} run {config.run.name} in {folder}")


def tracking_uri(config: ExperimentConfig) -> str:
    """Where MLflow records.

    Raises:
        UserError: run.storage_path is a bucket and no server is named.
    """
    return config.run.mlflow_uri or default_uri(storage.absolute(config.run.storage_path))


def _tracker_arguments(config: ExperimentConfig, folder: str) -> tuple[str, str, str, str, str | None]:
    """What `Tracker` is made with."""
    storage_path = storage.absolute(config.run.storage_path)
    uri = tracking_uri(config)
    artifacts = None  # a server has its own place for them
    if uri.startswith("sqlite:") and not storage.is_url(storage_path):
        Path(storage_path).mkdir(parents=True, exist_ok=True)
        artifacts = (Path(storage_path) / "mlflow-artifacts").as_uri()
    return uri, config.run.mlflow_experiment, config.run.name, folder, artifacts


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


def _start_tracker(
    config: ExperimentConfig,
    folder: str,
    name: str,
    state: run_state.RunState | None,
    training: str,
    parent_run_id: str | None,
) -> Any:
    """The tracker as an actor on this node, which lives as long as the driver; nobody waits for MLflow.

    Where its process is lost, Ray starts it again and it goes on with its journal.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if state is None and storage.is_url(folder):
        shutil.rmtree(journal_folder(folder), ignore_errors=True)  # of an earlier run that lay there
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {
        "name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here,
        "max_restarts": -1, "max_task_retries": -1,
    }  # fmt: skip
    # Calls are run in their order, but those that show progress need not wait behind an upload.
    actor = ray.remote(concurrency_groups={SHOW_GROUP: 1})(RunActor).options(**options)
    known_run_id = state.mlflow_run_id if state else None
    parameters = flatten(config.model_dump(mode="json"))
    arguments = _tracker_arguments(config, folder)
    return actor.remote(RunActorSettings(arguments, known_run_id, parameters, config, training, parent_run_id))


def _begin_run(
    tracker: Any,
    config: ExperimentConfig,
    state: run_state.RunState | None,
    folder: str,
    shards: ShardSet,
    validation: ShardSet,
) -> None:
    """Write the run's folder down, and record what the run begins with."""
    if not storage.is_url(folder):
        # Ray Train's own list of checkpoints. We keep none there, and it would stop at one that is gone or torn.
        Path(folder, SNAPSHOT_FILE).unlink(missing_ok=True)
    if state is not None:
        return
    resolved = config.model_dump(mode="json")
    digests = shards.manifest.digest, validation.manifest.digest
    run_state.write_run(folder, run_state.RunState(resolved, *digests, None))
    tracker.log_text.remote(json.dumps(resolved, indent=1), "config.json")
    class_map = {"background": 0, **{name: i + 1 for i, name in enumerate(shards.manifest.class_names)}}
    tracker.log_text.remote(json.dumps(class_map, indent=1), "class_map.json")


def _write_down_run_id(folder: str, run_id: str | None) -> None:
    """For those who go on with the run from another machine, or look for it in MLflow."""
    state = run_state.read_run(folder)
    if state is not None and run_id is not None and state.mlflow_run_id != run_id:
        run_state.write_run(folder, replace(state, mlflow_run_id=run_id))


def _say_link(tracker: Any, say: Say) -> None:
    """Where a person sees the run."""
    import ray

    if (link := ray.get(tracker.link.remote())) is not None:
        say(f"mlflow: {link}")


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
        reasons = sorted({_last_line(failure) for failure in failures.values()}) or [_last_line(error)]
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


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _summarise(folder: str, result: Any, run_id: str | None, seconds: float) -> dict[str, Any]:
    """What the job prints; the metrics are those of the checkpoint that it names, the best one."""
    chosen = best(CheckpointStore(folder).list())
    assert chosen is not None, "a training ends with a checkpoint"
    metrics = chosen.description.metrics or result.return_value["metrics"]
    return {
        **{name: round(metrics[name], 4) for name in SUMMARY_METRICS},
        "images_per_second": result.return_value["images_per_second"],
        "step_seconds": {name: round(value, 5) for name, value in result.return_value["step_seconds"].items()},
        "first_batch_seconds": result.return_value["first_batch_seconds"],
        "peak_memory_megabytes": result.return_value["peak_memory_megabytes"],
        "steps": result.return_value["steps"],
        "stopped": result.return_value["stopped"],
        "seconds": round(seconds, 1),
        "mlflow_run_id": run_id,
        "checkpoint": chosen.path,
    }


def _record_checkpoints(tracker: Any, folder: str) -> None:
    """Have MLflow keep the best and the last checkpoint, and the best as a model that it can serve."""
    stored = CheckpointStore(folder).list()
    for checkpoint, artifact_path in ((best(stored), BEST_CHECKPOINT), (stored[-1], LAST_CHECKPOINT)):
        if checkpoint is not None:
            tracker.log_folder.remote(checkpoint.path, artifact_path)
    if (chosen := best(stored)) is not None:
        tracker.log_model.remote(chosen.path)


def _end_run(tracker: Any, status: str, say: Say, shown: bool) -> str | None:
    """End the MLflow run truthfully, and say what went wrong; its id, if MLflow ever answered.

    Args:
        tracker: of the run.
        status: of MLflow.
        say: takes warnings.
        shown: whether the user has been told of its notices.
    """
    import ray

    seconds = KILLED_SECONDS if status == "KILLED" else FINISH_SECONDS
    run_id: str | None = None
    problems: list[str] = []
    try:
        ray.get(tracker.finish.remote(status, seconds), timeout=seconds + 1)
        run_id = ray.get(tracker.run_id.remote(), timeout=5)
        show = tracker.get_progress.options(concurrency_group=SHOW_GROUP)
        progress = ray.get(show.remote(), timeout=5)
        problems = [] if shown else progress["notices"]
        problems += [progress["problem"]] if progress["problem"] else []
    except (ray.exceptions.RayError, TimeoutError) as error:
        problems.append(f"the end of the run could not be recorded ({_last_line(error)})")
    for problem in problems:
        say(f"warning: {problem}")
    return run_id
