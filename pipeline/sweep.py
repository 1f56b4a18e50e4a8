"""A sweep from the driver's side: prepare the data once, run trials with Ray Tune, record them, name the best.

Ray Tune runs the trials side by side, each in a process of its own that launches a Ray Train run. What is tried next
and what is stopped is decided by the ledger (`pipeline.trials`), which keeps it on disk: a trial hears at its own
evaluation that it is to stop and ends in order, with its last metrics, checkpoint and MLflow run, instead of being
killed; and a sweep that was killed goes on from files that a person can read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import cluster, prepare, run_state, storage
from pipeline.checkpoint import best_checkpoint_of_run
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.launch import TrialOfSweep, tracking_uri
from pipeline.preflight import REPORT
from pipeline.search import point_key
from pipeline.search_space import (
    Point,
    Space,
    advised_points,
    apply_point,
    check_start_points,
    shard_knobs,
    show_point,
    with_advice,
)
from pipeline.shards import read_manifest
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_report import draw_importances, draw_objective, draw_parallel_coordinates, table_file, table_lines
from pipeline.sweep_resources import check_disk, disk_bytes, trial_placement
from pipeline.tracking import NAMESPACE, SweepRecord, flatten
from pipeline.trial import SweepOfTrials, run_trial
from pipeline.trials import Ledger, Trial, ranked

Say = Callable[[str], None]
SWEEP_FILE, RESULT_FILE, TABLE_FILE, BEST_FILE = "sweep.json", "result.json", "trials.parquet", "best.yaml"
POLL_SECONDS = 0.5
MAY_CHANGE = (
    "run.",
    "checkpoints.",
    "data.root",
    "data.shards",
    "data.object_store_megabytes",
    "data.verify_shards",
    "train.log_every_steps",
    "sweep.max_",
    "sweep.keep_checkpoints",
)


@dataclass(frozen=True)
class SweepState:
    """What a sweep's folder says of it."""

    config: dict[str, Any]
    """The resolved configuration it was begun with."""
    mlflow_run_id: str | None


def finished_summary(config: SweepConfig, say: Say) -> dict[str, Any] | None:
    """Summary of a sweep that has nothing left to do, None for every other.

    Raises:
        UserError: the sweep was begun with another configuration.
    """
    tracking_uri(config.base())
    folder = run_state.run_folder(config)
    state = read_state(folder)
    if state is None:
        if run_state.read_run(folder) is not None:
            raise UserError(f"{folder}: is the run of a training; name the sweep with --run.name")
        return None
    check_unchanged(state, config, folder)
    result = read_json(storage.join(folder, RESULT_FILE))
    if result is None or result["budget"] != budget_of(config):
        return None
    summary: dict[str, Any] = result["summary"]
    say(f"sweep {config.run.name} in {folder} is finished ({summary['trials']} trials); nothing to do")
    return summary


def read_state(folder: str) -> SweepState | None:
    """State of a sweep, None where it was never begun."""
    content = read_json(storage.join(folder, SWEEP_FILE))
    return SweepState(**content) if content is not None else None


