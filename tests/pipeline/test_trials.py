"""The ledger of a sweep: asha's decisions, budgets, failures, and that a crash loses and doubles nothing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler

from pipeline.errors import UserError
from pipeline.search import point_key
from pipeline.search_space import Knob, Space
from pipeline.sweep_config import SweepSettings
from pipeline.trials import Ledger, Trial, is_cut, is_rung, ranked, read_trials

SPACE = Space((Knob("model.rpn.nms_threshold", "uniform", low=0.3, high=0.9),))


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_ledger(folder: Path, clock: Clock, **settings: Any) -> Ledger:
    return Ledger(str(folder), SPACE, SweepSettings.model_validate(settings), [], 2, clock)


def begin(ledger: Ledger) -> int:
    trial = ledger.next_trial()
    assert trial is not None
    return trial.number


def judge(ledger: Ledger, number: int, evaluation: int, value: float, last: bool = False, **more: float) -> str | None:
    return ledger.judge(number, 10 * evaluation, float(evaluation), last, {"segm_AP": value, **more})


def test_rungs_by_hand() -> None:
    def rungs(**settings: Any) -> list[int]:
        return [k for k in range(1, 30) if is_rung(k, SweepSettings.model_validate(settings))]

    assert rungs() == [1, 3, 9, 27]
    assert rungs(grace_evaluations=2, reduction_factor=2) == [2, 4, 8, 16]
    assert rungs(reduction_factor=2.5) == [1, 3, 7, 16]


def test_who_is_cut_by_hand() -> None:
    settings = SweepSettings(reduction_factor=2.0)
    assert is_cut(0.1, [], settings) is None, "the first one goes on"
    assert is_cut(0.1, [0.2], settings) == 0.2
    assert is_cut(0.2, [0.2], settings) is None
    assert is_cut(0.2, [0.1, 0.4], settings) == pytest.approx(0.25)
    assert is_cut(0.3, [0.1, 0.4], settings) is None


class _Stub:
    """All that Tune's scheduler looks at of a trial."""

    def __init__(self, number: int) -> None:
        self.trial_id = str(number)


@pytest.mark.parametrize(("mode", "factor", "grace"), [("max", 3, 1), ("max", 2, 2), ("min", 4, 1)])
def test_asha_decides_as_ray_tune_does(tmp_path: Path, clock: Clock, mode: str, factor: int, grace: int) -> None:
    """Trials report in random order; one that was stopped reports no more."""
    scheduler = ASHAScheduler(
        time_attr="evaluation", metric="segm_AP", mode=mode, max_t=10**6, grace_period=grace, reduction_factor=factor
    )
    ledger = make_ledger(tmp_path, clock, mode=mode, reduction_factor=factor, grace_evaluations=grace, max_trials=12)
    rng = np.random.default_rng(factor)
    stubs = [_Stub(begin(ledger)) for _ in range(12)]
    for stub in stubs:
        scheduler.on_trial_add(None, stub)
    evaluations = dict.fromkeys(range(12), 0)
    stopped = 0
    while evaluations:
        number = int(rng.choice(list(evaluations)))
        evaluations[number] += 1
        value = float(rng.random())
        result = {"evaluation": evaluations[number], "segm_AP": value}
        expected = scheduler.on_trial_result(None, stubs[number], result)
        reason = judge(ledger, number, evaluations[number], value)
        assert (reason is not None) == (expected == "STOP"), (number, evaluations[number], reason)
        if reason is not None or evaluations[number] == 10:
            stopped += reason is not None
            del evaluations[number]
    assert 2 < stopped < 12


def test_reasons_say_the_numbers(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock)
    first, second = begin(ledger), begin(ledger)
    assert judge(ledger, first, 1, 0.5) is None
    reason = judge(ledger, second, 1, 0.25)
    assert reason == "asha: segm_AP 0.2500 at evaluation 1 is not among the best 1/3 of 1 other trials (0.5000)"
    assert ledger.verdict(second) == reason
    ledger.finish(second, {"steps": 10})
    assert [trial.state for trial in ledger.trials()] == ["running", "stopped"]
    assert any("evaluation 1 (epoch 1.00)  segm_AP 0.2500  stops: asha" in line for line in ledger.take_news())
    assert ledger.take_news() == []


def test_what_a_trial_tells_is_news(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock)
    begin(ledger), begin(ledger)
    ledger.take_news()
    ledger.tell(1, "warning: worker 0 hangs")
    assert ledger.take_news() == ["trial-0001: warning: worker 0 hangs"]


