"""A run = a folder below storage_path + an MLflow run; the same command again goes on with it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import storage
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.mlflow_runs import flatten

RUN_FILE, RESULT_FILE = "run.json", "result.json"

MAY_CHANGE = (
    "train.epochs",
    "train.max_steps",
    "train.target_",
    "train.patience",
    "train.evaluate_every_epochs",
    "train.rpn_recall",
    "train.log_every_steps",
    "train.nonfinite",
    "train.deterministic",
    "train.batch_size_per_worker",  # together with the passes and the workers, see `check_unchanged`
    "train.accumulation_steps",
    "scaling.",
    "checkpoints.",
    "data.root",  # where the same data lie is checked by their digest
    "data.shards",
    "data.object_store_megabytes",
    "data.verify_shards",
    "run.",
    "predict.",
)


@dataclass(frozen=True)
class RunState:
    """What a run folder says of the run."""

    config: dict[str, Any]
    """The resolved configuration it was begun with."""
    training_digest: str
    """Of the training shards."""
    validation_digest: str
    mlflow_run_id: str | None
    annotation_files: dict[str, str] | None = None
    """SHA-256 of the annotation files it was begun with, by key (`sources.0`); None in runs of earlier versions."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves."""

    length: str
    """How long it was asked to train; a longer training goes on with it."""
    summary: dict[str, Any]
    """What the job printed."""


def run_folder(config: ExperimentConfig) -> str:
    """Absolute path or URL."""
    return storage.join(storage.absolute(config.run.storage_path), config.run.name)


def read_run(folder: str) -> RunState | None:
    """State of a run, None where it was never begun.

    Raises:
        UserError: the file is damaged.
    """
    path = storage.join(folder, RUN_FILE)
    content = _read_json(path)
    try:
        return RunState(**content) if content is not None else None
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error}); begin a new run with --run.name") from error


def write_run(folder: str, state: RunState) -> None:
    """Write the state of a run."""
    storage.write_bytes(storage.join(folder, RUN_FILE), json.dumps(asdict(state), indent=1).encode())


def read_result(folder: str) -> RunResult | None:
    """Result of a finished run, None where it has not finished."""
    path = storage.join(folder, RESULT_FILE)
    content = _read_json(path)
    try:
        return RunResult(**content) if content is not None else None
    except TypeError as error:
        raise UserError(f"{path}: damaged ({error}); begin a new run with --run.name") from error


def write_result(folder: str, result: RunResult) -> None:
    """Write the result that tells a run is finished."""
    storage.write_bytes(storage.join(folder, RESULT_FILE), json.dumps(asdict(result), indent=1).encode())


def check_unchanged(state: RunState, config: ExperimentConfig, folder: str) -> None:
    """Refuse to go on with another configuration than the run was begun with.

    A key that there was not yet had what is now its default: new ones are made so that this changes nothing.

    Raises:
        UserError: with every difference.
    """
    before, after = flatten(state.config), flatten(config.model_dump(mode="json"))
    defaults, left_out = flatten(ExperimentConfig().model_dump(mode="json")), tuple(f"{key}." for key in before)
    new = after.keys() - before.keys()
    # Not the keys of a section that was null.
    before |= {key: defaults[key] for key in new if key in defaults and not key.startswith(left_out)}
    changes = [
        f"{key} {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not key.startswith(MAY_CHANGE)
    ]
    old = state.config["train"]
    old_size = old["batch_size_per_worker"] * old.get("accumulation_steps", 1) * state.config["scaling"]["num_workers"]
    if old_size != config.global_batch_size:
        changes.append(
            "global batch (train.batch_size_per_worker * train.accumulation_steps * scaling.num_workers) "
            f"{old_size} -> {config.global_batch_size}"
        )
    if changes:
        raise UserError(
            f"{folder}: was begun with another configuration: {'; '.join(changes)}. "
            "Take the change back, or begin a new run with --run.name"
        )


def annotation_digests(config: ExperimentConfig) -> dict[str, str]:
    """SHA-256 of the annotation files that are there, by key (`sources.0`); none of a data set that is made anew."""
    if config.data.synthetic is not None:
        return {}
    root, digests = storage.absolute(config.data.root), {}
    for key, source in config.data.sources_to_read().items():
        path = storage.absolute(source.annotations, root)
        if storage.exists(path):
            digests[key] = hashlib.sha256(storage.read_bytes(path)).hexdigest()
    return digests


def has_annotations_of(state: RunState, config: ExperimentConfig) -> bool:
    """Whether the annotation files are those that a run was begun with, as far as they are there.

    Where they are looked for in another data.root than at the beginning, they have to be there.
    """
    same_place = storage.absolute(state.config["data"]["root"]) == storage.absolute(config.data.root)
    now = annotation_digests(config)
    known = state.annotation_files or {}
    return all(now.get(key, digest if same_place else None) == digest for key, digest in known.items())


def check_same_data(
    state: RunState, config: ExperimentConfig, training_digest: str, validation_digest: str, folder: str
) -> None:
    """Refuse to go on with other data than the run was begun with.

    Raises:
        UserError: which of them differs.
    """
    for name, before, after in (
        ("training", state.training_digest, training_digest),
        ("validation", state.validation_digest, validation_digest),
    ):
        if before != after:
            known, now = state.annotation_files or {}, annotation_digests(config)
            changed = [
                storage.absolute(source.annotations, storage.absolute(config.data.root))
                for key, source in config.data.sources_to_read().items()
                if key in known and now.get(key) != known[key]
            ]
            which = f" ({', '.join(changed)} is not what it was)" if changed else ""
            raise UserError(f"{folder}: was begun on other {name} data{which}; begin a new run with --run.name")


def _read_json(path: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); begin a new run with --run.name") from error
    return content