def read_json(path: str) -> dict[str, Any] | None:
    """A file of the sweep, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); begin a new sweep with --run.name") from error
    return content


def check_unchanged(state: SweepState, config: SweepConfig, folder: str) -> None:
    """Refuse to go on with another configuration than the sweep was begun with.

    Raises:
        UserError: with every difference.
    """
    before, after = flatten(state.config), flatten(config.model_dump(mode="json"))
    changes = [
        f"{key} {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if changes:
        raise UserError(
            f"{folder}: was begun with another configuration: {'; '.join(changes)}. "
            "Take the change back, or begin a new sweep with --run.name"
        )


def budget_of(config: SweepConfig) -> list[float | None]:
    """What ends a sweep; with another one it goes on."""
    return [config.sweep.max_trials, config.sweep.max_worker_hours, config.sweep.max_hours]


def run(config: SweepConfig, space: Space, debug: bool, say: Say) -> dict[str, Any]:
    """Run a sweep to its end, or go on with it.

    Args:
        config: whole.
        space: from `read_space`.
        debug: show Ray's messages.
        say: takes lines for a person to read.

    Returns:
        The summary that the job prints as JSON.

    Raises:
        UserError: what the user can mend.
    """
    started = time.monotonic()
    base, folder = config.base(), run_state.run_folder(config)
    of_shards = shard_knobs(space)
    combinations = of_shards.points() if of_shards.knobs else [{}]
    checked = [(point, prepare.check(apply_point(base, point), say)) for point in combinations]
    cluster.connect(debug, concurrent_trials(config), dashboard=True)
    data = {point_key(point): prepare.write(apply_point(base, point), entry, say) for point, entry in checked}
    candidates = read_advice(checked[0][1].folder)
    space = with_advice(space, candidates, base)
    starts = start_points(config, space, candidates)

    alone = cluster.place_workers(config.scaling, say)
    nodes, num_workers = cluster.node_resources(), config.scaling.num_workers
    number, placement = trial_placement(nodes, num_workers, alone, config.sweep.max_concurrent_trials)
    num_classes = read_manifest(next(iter(data.values())).training).num_classes
    check_disk(folder, disk_bytes(base, space, config.sweep, number, num_classes), say)
    say(
        f"sweep: {config.sweep.search} search with {config.sweep.scheduler} over {len(space.knobs)} knobs, "
        f"{len(starts)} start points, up to {config.sweep.max_trials} trials, {number} at once of {num_workers} workers"
    )

    parent = begin_parent(config, folder, say)
    ledger_name = f"ledger-{uuid.uuid4().hex}"
    ledger = _start_ledger(ledger_name, (folder, space, config.sweep, starts, num_workers))
    run_settings = base.run.model_copy(update={"mlflow_uri": tracking_uri(base)})
    resolved = base.model_copy(update={"run": run_settings}).model_dump(mode="json")
    of_sweep = TrialOfSweep(0, ledger_name, placement, parent.run_id)
    trials_have = SweepOfTrials(
        resolved, folder, data, tuple(k.name for k in of_shards.knobs), ledger_name, of_sweep, os.getcwd()
    )

    def record(trial: Trial) -> None:
        record_trial(trial, trials_have, parent, config.sweep.objective)

    status = "FAILED"
    try:
        with _News(ledger, say):
            _tune(trials_have, ledger, number, record)
        trials = _settled(ledger, record)
        summary = conclude(config, space, trials, folder, parent, say)
        summary["seconds"] = round(time.monotonic() - started, 1)
        result = {"budget": budget_of(config), "summary": summary}
        storage.write_bytes(storage.join(folder, RESULT_FILE), json.dumps(result, indent=1).encode())
        status = "FINISHED"
        return summary
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        parent.end(status)


def concurrent_trials(config: SweepConfig) -> int:
    """Trials that a Ray of our own on this machine counts CPUs for: those whose workers have a core each."""
    if config.sweep.max_concurrent_trials is not None:
        return config.sweep.max_concurrent_trials
    cores = cluster.local_cpus() - cluster.MIN_CPUS_FOR_DATA
    return max(1, cores // (config.scaling.num_workers * config.scaling.cpus_per_worker))


def read_advice(folder: str) -> list[dict[str, Any]]:
    """Scales and ratios that the data suggest, the configured ones first; none where shards came without a report."""
    report = read_json(storage.join(folder, REPORT))
    return [report["anchors"]["configured"], *report["anchors"]["candidates"]] if report is not None else []


def start_points(config: SweepConfig, space: Space, candidates: Sequence[dict[str, Any]]) -> list[Point]:
    """What is tried first: the user's points, then the advisor's anchors.

    Raises:
        ConfigurationError: one of the user's lies outside the space.
    """
    check_start_points(config.sweep.start_points, space)
    given = [dict(point) for point in config.sweep.start_points]
    return given + (advised_points(space, candidates, config.base()) if config.sweep.advised_anchors else [])


@dataclass(frozen=True)
class Parent:
    """MLflow run of the sweep."""

    record: SweepRecord
    run_id: str | None
    """None where MLflow was never reached."""

    def end(self, status: str) -> None:
        """End the run."""
        if self.run_id is not None:
            self.record.end(self.run_id, status)


def begin_parent(config: SweepConfig, folder: str, say: Say) -> Parent:
    """Begin or take up the sweep's MLflow run, and write the sweep's folder down."""
    uri, state = tracking_uri(config.base()), read_state(folder)
    artifacts = None
    storage_path = storage.absolute(config.run.storage_path)
    if uri.startswith("sqlite:") and not storage.is_url(storage_path):
        os.makedirs(storage_path, exist_ok=True)
        artifacts = (Path(storage_path) / "mlflow-artifacts").as_uri()
    record = SweepRecord(uri, config.run.mlflow_experiment, artifacts, say)
    resolved = config.model_dump(mode="json")
    known = state.mlflow_run_id if state else None
    run_id = record.begin(known, config.run.name, folder, flatten(resolved)) or known
    content = asdict(SweepState(state.config if state else resolved, run_id))
    storage.write_bytes(storage.join(folder, SWEEP_FILE), json.dumps(content, indent=1).encode())
    return Parent(record, run_id)


def _start_ledger(name: str, arguments: tuple[Any, ...]) -> Any:
    """The ledger as an actor on this node, which lives as long as the driver."""
    import ray

    actor = ray.remote(Ledger).options(name=name, namespace=NAMESPACE, num_cpus=0, resources=_here())
    ledger = actor.remote(*arguments)
    ray.get(ledger.trials.remote())  # damaged files show here
    return ledger


def _here() -> dict[str, float]:
    """A trifle of what only this node has."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return {name: 0.001 for name in resources if name.startswith("node:") and not name.startswith("node:__")}


