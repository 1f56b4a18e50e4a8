"""One trial of a sweep: what Ray Tune runs, a training with the values of its point."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.command_line import say
from pipeline.config import ExperimentConfig, RunSettings
from pipeline.errors import UserError
from pipeline.key_mistakes import explain_validation
from pipeline.launch import TrialOfSweep, finished_summary, train
from pipeline.prepare import PreparedData
from pipeline.search import point_key
from pipeline.search_space import Point, apply_point
from pipeline.shards import read_manifest
from pipeline.tracking import NAMESPACE
from pipeline.trials import trial_name

Say = Callable[[str], None]


@dataclass(frozen=True)
class SweepOfTrials:
    """What all trials of a sweep have in common."""

    base: dict[str, Any]
    """Configuration that their points are applied to, as from `model_dump`; where they are recorded is absolute."""
    folder: str
    """Of the sweep; each trial is a run in it."""
    data: dict[str, PreparedData]
    """Shards by the values of the knobs that change them, see `point_key`."""
    shard_knobs: tuple[str, ...]
    ledger: str
    """Name of the actor, see `pipeline.trials.Ledger`."""
    trial: TrialOfSweep
    """Of number 0; all get the same share of the cluster."""
    working_folder: str
    """Where relative paths of the configuration begin."""

    def config_of(self, number: int, point: Point) -> ExperimentConfig:
        """Configuration of a trial: a run of its own in the sweep's folder."""
        config = apply_point(ExperimentConfig.model_validate(self.base), point)
        run: RunSettings = config.run.model_copy(update={"name": trial_name(number), "storage_path": self.folder})
        return config.model_copy(update={"run": run})

    def data_of(self, point: Point) -> PreparedData:
        """Shards of a trial."""
        return self.data[point_key({name: point[name] for name in self.shard_knobs})]


def run_trial(config: dict[str, Any], sweep: SweepOfTrials) -> dict[str, Any]:
    """Run a trial, or go on with it; that it fails is written down, and nothing that Ray Tune has to hear of.

    Args:
        config: from `LedgerSearch`: its number.
        sweep: see there.
    """
    import ray

    with contextlib.suppress(FileNotFoundError):  # of a driver on another machine
        os.chdir(sweep.working_folder)
    number: int = config["trial"]
    ledger = ray.get_actor(sweep.ledger, namespace=NAMESPACE)
    point = ray.get(ledger.point.remote(number))
    try:
        summary = _train(sweep, number, point, lambda line: _tell(ledger, number, line))
    except Exception as error:  # whatever it is, the sweep goes on
        ray.get(ledger.fail.remote(number, explain(error)))
    else:
        ray.get(ledger.finish.remote(number, summary))
    return {"trial": number}


def _tell(ledger: Any, number: int, line: str) -> None:
    """Into the log of the trial's process; what went wrong also to the user."""
    say(line)
    if line.startswith("warning: "):
        ledger.tell.remote(number, line)


def _train(sweep: SweepOfTrials, number: int, point: Point, say: Say) -> dict[str, Any]:
    from pipeline.initial_weights import initial_weights

    config, data = sweep.config_of(number, point), sweep.data_of(point)
    summary = finished_summary(config, say)
    if summary is not None:  # it had ended, and the sweep did not live to hear of it
        return summary
    weights = initial_weights(config, list(read_manifest(data.training).class_names), say)
    common = sweep.trial
    of_sweep = TrialOfSweep(number, common.ledger, common.placement, common.parent_run_id)
    return train(config, data, weights, say, of_sweep)


def explain(error: BaseException) -> str:
    """What went wrong in a line."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return explain(cause)
    if isinstance(error, ValidationError):
        return explain_validation(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[-1].strip() if isinstance(error, UserError) else f"{type(error).__name__}: {lines[-1].strip()}"
