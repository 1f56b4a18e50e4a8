"""What an evaluation is of, and whose configuration and data it goes by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from model.weights import is_import
from pipeline import prepare, storage
from pipeline.checkpoint import DESCRIPTION_FILE, read_description
from pipeline.command_line import options_given, parse
from pipeline.config import DataSettings, ExperimentConfig
from pipeline.errors import UserError
from pipeline.inference import find_weights
from pipeline.run_state import RUN_FILE

NAMING_DATA = ("data.root", "data.sources", "data.validation_sources", "data.synthetic", "data.shards")


@dataclass(frozen=True)
class Training:
    """Where a checkpoint of ours comes from."""

    checkpoint: str
    """Local folder."""
    base: ExperimentConfig
    """What the command line is read on top of: all that it was trained with, or beside --config its data.root alone."""
    knows_data: bool
    """Whether it says what it was trained on."""
    root_given: str
    """data.root as it would be without the training."""


def find_training(arguments: Sequence[str]) -> Training | None:
    """The checkpoint that a command line names, and what it was trained with; None of weights of others.

    Args:
        arguments: of the job, not checked yet. Only those are looked at that tell where checkpoints are looked for;
            others may make sense on top of the training's configuration alone.

    Raises:
        UserError: there is no such checkpoint, or its configuration cannot be read.
    """
    has_file = bool(options_given(arguments, "config"))
    telling = options_given(arguments, "checkpoint", "model.weights", "run")
    options = parse(
        "",
        arguments if has_file else [f"--{name}={value}" for name, value in telling],
        optional=dict.fromkeys(("checkpoint", "predictions", "output"), ""),
    )
    alone: ExperimentConfig = options.experiment
    checkpoint = find_weights(alone, options.checkpoint)
    if is_import(checkpoint):
        return None
    description = read_description(checkpoint)
    trained = description.experiment()
    if not has_file:
        run = trained.run.model_copy(update={"storage_path": _storage_path(checkpoint, alone.run.storage_path)})
        base = trained.model_copy(update={"run": run, "data": _data_beside(trained.data, arguments)})
    elif alone.data.shards is None and alone.data.synthetic is None:
        base = ExperimentConfig(data=DataSettings(root=trained.data.root))
    else:  # they are the data; nothing must be written over those of the training
        base = ExperimentConfig()
    return Training(checkpoint, base, "data" in description.config, alone.data.root)


def _data_beside(trained: DataSettings, arguments: Sequence[str]) -> DataSettings:
    """Data of the training, for keys that may name others: nothing is then written where those of the training lie."""
    given = {name for name, _ in options_given(arguments, "data", "augment")}
    changes: dict[str, None] = {}
    if given and "data.shards" not in given:
        changes["shards"] = None  # made of other rows
    if "data.root" in given and not options_given(arguments, "data.synthetic"):
        changes["synthetic"] = None  # the shapes would be drawn there
    return trained.model_copy(update=changes)


def _storage_path(checkpoint: str, looked_in: str) -> str:
    """Where the run of a checkpoint is now, which may have moved; without its run, where runs are looked for."""
    run_folder = os.path.dirname(checkpoint)
    below = checkpoint.startswith(os.path.join(storage.absolute(looked_in), ""))
    return looked_in if below or not os.path.exists(os.path.join(run_folder, RUN_FILE)) else os.path.dirname(run_folder)


def title_of(source: str) -> str:
    """What is evaluated, in a few words.

    Args:
        source: weights of another implementation, the local folder of a checkpoint, or an output of jobs/predict.py.
    """
    if is_import(source):
        return source
    if os.path.exists(os.path.join(source, DESCRIPTION_FILE)):
        description = read_description(source)
        return f"{description.experiment().run.name}, checkpoint {description.step}"
    return f"predictions in {source.rstrip('/').rpartition('/')[2]}"


def basis(config: ExperimentConfig, training: Training | None, arguments: Sequence[str]) -> str:
    """Whose configuration and data an evaluation goes by, in words.

    Args:
        config: resolved.
        training: of a checkpoint of ours.
        arguments: of the command line.
    """
    files = [file for _, file in options_given(arguments, "config")]
    keys = dict.fromkeys(f"--{name}" for name, _ in options_given(arguments, *ExperimentConfig.model_fields))
    stored = "default configuration" if training is None else "configuration of its training"
    whose = ", ".join([f"configuration {', '.join(files)}" if files else stored, *keys])
    shards = prepare.shards_alone(config)
    if shards is not None:
        return f"{whose}; shards in {shards}"
    root = storage.absolute(config.data.root)
    if files and training is not None and config.data.root != training.root_given:
        return f"{whose}; data of its training in {root}, as no data.root is given"
    return f"{whose}; data in {root}"


def check_data_known(
    config: ExperimentConfig, training: Training | None, source: str, arguments: Sequence[str]
) -> None:
    """Refuse an evaluation on data that nobody has named; of those that were named it is told when they are read.

    Args:
        config: resolved.
        training: of a checkpoint of ours.
        source: see `title_of`.
        arguments: of the command line.

    Raises:
        UserError: with what to give.
    """
    if options_given(arguments, "config", *NAMING_DATA) or is_import(source):
        return
    missing = _missing_annotations(config)
    title, of_the_data = title_of(source), "name a configuration of the data with --config"
    if training is not None and not training.knows_data:
        raise UserError(f"{title}: does not say what it was trained on; {of_the_data}")
    if missing is not None and training is None:
        raise UserError(f"{title}: do not say what they are to be compared with; {of_the_data}")
    if missing is not None:
        raise UserError(
            f"{title}: what it was trained on is not there (no {missing}); say with --data.root where it lies, or "
            "with --config on what else to evaluate"
        )


def _missing_annotations(config: ExperimentConfig) -> str | None:
    """The first annotation file that is not there; None where all are, or are not needed."""
    if config.data.synthetic is not None or prepare.shards_alone(config) is not None:
        return None
    root = storage.absolute(config.data.root)
    paths = (storage.absolute(source.annotations, root) for source in config.data.sources_to_read().values())
    try:
        return next((path for path in paths if not storage.exists(path)), None)
    except OSError:  # a bucket out of reach, of which their reader says more
        return None