def test_the_last_evaluation_stops_nobody(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock)
    first, second = begin(ledger), begin(ledger)
    judge(ledger, first, 1, 0.5)
    assert judge(ledger, second, 1, 0.1, last=True) is None
    ledger.finish(second, {"steps": 10})
    assert ledger.trials()[second].state == "finished"


def test_without_a_scheduler_all_go_on(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, scheduler="none")
    for number, value in ((begin(ledger), 0.5), (begin(ledger), 0.0)):
        assert judge(ledger, number, 1, value) is None


def test_the_first_rung_can_judge_by_recall(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, early_objective="rpn_AR_100")
    first, second = begin(ledger), begin(ledger)
    judge(ledger, first, 1, 0.0, rpn_AR_100=0.3)
    assert judge(ledger, second, 1, 0.9, rpn_AR_100=0.2) is not None
    third = begin(ledger)
    assert judge(ledger, third, 1, 0.0, rpn_AR_100=0.4) is None
    for evaluation in (2, 3):
        judge(ledger, first, evaluation, 0.5, rpn_AR_100=0.3)
    judge(ledger, third, 2, 0.4, rpn_AR_100=0.9)
    assert judge(ledger, third, 3, 0.4, rpn_AR_100=0.9) is not None, "later ones by the objective"


def test_the_budget_of_trials(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, max_trials=2)
    assert [begin(ledger), begin(ledger)] == [0, 1]
    assert ledger.next_trial() is None
    assert begin(make_ledger(tmp_path, clock, max_trials=3)) == 0, "interrupted ones first"


def test_the_budget_of_worker_hours(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, max_worker_hours=1.0, scheduler="none")
    number = begin(ledger)
    clock.now = 1700
    assert judge(ledger, number, 1, 0.5) is None
    clock.now = 1810  # x 2 workers = 1.005 hours
    assert judge(ledger, number, 2, 0.5) == "the budget of 1 worker hours is spent"
    ledger.finish(number, {"steps": 20})
    assert ledger.next_trial() is None
    assert make_ledger(tmp_path, clock, max_worker_hours=1.0).next_trial() is None, "also when started again"
    assert make_ledger(tmp_path, clock, max_worker_hours=2.0).next_trial() is not None


def test_the_budget_of_hours_leaves_interruptions_out(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, max_hours=1.0, scheduler="none")
    number = begin(ledger)
    clock.now = 1800
    assert judge(ledger, number, 1, 0.5) is None
    clock.now = 9000
    again = make_ledger(tmp_path, clock, max_hours=1.0, scheduler="none")
    assert begin(again) == number
    clock.now += 1700
    assert judge(again, number, 2, 0.5) is None
    clock.now += 110
    assert judge(again, number, 3, 0.5) == "the budget of 1 hours is spent"


def test_a_crash_loses_and_doubles_nothing(tmp_path: Path, clock: Clock) -> None:
    """One finished, one stopped, one failed, two running when it is killed; then again with an own process."""
    ledger = make_ledger(tmp_path, clock, max_trials=6, search="tpe")
    for number, value in enumerate((0.5, 0.1)):
        assert begin(ledger) == number
        judge(ledger, number, 1, value)
        ledger.finish(number, {"steps": 10})
    ledger.fail(begin(ledger), "out of memory")
    running = [begin(ledger), begin(ledger)]
    judge(ledger, running[0], 1, 0.6)
    points = [point_key(trial.point) for trial in ledger.trials()]

    again = make_ledger(tmp_path, clock, max_trials=6, search="tpe")
    assert again.trials() == ledger.trials()
    assert [begin(again), begin(again)] == running, "interrupted ones first, under their numbers"
    assert begin(again) == 5
    assert again.next_trial() is None
    assert [point_key(trial.point) for trial in again.trials()][:5] == points
    assert [trial.state for trial in again.trials()] == [
        "finished", "stopped", "failed", "running", "running", "running",
    ]  # fmt: skip
    assert judge(again, running[0], 2, 0.7) is None
    assert len(again.trials()[running[0]].evaluations) == 2


def test_the_point_of_a_trial_lost_before_it_was_written_is_drawn_again(tmp_path: Path, clock: Clock) -> None:
    first = make_ledger(tmp_path / "a", clock, search="tpe")
    second = make_ledger(tmp_path / "b", clock, search="tpe")
    for ledger in (first, second):
        ledger.finish(begin(ledger), {"steps": 1})
    assert begin(first) == begin(second) == 1
    assert first.point(1) == second.point(1)


