"""A sweep from the driver's side: prepare the data once, run trials with Ray Tune, record them, name the best.

Ray Tune runs the trials side by side, each in a process of its own that launches a Ray Train run. What is tried next
and what is stopped is decided by the ledger (`pipeline.trials`), which keeps it on disk: a trial hears at its own
evaluation that it is to stop and ends in order, with its last metrics, checkpoint and MLflow run, instead of being
killed; and a sweep that was killed goes on from files that a person can read.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import cluster, prepare, run_state, storage
from pipeline.cluster import Placement
from pipeline.doctor import check_at_start
from pipeline.errors import UserError
from pipeline.initial_weights import check_source
from pipeline.launch import TrialOfSweep, ending_on_sigterm
from pipeline.mlflow_place import tracking_uri
from pipeline.preflight import REPORT
from pipeline.search import point_key
from pipeline.search_space import Point, Space, advised_points, apply_point, shard_knobs
from pipeline.shards import read_manifest
from pipeline.space_parsing import check_start_points, with_advice
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_resources import check_disk, disk_bytes, trial_placement
from pipeline.sweep_result import conclude, record_trial
from pipeline.sweep_state import begin_parent, read_json, write_result
from pipeline.tracking import NAMESPACE
from pipeline.trial import SweepOfTrials, explain, run_trial
from pipeline.trials import Ledger, Trial

Say = Callable[[str], None]
POLL_SECONDS = 0.5


def run(config: SweepConfig, space: Space, debug: bool, say: Say) -> dict[str, Any]:
    """Run a sweep to its end, or go on with it.

    Args:
        config: whole.
        space: checked.
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
    checked = [(point, prepare.check(apply_point(base, point), say)) for point in of_shards.points()]
    for source in space["model.weights"].values if "model.weights" in space else (base.model.weights,):
        check_source(base, source)  # else every trial would say it
    cluster.connect(debug, concurrent_trials=concurrent_trials(config), dashboard=True)
    data = {point_key(point): prepare.write(apply_point(base, point), entry, say) for point, entry in checked}
    candidates = read_advice(checked[0][1].folder)
    space = with_advice(space, candidates, base)
    starts = start_points(config, space, candidates)
    number, placement = share_cluster(config, space, say)
    num_classes = read_manifest(next(iter(data.values())).training).num_classes
    check_disk(folder, disk_bytes(base, space, config.sweep, number, num_classes), say)
    num_workers = config.scaling.num_workers
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
        try:
            record_trial(trial, trials_have, parent, config.sweep.objective, say)
        except Exception as error:  # the trial is on disk; what MLflow lacks of it must not end the others
            say(f"warning: {trial.name} could not be recorded in MLflow ({explain(error)})")

    status = "FAILED"
    try:
        with ending_on_sigterm(), _News(ledger, say):
            _tune(trials_have, ledger, number, record)
        trials = _settled(ledger, record)
        summary = conclude(config, space, trials, folder, parent, say)
        summary["seconds"] = round(time.monotonic() - started, 1)
        write_result(config, folder, summary)
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
    fit = cores // (config.scaling.num_workers * config.scaling.cpus_per_worker)
    return max(1, min(fit, config.sweep.max_trials))


def share_cluster(config: SweepConfig, space: Space, say: Say) -> tuple[int, Placement]:
    """How many trials run at once, and what the workers of each get.

    Raises:
        UserError: not even one fits, now and ever, or not as many as asked for.
    """
    alone = cluster.place_workers(config.scaling, say)
    most = min(config.sweep.max_trials, space.num_points or config.sweep.max_trials)
    wanted = min(config.sweep.max_concurrent_trials or 1, most)
    if wanted > 1 and cluster.capacity().autoscaler:  # which brings nodes for all trials only when asked for them
        together = {"num_workers": wanted * config.scaling.num_workers, "min_workers": None}
        cluster.place_workers(config.scaling.model_copy(update=together), say)
    check_at_start(config.base(), say)
    nodes = cluster.capacity().nodes
    return trial_placement(nodes, config.scaling.num_workers, alone, config.sweep.max_concurrent_trials, most)


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
