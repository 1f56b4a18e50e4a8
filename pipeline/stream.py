"""The stream: a planned order of rows, the same on any number of workers.

Epoch e has an order drawn from (seed, e): shards shuffled, then rows within windows of shards; a row stands in it as
often as its repeat factor says, and every place has a partner that copy-paste may take objects from. The run is the
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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from model.structures import Batch
from pipeline.augment import augment
from pipeline.config import AugmentSettings
from pipeline.errors import UserError
from pipeline.sample import SAMPLE_SCHEMA, collate, sample_from_row, sample_to_values
from pipeline.shards import ShardSet

Int64Array = npt.NDArray[np.int64]

MAX_STEPS_PER_BLOCK = 50
SCHEDULING_PAUSE_SECONDS = 0.02
MAX_BLOCK_BYTES = 32 * 1024 * 1024
_PLACE = ("epoch", "row", "repeat", "partner")
_PLAN_SCHEMA = pa.schema([(name, pa.int64()) for name in ("position", *_PLACE)])
_FACTOR_BITS = 20  # repeat factors are multiples of 2 ** -20, so that sums of them are exact


class Step(NamedTuple):
    """What the plan says of one step, of all workers; all rows share a canvas."""

    step: int
    epochs: Int64Array
    """(G,) epoch of every row."""
    rows: Int64Array
    """(G,)"""
    repeats: Int64Array
    """(G,) how often the row stood in its epoch before."""
    partners: Int64Array
    """(G,) another row of the epoch, from the same window of shards."""


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
    repeat_factors: npt.NDArray[np.float64] | None = None
    """(num_rows,) how often each row stands in an epoch, on average; None for once each."""

    @property
    def num_rows(self) -> int:
        """Rows of the data set."""
        return len(self.row_canvases)

    @property
    def mean_epoch_length(self) -> float:
        """Places of an epoch, on average."""
        return float(self._factors().sum() / 2**_FACTOR_BITS)

    def epoch_length(self, epoch: int) -> int:
        """Places of one epoch: the sum of the repeat factors, up or down to a whole number."""
        return int(self._factors().sum() + self._offset(epoch)) >> _FACTOR_BITS

    def steps_of_epochs(self, epochs: float) -> int:
        """Steps that take the rows of the given number of epochs (with several canvases some of them still wait)."""
        whole = math.floor(epochs)
        places: float = sum(self.epoch_length(epoch) for epoch in range(whole))
        if epochs > whole:
            places += (epochs - whole) * self.epoch_length(whole)
        return math.ceil(round(places, 6) / self.global_batch_size)

    def row_counts(self, epoch: int) -> Int64Array:
        """(num_rows,) how often each row stands in an epoch: its repeat factor, up or down to a whole number.

        Systematic sampling: the factors lie end to end on a line in random order, and every whole number counts for the
        row that it falls into.
        """
        order = np.random.default_rng([self.seed, epoch, 0, 0, 2]).permutation(self.num_rows)
        ends = (np.cumsum(self._factors()[order]) + self._offset(epoch)) >> _FACTOR_BITS
        counts = np.empty(self.num_rows, dtype=np.int64)
        counts[order] = np.diff(ends, prepend=0)
        return counts

    def _factors(self) -> Int64Array:
        """Repeat factors as whole numbers."""
        if self.repeat_factors is None:
            return np.full(self.num_rows, 1 << _FACTOR_BITS, dtype=np.int64)
        factors: Int64Array = np.rint(self.repeat_factors * 2**_FACTOR_BITS).astype(np.int64)
        return factors

    def _offset(self, epoch: int) -> int:
        """Where on the line of factors the whole numbers of an epoch lie."""
        return int(np.random.default_rng([self.seed, epoch, 0, 0, 3]).integers(1 << _FACTOR_BITS))

    def epoch_order(self, epoch: int) -> Int64Array:
        """(places,) rows of one epoch in their order, drawn from (seed, epoch); without repeats a permutation."""
        return np.concatenate(self._windows(epoch))

    def _windows(self, epoch: int) -> list[Int64Array]:
        rng = np.random.default_rng([self.seed, epoch])
        shards = rng.permutation(math.ceil(self.num_rows / self.rows_per_shard))
        counts = None if self.repeat_factors is None else self.row_counts(epoch)
        windows = []
        for start in range(0, len(shards), self.shuffle_window):
            first_rows = shards[start : start + self.shuffle_window, None] * self.rows_per_shard
            rows = (first_rows + np.arange(self.rows_per_shard)).ravel()
            rows = rows[rows < self.num_rows]
            windows.append(rng.permutation(rows if counts is None else np.repeat(rows, counts[rows])))
        return windows

    def _places(self, epoch: int) -> Int64Array:
        """(places, 4) of one epoch in order, columns as in `_PLACE`."""
        windows = self._windows(epoch)
        rng = np.random.default_rng([self.seed, epoch, 0, 0, 1])
        partners = np.concatenate([rng.permutation(window) for window in windows])
        rows = np.concatenate(windows)
        return np.stack([np.full(len(rows), epoch), rows, _times_before(rows), partners], axis=1).astype(np.int64)

    def steps(self, first_step: int, last_step: int) -> Iterator[Step]:
        """Steps with first_step <= step < last_step."""
        step, epoch = 0, 0
        waiting: dict[int, Int64Array] = {}  # canvas to the places that fill no step yet
        while step < last_step:
            for places in self._full_steps(epoch, waiting):
                if first_step <= step < last_step:
                    yield Step(step, *places.T)
                step += 1
            epoch += 1

    def _full_steps(self, epoch: int, waiting: dict[int, Int64Array]) -> list[Int64Array]:
        """Steps that fill up in the course of one epoch, in the order in which they do; `waiting` is carried on."""
        places = self._places(epoch)
        size = self.global_batch_size
        filled: list[tuple[int, Int64Array]] = []
        for canvas in np.unique(self.row_canvases):
            mine = np.flatnonzero(self.row_canvases[places[:, 1]] == canvas)
            old = waiting.get(int(canvas), np.empty((0, len(_PLACE)), dtype=np.int64))
            together = np.concatenate([old, places[mine]])
            num_steps = len(together) // size
            for index in range(num_steps):
                last_place = int(mine[(index + 1) * size - 1 - len(old)])
                filled.append((last_place, together[index * size : (index + 1) * size]))
            waiting[int(canvas)] = together[num_steps * size :]
        filled.sort(key=lambda entry: entry[0])
        return [step for _, step in filled]


def _times_before(rows: Int64Array) -> Int64Array:
    """For every place how often its row stands further ahead."""
    order = np.argsort(rows, kind="stable")
    grouped = rows[order]
    first = np.searchsorted(grouped, grouped)
    times = np.empty(len(rows), dtype=np.int64)
    times[order] = np.arange(len(rows)) - first
    return times


def planned_blocks(
    plan: StreamPlan, first_step: int, last_step: int, num_workers: int, steps_per_block: int
) -> list[Any]:
    """The plan as Arrow tables, block b for worker b mod W; their number is a multiple of W.

    Args:
        plan: order.
        first_step: where to begin.
        last_step: first step not to take.
        num_workers: W; divides the global batch.
        steps_per_block: steps of one worker in a block; the last blocks may hold fewer.
    """
    size = plan.global_batch_size // num_workers
    if size * num_workers != plan.global_batch_size:
        raise ValueError(f"a global batch of {plan.global_batch_size} does not divide by {num_workers} workers")
    blocks: list[Any] = []
    chunk: list[Step] = []

    def close_chunk() -> None:
        for worker in range(num_workers if chunk else 0):
            mine = slice(worker * size, (worker + 1) * size)
            positions = [np.arange(plan.global_batch_size)[mine] + s.step * plan.global_batch_size for s in chunk]
            places = [
                np.concatenate([values[mine] for values in column]) for column in list(zip(*chunk, strict=True))[1:]
            ]
            columns = [np.concatenate(positions), *places]
            blocks.append(pa.table(columns, schema=_PLAN_SCHEMA))
        chunk.clear()

    for step in plan.steps(first_step, last_step):
        chunk.append(step)
        if len(chunk) == steps_per_block:
            close_chunk()
    close_chunk()
    return blocks


def steps_per_block(canvases: tuple[tuple[int, int], ...], batch_size_per_worker: int) -> int:
    """As many steps as keep a block small: Ray Data splits large blocks, which would break the order."""
    largest = max(height * width * 3 for height, width in canvases) * batch_size_per_worker
    return int(np.clip(MAX_BLOCK_BYTES // largest, 1, MAX_STEPS_PER_BLOCK))


def random_key(seed: int, epoch: int, row: int, repeat: int = 0) -> int:
    """What the draws of the model for a row in an epoch are a function of: 63 bits."""
    return int(np.random.SeedSequence([seed, epoch, row, repeat]).generate_state(1, np.uint64)[0] >> np.uint64(1))


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

    def __call__(self, table: Any) -> Any:
        """Read, augment and lay out the planned rows."""
        shards = _open_shards(self.folder, self.manifest_digest)
        rows = [self.load(shards, *planned) for planned in zip(*table.to_pydict().values(), strict=True)]
        return pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)

    def load(
        self, shards: ShardSet, position: int, epoch: int, row: int, repeat: int = 0, partner: int | None = None
    ) -> dict[str, Any]:
        """One planned row, a function of (seed, epoch, row, repeat).

        Args:
            shards: to read from.
            position: place in the run.
            epoch: in which it stands.
            row: of the shards.
            repeat: how often it stood in the epoch before.
            partner: row that copy-paste takes objects from; no augmentation asks for it yet.
        """
        values = shards.read_row(row)
        rng = np.random.default_rng([self.seed, epoch, row, repeat])
        sample = augment(sample_from_row(values), self.augment_settings, rng)
        canvas_height, canvas_width = shards.manifest.canvases[values["canvas"]]
        return {
            "position": position,
            "row": row,
            "random_key": random_key(self.seed, epoch, row, repeat),
            "source": values["source"],
            "canvas_height": canvas_height,
            "canvas_width": canvas_width,
            **sample_to_values(sample),
        }


class PauseBetweenSteps:
    """Execution callback of Ray Data that keeps its scheduling loop from spinning.

    While the consumers are behind, no task runs and the loop has nothing to wait for: it was seen to take half of a CPU
    from the training beside it (Ray 2.60). A short pause after every turn ends that; a turn dispatches all it can.
    """

    def before_execution_starts(self, executor: Any) -> None:
        """Part of the interface."""

    def on_execution_step(self, executor: Any) -> None:
        """Called after every turn of the loop."""
        time.sleep(SCHEDULING_PAUSE_SECONDS)

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
        cpus: CPUs that loading may take in the whole cluster.
        object_store_bytes: bound of what waits for the workers; an ordered stream fills up behind a slow task.
    """
    import ray.data

    dataset = ray.data.from_arrow(blocks).map_batches(load, batch_size=None, batch_format="pyarrow")
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = ray.data.ExecutionResources(cpu=cpus, object_store_memory=object_store_bytes)
    dataset.context.custom_execution_callback_classes.append(PauseBetweenSteps)
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset.streaming_split(num_workers, equal=False)