def test_an_evaluation_that_comes_again_counts_once(tmp_path: Path, clock: Clock) -> None:
    """Workers that are lost go on from the checkpoint before."""
    ledger = make_ledger(tmp_path, clock, scheduler="none")
    number = begin(ledger)
    for evaluation, value in ((1, 0.1), (2, 0.2), (2, 0.25), (3, 0.3)):
        judge(ledger, number, evaluation, value)
    assert [entry["segm_AP"] for entry in ledger.trials()[number].evaluations] == [0.1, 0.25, 0.3]


def test_failed_trials_are_never_the_best_and_the_search_goes_on(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, scheduler="none", search="tpe")
    first, second = begin(ledger), begin(ledger)
    judge(ledger, first, 1, 0.9)
    ledger.fail(first, "step 12: loss = nan")
    ledger.fail(first, "its process was lost")
    judge(ledger, second, 1, float("nan"), loss=1.0)
    judge(ledger, second, 2, 0.2)
    ledger.finish(second, {"steps": 20})
    assert ledger.trials()[first].reason == "step 12: loss = nan"
    assert [trial.number for trial in ranked(ledger.trials(), SweepSettings())] == [second]
    assert json.loads((tmp_path / "trial-0001" / "trial.json").read_text())["state"] == "finished"
    assert ledger.next_trial() is not None


def test_checkpoints_of_losers_go(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, scheduler="none", keep_checkpoints=1)

    def checkpoints() -> list[int]:
        return [n for n in range(4) if (tmp_path / f"trial-{n:04d}" / "checkpoint-0000010" / "weights").exists()]

    for value in (0.3, 0.5, 0.4, 0.0):
        number = begin(ledger)
        folder = tmp_path / f"trial-{number:04d}"
        (folder / "checkpoint-0000010").mkdir(parents=True)
        (folder / "checkpoint-0000010" / "weights").write_text("weights")
        (folder / "run.json").write_text("{}")
        if number == 3:
            break  # it still runs
        judge(ledger, number, 1, value)
        ledger.finish(number, {"steps": 10})
        assert checkpoints() == ([0] if number == 0 else [1])
    assert checkpoints() == [1, 3]
    assert (tmp_path / "trial-0000" / "run.json").exists()


def test_the_smallest_wins_where_it_should() -> None:
    def trial(number: int, *losses: float) -> Trial:
        evaluations = [{"loss": loss, "step": 1.0, "epoch": 1.0} for loss in losses]
        return Trial(number, {}, "finished", evaluations=evaluations)

    settings = SweepSettings(objective="loss", mode="min")
    trials = [trial(0, 3.0, 1.5), trial(1, 1.0, 2.0), trial(2), trial(3, 1.0)]
    assert [t.number for t in ranked(trials, settings)] == [1, 3, 0]
    assert trials[1].value(settings) == 1.0


def test_damaged_files_are_named(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock)
    begin(ledger), begin(ledger)
    path = tmp_path / "trial-0001" / "trial.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(UserError, match=r"trial-0001/trial\.json: damaged"):
        read_trials(str(tmp_path))
    path.unlink()
    assert len(read_trials(str(tmp_path))) == 1
    assert begin(ledger) == 2
    with pytest.raises(UserError, match=r"holds trials \[0, 2\]"):
        make_ledger(tmp_path, clock)


def test_an_ap_of_objects_that_there_are_not_is_no_value(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, objective="segm_AP_large", scheduler="none")
    number = begin(ledger)
    judge(ledger, number, 1, 0.5, segm_AP_large=-1.0)
    ledger.finish(number, {"steps": 10})
    (trial,) = ledger.trials()
    assert trial.evaluations[0]["segm_AP_large"] == -1.0, "it stands in the table as evaluations say it"
    assert trial.value(SweepSettings()) == 0.5
    assert ranked(ledger.trials(), SweepSettings(objective="segm_AP_large")) == []
    cut = make_ledger(tmp_path / "asha", clock, objective="segm_AP_large")
    assert judge(cut, begin(cut), 1, 0.5, segm_AP_large=-1.0) == "asha: segm_AP_large is not a number at evaluation 1"


def test_however_small_the_budget_one_trial_is_made(tmp_path: Path, clock: Clock) -> None:
    ledger = make_ledger(tmp_path, clock, max_hours=1e-6, scheduler="none")
    clock.now = 60.0
    number = begin(ledger)
    assert judge(ledger, number, 1, 0.5) == "the budget of 1e-06 hours is spent"
    assert ledger.next_trial() is None
