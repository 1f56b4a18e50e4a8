"""Detections of many thresholds from one forward pass.

Thresholds and numbers of the proposals and of the detections change what is looked at, not how it looks. So features
and RPN outputs are computed once, the box head sees the union of all variants' proposals once, and the mask head the
union of their detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.canvas import image_windows
from model.config import DetectionConfig, ModelConfig, RpnConfig
from model.mask_rcnn import MaskRCNN
from model.postprocess import final_scores, select_detections
from model.roi_align import PooledFrom, as_pooled
from model.structures import Detections

VARIABLE_KEYS = (
    "rpn.nms_threshold",
    "rpn.pre_nms_top_k",
    "rpn.pre_nms_top_k_inference",
    "rpn.proposals_inference",
    "rpn.min_size",
    "detections.score_threshold",
    "detections.nms_threshold",
    "detections.max_per_image",
    "detections.min_size",
    "detections.best_class_only",
)
"""Keys of `ModelConfig` in which variants may differ from the model's own configuration."""
REGIONS_A_PASS = 2048  # of a head; bounds the memory that pooled features take


@dataclass(frozen=True)
class SharedDetections:
    """What all variants together found in one image, and which of it each of them found."""

    union: Detections
    """In no order; boxes in input pixels."""
    rows: list[npt.NDArray[np.int64]]
    """For each variant the rows of its detections in the union, best score first."""


@torch.no_grad()
def detect_variants(
    model: MaskRCNN, images: Tensor, image_sizes: Tensor, variants: Sequence[ModelConfig]
) -> list[SharedDetections]:
    """Objects of each image as `MaskRCNN.detect` finds them with each of the configurations.

    Args:
        model: in evaluation mode.
        images: as `MaskRCNN.detect`.
        image_sizes: likewise.
        variants: they differ from the model's configuration in `VARIABLE_KEYS` only.

    Returns:
        One a image.
    """
    canvas = (images.shape[2], images.shape[3])
    windows = image_windows(image_sizes, canvas, model.config.image_position)
    pyramid = model.features(model.place(images, windows), windows)
    rpn_logits, rpn_deltas = model.rpn(pyramid)
    anchors = model.anchors(canvas, pyramid)
    rpn_configs = list(dict.fromkeys(variant.rpn for variant in variants))
    proposed = [model.propose(rpn_logits, rpn_deltas, anchors, windows, canvas, config) for config in rpn_configs]
    found = []
    for image in range(images.shape[0]):
        features = as_pooled([level[image : image + 1] for level in pyramid], model.config.roi)
        proposals = [boxes[image][valid[image]] for boxes, valid in proposed]
        rows_of_config, regions = _union(proposals)
        class_logits, box_deltas = _box_head(model, features, regions, canvas)
        window = model.to_frame(windows[image])
        selected: dict[tuple[RpnConfig, DetectionConfig], Tensor] = {}
        for variant in variants:
            key = (variant.rpn, variant.detections)
            if key not in selected:
                rows = rows_of_config[rpn_configs.index(variant.rpn)]
                boxes, scores, classes = select_detections(
                    class_logits[rows], box_deltas[rows], regions[rows], window, variant.box_head, variant.detections
                )
                selected[key] = torch.cat([boxes, scores[:, None], classes[:, None].to(boxes.dtype)], dim=1)
        rows_of_selection, union = _union(list(selected.values()))
        boxes, scores, classes = union[:, :4], union[:, 4], union[:, 5].long()
        masks = _mask_head(model, features, boxes, classes, canvas)
        scores = final_scores(scores, masks, model.config.detections)
        ranked = (rows[scores[rows].argsort(descending=True, stable=True)] for rows in rows_of_selection)
        numbers = dict(zip(selected, (rows.cpu().numpy() for rows in ranked), strict=True))
        found.append(
            SharedDetections(
                Detections(model.to_input(boxes, windows[image]), scores, classes, masks),
                [numbers[variant.rpn, variant.detections] for variant in variants],
            )
        )
    return found


def _union(parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Different rows of several (N, columns) float32 tensors, bit by bit, and where the rows of each part are there."""
    together = torch.cat(list(parts))
    first, inverse = unique_rows(together.cpu().numpy())
    places = torch.from_numpy(inverse).to(together.device)
    return list(torch.split(places, [len(part) for part in parts])), together[
        torch.from_numpy(first).to(together.device)
    ]


def unique_rows(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows that differ in any bit.

    Args:
        rows: (N, columns), an even number of columns; N may be 0.

    Returns:
        (M,) index of one row of each kind, and (N,) which of the M each row is.
    """
    bits = np.ascontiguousarray(rows, dtype=np.float32).view(np.int64)  # two numbers each
    order = np.lexsort(bits.T)
    is_new = np.ones(len(rows), dtype=bool)
    is_new[1:] = (bits[order[1:]] != bits[order[:-1]]).any(axis=1)
    inverse = np.empty(len(rows), dtype=np.int64)
    inverse[order] = np.cumsum(is_new) - 1
    return order[is_new], inverse


def _box_head(model: MaskRCNN, features: PooledFrom, regions: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    parts = []
    for some in torch.split(regions, REGIONS_A_PASS):
        first_image = torch.zeros(len(some), dtype=torch.int64, device=some.device)
        parts.append(model.box_head(model.pool(features, some, first_image, model.config.box_head.pool_size, canvas)))
    class_logits, box_deltas = zip(*parts, strict=True)
    return torch.cat(class_logits), torch.cat(box_deltas)


def _mask_head(
    model: MaskRCNN, features: PooledFrom, boxes: Tensor, classes: Tensor, canvas: tuple[int, int]
) -> Tensor:
    """Mask probabilities (N, M, M)."""
    parts = []
    passes = torch.split(boxes, REGIONS_A_PASS), torch.split(classes, REGIONS_A_PASS)
    for some, of_classes in zip(*passes, strict=True):
        first_image = torch.zeros_like(of_classes)
        pooled = model.pool(features, some, first_image, model.config.mask_head.pool_size, canvas)
        parts.append(model.mask_head(pooled, of_classes).sigmoid())
    return torch.cat(parts)
