"""The actor beside the driver: it records the run, shows where it is, and ends workers that hang."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass

from pipeline.config import ExperimentConfig
from pipeline.shards import ShardSet
from pipeline.tracking import Tracker
from pipeline.watchdog import BEAT_SECONDS, SILENT_BEATS, Beat, Hang, Watch, explain


@dataclass(frozen=True)
class RunActorSettings:
    """What the actor is made with, and made with again where its process is lost."""

    tracker: tuple[str, str, str, str, str | None]
    """Arguments of `Tracker`."""
    known_run_id: str | None
    parameters: dict[str, str]
    """For MLflow."""
    config: ExperimentConfig
    training: str
    """Folder of the training shards."""
    parent_run_id: str | None = None
    """MLflow run of the sweep, where the run is one of its trials."""


class RunActor(Tracker):
    """A tracker that also listens to the workers' signs of life."""

    def __init__(self, settings: RunActorSettings) -> None:
        super().__init__(*settings.tracker)
        self._settings = settings
        self._watch = Watch(settings.config.run.hang_minutes * 60)
        self._watch_lock = threading.Lock()
        self.start(settings.known_run_id, settings.parameters, seconds=0, parent_run_id=settings.parent_run_id)
        threading.Thread(target=self._watch_workers, daemon=True).start()

    def beat(self, beat: Beat) -> None:
        """A worker's sign of life."""
        with self._watch_lock:
            self._watch.hear(beat)

    def _watch_workers(self) -> None:
        looked_at = time.monotonic()
        while not self._closed.wait(BEAT_SECONDS):
            with self._watch_lock:
                if time.monotonic() - looked_at > SILENT_BEATS * BEAT_SECONDS / 2:
                    self._watch.forget()  # it was this process that did not run
                looked_at = time.monotonic()
                hangs = self._watch.hanging()
                if hangs:
                    self._watch.forget()
            for hang in hangs:
                self.warn(explain(hang, self._images(hang)))
                end_process(hang.beat.pid, hang.beat.node_id)

    def _images(self, hang: Hang) -> str:
        """Ids of the images of a worker's step, in words."""
        from pipeline.training_plan import make_plan

        beat = hang.beat
        try:
            shards = ShardSet(self._settings.training)
            plan = make_plan(self._settings.config, shards)
            ((_, _, rows),) = plan.steps(beat.step, beat.step + 1)
            size = plan.global_batch_size // beat.num_workers
            mine = rows[beat.rank * size : (beat.rank + 1) * size].tolist()
            return "images " + ", ".join(str(shards.read_row(row)["image_id"]) for row in mine)
        except Exception as error:  # whatever it is, the worker has to be ended
            return f"images that cannot be told ({type(error).__name__})"


def end_process(pid: int, node_id: str) -> None:
    """SIGKILL a process on a node of the cluster; one that is frozen ends too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node_id == ray.get_runtime_context().get_node_id():
        _kill(pid)
        return
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_kill)
    with contextlib.suppress(ray.exceptions.RayError):  # a node that is gone has taken it along
        ray.get(task.remote(pid), timeout=60)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
