"""The stream: a planned order of rows, the same on any number of workers.

Epoch e has an order drawn from (seed, e): shards shuffled, then rows within windows of shards; a row stands in it once,
or as often as its repeats say. The run is the
concatenation of its epochs; step s takes the positions s * G to (s + 1) * G of it, G the global batch. Batches may span
epochs; nothing is padded and nothing dropped. Where there are several canvases, rows of a canvas gather until they fill
a step, across epochs. A place in the stream is one number, the step.

Ray Data reads and augments: one block holds the rows of some consecutive steps of one worker. With `preserve_order`,
block b reaches worker b mod W; nothing in Ray promises it, so every row carries its position and the worker checks it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.augment import augment
from pipeline.config import AugmentSettings
from pipeline.copy_paste import PASTED_SHARE, copy_paste, planned_partner
from pipeline.preprocess import choose_canvas
from pipeline.sample import SAMPLE_SCHEMA, Sample, sample_from_row, sample_to_values, with_mini_masks
from pipeline.sampling import Float64Array, Int64Array, repeat_counts, rows_an_epoch
from pipeline.shards import ShardSet

MAX_STEPS_PER_BLOCK = 50
SCHEDULING_PAUSE_SECONDS, AHEAD_PAUSE_SECONDS, TURNS_AHEAD = 0.02, 0.25, 10
MAX_BLOCK_BYTES = 32 * 1024 * 1024
FURTHER_PLACE = 1 << 32
_PASTED = 2  # tells the draws for what is pasted from those for the row itself and for its partner
_PLAN_SCHEMA = pa.schema([("position", pa.int64()), ("epoch", pa.int64()), ("row", pa.int64())])


@dataclass(frozen=True)
class StreamPlan:
    """Which row every worker sees in every step, as a function of the seed alone."""

    row_canvases: Int64Array
    """(num_rows,) canvas of every row."""
    rows_per_shard: int
    shuffle_window: int
    """Shards whose rows are shuffled together."""
    global_batch_size: int
    """G."""
    seed: int
    row_repeats: Float64Array | None = None
    """(num_rows,) mean number of places of every row in an epoch, see `pipeline.sampling`; None for one each."""

    @property
    def num_rows(self) -> int:
        """Places in an epoch."""
        return len(self.row_canvases) if self.row_repeats is None else rows_an_epoch(self.row_repeats)

    def steps_of_epochs(self, epochs: float) -> int:
        """Steps that take the rows of the given number of epochs (with several canvases some of them still wait)."""
        return math.ceil(round(epochs * self.num_rows, 6) / self.global_batch_size)

    def epoch_order(self, epoch: int) -> Int64Array:
        """(num_rows,) rows of one epoch in their order, drawn from (seed, epoch); without repeats a permutation."""
        rng = np.random.default_rng([self.seed, epoch])
        stored_rows = len(self.row_canvases)
        shards = rng.permutation(math.ceil(stored_rows / self.rows_per_shard))
        counts = None if self.row_repeats is None else repeat_counts(self.row_repeats, rng)
        windows = []
        for start in range(0, len(shards), self.shuffle_window):
            first_rows = shards[start : start + self.shuffle_window, None] * self.rows_per_shard
            rows = (first_rows + np.arange(self.rows_per_shard)).ravel()
            rows = rows[rows < stored_rows]
            windows.append(rng.permutation(rows if counts is None else np.repeat(rows, counts[rows])))
        return np.concatenate(windows)

    def steps(self, first_step: int, last_step: int) -> Iterator[tuple[int, Int64Array, Int64Array]]:
        """Step, epochs (G,) and rows (G,) for first_step <= step < last_step; all rows of a step share a canvas.

        The k-th further place of a row in an epoch has the epoch's number plus k * `FURTHER_PLACE`, so that each place
        has random draws of its own.
        """
        step, epoch = 0, 0
        waiting: dict[int, tuple[Int64Array, Int64Array]] = {}  # canvas to epochs and rows that fill no step yet
        while step < last_step:
            for epochs, rows in self._full_steps(epoch, waiting):
                if first_step <= step < last_step:
                    yield step, epochs, rows
                step += 1
            epoch += 1

    def _full_steps(
        self, epoch: int, waiting: dict[int, tuple[Int64Array, Int64Array]]
    ) -> list[tuple[Int64Array, Int64Array]]:
        """Steps that fill up in the course of one epoch, in the order in which they do; `waiting` is carried on."""
        order = self.epoch_order(epoch)
        numbers = epoch + FURTHER_PLACE * _occurrences(order)
        size = self.global_batch_size
        filled: list[tuple[int, Int64Array, Int64Array]] = []
        for canvas in np.unique(self.row_canvases):
            places = np.flatnonzero(self.row_canvases[order] == canvas)
            nothing = np.empty(0, dtype=np.int64)
            old_epochs, old_rows = waiting.get(int(canvas), (nothing, nothing))
            epochs = np.concatenate([old_epochs, numbers[places]])
            rows = np.concatenate([old_rows, order[places]])
            num_steps = len(rows) // size
            for index in range(num_steps):
                part = slice(index * size, (index + 1) * size)
                last_place = int(places[(index + 1) * size - 1 - len(old_rows)])
                filled.append((last_place, epochs[part], rows[part]))
            waiting[int(canvas)] = (epochs[num_steps * size :], rows[num_steps * size :])
        filled.sort(key=lambda entry: entry[0])
        return [(epochs, rows) for _, epochs, rows in filled]


def _occurrences(order: Int64Array) -> Int64Array:
    """How often the row of each place stood before it."""
    by_row = np.argsort(order, kind="stable")
    rows = order[by_row]
    starts = np.searchsorted(rows, rows, side="left")
    occurrences = np.empty_like(order)
    occurrences[by_row] = np.arange(len(order)) - starts
    return occurrences


def planned_blocks(
    plan: StreamPlan, first_step: int, last_step: int, num_workers: int, steps_per_block: int
) -> list[Any]:
    """The plan as Arrow tables, block b for worker b mod W; their number is a multiple of W.

    Args:
        plan: order.
        first_step: where to begin.
        last_step: first step not to take.
        num_workers: W; divides the global batch.
        steps_per_block: most steps of one worker in a block. The first blocks hold 1, 1, 2, 4, ... since a worker gets
            its first batch when two blocks are loaded; the last ones what is left.
    """
    size = plan.global_batch_size // num_workers
    if size * num_workers != plan.global_batch_size:
        raise ValueError(f"a global batch of {plan.global_batch_size} does not divide by {num_workers} workers")
    blocks: list[Any] = []
    chunk: list[tuple[int, Int64Array, Int64Array]] = []

    def close_chunk() -> None:
        for worker in range(num_workers if chunk else 0):
            mine = slice(worker * size, (worker + 1) * size)
            positions = [np.arange(plan.global_batch_size)[mine] + s * plan.global_batch_size for s, _, _ in chunk]
            columns = [
                np.concatenate(positions),
                np.concatenate([epochs[mine] for _, epochs, _ in chunk]),
                np.concatenate([rows[mine] for _, _, rows in chunk]),
            ]
            blocks.append(pa.table(columns, schema=_PLAN_SCHEMA))
        chunk.clear()

    full = 1
    for step in plan.steps(first_step, last_step):
        chunk.append(step)
        if len(chunk) == full:
            full = min(steps_per_block, full if not blocks else 2 * full)
            close_chunk()
    close_chunk()
    return blocks


def steps_per_block(canvases: tuple[tuple[int, int], ...], batch_size_per_worker: int) -> int:
    """As many steps as keep a block small: Ray Data splits large blocks, which would break the order."""
    largest = max(height * width * 3 for height, width in canvases) * batch_size_per_worker
    return int(np.clip(MAX_BLOCK_BYTES // largest, 1, MAX_STEPS_PER_BLOCK))


def random_key(seed: int, epoch: int, row: int) -> int:
    """What the draws of the model for a row in an epoch are a function of: 63 bits."""
    return int(np.random.SeedSequence([seed, epoch, row]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=2)
def _open_shards(folder: str, manifest_digest: str) -> ShardSet:
    """Shards of a folder; a process reads a manifest once."""
    shards = ShardSet(folder)
    if shards.manifest.digest != manifest_digest:
        raise RuntimeError(f"{folder}: the shards were prepared anew while a training reads them")
    return shards


@dataclass(frozen=True)
class LoadBlock:
    """Ray Data task: a block of the plan to a block of `SAMPLE_SCHEMA`, row for row."""

    folder: str
    """Shards."""
    manifest_digest: str
    """Of the shards that the plan was made for."""
    augment_settings: AugmentSettings
    seed: int
    mini_masks: int | None = None
    """Pixels a side that masks are reduced to, see `DataSettings`."""

    def __call__(self, table: Any) -> Any:
        """Read, augment and lay out the planned rows."""
        shards = _open_shards(self.folder, self.manifest_digest)
        rows = [self.load(shards, *planned) for planned in zip(*table.to_pydict().values(), strict=True)]
        return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)

    def load(self, shards: ShardSet, position: int, epoch: int, row: int) -> dict[str, Any]:
        """One planned row, a function of (seed, epoch, row)."""
        values = shards.read_row(row)
        canvas_height, canvas_width = canvas = shards.manifest.canvases[values["canvas"]]
        rng = np.random.default_rng([self.seed, epoch, row])
        sample = self._augment(values, rng, canvas, shards.manifest.short_side)
        sample = self._paste(shards, sample, values["source"], canvas, epoch, row)
        if self.mini_masks is not None:
            sample = with_mini_masks(sample, self.mini_masks)
        return {
            "position": position,
            "row": row,
            "random_key": random_key(self.seed, epoch, row),
            "source": values["source"],
            "canvas_height": canvas_height,
            "canvas_width": canvas_width,
            **sample_to_values(sample),
        }

    def _augment(
        self, values: Mapping[str, Any], rng: np.random.Generator, canvas: tuple[int, int], short_side: int | None
    ) -> Sample:
        """A row changed by these draws; where they do not draw its size, it gets the one that it has on the canvas."""
        _, height, width = choose_canvas(values["height"], values["width"], (canvas,), short_side)
        return augment(sample_from_row(values), self.augment_settings, rng, canvas, (height, width))

    def _paste(
        self, shards: ShardSet, sample: Sample, source: int, canvas: tuple[int, int], epoch: int, row: int
    ) -> Sample:
        """With objects of the row that is the partner of this one in this epoch, if it has one."""
        partner_row = planned_partner(self.seed, epoch, row, len(shards), self.augment_settings.copy_paste)
        if partner_row is None:
            return sample
        values = shards.read_row(partner_row)
        if values["source"] != source:  # it may have labelled other classes
            return sample
        rng = np.random.default_rng([self.seed, epoch, row, _PASTED])
        partner = self._augment(values, rng, canvas, shards.manifest.short_side)
        return copy_paste(sample, partner, rng.random(len(partner.classes)) < PASTED_SHARE)


class PauseBetweenSteps:
    """Execution callback of Ray Data that keeps its scheduling loop from spinning.

    While the consumers are behind, no task runs and the loop has nothing to wait for: it was seen to take half of a CPU
    from the training beside it (Ray 2.60). A short pause after every turn ends that; a turn dispatches all it can.
    Once loaded blocks have waited for the workers for some turns nothing is urgent, and the pause is longer: with the
    short one the turns still took 11 % of a CPU.
    """

    def __init__(self) -> None:
        self._turns_ahead = 0

    def before_execution_starts(self, executor: Any) -> None:
        """Part of the interface."""

    def on_execution_step(self, executor: Any) -> None:
        """Called after every turn of the loop."""
        self._turns_ahead = 0 if executor._consumer_idling() else self._turns_ahead + 1
        time.sleep(AHEAD_PAUSE_SECONDS if self._turns_ahead > TURNS_AHEAD else SCHEDULING_PAUSE_SECONDS)

    def after_execution_succeeds(self, executor: Any) -> None:
        """Part of the interface."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Part of the interface."""


def split_stream(blocks: list[Any], load: LoadBlock, num_workers: int, cpus: float, object_store_bytes: int) -> Any:
    """One iterator a worker over the loaded blocks; they can be sent to other processes.

    Args:
        blocks: from `planned_blocks`, at least one.
        load: what turns them into samples.
        num_workers: W.
        cpus: CPUs that loading may take in the whole cluster. With none, as when the workers have all that is left of
            it, one task at a time shares theirs; to wait for a CPU would be to wait for ever.
        object_store_bytes: bound of what waits for the workers; an ordered stream fills up behind a slow task.
    """
    import ray.data
    from ray.data.read_api import from_blocks  # from_arrow has a task look at every block, a second for 200 of them

    sharing: dict[str, Any] = {} if cpus >= 1 else {"num_cpus": 0, "concurrency": 1}
    dataset = from_blocks(blocks).map_batches(load, batch_size=None, batch_format="pyarrow", **sharing)
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ray.data.ExecutionResources(cpu=max(cpus, 1), object_store_memory=object_store_bytes)
    dataset.context.custom_execution_callback_classes.append(PauseBetweenSteps)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset.streaming_split(num_workers, equal=False)
