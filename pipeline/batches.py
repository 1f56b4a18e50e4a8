"""What a worker takes from its stream: batches, each checked against the plan.

Apart from `pipeline.stream`, whose tasks and coordinator start sooner and stay smaller without torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from model.structures import Batch
from pipeline.errors import UserError
from pipeline.preprocess import UInt8Array
from pipeline.sample import mask_offsets

MIN_GROUND_TRUTH_SLOTS = 8
"""Slots are a power of two and at least these, so that few shapes occur."""


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
    accumulation_steps: int = 1
    """Batches that a step is cut into."""

    def __iter__(self) -> Iterator[Batch]:
        """Batches of each step from first_step to last_step, one after the other.

        Raises:
            UserError: a row is damaged.
            RuntimeError: Ray Data delivered rows of another place in the plan, or too few.
        """
        size, part = self.batch_size_per_worker, self.first_step * self.accumulation_steps
        for table in self._tables(size):
            step, index = divmod(part, self.accumulation_steps)
            first = ((step * self.num_workers + self.worker) * self.accumulation_steps + index) * size
            positions = table["position"].to_pylist()
            if positions != list(range(first, first + size)):
                raise RuntimeError(f"worker {self.worker}, step {step}: rows of positions {positions}, not {first} on")
            yield collate(table_rows(table), self.active_classes)
            part += 1
        if part != self.last_step * self.accumulation_steps:
            step = part // self.accumulation_steps
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


def collate(rows: Sequence[Mapping[str, Any]], active_classes: npt.NDArray[np.bool_]) -> Batch:
    """Rows of `SAMPLE_SCHEMA` on one canvas to a Batch on the CPU.

    Args:
        rows: at least one, all of the same canvas.
        active_classes: (sources, C) see `Manifest.active_classes`.
    """
    canvas = (rows[0]["canvas_height"], rows[0]["canvas_width"])
    if any((row["canvas_height"], row["canvas_width"]) != canvas for row in rows):
        raise AssertionError("a step mixes canvases")
    num_images = len(rows)
    most = max(MIN_GROUND_TRUTH_SLOTS, *(len(row["classes"]) for row in rows))
    slots = 1 << (most - 1).bit_length()
    images = np.zeros((num_images, *canvas, 3), dtype=np.uint8)
    classes = np.zeros((num_images, slots), dtype=np.int64)
    is_crowd = np.zeros((num_images, slots), dtype=bool)
    boxes = np.zeros((num_images, slots, 4), dtype=np.float32)
    mask_boxes = np.zeros((num_images, slots, 4), dtype=np.float32)
    mask_sizes = np.zeros((num_images, slots, 2), dtype=np.int64)
    offsets = np.zeros((num_images, slots), dtype=np.int64)
    mask_bits: list[UInt8Array] = []
    first_byte = 0
    for index, row in enumerate(rows):
        height, width, number = row["image_height"], row["image_width"], len(row["classes"])
        images[index, :height, :width] = np.frombuffer(row["image"], dtype=np.uint8).reshape(height, width, 3)
        classes[index, :number] = row["classes"]
        is_crowd[index, :number] = row["is_crowd"]
        boxes[index, :number] = np.asarray(row["boxes"]).reshape(-1, 4)
        mask_boxes[index, :number] = np.asarray(row["mask_boxes"]).reshape(-1, 4)
        mask_sizes[index, :number] = np.asarray(row["mask_sizes"]).reshape(-1, 2)
        ends = mask_offsets(mask_sizes[index, :number].astype(np.int32))
        offsets[index, :number] = first_byte + ends[:-1]
        first_byte += int(ends[-1])
        mask_bits.append(np.frombuffer(row["mask_bits"], dtype=np.uint8))
    mask_bits.append(np.zeros(1, dtype=np.uint8))  # never empty: index 0 stands for "no bit"
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        image_sizes=torch.tensor([[row["image_height"], row["image_width"]] for row in rows], dtype=torch.int64),
        boxes=torch.from_numpy(boxes),
        classes=torch.from_numpy(classes),
        is_crowd=torch.from_numpy(is_crowd),
        mask_boxes=torch.from_numpy(mask_boxes),
        mask_sizes=torch.from_numpy(mask_sizes),
        mask_offsets=torch.from_numpy(offsets),
        mask_bits=torch.from_numpy(np.concatenate(mask_bits)),
        active_class_ids=torch.from_numpy(active_classes[[row["source"] for row in rows]]),
        random_keys=torch.tensor([row["random_key"] for row in rows], dtype=torch.int64),
    )
