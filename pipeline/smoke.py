"""A training of ten steps on the real cluster, before the real thing, and what it tells of that."""

from __future__ import annotations

from typing import Any

from pipeline import run_state, storage
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.prepare import PreparedData
from pipeline.progress import duration
from pipeline.shards import ShardSet
from pipeline.training_plan import make_plan, total_steps

STEPS = 10
SUFFIX = "-smoke"


def smoke_config(config: ExperimentConfig) -> ExperimentConfig:
    """The same training, cut after ten steps, as a run of its own beside the real one's."""
    train = config.train.model_copy(update={"max_steps": STEPS, "log_every_steps": 1})
    run = config.run.model_copy(update={"name": config.run.name + SUFFIX})
    return config.model_copy(update={"train": train, "run": run})


def is_smoke(config: ExperimentConfig) -> bool:
    """Whether this is the configuration of a smoke test."""
    return config.run.name.endswith(SUFFIX) and config.train.max_steps == STEPS


def forget_last_smoke(config: ExperimentConfig) -> None:
    """Remove the run of an earlier smoke test: one that is finished would have nothing left to show.

    Args:
        config: as from `smoke_config`.

    Raises:
        UserError: the folder holds something else.
    """
    folder = run_state.run_folder(config)
    if not storage.exists(folder):
        return
    state = run_state.read_run(folder)
    if not config.run.name.endswith(SUFFIX) or state is None or state.config["train"]["max_steps"] != STEPS:
        raise UserError(f"{folder}: is not the run of a smoke test; move it away, or take another --run.name")
    storage.delete_folder(folder)


def forecast(config: ExperimentConfig, data: PreparedData, summary: dict[str, Any]) -> str:
    """How long the real training will take, by the median step of the smoke test.

    Args:
        config: of the real training.
        data: what both train on.
        summary: of the smoke test.
    """
    steps = total_steps(config, make_plan(config, ShardSet(data.training)))
    run, seconds = config.run.name, summary["seconds_a_step"]
    if seconds is None:
        return f"smoke: too few steps were timed to tell how long the {steps} of {run} would take"
    whole = duration(steps * seconds)
    return f"smoke: all {steps} steps of {run} would take about {whole}, without evaluations and checkpoints"
