"""From head outputs to detections (Mask R-CNN, section 3.1 "Inference")."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from model.boxes import clip_boxes, decode_boxes, last_pixel_inside, last_pixel_outside
from model.config import BoxHeadConfig, DetectionConfig, ModelConfig
from model.structures import Detections


def select_detections(
    class_logits: Tensor,
    box_deltas: Tensor,
    proposals: Tensor,
    window: Tensor,
    box_head: BoxHeadConfig,
    config: DetectionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of one image: threshold, NMS within each class, best `max_per_image`.

    Args:
        class_logits: (K, C) of the image's proposals; K may be 0.
        box_deltas: (K, C, 4).
        proposals: (K, 4) xyxy.
        window: (4,) xyxy that boxes are clipped to, in the frame of the proposals.
        box_head: delta scale.
        config: thresholds.

    Returns:
        boxes (N, 4) xyxy in the frame of the proposals, scores (N,), classes (N,), by falling score; N may be 0.
    """
    row, classes, scores = _candidates(class_logits.softmax(dim=1), config)
    boxes = clip_boxes(decode_boxes(box_deltas[row, classes], proposals[row], box_head.delta_scale), window)
    if config.min_size > 0:
        large_enough = ((boxes[:, 2:] - boxes[:, :2]) >= config.min_size).all(dim=1)
        scores, boxes, classes = scores[large_enough], boxes[large_enough], classes[large_enough]
    keep = batched_nms(boxes, scores, classes, config.nms_threshold)[: config.max_per_image]
    return boxes[keep], scores[keep], classes[keep]


def _candidates(probabilities: Tensor, config: DetectionConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Row, class and score of what (K, C) probabilities can be detected as."""
    if config.best_class_only:
        scores, classes = probabilities.max(dim=1)
        row = torch.nonzero((classes > 0) & (scores >= config.score_threshold)).flatten()
        return row, classes[row], scores[row]
    row, column = torch.nonzero(probabilities[:, 1:] > config.score_threshold, as_tuple=True)  # without background
    return row, column + 1, probabilities[row, column + 1]


def final_scores(scores: Tensor, mask_probabilities: Tensor, config: DetectionConfig) -> Tensor:
    """Scores that detections are reported and ranked with.

    With `class_times_mask` the probability of the class is multiplied by the mean probability of the mask's cells
    ("maskness", SOLO, arXiv 2106.15947): a mask that the model is in doubt about comes after a clear one. The model's
    threshold and NMS come before, and see the probability of the class alone.

    Args:
        scores: (N,) in 0..1; N may be 0.
        mask_probabilities: (N, M, M) over the boxes. The cells of at least one half are the mask's; where there are
            none, the largest counts.
        config: which score is wanted.
    """
    if config.score == "class":
        return scores
    inside = mask_probabilities >= 0.5
    number = inside.sum(dim=(1, 2))
    mean = (mask_probabilities * inside).sum(dim=(1, 2)) / number.clamp(min=1)
    return scores * torch.where(number > 0, mean, mask_probabilities.amax(dim=(1, 2)))


def to_original(
    detections: Detections,
    image_size: tuple[int, int],
    original_size: tuple[int, int],
    config: ModelConfig,
) -> Detections:
    """Move boxes from input pixels to original pixels, clipped to the image.

    Args:
        detections: boxes in input pixels.
        image_size: height and width that the image covers on the canvas, input pixels.
        original_size: height and width of the image file.
        config: how boxes are counted; with `whole_pixels` they are rounded, and those without area left out, as in the
            original.
    """
    inclusive = config.boxes == "inclusive"
    boxes = detections.boxes.double()
    if inclusive:
        boxes = last_pixel_inside(boxes)
    edge = 1 if inclusive else 0
    scale_y, scale_x = (
        (original - edge) / max(covered - edge, 1) for original, covered in zip(original_size, image_size, strict=True)
    )
    boxes = boxes * boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
    if inclusive:
        boxes = last_pixel_outside(boxes)
    if config.detections.whole_pixels:
        boxes = boxes.round()
    window = boxes.new_tensor([0, 0, original_size[1], original_size[0]])
    boxes = clip_boxes(boxes, window).to(detections.boxes.dtype)
    moved = Detections(boxes, detections.scores, detections.classes, detections.mask_probabilities)
    return moved.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1)) if config.detections.whole_pixels else moved
