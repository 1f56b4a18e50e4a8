"""The trials of a sweep on disk: what each tried, what it reached, whether it goes on; a crash loses none.

Every trial is a folder `trial-0003` of the sweep's folder: the run of its training, and `trial.json`, written whole
with every event. The ledger alone writes them. Started again, it finds finished trials as they were and gives out
interrupted ones first, which then go on from their runs' checkpoints.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.checkpoint_store import CheckpointStore
from pipeline.errors import UserError
from pipeline.search import Tried, next_point
from pipeline.search_space import Point, Space
from pipeline.sweep_config import SweepSettings
from pipeline.tracking import NAMESPACE

TRIAL_FILE, HOURS_FILE = "trial.json", "hours.json"
State = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Trial:
    """One point and what came of it."""

    number: int
    point: Point
    state: State = "running"
    reason: str | None = None
    """Why it was stopped or failed."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each, with `step` and `epoch`; evaluation k is entry k - 1."""
    seconds: float = 0.0
    """That it trained, all attempts together."""
    summary: dict[str, Any] = field(default_factory=dict)
    """What the training ended with."""

    @property
    def name(self) -> str:
        """Of its run."""
        return trial_name(self.number)

    def value(self, settings: SweepSettings) -> float | None:
        """Objective of its best evaluation; None before the first, and of a failed trial."""
        found = [reached(entry, settings.objective) for entry in self.evaluations]
        values = [value for value in found if value is not None]
        if self.state == "failed" or not values:
            return None
        return max(values) if settings.larger_is_better else min(values)


def trial_name(number: int) -> str:
    """Folder of a trial, and name of its run."""
    return f"trial-{number:04d}"


def read_trials(folder: str) -> list[Trial]:
    """All trials of a sweep, by number.

    Raises:
        UserError: a file is damaged, or a trial is missing between others.
    """
    trials = []
    for path in sorted(storage.list_files(folder)):
        if re.fullmatch(rf"trial-\d+/{re.escape(TRIAL_FILE)}", path):
            where = storage.join(folder, path)
            try:
                trials.append(Trial(**json.loads(storage.read_bytes(where))))
            except (ValueError, TypeError) as error:
                raise UserError(f"{where}: damaged ({error}); begin a new sweep with --run.name") from error
    trials.sort(key=lambda trial: trial.number)
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise UserError(f"{folder}: holds trials {[t.number for t in trials]}; begin a new sweep with --run.name")
    return trials


def is_cut(value: float, others: Sequence[float], settings: SweepSettings) -> float | None:
    """Whether asha ends a trial: the value that it should have had, None where it goes on.

    Asynchronous successive halving (Li et al. 2020), the rule of Ray Tune's ASHAScheduler.

    Args:
        value: of the trial at a rung; larger is better.
        others: of those that came there before; may be empty.
        settings: reduction_factor.
    """
    if not others:
        return None
    cutoff = float(np.percentile(others, (1 - 1 / settings.reduction_factor) * 100))
    return cutoff if value < cutoff else None


def is_rung(evaluation: int, settings: SweepSettings) -> bool:
    """Whether asha compares trials at this evaluation, the first being 1: grace, grace * factor, ..."""
    rung = float(settings.grace_evaluations)
    while math.ceil(rung) < evaluation:
        rung *= settings.reduction_factor
    return math.ceil(rung) == evaluation