@dataclass(frozen=True)
class PlannedBatches:
    """Batches of one worker, each checked against the plan."""

    iterator: Any
    """From `split_stream`."""
    active_classes: npt.NDArray[np.bool_]
    """(sources, C) see `Manifest.active_classes`."""
    first_step: int
    last_step: int
    worker: int
    """Rank of this worker."""
    batch_size_per_worker: int
    num_workers: int

    def __iter__(self) -> Iterator[Batch]:
        """One batch for each step from first_step to last_step.

        Raises:
            UserError: a row is damaged.
            RuntimeError: Ray Data delivered rows of another place in the plan, or too few.
        """
        size, step = self.batch_size_per_worker, self.first_step
        for table in self._tables(size):
            first = (step * self.num_workers + self.worker) * size
            positions = table["position"].to_pylist()
            if positions != list(range(first, first + size)):
                raise RuntimeError(f"worker {self.worker}, step {step}: rows of positions {positions}, not {first} on")
            yield collate(table_rows(table), self.active_classes)
            step += 1
        if step != self.last_step:
            raise RuntimeError(f"worker {self.worker}: the stream ended before step {step}, not {self.last_step}")

    def _tables(self, size: int) -> Iterator[Any]:
        """What Ray Data delivers; a user's error in one of its tasks comes out as what it was."""
        import ray

        try:
            yield from self.iterator.iter_batches(batch_size=size, batch_format="pyarrow", prefetch_batches=2)
        except ray.exceptions.RayTaskError as error:
            mark = f"{UserError.__module__}.{UserError.__qualname__}: "
            told = [line.partition(mark)[2] for line in str(error).splitlines() if mark in line]
            if not told:
                raise
            raise UserError(told[-1]) from error


def table_rows(table: Any) -> list[Mapping[str, Any]]:
    """Rows of an Arrow table: numbers, arrays for lists, buffers for bytes, without copying the pixels."""
    columns: dict[str, list[Any]] = {}
    for field in table.schema:
        column = table[field.name].combine_chunks()
        if pa.types.is_large_binary(field.type):
            columns[field.name] = [value.as_buffer() for value in column]
        elif pa.types.is_list(field.type):
            columns[field.name] = [value.values.to_numpy(zero_copy_only=False) for value in column]
        else:
            columns[field.name] = column.to_pylist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
