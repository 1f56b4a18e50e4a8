"""Checkpoints of a worker group: rank 0 looks for the newest and writes new ones, all go on or stop together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.checkpoint import Description, TrainingState
from pipeline.checkpoint_store import CheckpointStore
from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.config import CheckpointSettings
from pipeline.errors import SharedError, UserError

MESSAGE_LENGTH = 900  # Ray Train broadcasts less than 1 kB


class WorkerCheckpoints:
    """Every worker has one, and calls the same methods at the same steps."""

    def __init__(self, store: CheckpointStore, settings: CheckpointSettings, rank: int) -> None:
        self._store, self._settings = store, settings
        self._writer = CheckpointWriter(store, settings) if rank == 0 else None
        self._unreported: dict[str, Any] | None = None

    def newest(self, checkpoint_bytes: int, warn: Callable[[str], None]) -> str | None:
        """Path of the newest whole checkpoint, None if there is none; what is refused is said aloud.

        Args:
            checkpoint_bytes: size of those that will be written.
            warn: called by rank 0.

        Raises:
            SharedError: the disk has no room for them.
        """
        import ray.train.collective

        newest, problem = None, None
        if self._writer is not None:
            self._store.remove_unfinished()
            newest = self._store.newest_whole(warn)
            try:
                self._store.check_room(checkpoint_bytes, self._settings.keep_best + self._settings.keep_last)
            except UserError as error:
                problem = str(error)
        stop_together(problem)
        agreed: str | None = ray.train.collective.broadcast_from_rank_zero(newest)
        return agreed

    def save(
        self, state: Callable[[], TrainingState], description: Description, before_it_counts: Callable[[], None]
    ) -> None:
        """Begin to write a checkpoint beside the training, after the one before.

        Args:
            state: makes a copy, see `capture`; called on rank 0 only.
            description: of it; without metrics it is never the best.
            before_it_counts: see `CheckpointStore.commit`.

        Raises:
            SharedError: the one before could not be written.
        """
        self.finish()
        if self._writer is not None:
            self._writer.start(state(), description, before_it_counts)
        score = description.metrics.get("segm_AP", -1.0)
        path = self._store.path(description.step)
        self._unreported = {"step": description.step, "segm_AP": score, "checkpoint_path": path}

    def finish(self) -> None:
        """Wait for the checkpoint under way and report it to Ray Train, which keeps none itself.

        Raises:
            SharedError: it could not be written.
        """
        import ray.train

        if self._unreported is None:
            return
        stop_together(self._writer.finish() if self._writer is not None else None)
        report, self._unreported = self._unreported, None
        ray.train.report(report)


def stop_together(problem: str | None) -> None:
    """Raise on all workers what rank 0 has found.

    Raises:
        SharedError: there is a problem.
    """
    import ray.train.collective

    problem = ray.train.collective.broadcast_from_rank_zero(problem[:MESSAGE_LENGTH] if problem else None)
    if problem is not None:
        raise SharedError(problem)
