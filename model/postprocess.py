"""From head outputs to detections (Mask R-CNN, section 3.1 "Inference")."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from model.boxes import clip_boxes, decode_boxes
from model.config import BoxHeadConfig, DetectionConfig
from model.structures import Detections


def select_detections(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals: Tensor,
    image_size: Tensor,
    box_head: BoxHeadConfig,
    config: DetectionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image: threshold, NMS within each class, best `max_per_image`.

    Args:
        class_logits: (K, C) of the image's proposals; K may be 0.
        box_deltas: (K, C, 4).
        proposals: (K, 4) xyxy in input pixels.
        image_size: (2,) height and width of the image on the canvas, input pixels.
        box_head: delta scale.
        config: thresholds.

    Returns:
        boxes (N, 4) xyxy in input pixels, scores (N,), classes (N,), by falling score; N may be 0.
    """
    probabilities = class_logits.softmax(dim=1)[:, 1:]  # without background
    boxes = decode_boxes(box_deltas[:, 1:], proposals[:, None, :], box_head.delta_scale)  # (K, C - 1, 4)
    boxes = clip_boxes(boxes.reshape(-1, 4), image_size).reshape(boxes.shape)
    row, column = torch.nonzero(probabilities > config.score_threshold, as_tuple=True)
    scores, boxes, classes = probabilities[row, column], boxes[row, column], column + 1
    large_enough = ((boxes[:, 2:] - boxes[:, :2]) >= config.min_size).all(dim=1)
    scores, boxes, classes = scores[large_enough], boxes[large_enough], classes[large_enough]
    keep = batched_nms(boxes, scores, classes, config.nms_threshold)[: config.max_per_image]
    return boxes[keep], scores[keep], classes[keep]


def to_original(detections: Detections, image_size: tuple[int, int], original_size: tuple[int, int]) -> Detections:
    """Move boxes from input pixels to original pixels, clipped to the image.

    Args:
        detections: boxes in input pixels.
        image_size: height and width that the image covers on the canvas, input pixels.
        original_size: height and width of the image file.
    """
    scale_y, scale_x = original_size[0] / image_size[0], original_size[1] / image_size[1]
    boxes = detections.boxes * detections.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    boxes = clip_boxes(boxes, torch.tensor(original_size, device=boxes.device))
    return Detections(boxes, detections.scores, detections.classes, detections.mask_probabilities)
