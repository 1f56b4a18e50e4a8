"""COCO average precision of boxes and masks; every row exactly once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from model.folded import folded
from model.mask_rcnn import MaskRCNN
from model.masks import encode_detections
from model.postprocess import to_original
from model.structures import Detections
from pipeline.coco_metrics import coco_statistics
from pipeline.proposal_recall import RecallCounts, average_recall, count_found
from pipeline.sample import unpack_row_masks
from pipeline.shards import Manifest, ShardSet
from pipeline.training import autocast
from pipeline.views import Viewing, detect_views, unite, views_of

Json = dict[str, Any]


@dataclass(frozen=True)
class EvaluatedRow:
    """What one row contributes to the evaluation; small enough to be sent elsewhere."""

    row: int
    height: int
    """Original rows."""
    width: int
    annotations: list[Json]
    """Ground truth."""
    results: list[Json]
    recall: RecallCounts | None = None
    """Of the proposals, where it was asked for."""


AP_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
AP_METRICS = tuple(f"{kind}_{name}" for kind in ("bbox", "segm") for name in AP_NAMES)
"""Names of the numbers that `average_precision` returns, in its order."""


def rows_of_worker(num_rows: int, worker: int, num_workers: int) -> range:
    """Rows that one of the workers looks at; together they see each exactly once."""
    return range(worker, num_rows, num_workers)


def predict_rows(
    model: MaskRCNN,
    shards: ShardSet,
    rows: Iterable[int],
    batch_size: int,
    dtype: torch.dtype | None,
    viewing: Viewing | None = None,
) -> Iterator[tuple[dict[str, Any], Detections]]:
    """Detections of prepared rows in original pixels, masks not yet pasted.

    Args:
        model: in evaluation mode.
        shards: validation data.
        rows: which of them.
        batch_size: images a forward pass; only rows of one canvas share one.
        dtype: see `autocast_dtype`.
        viewing: how to look at each image, of the size that it is stored at; None takes it as it is stored.

    Yields:
        The row as read, and what was found in it.
    """
    if viewing is not None:
        yield from _predict_views(model, shards, rows, dtype, viewing)
        return
    for group in row_groups(shards, rows, batch_size):
        for values, detections, _ in _predict(model, shards.manifest, group, dtype, with_proposals=False):
            yield values, detections


def row_groups(shards: ShardSet, rows: Iterable[int], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows as read, in lists of up to batch_size that lie on one canvas."""
    waiting: dict[int, list[dict[str, Any]]] = {}
    for values in shards.read_rows(list(rows)):
        waiting.setdefault(values["canvas"], []).append(values)
        if len(waiting[values["canvas"]]) == batch_size:
            yield waiting.pop(values["canvas"])
    yield from waiting.values()


