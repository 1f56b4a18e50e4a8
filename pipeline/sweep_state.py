"""A sweep's folder and its MLflow run: what it began with, whether it is finished, what may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import run_state, storage
from pipeline.errors import UserError
from pipeline.mlflow_place import artifacts_folder, tracking_uri
from pipeline.mlflow_runs import flatten
from pipeline.sweep_config import SweepConfig
from pipeline.sweep_record import SweepRecord

Say = Callable[[str], None]
SWEEP_FILE, RESULT_FILE = "sweep.json", "result.json"
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


def write_result(config: SweepConfig, folder: str, summary: dict[str, Any]) -> None:
    """Write what tells that a sweep is finished."""
    result = {"budget": budget_of(config), "summary": summary}
    storage.write_bytes(storage.join(folder, RESULT_FILE), json.dumps(result, indent=1).encode())


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
    state, base = read_state(folder), config.base()
    record = SweepRecord(tracking_uri(base), config.run.mlflow_experiment, artifacts_folder(base), say)
    resolved = config.model_dump(mode="json")
    known = state.mlflow_run_id if state else None
    run_id = record.begin(known, config.run.name, folder, flatten(resolved)) or known
    content = asdict(SweepState(state.config if state else resolved, run_id))
    storage.write_bytes(storage.join(folder, SWEEP_FILE), json.dumps(content, indent=1).encode())
    return Parent(record, run_id)
