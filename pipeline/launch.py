"""A training from the driver's side: place it, record it, run it, show it, sum it up."""

from __future__ import annotations

import json
import signal
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import run_state, storage
from pipeline.checkpoint import build_model, read_description, write_checkpoint
from pipeline.cluster import Placement, place_workers
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.initial_weights import InitialWeights
from pipeline.optim import explain_scaling
from pipeline.prepare import PreparedData
from pipeline.progress import ProgressDisplay
from pipeline.shards import ShardSet
from pipeline.tracking import NAMESPACE, SHOW_GROUP, Tracker, default_uri, flatten
from pipeline.worker import make_plan, total_steps, train_worker

Say = Callable[[str], None]
SUMMARY_METRICS = ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50")


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
    say(f"run {config.run.name} in {folder} is finished ({result.summary['steps']} steps); nothing to do")
    return result.summary


def train(config: ExperimentConfig, data: PreparedData, weights: InitialWeights | None, say: Say) -> dict[str, Any]:
    """Run a training to its end, or go on with it; Ray has to be running.

    Args:
        config: whole.
        data: shards.
        weights: to begin with, None for random ones.
        say: takes lines for a person to read.

    Returns:
        The summary that the job prints as JSON.

    Raises:
        UserError: what the user can mend.
    """
    started = time.monotonic()
    folder = run_state.run_folder(config)
    shards, validation = ShardSet(data.training), ShardSet(data.validation)
    _check_data(config, shards, validation)
    placement = place_workers(config.scaling, say)
    state = run_state.read_run(folder)
    if state is not None:
        run_state.check_unchanged(state, config, folder)
        run_state.check_same_data(state, shards.manifest.digest, validation.manifest.digest, folder)
    _explain(config, shards, validation, placement, folder, resumed=state is not None, say=say)
    if weights is not None:
        weights.write()

    tracker_name = f"tracker-{uuid.uuid4().hex}"
    tracker = _start_tracker(config, folder, tracker_name)
    run_id = _begin_run(tracker, config, state, folder, shards, validation)
    if weights is not None and weights.report is not None:
        tracker.log_text.remote("\n".join(weights.report.lines(most_names=None)), "initial_weights.txt")
    status = "FAILED"
    try:
        with ProgressDisplay(tracker, say):
            result = _fit(config, data, weights, placement, tracker_name)
        if "error" in result.return_value:
            raise UserError(f"training failed: {result.return_value['error']}")
        status = "FINISHED"
        if result.return_value["stopped"]:
            say(f"train: stopped at step {result.return_value['steps']}: {result.return_value['stopped']}")
        summary = _summarise(config, result, run_id, time.monotonic() - started)
        _record_artifacts(tracker, config, shards, result)
        run_state.write_result(folder, run_state.RunResult(_length(config), summary))
        return summary
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _end_run(tracker, status, say)


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


def _start_tracker(config: ExperimentConfig, folder: str, name: str) -> Any:
    """The tracker as an actor on this node, which lives as long as the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    storage_path = storage.absolute(config.run.storage_path)
    uri = tracking_uri(config)
    artifacts = None  # a server has its own place for them
    if uri.startswith("sqlite:") and not storage.is_url(storage_path):
        Path(storage_path).mkdir(parents=True, exist_ok=True)
        artifacts = (Path(storage_path) / "mlflow-artifacts").as_uri()
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "scheduling_strategy": here}
    # Calls are run in their order, but those that show progress need not wait behind an upload.
    actor = ray.remote(concurrency_groups={SHOW_GROUP: 1})(Tracker).options(**options)
    return actor.remote(uri, config.run.mlflow_experiment, config.run.name, folder, artifacts)


def _begin_run(
    tracker: Any,
    config: ExperimentConfig,
    state: run_state.RunState | None,
    folder: str,
    shards: ShardSet,
    validation: ShardSet,
) -> str | None:
    """Begin or take up the MLflow run, and write the run's folder down."""
    import ray

    resolved = config.model_dump(mode="json")
    run_id: str | None = ray.get(tracker.start.remote(state.mlflow_run_id if state else None, flatten(resolved)))
    begun_with = state.config if state else resolved
    digests = shards.manifest.digest, validation.manifest.digest
    known_id = run_id or (state.mlflow_run_id if state else None)  # MLflow may be away now and back later
    run_state.write_run(folder, run_state.RunState(begun_with, *digests, known_id))
    if state is None:
        tracker.log_text.remote(json.dumps(resolved, indent=1), "config.json")
        class_map = {"background": 0, **{name: i + 1 for i, name in enumerate(shards.manifest.class_names)}}
        tracker.log_text.remote(json.dumps(class_map, indent=1), "class_map.json")
    return run_id


def _fit(
    config: ExperimentConfig,
    data: PreparedData,
    weights: InitialWeights | None,
    placement: Placement,
    tracker_name: str,
) -> Any:
    """Run the workers; Ray Train restarts them from the latest checkpoint when some are lost."""
    import ray.train
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "training": data.training,
            "validation": data.validation,
            "initial_weights": weights.path if weights is not None else None,
            "tracker": tracker_name,
            "cpus_for_data": placement.cpus_for_data,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.resources_per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=storage.absolute(config.run.storage_path),
            failure_config=ray.train.FailureConfig(
                max_failures=config.run.max_failures, controller_failure_limit=config.run.max_failures
            ),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config.checkpoints.keep, checkpoint_score_attribute="segm_AP", checkpoint_score_order="max"
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
        signal.signal(signal.SIGINT, handler)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _summarise(config: ExperimentConfig, result: Any, run_id: str | None, seconds: float) -> dict[str, Any]:
    """What the job prints; the metrics are those of the checkpoint that it names, the best one."""
    best = _best_checkpoint(result)
    with best.as_directory() as folder:
        metrics = read_description(folder).metrics or result.return_value["metrics"]
    return {
        **{name: round(metrics[name], 4) for name in SUMMARY_METRICS},
        "images_per_second": result.return_value["images_per_second"],
        "steps": result.return_value["steps"],
        "stopped": result.return_value["stopped"],
        "seconds": round(seconds, 1),
        "mlflow_run_id": run_id,
        "checkpoint": best.path,
    }


def _best_checkpoint(result: Any) -> Any:
    """By segm_AP, the latest of equals."""
    return max(result.best_checkpoints, key=lambda entry: (entry[1]["segm_AP"], entry[1]["step"]))[0]


def _record_artifacts(tracker: Any, config: ExperimentConfig, shards: ShardSet, result: Any) -> None:
    import ray

    for checkpoint, artifact_path in (
        (_best_checkpoint(result), "best_checkpoint"),
        (result.checkpoint, "last_checkpoint"),
    ):
        with checkpoint.as_directory() as folder:
            ray.get(tracker.log_folder.remote(folder, artifact_path))
    with _best_checkpoint(result).as_directory() as folder, tempfile.TemporaryDirectory() as served:
        model, description = build_model(folder)
        write_checkpoint(served, model, None, description)
        ray.get(tracker.log_model.remote(served, config.run.register_as))


def _end_run(tracker: Any, status: str, say: Say) -> None:
    import ray

    try:
        ray.get(tracker.finish.remote(status), timeout=60)
        show = tracker.get_progress.options(concurrency_group=SHOW_GROUP)
        problem = ray.get(show.remote(), timeout=60)["problem"]
    except (ray.exceptions.RayError, TimeoutError) as error:
        problem = f"the end of the run could not be recorded ({_last_line(error)})"
    if problem:
        say(f"warning: {problem}")
