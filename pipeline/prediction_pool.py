"""A pool of processes that hold the model, and the parts that they get: what is lost with one is given to another.

Ray Data is not used here, although it has actor pools. Its unit is the block, whose borders it may move, and it writes
files named by its own runs; a part has to be the same images in the same file in every run. One exception in it ends
the job, or drops a whole block; here it is an entry of the errors table. And its pool would be filled through the
object store with pixels of images whose part may be there already. What it would have brought is a queue, two parts
ahead of every process, and another try for a part whose process died: the loop below.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from model.mask_rcnn import MaskRCNN
from pipeline.cluster import Placement
from pipeline.errors import UserError
from pipeline.prediction_inputs import Entry
from pipeline.prediction_parts import PARTS_AT_ONCE, PartPredictor, PartSettings, last_line
from pipeline.prediction_schema import PartSummary

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """A part that is to be computed."""

    number: int
    entries: list[Entry]


class Pool:
    """Actors with the model; entered as a context, left with all of them ended."""

    def __init__(
        self, model: MaskRCNN, settings: PartSettings, placement: Placement, size: int, max_failures: int, say: Say
    ) -> None:
        import ray

        self._sent = ray.put(model)  # not its file: that may be on this node alone
        self._settings, self._placement = settings, placement
        self._size, self._max_failures, self._say = size, max_failures, say
        self._starting: dict[Any, Any] = {}  # reference of `process_id`: actor
        self._ready: dict[Any, int] = {}  # actor: parts that it has
        self._failures: Counter[int] = Counter()
        self.process_ids: dict[Any, int] = {}
        """Of the actors that are ready."""

    def __enter__(self) -> Pool:
        for _ in range(self._size):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in [*self._starting.values(), *self._ready]:
            ray.kill(actor)

    def _start(self) -> None:
        import ray

        resources, use_gpu = self._placement.resources_per_worker, self._placement.use_gpu
        actor_class = ray.remote(PartPredictor).options(
            num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0), max_concurrency=PARTS_AT_ONCE
        )
        actor = actor_class.remote(self._sent, self._settings, "cuda" if use_gpu else "cpu", int(resources["CPU"]))
        self._starting[actor.process_id.remote()] = actor

    def predict(self, parts: Iterable[Part]) -> Iterator[PartSummary]:
        """Compute parts; summaries come in the order in which they get done.

        Raises:
            UserError: a part, or the start of a process, failed more often than `predict.max_failures` allows.
        """
        import ray

        queue = deque(parts)
        running: dict[Any, tuple[Any, Part]] = {}
        while queue or running:
            for actor, load in self._ready.items():
                while queue and load < PARTS_AT_ONCE:
                    part = queue.popleft()
                    running[actor.predict_part.remote(part.number, part.entries)] = (actor, part)
                    load += 1
                self._ready[actor] = load
            done, _ = ray.wait([*running, *self._starting], num_returns=1)
            for reference in done:
                if reference in self._starting:
                    self._take_in(reference)
                    continue
                if reference not in running:  # went with its actor in this same round
                    continue
                actor, part = running.pop(reference)
                try:
                    summary: PartSummary = ray.get(reference)
                except ray.exceptions.RayError as error:
                    self._note_failure(part.number, error)
                    queue.appendleft(part)
                    if isinstance(error, ray.exceptions.RayTaskError):  # the process lives
                        self._ready[actor] -= 1
                    elif actor in self._ready:
                        queue.extendleft(self._replace(actor, running))
                    continue
                self._ready[actor] -= 1
                yield summary

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

    def _replace(self, actor: Any, running: dict[Any, tuple[Any, Part]]) -> list[Part]:
        """Start another actor in place of a dead one; returns the parts that went with it."""
        import ray

        del self._ready[actor]
        self.process_ids.pop(actor, None)
        ray.kill(actor)
        lost = [reference for reference, (holder, _) in running.items() if holder is actor]
        self._start()
        return [running.pop(reference)[1] for reference in lost]

    def _note_failure(self, part: int, error: Exception) -> None:
        self._failures[part] += 1
        what = f"part {part}" if part >= 0 else "the start of a process with the model"
        if self._failures[part] > self._max_failures:
            raise UserError(
                f"{what} failed {self._failures[part]} times ({last_line(error)}); parts that are done are kept, "
                "the same command goes on with the others; see --predict.max_failures"
            )
        self._say(f"predict: {what} failed ({last_line(error)}); it is tried again")