def _tune(sweep: SweepOfTrials, ledger: Any, number: int, ended: Callable[[Trial], None]) -> None:
    """Have Ray Tune run what the ledger gives out."""
    # Tune's own files, tables and Ctrl-C handling have no part in this.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    from ray import tune

    from pipeline.ledger_search import LedgerSearch

    scratch = tempfile.mkdtemp(prefix="tune-")
    try:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(run_trial, sweep=sweep), {"CPU": 0, **_here()}),
            tune_config=tune.TuneConfig(
                search_alg=LedgerSearch(ledger, ended), num_samples=-1, max_concurrent_trials=number
            ),
            run_config=tune.RunConfig(
                name="sweep", storage_path=scratch, verbose=0, failure_config=tune.FailureConfig(max_failures=0)
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _News:
    """Shows what the ledger has to tell, from a thread."""

    def __init__(self, ledger: Any, say: Say) -> None:
        self._ledger, self._say = ledger, say
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> _News:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _follow(self) -> None:
        import ray

        finished = False
        while not finished:
            finished = self._done.wait(POLL_SECONDS)
            try:
                for line in ray.get(self._ledger.take_news.remote(), timeout=30):
                    self._say(line)
            except (ray.exceptions.RayError, TimeoutError):
                continue


def record_trial(trial: Trial, sweep: SweepOfTrials, parent: Parent, objective: str) -> None:
    """Tell the MLflow run of an ended trial how it ended; one that failed before it had its own gets one."""
    config = sweep.config_of(trial.number, trial.point)
    folder = storage.join(sweep.folder, trial.name)
    state = run_state.read_run(folder)
    run_id = state.mlflow_run_id if state is not None else None
    if run_id is None:
        parameters = flatten(config.model_dump(mode="json"))
        run_id = parent.record.begin(None, trial.name, folder, parameters, parent.run_id)
    if run_id is None:
        return
    rungs = [f"epoch {e['epoch']:g}: {e[objective]:.4f}" for e in trial.evaluations if objective in e]
    tags = {
        "sweep.trial": trial.name,
        "sweep.state": trial.state,
        "sweep.reason": trial.reason or "",
        "sweep.point": show_point(trial.point),
        "sweep.rungs": ", ".join(rungs),
    }
    parent.record.tag(run_id, tags)
    if trial.state == "failed":
        parent.record.end(run_id, "FAILED")


def _settled(ledger: Any, record: Callable[[Trial], None]) -> list[Trial]:
    """All trials, when none runs any more; those that ended while nobody listened are recorded too."""
    import ray

    trials: list[Trial] = ray.get(ledger.trials.remote())
    left = [trial.name for trial in trials if trial.state == "running"]
    if left:
        raise UserError(f"{', '.join(left)} did not come to an end; the same command goes on")
    for trial in trials:
        record(trial)
    return trials


def conclude(
    config: SweepConfig, space: Space, trials: Sequence[Trial], folder: str, parent: Parent, say: Say
) -> dict[str, Any]:
    """Write table, pictures and the best configuration, on disk and to MLflow, and show the table.

    Raises:
        UserError: no trial reached anything.
    """
    settings = config.sweep
    table = storage.join(folder, TABLE_FILE)
    storage.write_bytes(table, table_file(trials, space, settings, config.scaling.num_workers))
    for line in table_lines(trials, space, settings):
        say(line)
    counts = {state: sum(trial.state == state for trial in trials) for state in ("finished", "stopped", "failed")}
    best_first = ranked(trials, settings)
    if not best_first:
        reasons = sorted({str(trial.reason) for trial in trials})
        raise UserError(f"none of {len(trials)} trials reached anything: {'; '.join(reasons[:3])}")
    best = best_first[0]
    text = best_yaml(config, best)
    storage.write_bytes(storage.join(folder, BEST_FILE), text.encode())
    summary = {
        "best_trial": best.name,
        settings.objective: round(best.value(settings) or 0.0, 4),
        "best_point": best.point,
        "trials": len(trials),
        **counts,
        "best_config": storage.join(folder, BEST_FILE),
        "table": table,
        "mlflow_run_id": parent.run_id,
    }
    checkpoint = best_checkpoint_of_run(storage.join(folder, best.name))
    if checkpoint is not None:
        summary["checkpoint"] = checkpoint
    if parent.run_id is not None:
        parent.record.log_files(parent.run_id, files_of_conclusion(config, space, trials, text))
        for name in sorted(os.listdir(checkpoint)) if checkpoint is not None else []:
            parent.record.log_file(parent.run_id, os.path.join(checkpoint or "", name), "best_checkpoint")
    return summary


def files_of_conclusion(config: SweepConfig, space: Space, trials: Sequence[Trial], best: str) -> dict[str, bytes]:
    """Table, best configuration and pictures, by their path in the sweep's MLflow run."""
    settings = config.sweep
    pictures = {
        "objective.png": draw_objective(trials, settings),
        "parallel_coordinates.png": draw_parallel_coordinates(trials, space, settings),
        "importance.png": draw_importances(trials, space, settings),
    }
    return {
        BEST_FILE: best.encode(),
        TABLE_FILE: table_file(trials, space, settings, config.scaling.num_workers),
        "trials.txt": "\n".join(table_lines(trials, space, settings)).encode(),
        **{f"pictures/{name}": picture for name, picture in pictures.items() if picture is not None},
    }


def best_yaml(config: SweepConfig, best: Trial) -> str:
    """The configuration of the best trial, whole, as a run of its own."""
    experiment = apply_point(config.base(), best.point)
    experiment = _named(experiment, f"{config.run.name}-best")
    job = "train.py" if config.sweep.checkpoint is None else f"evaluate.py --checkpoint {config.sweep.checkpoint}"
    lines = [
        f"# What:    the best of sweep {config.run.name}: {best.name}, {show_point(best.point)}.",
        f"# Result:  {config.sweep.objective} {best.value(config.sweep):.4f}.",
        f"# Command: python jobs/{job} --config {BEST_FILE}",
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)


def _named(experiment: ExperimentConfig, name: str) -> ExperimentConfig:
    return experiment.model_copy(update={"run": experiment.run.model_copy(update={"name": name})})
