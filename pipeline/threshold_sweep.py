"""AP of many thresholds of one checkpoint, from one pass over the validation rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from model.config import ModelConfig
from model.folded import folded
from model.mask_rcnn import MaskRCNN
from model.postprocess import to_original
from model.variants import SharedDetections, detect_variants
from pipeline.evaluation import (
    EvaluatedRow,
    average_precision,
    batch_of_rows,
    coco_results,
    ground_truth,
    row_groups,
)
from pipeline.shards import Manifest, ShardSet
from pipeline.training import autocast


@dataclass(frozen=True)
class SweptRow:
    """What one row contributes to all points; small enough to be sent elsewhere."""

    shared: EvaluatedRow
    """Its results are those of all points together."""
    chosen: list[npt.NDArray[np.int32]]
    """For each point which of the results are its own, best score first."""

    def of_point(self, index: int) -> EvaluatedRow:
        """As `evaluate_rows` gives it with the thresholds of this point."""
        return replace(self.shared, results=[self.shared.results[i] for i in self.chosen[index]])


def sweep_rows(
    model: MaskRCNN,
    shards: ShardSet,
    rows: Sequence[int],
    batch_size: int,
    dtype: torch.dtype | None,
    variants: Sequence[ModelConfig],
) -> list[SweptRow]:
    """Ground truth and results of some rows with each of the thresholds.

    Args:
        model: left as it is.
        shards: validation data.
        rows: which of them.
        batch_size: images a forward pass.
        dtype: see `autocast_dtype`.
        variants: configurations that differ from the model's in `model.variants.VARIABLE_KEYS` only, one a point.
    """
    device = next(model.parameters()).device
    judged = folded(model, dtype)  # as `evaluate_rows` does
    swept = []
    for group in row_groups(shards, rows, batch_size):
        images, sizes = batch_of_rows(group, shards.manifest)
        with autocast(dtype, device.type):
            found = detect_variants(judged, images.to(device), sizes.to(device), variants)
        for values, size, shared in zip(group, sizes.tolist(), found, strict=True):
            swept.append(_swept_row(values, (size[0], size[1]), shared, shards.manifest, model.config))
    return swept


def _swept_row(
    values: dict[str, Any],
    size: tuple[int, int],
    shared: SharedDetections,
    manifest: Manifest,
    config: ModelConfig,
) -> SweptRow:
    union = shared.union
    # Some may be left out on the way: those without whole pixels, and those of classes that nobody has labelled here.
    numbered = replace(union, classes=torch.arange(len(union), device=union.classes.device))
    moved = to_original(numbered, size, (values["height"], values["width"]), config)
    kept = moved.classes
    active = torch.tensor(manifest.sources[values["source"]].active_class_ids, device=kept.device)
    kept = kept[torch.isin(union.classes[kept], active)]
    place = np.full(len(union), -1, dtype=np.int32)
    place[kept.cpu().numpy()] = np.arange(len(kept))
    results = coco_results(
        values, replace(moved, classes=union.classes[moved.classes]), manifest, config.detections.whole_pixels
    )
    places = [place[rows] for rows in shared.rows]
    row = EvaluatedRow(values["row"], values["height"], values["width"], ground_truth(values), results)
    return SweptRow(row, [chosen[chosen >= 0] for chosen in places])


def point_precision(swept: Sequence[SweptRow], point: int, num_rows: int, num_classes: int) -> dict[str, float]:
    """COCO AP of one point over all rows.

    Args:
        swept: what `sweep_rows` of all workers gave, in any order.
        point: its number.
        num_rows: of the data set.
        num_classes: C, with the background.

    Returns:
        The numbers of `AP_METRICS`.
    """
    return average_precision([row.of_point(point) for row in swept], num_rows, num_classes)
