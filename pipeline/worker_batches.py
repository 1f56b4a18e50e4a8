"""The batches of one worker from a step to the last: the plan, streamed by Ray Data, shared out among the workers."""

from __future__ import annotations

from collections.abc import Iterator

from model.structures import Batch
from pipeline.batch_shares import BatchShare
from pipeline.batches import PlannedBatches
from pipeline.cluster import cpus_beside
from pipeline.config import ExperimentConfig
from pipeline.shards import ShardSet
from pipeline.stream import LoadBlock, StreamPlan, planned_blocks, split_stream, steps_per_block

MAX_BLOCKS_PER_STREAM = 4096  # each costs the driver of the stream about a millisecond before the first batch comes


class WorkerBatches:
    """What this worker gets of the plan; all workers iterate alike, for each stream begins with a broadcast."""

    def __init__(
        self,
        config: ExperimentConfig,
        shards: ShardSet,
        plan: StreamPlan,
        load: LoadBlock,
        share: BatchShare,
        rank: int,
        num_workers: int,
        cpus_for_data: float,
    ) -> None:
        self._config, self._shards, self._plan, self._load = config, shards, plan, load
        self._share, self._rank, self._num_workers, self._cpus_for_data = share, rank, num_workers, cpus_for_data

    def of_steps(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Batches from one step to before another, as many for each as the share has passes."""
        per_block = steps_per_block(self._shards.manifest.canvases, self._share.images * self._share.passes)
        steps = max(1, MAX_BLOCKS_PER_STREAM // self._num_workers) * per_block
        for first in range(first_step, last_step, steps):
            yield from self._stream(first, min(first + steps, last_step), per_block)

    def _stream(self, first_step: int, last_step: int, per_block: int) -> PlannedBatches:
        """Rank 0 builds the stream for all.

        Not through `datasets=` of the trainer: only here is it known from which checkpoint the run goes on.
        """
        import ray.train.collective

        iterators = None
        if self._rank == 0:
            blocks = planned_blocks(self._plan, first_step, last_step, self._num_workers, per_block)
            store_bytes = self._config.data.object_store_megabytes * 1024 * 1024
            cpus = min(self._cpus_for_data, cpus_beside(self._num_workers * self._config.scaling.cpus_per_worker))
            iterators = split_stream(blocks, self._load, self._num_workers, cpus, store_bytes)
        iterators = ray.train.collective.broadcast_from_rank_zero(iterators)
        return PlannedBatches(
            iterators[self._rank],
            self._shards.manifest.active_classes(),
            first_step,
            last_step,
            self._rank,
            self._share.images,
            self._num_workers,
            self._share.passes,
        )