def batch_of_rows(group: Sequence[dict[str, Any]], manifest: Manifest) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one canvas as images (B, 3, H, W) uint8 and their sizes (B, 2) int64 on it."""
    canvas_height, canvas_width = manifest.canvases[group[0]["canvas"]]
    images = np.zeros((len(group), canvas_height, canvas_width, 3), dtype=np.uint8)
    for index, values in enumerate(group):
        height, width = values["image_height"], values["image_width"]
        images[index, :height, :width] = values["image"].reshape(height, width, 3)
    sizes = torch.tensor([(values["image_height"], values["image_width"]) for values in group])
    return torch.from_numpy(images).permute(0, 3, 1, 2), sizes


def _predict(
    model: MaskRCNN,
    manifest: Manifest,
    group: Sequence[dict[str, Any]],
    dtype: torch.dtype | None,
    with_proposals: bool,
) -> Iterator[tuple[dict[str, Any], Detections, torch.Tensor | None]]:
    """The rows, their detections, and their proposals (K, 4) xyxy; all in original pixels."""
    device = next(model.parameters()).device
    images, sizes = batch_of_rows(group, manifest)
    proposals: Sequence[torch.Tensor | None] = [None] * len(group)
    with autocast(dtype, device.type):
        if with_proposals:
            found, proposals = model.detect_with_proposals(images.to(device), sizes.to(device))
        else:
            found = model.detect(images.to(device), sizes.to(device))
    for values, (height, width), detections, boxes in zip(group, sizes.tolist(), found, proposals, strict=True):
        original = values["height"], values["width"]
        if boxes is not None:
            boxes = boxes * boxes.new_tensor([original[1] / width, original[0] / height] * 2)
        yield values, to_original(detections, (height, width), original, model.config), boxes


def _predict_views(
    model: MaskRCNN, shards: ShardSet, rows: Iterable[int], dtype: torch.dtype | None, viewing: Viewing
) -> Iterator[tuple[dict[str, Any], Detections]]:
    """Test-time augmentation: one image after the other, one view a forward pass."""
    for values in shards.read_rows(list(rows)):
        pixels = values["image"].reshape(values["image_height"], values["image_width"], 3)
        height, width = values["height"], values["width"]
        views = views_of(pixels, height, width, viewing)
        found = [detect_views(model, [view], dtype)[0] for view in views]
        yield values, unite(views, found, height, width, viewing, model.config)


def coco_results(
    values: dict[str, Any], detections: Detections, manifest: Manifest, whole_pixels: bool = False
) -> list[Json]:
    """Detections of one row as COCO results, keyed by row and class.

    Classes that the row's data set has not labelled are left out: nobody can say whether they are right.

    Args:
        values: the row.
        detections: in original pixels.
        manifest: of the data set.
        whole_pixels: see `model.masks.paste_masks_in_boxes`.
    """
    active = set(manifest.sources[values["source"]].active_class_ids)
    segmentations = encode_detections(detections, values["height"], values["width"], whole_pixels)
    boxes, scores, classes = detections.boxes.tolist(), detections.scores.tolist(), detections.classes.tolist()
    return [
        {
            "image_id": values["row"],
            "category_id": class_id,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
            "segmentation": segmentation,
        }
        for (x0, y0, x1, y1), score, class_id, segmentation in zip(boxes, scores, classes, segmentations, strict=True)
        if class_id in active
    ]


def ground_truth(values: dict[str, Any]) -> list[Json]:
    """Annotations of one row as COCO annotations, masks exactly as they were before sharding."""
    from pycocotools import mask as coco_mask

    annotations = []
    for index, ((left, top, right, bottom), crop) in enumerate(unpack_row_masks(values)):
        mask = np.zeros((values["height"], values["width"]), dtype=np.uint8, order="F")
        mask[top:bottom, left:right] = crop
        annotations.append(
            {
                "image_id": values["row"],
                "category_id": int(values["classes"][index]),
                "bbox": values["bboxes"][4 * index : 4 * index + 4].tolist(),
                "area": float(values["areas"][index]),
                "iscrowd": int(values["is_crowd"][index]),
                "segmentation": coco_mask.encode(mask),
            }
        )
    return annotations


def evaluate_rows(
    model: MaskRCNN,
    shards: ShardSet,
    rows: Sequence[int],
    batch_size: int,
    dtype: torch.dtype | None,
    recall: bool = False,
    viewing: Viewing | None = None,
) -> list[EvaluatedRow]:
    """Ground truth and results of some rows, by a copy of the model that is made for inference (`model.folded`).

    On request with the recall of the proposals, or by several views of each image (then without it).
    """
    whole_pixels = model.config.detections.whole_pixels
    judged = folded(model, dtype)
    seen: Iterable[tuple[dict[str, Any], Detections, torch.Tensor | None]] = (
        ((values, found, None) for values, found in _predict_views(judged, shards, rows, dtype, viewing))
        if viewing is not None
        else (
            entry
            for group in row_groups(shards, rows, batch_size)
            for entry in _predict(judged, shards.manifest, group, dtype, recall)
        )
    )
    return [
        evaluated_row(
            values,
            detections,
            shards.manifest,
            whole_pixels,
            _proposal_recall(values, proposals) if proposals is not None else None,
        )
        for values, detections, proposals in seen
    ]


def evaluated_row(
    values: dict[str, Any],
    detections: Detections,
    manifest: Manifest,
    whole_pixels: bool = False,
    recall: RecallCounts | None = None,
) -> EvaluatedRow:
    """A row as read and what was found in it; see `coco_results`."""
    results = coco_results(values, detections, manifest, whole_pixels)
    return EvaluatedRow(values["row"], values["height"], values["width"], ground_truth(values), results, recall)


def _proposal_recall(values: dict[str, Any], proposals: torch.Tensor) -> RecallCounts:
    boxes = values["bboxes"].reshape(-1, 4)[~values["is_crowd"].astype(bool)]
    objects = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return count_found(proposals.double().cpu().numpy(), objects)


def proposal_recall(seen: Sequence[EvaluatedRow]) -> dict[str, float]:
    """The numbers of `RECALL_METRICS` over all rows; empty where they were not asked for."""
    counts = [entry.recall for entry in seen if entry.recall is not None]
    return average_recall(counts) if counts else {}


def average_precision(seen: Sequence[EvaluatedRow], num_rows: int, num_classes: int) -> dict[str, float]:
    """COCO AP over all rows, as pycocotools counts it.

    Args:
        seen: what `evaluate_rows` of all workers gave, in any order.
        num_rows: of the data set.
        num_classes: C, with the background.

    Returns:
        The numbers of `AP_METRICS`; -1 where there is no object of that size at all, as in pycocotools. By size, false
        positives count by the area of their box, also for masks.

    Raises:
        RuntimeError: not every row was seen exactly once.
    """
    ordered = in_order(seen, num_rows)
    images = [{"id": entry.row, "height": entry.height, "width": entry.width} for entry in ordered]
    annotations = [annotation for entry in ordered for annotation in entry.annotations]
    results = [result for entry in ordered for result in entry.results]
    return coco_average_precision(images, range(1, num_classes), annotations, results)


def in_order(seen: Sequence[EvaluatedRow], num_rows: int) -> list[EvaluatedRow]:
    """Rows in their order.

    Raises:
        RuntimeError: not every row was seen exactly once.
    """
    ordered = sorted(seen, key=lambda entry: entry.row)
    rows = [entry.row for entry in ordered]
    if rows != list(range(num_rows)):
        raise RuntimeError(f"evaluation saw {len(rows)} rows ({len(set(rows))} different ones) of {num_rows}")
    return ordered


def coco_average_precision(
    images: Sequence[Json], category_ids: Iterable[int], annotations: Sequence[Json], results: Sequence[Json]
) -> dict[str, float]:
    """COCO AP of results against annotations: the numbers of `AP_METRICS`, see `pipeline.coco_metrics`."""
    statistics = coco_statistics(images, category_ids, annotations, results)
    return {f"{kind}_{name}": statistics[kind][name] for kind in ("bbox", "segm") for name in AP_NAMES}
