"""What Ray Tune asks and tells, without Ray."""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.search import Searcher

from pipeline.ledger_search import PROCESS_LOST, LedgerSearch
from pipeline.search_space import Knob, Space
from pipeline.sweep_config import SweepSettings
from pipeline.trials import Ledger, Trial


class Actor:
    """Calls a ledger as if it were an actor."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)
        return type("Method", (), {"remote": staticmethod(method)})


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    space = Space((Knob("model.rpn.nms_threshold", "uniform", low=0.3, high=0.9),))
    return Ledger(str(tmp_path), space, SweepSettings(max_trials=2), [], 1)


def test_tune_runs_what_the_ledger_gives_out(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda result: result)
    ended: list[Trial] = []
    search = LedgerSearch(Actor(ledger), ended.append)
    assert search.set_search_properties(None, None, {}, num_samples=-1)
    assert search.suggest("a") == {"trial": 0}
    assert search.suggest("b") == {"trial": 1}
    assert search.suggest("c") == Searcher.FINISHED
    ledger.finish(1, {"steps": 3})
    search.on_trial_complete("b", {"trial": 1})
    search.on_trial_complete("a", error=True)
    assert [(trial.number, trial.state, trial.reason) for trial in ended] == [
        (1, "finished", None), (0, "failed", PROCESS_LOST),
    ]  # fmt: skip


def test_an_end_that_is_told_twice_counts_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda result: result)
    ended: list[Trial] = []
    search = LedgerSearch(Actor(ledger), ended.append)
    search.suggest("a")
    for _ in range(2):
        search.on_trial_complete("a", error=True)
    assert len(ended) == 1
