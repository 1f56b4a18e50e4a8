"""How many objects the RPN's proposals find: COCO's average recall, without classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

NUMBERS = (100, 1000)
"""Proposals of an image that count, best first."""
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_METRICS = tuple(f"rpn_AR_{number}" for number in NUMBERS)


@dataclass(frozen=True)
class RecallCounts:
    """What one image contributes."""

    num_objects: int
    num_found: npt.NDArray[np.int64]
    """(len(NUMBERS), len(IOU_THRESHOLDS))."""


def count_found(proposals: FloatArray, objects: FloatArray) -> RecallCounts:
    """Match the proposals of an image with its objects as COCO does: the best first, each to one object.

    Args:
        proposals: (N, 4) xyxy, best first; N may be 0.
        objects: (G, 4) xyxy in the same frame, crowds left out; G may be 0.
    """
    num_found = np.zeros((len(NUMBERS), len(IOU_THRESHOLDS)), dtype=np.int64)
    if not len(proposals) or not len(objects):
        return RecallCounts(len(objects), num_found)
    ious = pairwise_iou(proposals[: NUMBERS[-1]], objects)
    near = ious >= IOU_THRESHOLDS[0]
    nearest, reached = ious.argmax(axis=1), ious.max(axis=1)[:, None] >= IOU_THRESHOLDS  # (N,), (N, thresholds)
    taken = np.zeros((len(IOU_THRESHOLDS), len(objects)), dtype=bool)
    num_near = near.sum(axis=1)
    for index, number in enumerate(NUMBERS):
        for proposal in range(NUMBERS[index - 1] if index else 0, min(number, len(ious))):
            if num_near[proposal] == 1:  # nearly always: there is nothing to choose
                taken[:, nearest[proposal]] |= reached[proposal]
            elif num_near[proposal] > 1:
                _take_best(taken, ious[proposal])
        num_found[index] = taken.sum(axis=1)
    return RecallCounts(len(objects), num_found)


def _take_best(taken: npt.NDArray[np.bool_], ious: FloatArray) -> None:
    """At every threshold a proposal takes the object that it overlaps most of those that are left."""
    free = np.where(~taken & (ious >= IOU_THRESHOLDS[:, None]), ious, -1.0)
    best = free.shape[1] - 1 - free[:, ::-1].argmax(axis=1)  # of equal ones the last, as in pycocotools
    rows = np.flatnonzero(free.max(axis=1) > 0)
    taken[rows, best[rows]] = True


def average_recall(counts: Sequence[RecallCounts]) -> dict[str, float]:
    """Share of the objects that proposals find, averaged over IoU 0.50 to 0.95.

    Args:
        counts: of every image.

    Returns:
        The numbers of `RECALL_METRICS`; -1 where there is no object at all, as in pycocotools.
    """
    num_objects = sum(entry.num_objects for entry in counts)
    if not num_objects:
        return dict.fromkeys(RECALL_METRICS, -1.0)
    shares = np.sum([entry.num_found for entry in counts], axis=0) / num_objects
    return dict(zip(RECALL_METRICS, shares.mean(axis=1).tolist(), strict=True))


def pairwise_iou(boxes: FloatArray, others: FloatArray) -> FloatArray:
    """(N, M) IoU of xyxy boxes; 0 where both have no area."""
    corners = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])
    intersection = corners.clip(min=0).prod(axis=2)
    areas = [np.prod(sides[:, 2:] - sides[:, :2], axis=1) for sides in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - intersection
    iou: FloatArray = np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
    return iou
