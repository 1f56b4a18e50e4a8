"""An evaluation by all workers: each predicts its part of the validation rows, rank 0 puts the numbers together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import nn

from model.mask_rcnn import MaskRCNN
from pipeline.evaluation import average_precision, evaluate_rows, predict_rows, proposal_recall, rows_of_worker
from pipeline.report import draw_comparison
from pipeline.shards import ShardSet

NUM_PICTURES = 4
EVALUATION_BATCH_SIZE = 8


class WorkerEvaluation:
    """Every worker has one, and calls all but `picture`, which is one's own, at the same steps."""

    def __init__(
        self, validation: ShardSet, rank: int, num_workers: int, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self._validation, self._rank, self._num_workers, self._dtype = validation, rank, num_workers, dtype
        self.group = _object_group(num_workers, device)

    def metrics(self, model: MaskRCNN, with_proposal_recall: bool) -> dict[str, float] | None:
        """COCO AP on the validation rows, and the recall of the proposals if it is asked for; None but on rank 0."""
        rows = rows_of_worker(len(self._validation), self._rank, self._num_workers)
        seen = evaluate_rows(model, self._validation, rows, EVALUATION_BATCH_SIZE, self._dtype, with_proposal_recall)
        everything: list[Any] | None = [None] * self._num_workers if self._rank == 0 else None
        if self._num_workers > 1:
            torch.distributed.gather_object(seen, everything, dst=0, group=self.group)
        else:
            everything = [seen]
        if everything is None:
            return None
        together = [entry for part in everything for entry in part]
        manifest = self._validation.manifest
        return {**average_precision(together, manifest.num_rows, manifest.num_classes), **proposal_recall(together)}

    def from_first(self, message: list[Any]) -> list[Any]:
        """What rank 0 has; the others give as many places for it."""
        if self._num_workers > 1:
            torch.distributed.broadcast_object_list(message, src=0, group=self.group)
        return message

    def share_statistics(self, *models: nn.Module | None) -> None:
        """Give all workers rank 0's norm statistics, which the checkpoint gets: a forward pass leaves each its own."""
        if self._num_workers > 1:
            for buffer in (buffer for model in models if model is not None for buffer in model.buffers()):
                torch.distributed.broadcast(buffer, src=0)

    def picture(self, model: MaskRCNN) -> bytes | None:
        """A PNG of a few validation images with objects, predictions beside annotations; None without any."""
        rows = pictured_rows(self._validation.manifest.row_classes())
        if not rows:
            return None
        was_training = model.training
        found = list(predict_rows(model.eval(), self._validation, rows, EVALUATION_BATCH_SIZE, self._dtype))
        model.train(was_training)
        return draw_comparison(found, self._validation.manifest.class_names)


def pictured_rows(row_classes: Sequence[Sequence[int]]) -> list[int]:
    """At most four rows with objects, from everywhere: images beside each other in a file often show the same place.

    Args:
        row_classes: classes of the objects of every row; nothing else counts, so all evaluations show the same images.
    """
    with_objects = [row for row, classes in enumerate(row_classes) if classes]
    places = {len(with_objects) * part // NUM_PICTURES for part in range(NUM_PICTURES)}
    return [with_objects[place] for place in sorted(places)] if with_objects else []


def _object_group(num_workers: int, device: torch.device) -> Any:
    """Process group that sends Python objects from memory to memory, also where tensors go over NCCL."""
    if num_workers > 1 and device.type == "cuda":
        return torch.distributed.new_group(backend="gloo")
    return None
