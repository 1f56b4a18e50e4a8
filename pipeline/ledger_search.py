"""Ray Tune's search algorithm that asks the ledger: Tune runs what the ledger gives out, and knows no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.tune.search import Searcher

from pipeline.trials import Trial

PROCESS_LOST = "its process was lost (killed, or out of memory)"


class LedgerSearch(Searcher):  # type: ignore[misc]
    """Every suggestion is the number of a trial."""

    def __init__(self, ledger: Any, ended: Callable[[Trial], None]) -> None:
        super().__init__()
        self._ledger, self._ended = ledger, ended
        self._numbers: dict[str, int] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: Any, **_: Any) -> bool:
        """Metric and space are the ledger's."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next trial; there is nothing more to run where the ledger has none."""
        trial: Trial | None = ray.get(self._ledger.next_trial.remote())
        if trial is None:
            return Searcher.FINISHED
        self._numbers[trial_id] = trial.number
        return {"trial": trial.number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end; a trial that could not say its own end was lost with its process."""
        number = self._numbers.pop(trial_id, None)
        if number is None:  # told already
            return
        ray.get(self._ledger.fail.remote(number, PROCESS_LOST))  # without effect where it has ended
        self._ended(ray.get(self._ledger.trials.remote())[number])

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: the ledger is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""
