"""What a training tells: metrics and pictures to the tracker, and so to MLflow; progress and warnings to the driver."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from pipeline.cluster_metrics import ClusterMetrics
from pipeline.tracking import SHOW_GROUP

JOURNAL_SECONDS = 30.0  # a checkpoint waits at most so long for the metrics before it to be on a disk


class WorkerVoice:
    """Of rank 0; that of another worker is silent. Nothing here waits, but what `journal` gives."""

    def __init__(self, tracker: Any, run_name: str) -> None:
        self._tracker = tracker
        self._cluster_metrics = ClusterMetrics(run_name)
        self._last_logged: Any = None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step."""
        self.log_rows([(step, metrics)])

    def log_rows(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Metrics of steps, each with its number."""
        if self._tracker is not None:
            self._last_logged = self._tracker.log_rows.remote(rows)
            for step, metrics in rows:
                self._cluster_metrics.show(step, metrics)

    def journal(self) -> Callable[[], None]:
        """What waits until all that was logged before this call is on a disk.

        A checkpoint waits for it before it counts: a resume from it would not log the steps before it again.
        """
        import ray

        last_logged = self._last_logged

        def wait() -> None:
            if last_logged is not None:
                with contextlib.suppress(ray.exceptions.RayError):  # without a tracker there is nobody to tell
                    ray.get(last_logged, timeout=JOURNAL_SECONDS)

        return wait

    def log_picture(self, png: bytes, name: str) -> None:
        """An artifact of the run."""
        if self._tracker is not None:
            self._tracker.log_picture.remote(png, name)

    def warn(self, text: str) -> None:
        """Have the driver tell the user."""
        if self._tracker is not None:
            self._tracker.warn.options(concurrency_group=SHOW_GROUP).remote(text)

    def show(self, progress: dict[str, Any]) -> None:
        """Have the driver show where the training is."""
        if self._tracker is not None:
            self._tracker.set_progress.options(concurrency_group=SHOW_GROUP).remote(progress)
