"""What a sweep ends with: table, pictures and the best configuration, on disk and in MLflow."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline import run_state, storage
from pipeline.checkpoint_store import CheckpointStore, local_folder
from pipeline.checkpoint_store import best as best_checkpoint
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.mlflow_models import BEST_CHECKPOINT
from pipeline.mlflow_runs import PARENT_TAG, flatten
from pipeline.search_space import Space, apply_point, show_point
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_record import SweepRecord
from pipeline.sweep_report import draw_importances, draw_objective, draw_parallel_coordinates, table_file, table_lines
from pipeline.sweep_state import Parent
from pipeline.training_record import deliver_the_rest
from pipeline.trial import SweepOfTrials
from pipeline.trials import Trial, ranked

Say = Callable[[str], None]
TABLE_FILE, BEST_FILE = "trials.parquet", "best.yaml"


def record_trial(trial: Trial, sweep: SweepOfTrials, parent: Parent, objective: str, say: Say) -> None:
    """Tell the MLflow run of an ended trial how it ended; one that failed before it had its own gets one.

    Where MLflow was away, what the trial has left for it is delivered first.
    """
    folder = storage.join(sweep.folder, trial.name)
    try:
        config = sweep.config_of(trial.number, trial.point)
    except ValidationError:  # why it failed: values that do not go together
        run_id, parameters = None, flatten(trial.point)
    else:
        run_id, parameters = deliver_the_rest(config, folder, say, seconds=0), flatten(config.model_dump(mode="json"))
    if run_id is None:  # it ended on another machine, or before it began to record
        state = run_state.read_run(folder)
        known = state.mlflow_run_id if state is not None else None
        run_id = parent.record.begin(known, trial.name, folder, parameters, parent.run_id)
        if run_id is None:
            return
        parent.record.end(run_id, "FAILED" if trial.state == "failed" else "FINISHED")
    rungs = [f"epoch {e['epoch']:g}: {e[objective]:.4f}" for e in trial.evaluations if objective in e]
    tags = {
        "sweep.trial": trial.name,
        "sweep.state": trial.state,
        "sweep.reason": trial.reason or "",
        "sweep.point": show_point(trial.point),
        "sweep.rungs": ", ".join(rungs),
    }
    if parent.run_id is not None:  # MLflow may have been away when the sweep began
        tags[PARENT_TAG] = parent.run_id
    parent.record.tag(run_id, tags)
    if trial.state == "failed":
        parent.record.end(run_id, "FAILED")


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
        reasons = sorted({trial.reason for trial in trials if trial.reason is not None})
        missing = f"no evaluation has a {settings.objective}; do the validation data have such objects?"
        raise UserError(f"none of {len(trials)} trials reached anything: {'; '.join(reasons[:3]) or missing}")
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
    checkpoint = best_checkpoint(CheckpointStore(storage.join(folder, best.name)).list())
    if checkpoint is not None:
        reached = checkpoint.description.metrics.get(settings.objective)
        summary["checkpoint"] = checkpoint.path  # a run keeps those of the best mask AP, whatever a sweep looks at
        summary["checkpoint_objective"] = round(reached, 4) if reached is not None else None
    if parent.run_id is not None:
        parent.record.log_files(parent.run_id, files_of_conclusion(config, space, trials, text))
        if checkpoint is not None:
            _record_checkpoint(checkpoint.path, parent.record, parent.run_id)
    return summary


def _record_checkpoint(path: str, record: SweepRecord, run_id: str) -> None:
    with local_folder(path) as folder:
        for name in sorted(os.listdir(folder)):
            record.log_file(run_id, os.path.join(folder, name), BEST_CHECKPOINT)


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
