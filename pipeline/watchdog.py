"""Notices a worker that hangs, says where and on which images, and ends it, so that the others need not wait for ever.

Every worker sends a sign of life from a thread of its own: step, what it does, and where its training stands. A process
that is frozen sends none; one whose training has stopped moving says so itself.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

BEAT_SECONDS = 1.0
SILENT_BEATS = 5
"""Beats without a word after which a process is taken for frozen once the training does not move."""
WAITING_FOR_OTHERS = ("torch/distributed", "torch/autograd/graph", "ray/train/collective", "collective_impl")
"""Files in which a worker stands that is only waiting for another one."""


@dataclass(frozen=True)
class Beat:
    """One sign of life."""

    group: str
    """Of the workers that were started together."""
    rank: int
    num_workers: int
    step: int
    """That it is in."""
    activity: str
    """What it does, such as "step" or "evaluation"."""
    seconds_still: float
    """Since the step or the activity last changed."""
    where: str
    """File, line and function that the training stands in; the innermost of ours."""
    is_waiting: bool
    """Whether it stands in an exchange with other workers."""
    pid: int
    node_id: str


class Pulse:
    """Of one worker: sends signs of life about the thread that made it."""

    def __init__(self, first: Beat, send: Callable[[Beat], object]) -> None:
        self._beat, self._send = first, send
        self._thread_id, self._moved_at = threading.get_ident(), time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="pulse", daemon=True).start()

    def at(self, step: int, activity: str) -> None:
        """The training has moved on; costs next to nothing."""
        self._beat, self._moved_at = replace(self._beat, step=step, activity=activity), time.monotonic()

    def stop(self) -> None:
        """Send no more."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            where, is_waiting = _place_of(self._thread_id)
            still = time.monotonic() - self._moved_at
            self._send(replace(self._beat, seconds_still=still, where=where, is_waiting=is_waiting))


def first_beat(group: str, rank: int, num_workers: int, node_id: str) -> Beat:
    """The sign of life of this process before its first step."""
    return Beat(group, rank, num_workers, 0, "start", 0.0, "", False, os.getpid(), node_id)


def _place_of(thread_id: int) -> tuple[str, bool]:
    """Innermost line of ours that a thread is in, and whether it waits for other workers there."""
    frame = sys._current_frames().get(thread_id)
    stack = traceback.extract_stack(frame) if frame is not None else []
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    ours = [entry for entry in stack if entry.filename.startswith(root) and "site-packages" not in entry.filename]
    where = f"{os.path.relpath(ours[-1].filename, root)}:{ours[-1].lineno} ({ours[-1].name})" if ours else "nowhere"
    innermost = [entry.filename for entry in stack[-6:]]
    return where, any(part in file for file in innermost for part in WAITING_FOR_OTHERS)


@dataclass(frozen=True)
class Hang:
    """A worker that the others wait for."""

    beat: Beat
    """Its last sign of life."""
    is_silent: bool
    """Whether it sends none any more."""
    seconds: float
    """For how long nothing has moved."""


class Watch:
    """Listens to all workers and finds out which one hangs."""

    def __init__(self, limit_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has been heard yet.

        Args:
            limit_seconds: without any movement, after which somebody hangs.
            clock: seconds.
        """
        self._limit, self._clock = limit_seconds, clock
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._group: str | None = None

    def hear(self, beat: Beat) -> None:
        """Take a sign of life; that of another group of workers makes the earlier ones forgotten."""
        if beat.group != self._group:
            self._group, self._heard = beat.group, {}
        self._heard[beat.rank] = beat, self._clock()

    def hanging(self) -> list[Hang]:
        """Workers to be ended: those that are silent, else those that do not wait for another; none while all move.

        An evaluation may take its time: a worker that is in one hangs only when it is silent.
        """
        now = self._clock()
        silent = {rank for rank, (_, heard) in self._heard.items() if now - heard > SILENT_BEATS * BEAT_SECONDS}
        still = {rank: beat.seconds_still + now - heard for rank, (beat, heard) in self._heard.items()}
        stuck = [
            rank
            for rank, seconds in still.items()
            if seconds >= self._limit and (rank in silent or self._heard[rank][0].activity != "evaluation")
        ]
        if not stuck:
            return []
        working = [rank for rank in stuck if not self._heard[rank][0].is_waiting]
        return [Hang(self._heard[rank][0], rank in silent, still[rank]) for rank in sorted(silent or working or stuck)]

    def forget(self) -> None:
        """Begin anew: the group is started again, or this process itself was not running."""
        self._heard = {}


def explain(hang: Hang, images: str) -> str:
    """What a user is told.

    Args:
        hang: of one worker.
        images: that it was on, in words.
    """
    beat = hang.beat
    sign = "gives no sign of life" if hang.is_silent else f"stands in {beat.where}"
    return (
        f"worker {beat.rank} (process {beat.pid} on node {beat.node_id[:8]}) hangs in {beat.activity} {beat.step}, on "
        f"{images}: it {sign}, nothing has moved for {hang.seconds:.0f} s; it is ended, and the training goes on from "
        "the last checkpoint"
    )