class Ledger:
    """Gives out trials, judges them, keeps the budget; wrapped in an actor, so that all calls come one by one."""

    def __init__(
        self,
        folder: str,
        space: Space,
        settings: SweepSettings,
        start_points: Sequence[Point],
        num_workers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._space, self._settings = folder, space, settings
        self._start_points, self._num_workers, self._clock = start_points, num_workers, clock
        self._trials = read_trials(folder)
        self._given_out: dict[int, float] = {}  # number to when its attempt began, or was last counted
        self._session_began = clock()
        self._hours_before = self._read_hours()
        self._news: list[str] = []

    def trials(self) -> list[Trial]:
        """All trials so far."""
        return self._trials

    def point(self, number: int) -> Point:
        """What a trial tries."""
        return self._trials[number].point

    def take_news(self) -> list[str]:
        """Lines for a person that have not been taken yet."""
        news, self._news = self._news, []
        return news

    def next_trial(self) -> Trial | None:
        """The next trial to run: an interrupted one, else a new one; None where budget or space are used up."""
        for trial in self._trials:
            if trial.state == "running" and trial.number not in self._given_out:
                return self._give_out(trial, "goes on" if trial.evaluations else "begins again")
        if len(self._trials) >= self._settings.max_trials or (self._trials and self.spent() is not None):
            return None  # however small the budget, one trial shows what it would take
        tried = [Tried(t.point, t.value(self._settings), t.state == "running") for t in self._trials]
        point = next_point(self._space, self._settings, self._start_points, tried)
        if point is None:
            return None
        trial = Trial(len(self._trials), point)
        self._trials.append(trial)
        return self._give_out(trial, "begins")

    def judge(self, number: int, step: int, epoch: float, is_last: bool, metrics: dict[str, float]) -> str | None:
        """Note an evaluation of a trial and say whether to stop it.

        Args:
            number: of the trial.
            step: after which it was evaluated; again the same one after a lost worker.
            epoch: likewise.
            is_last: whether the training ends here anyway.
            metrics: of the evaluation, and of the latest step.

        Returns:
            Why the trial is to stop, None to go on.
        """
        trial = self._trials[number]
        before = [entry for entry in trial.evaluations if entry["step"] < step]
        numbers = {name: value for name, value in metrics.items() if math.isfinite(value)}
        trial.evaluations = [*before, {**numbers, "step": step, "epoch": epoch}]
        self._count(trial)
        if not is_last:
            trial.reason = self._asha(trial) or self.spent()
        shown = f"{self._settings.objective} {numbers.get(self._settings.objective, math.nan):.4f}"
        outcome = f"stops: {trial.reason}" if trial.reason else "is at its end" if is_last else "goes on"
        self._say(trial, f"evaluation {len(trial.evaluations)} (epoch {epoch:.2f})  {shown}  {outcome}")
        self._write(trial)
        return trial.reason

    def verdict(self, number: int) -> str | None:
        """Why a trial is to stop, where that was said before an interruption."""
        return self._trials[number].reason

    def finish(self, number: int, summary: dict[str, Any]) -> None:
        """Note that a trial has ended in order."""
        trial = self._trials[number]
        self._count(trial)
        trial.state = "stopped" if trial.reason else "finished"
        trial.summary = summary
        value = trial.value(self._settings)
        shown = "" if value is None else f" with {self._settings.objective} {value:.4f}"
        self._say(trial, f"{trial.state}{shown} after {summary.get('steps')} steps")
        self._end(trial)

    def fail(self, number: int, reason: str) -> None:
        """Note that a trial has failed; the sweep goes on."""
        trial = self._trials[number]
        if trial.state != "running":
            return
        self._count(trial)
        trial.state, trial.reason = "failed", reason
        self._say(trial, f"failed: {reason}")
        self._end(trial)

    def tell(self, number: int, line: str) -> None:
        """Pass on a line about a trial to a person."""
        self._say(self._trials[number], line)

    def spent(self) -> str | None:
        """Which budget of time is used up, None where there is time left."""
        worker_hours = sum(trial.seconds for trial in self._trials) * self._num_workers / 3600
        limits = (
            ("worker hours", worker_hours, self._settings.max_worker_hours),
            ("hours", self._hours(), self._settings.max_hours),
        )
        for name, used, limit in limits:
            if limit is not None and used >= limit:
                return f"the budget of {limit:g} {name} is spent"
        return None

    def _asha(self, trial: Trial) -> str | None:
        settings, evaluation = self._settings, len(trial.evaluations)
        if settings.scheduler == "none" or not is_rung(evaluation, settings):
            return None
        early = settings.early_objective is not None and evaluation <= settings.early_evaluations
        metric = settings.early_objective if early and settings.early_objective else settings.objective
        sign = 1.0 if early or settings.larger_is_better else -1.0
        values = {
            other.number: sign * value
            for other in self._trials
            if len(other.evaluations) >= evaluation
            and (value := reached(other.evaluations[evaluation - 1], metric)) is not None
        }
        if trial.number not in values:
            return f"asha: {metric} is not a number at evaluation {evaluation}"
        value = values.pop(trial.number)
        cutoff = is_cut(value, list(values.values()), settings)
        if cutoff is None:
            return None
        return (
            f"asha: {metric} {sign * value:.4f} at evaluation {evaluation} is not among the best 1/"
            f"{settings.reduction_factor:g} of {len(values)} other trials ({sign * cutoff:.4f})"
        )

    def _give_out(self, trial: Trial, what: str) -> Trial:
        self._given_out[trial.number] = self._clock()
        self._write(trial)
        self._say(trial, what)
        return trial

    def _count(self, trial: Trial) -> None:
        """Add the time since the attempt began, or since it was last counted."""
        now = self._clock()
        trial.seconds += now - self._given_out.get(trial.number, now)
        self._given_out[trial.number] = now
        self._write_hours()

    def _end(self, trial: Trial) -> None:
        self._write(trial)
        for loser in self.losers():
            delete_checkpoints(storage.join(self._folder, loser.name))

    def losers(self) -> list[Trial]:
        """Ended trials that are not among the best ones, whose checkpoints are kept."""
        ended = [trial for trial in self._trials if trial.state != "running"]
        return [
            trial for trial in ended if trial not in ranked(ended, self._settings)[: self._settings.keep_checkpoints]
        ]

    def _write(self, trial: Trial) -> None:
        content = json.dumps(asdict(trial), indent=1).encode()
        storage.write_bytes(storage.join(storage.join(self._folder, trial.name), TRIAL_FILE), content)

    def _say(self, trial: Trial, what: str) -> None:
        self._news.append(f"{trial.name}: {what}")

    def _hours(self) -> float:
        return self._hours_before + (self._clock() - self._session_began) / 3600

    def _read_hours(self) -> float:
        try:
            return float(json.loads(storage.read_bytes(storage.join(self._folder, HOURS_FILE))))
        except (FileNotFoundError, ValueError):
            return 0.0

    def _write_hours(self) -> None:
        storage.write_bytes(storage.join(self._folder, HOURS_FILE), json.dumps(self._hours()).encode())


def reached(evaluation: Mapping[str, float], metric: str) -> float | None:
    """What an evaluation says of a metric; None without it, and where an AP is -1, there being no such objects."""
    value = evaluation.get(metric)
    is_average = metric.startswith(("bbox_", "segm_", "rpn_AR"))
    return None if value is None or (is_average and value < 0) else value


def ranked(trials: Sequence[Trial], settings: SweepSettings) -> list[Trial]:
    """Trials that reached something, the best first, of equals the earliest."""
    sign = -1.0 if settings.larger_is_better else 1.0
    values = {trial.number: trial.value(settings) for trial in trials}
    judged = [trial for trial in trials if values[trial.number] is not None]
    return sorted(judged, key=lambda trial: (sign * (values[trial.number] or 0.0), trial.number))


def delete_checkpoints(run_folder: str) -> None:
    """Remove the weights of a run that nobody will go on with; what tells about it stays."""
    CheckpointStore(run_folder).remove_all()
    storage.delete_file(storage.join(run_folder, "initial_weights.safetensors"))


class SweepJudge:
    """The line of a trial's workers to the ledger."""

    def __init__(self, ledger: str, number: int) -> None:
        import ray

        self._ledger, self._number = ray.get_actor(ledger, namespace=NAMESPACE), number

    def judge(self, step: int, epoch: float, is_last: bool, metrics: dict[str, float]) -> str | None:
        """See `Ledger.judge`."""
        import ray

        reason: str | None = ray.get(self._ledger.judge.remote(self._number, step, epoch, is_last, metrics))
        return reason

    def verdict(self) -> str | None:
        """See `Ledger.verdict`."""
        import ray

        reason: str | None = ray.get(self._ledger.verdict.remote(self._number))
        return reason
