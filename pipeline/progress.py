"""Shows a person where a training is: one line that is rewritten on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from model.losses import LOSS_NAMES
from pipeline.tracking import SHOW_GROUP

POLL_SECONDS = 0.5
LOG_LINE_SECONDS = 10.0
LATE_PACES = 10  # that the time left goes by


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def settled_paces(paces: Sequence[float]) -> Sequence[float]:
    """Seconds a step, in order, without the first ones: those steps wait for the stream, and fill caches."""
    return paces[1 + len(paces) // 4 :]


def seconds_left(num_steps: int, paces: Sequence[float]) -> float | None:
    """Time for so many steps by the pace of late; None where only first steps were timed."""
    if num_steps == 0:
        return 0.0
    late = settled_paces(paces)[-LATE_PACES:]
    return num_steps * statistics.median(late) if late else None


def step_line(progress: dict[str, Any]) -> str:
    """Epoch, step, the losses, images/s and the time left, None where it cannot be told yet."""
    losses = "  ".join(f"{name} {progress['losses'][name]:.3f}" for name in LOSS_NAMES)
    left = progress["seconds_left"]
    return (
        f"epoch {progress['epoch']:.2f}  step {progress['step']}/{progress['last_step']}  "
        f"loss {progress['losses']['loss']:.3f} = {losses}  {progress['images_per_second']:.1f} images/s  "
        f"data wait {progress['data_wait_fraction']:.1%}  "
        + ("time left not known yet" if left is None else f"{duration(left)} left")
    )


def evaluation_line(progress: dict[str, Any]) -> str:
    """What an evaluation gave."""
    metrics = progress["evaluated"]
    shown = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"))
    return f"epoch {progress['epoch']:.2f}  step {progress['step']}/{progress['last_step']}  {shown}"


class ProgressDisplay:
    """Follows the tracker from a thread while the driver waits for the training."""

    def __init__(self, tracker: Any, say: Callable[[str], None]) -> None:
        self._tracker, self._say = tracker, say
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._last_step, self._evaluated_step = -1, -1
        self._line_at = 0.0
        self._problem: str | None = None
        self._notices_shown = 0
        self._line_is_open = False
        self._link_shown = False

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._close_line()

    def _follow(self) -> None:
        import ray

        show = self._tracker.get_progress.options(concurrency_group=SHOW_GROUP)
        while True:
            finished = self._done.wait(POLL_SECONDS)
            with contextlib.suppress(ray.exceptions.RayError):  # shown again when the tracker is back
                self._show(ray.get(show.remote(), timeout=30))
            if finished:
                return

    def _show(self, progress: dict[str, Any]) -> None:
        if progress.get("problem") and progress["problem"] != self._problem:
            self._problem = progress["problem"]
            self._print(f"warning: {self._problem}")
        for notice in progress.get("notices", [])[self._notices_shown :]:
            self._notices_shown += 1
            self._print(f"warning: {notice}")
        if progress.get("link") and not self._link_shown:
            self._link_shown = True
            self._print(f"mlflow: {progress['link']}")
        if "evaluated" in progress and progress["step"] != self._evaluated_step:
            self._evaluated_step = progress["step"]
            self._print(evaluation_line(progress))
        if "losses" not in progress or progress["step"] == self._last_step:
            return
        self._last_step = progress["step"]
        if sys.stdout.isatty():
            sys.stdout.write("\r\033[K" + step_line(progress))
            sys.stdout.flush()
            self._line_is_open = True
        elif time.monotonic() - self._line_at >= LOG_LINE_SECONDS:
            self._line_at = time.monotonic()
            self._say(step_line(progress))

    def _print(self, line: str) -> None:
        self._close_line()
        self._say(line)

    def _close_line(self) -> None:
        if self._line_is_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
            self._line_is_open = False
