"""The MLflow run of a training from the driver's side: begun, linked to, ended truthfully, delivered later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import run_state, storage
from pipeline.checkpoint_store import CheckpointStore, best
from pipeline.config import ExperimentConfig
from pipeline.errors import last_line
from pipeline.mlflow_models import BEST_CHECKPOINT, LAST_CHECKPOINT
from pipeline.mlflow_place import artifacts_folder, tracking_uri
from pipeline.mlflow_runs import flatten
from pipeline.run_actor import RunActor, RunActorSettings
from pipeline.shards import ShardSet
from pipeline.tracking import NAMESPACE, SHOW_GROUP, Tracker, journal_folder

Say = Callable[[str], None]
SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
FINISH_SECONDS, KILLED_SECONDS = 60.0, 1.5  # for the last delivery to MLflow; Ray kills a stopped job after 3 s


def start_tracker(
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


def begin_run(
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
    annotations = run_state.annotation_digests(config)
    if state is not None:
        if state.annotation_files != annotations:  # written otherwise, but they say the same
            run_state.write_run(folder, replace(state, annotation_files=annotations))
        return
    resolved = config.model_dump(mode="json")
    digests = shards.manifest.digest, validation.manifest.digest
    run_state.write_run(folder, run_state.RunState(resolved, *digests, None, annotations))
    tracker.log_text.remote(json.dumps(resolved, indent=1), "config.json")
    class_map = {"background": 0, **{name: i + 1 for i, name in enumerate(shards.manifest.class_names)}}
    tracker.log_text.remote(json.dumps(class_map, indent=1), "class_map.json")


def record_checkpoints(tracker: Any, folder: str) -> None:
    """Have MLflow keep the best and the last checkpoint, and the best as a model that it can serve."""
    stored = CheckpointStore(folder).list()
    for checkpoint, artifact_path in ((best(stored), BEST_CHECKPOINT), (stored[-1], LAST_CHECKPOINT)):
        if checkpoint is not None:
            tracker.log_folder.remote(checkpoint.path, artifact_path)
    if (chosen := best(stored)) is not None:
        tracker.log_model.remote(chosen.path)


def end_run(tracker: Any, status: str, say: Say, shown: bool) -> str | None:
    """End the MLflow run truthfully, and say what went wrong; its id, if MLflow ever answered.

    Args:
        tracker: of the run.
        status: of MLflow.
        say: takes lines for a person to read.
        shown: whether the user was shown the training: then its notices are known, and its page is told.
    """
    import ray

    seconds = KILLED_SECONDS if status == "KILLED" else FINISH_SECONDS
    run_id: str | None = None
    link: str | None = None
    problems: list[str] = []
    try:
        ray.get(tracker.finish.remote(status, seconds), timeout=seconds + 1)
        run_id = ray.get(tracker.run_id.remote(), timeout=5)
        show = tracker.get_progress.options(concurrency_group=SHOW_GROUP)
        progress = ray.get(show.remote(), timeout=5)
        link = progress["link"]
        problems = [] if shown else progress["notices"]
        problems += [progress["problem"]] if progress["problem"] else []
    except (ray.exceptions.RayError, TimeoutError) as error:
        problems.append(f"the end of the run could not be recorded ({last_line(error)})")
    for problem in problems:
        say(f"warning: {problem}")
    if shown and link is not None:
        say(f"mlflow: curves, and pictures among the artifacts: {link}")
    return run_id


def write_down_run_id(folder: str, run_id: str | None) -> None:
    """For those who go on with the run from another machine, or look for it in MLflow."""
    state = run_state.read_run(folder)
    if state is not None and run_id is not None and state.mlflow_run_id != run_id:
        run_state.write_run(folder, replace(state, mlflow_run_id=run_id))


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


def _tracker_arguments(config: ExperimentConfig, folder: str) -> tuple[str, str, str, str, str | None]:
    """What `Tracker` is made with."""
    return tracking_uri(config), config.run.mlflow_experiment, config.run.name, folder, artifacts_folder(config)
