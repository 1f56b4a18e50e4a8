"""A pool of processes that hold the model, and the parts that they get: what is lost with one is given to another.

Ray Data is not used here, although it has actor pools. Its unit is the block, whose borders it may move, and it writes
files named by its own runs; a part has to be the same images in the same file in every run. One exception in it ends
the job, or drops a whole block; here it is an entry of the errors table. And its pool would be filled through the
object store with pixels of images whose part may be there already. What it would have brought is a queue, two parts
ahead of every process, and another try for a part whose process died: the loop below.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from model.mask_rcnn import MaskRCNN
from pipeline.cluster import Placement, workers_that_fit
from pipeline.errors import UserError, last_line
from pipeline.prediction_inputs import Entry
from pipeline.prediction_parts import PARTS_AT_ONCE, PartPredictor, PartSettings
from pipeline.prediction_schema import PartSummary

Say = Callable[[str], None]
FIT_SECONDS = 5.0
"""Time between two looks at the nodes."""


@dataclass(frozen=True)
class Part:
    """A part that is to be computed."""

    number: int
    entries: list[Entry]


class Pool:
    """Actors with the model, as many as the cluster holds; entered as a context, left with all of them ended."""

    def __init__(
        self, model: MaskRCNN, settings: PartSettings, placement: Placement, most: int, max_failures: int, say: Say
    ) -> None:
        import ray

        self._actor_class = ray.remote(PartPredictor)
        self._sent = ray.put(model)  # not its file: that may be on this node alone
        self._settings, self._placement = settings, placement
        self._most, self._max_failures, self._say = most, max_failures, say
        self._starting: dict[Any, Any] = {}  # reference of `process_id`: actor
        self._ready: dict[Any, int] = {}  # actor: parts that it has
        self._running: dict[Any, tuple[Any, Part]] = {}  # reference of `predict_part`: actor and part
        self._queue: deque[Part] = deque()
        self._failures: Counter[int] = Counter()
        self.process_ids: dict[Any, int] = {}
        """Of the actors that are ready."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in [*self._starting.values(), *self._ready]:
            self._end(actor)

    def predict(self, parts: Iterable[Part]) -> Iterator[PartSummary]:
        """Compute parts; summaries come in the order in which they get done.

        Raises:
            UserError: a part, or the start of a process, failed more often than `predict.max_failures` allows.
        """
        import ray

        self._queue = deque(parts)
        fitted = -FIT_SECONDS
        while self._queue or self._running:
            if time.monotonic() - fitted > FIT_SECONDS:
                fitted = time.monotonic()
                self._fit()
            self._hand_out()
            done, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=FIT_SECONDS)
            for reference in done:
                if reference in self._starting:
                    self._take_in(reference)
                elif reference in self._running:  # else it went with its actor in this same round
                    summary = self._collect(reference)
                    if summary is not None:
                        yield summary

    def _fit(self) -> None:
        """As many actors as the nodes hold: nodes may come, and of those that went the CPUs for decoding have to stay.

        At least one is kept: it waits for a node.
        """
        wanted = max(1, min(self._most, workers_that_fit(self._placement.resources_per_worker)))
        wanted = min(wanted, len(self._queue) + len(self._running))
        while len(self._starting) + len(self._ready) < wanted:
            self._start()
        idle_first = [*self._starting.values(), *sorted(self._ready, key=lambda actor: self._ready[actor])]
        for actor in idle_first[: max(0, len(idle_first) - wanted)]:
            self._end(actor)

    def _start(self) -> None:
        resources, use_gpu = self._placement.resources_per_worker, self._placement.use_gpu
        actor_class = self._actor_class.options(max_concurrency=PARTS_AT_ONCE, **self._placement.options())
        actor = actor_class.remote(self._sent, self._settings, "cuda" if use_gpu else "cpu", int(resources["CPU"]))
        self._starting[actor.process_id.remote()] = actor

    def _end(self, actor: Any) -> None:
        """End an actor; its parts go back to the head of the queue."""
        import ray

        ray.kill(actor)
        self._ready.pop(actor, None)
        self.process_ids.pop(actor, None)
        self._starting = {reference: other for reference, other in self._starting.items() if other is not actor}
        lost = [reference for reference, (holder, _) in self._running.items() if holder is actor]
        self._queue.extendleft(self._running.pop(reference)[1] for reference in reversed(lost))

    def _hand_out(self) -> None:
        """Give every actor that is ready as many parts as it may have."""
        for actor in self._ready:
            while self._queue and self._ready[actor] < PARTS_AT_ONCE:
                part = self._queue.popleft()
                self._running[actor.predict_part.remote(part.number, part.entries)] = (actor, part)
                self._ready[actor] += 1

    def _take_in(self, reference: Any) -> None:
        """Count an actor as ready, or start another one where it has died."""
        import ray

        actor = self._starting.pop(reference)
        try:
            self.process_ids[actor] = ray.get(reference)
            self._ready[actor] = 0
        except ray.exceptions.RayError as error:
            self._note_failure(-1, error)
            self._start()

    def _collect(self, reference: Any) -> PartSummary | None:
        """What came of a part; None where it failed and waits for another try."""
        import ray

        actor, part = self._running[reference]
        try:
            summary: PartSummary = ray.get(reference)
        except ray.exceptions.RayError as error:
            self._note_failure(part.number, error)
            if isinstance(error, ray.exceptions.RayTaskError):  # the process lives
                del self._running[reference]
                self._ready[actor] -= 1
                self._queue.appendleft(part)
            else:
                self._end(actor)
                self._start()
            return None
        del self._running[reference]
        self._ready[actor] -= 1
        return summary

    def _note_failure(self, part: int, error: Exception) -> None:
        self._failures[part] += 1
        what = f"part {part}" if part >= 0 else "the start of a process with the model"
        if self._failures[part] > self._max_failures:
            raise UserError(
                f"{what} failed {self._failures[part]} times ({last_line(error)}); parts that are done are kept, "
                "the same command goes on with the others; see --predict.max_failures"
            )
        self._say(f"predict: {what} failed ({last_line(error)}); it is tried again")
