"""The five losses; by default each is computed per image and then averaged over the images.

So neither the number of workers nor accumulation changes the gradient of the losses: the mean over the global batch is
the mean of the workers' means. (Batch norm, where it is used, still takes its statistics from one worker's images.)
An image without positives contributes 0 to the box and mask losses. The other normalisers are those of torchvision and
of the original, over the images of one worker together; nothing to divide by gives 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model.boxes import decode_boxes, generalized_iou
from model.constants import constant

Normalizer = Literal["image", "batch", "positives"]
LOSS_NAMES = ("rpn_class_loss", "rpn_bbox_loss", "mrcnn_class_loss", "mrcnn_bbox_loss", "mrcnn_mask_loss")


def _sum_by_image(values: Tensor, image_index: Tensor, num_images: int) -> Tensor:
    """(N,) values summed into (num_images,)."""
    return values.new_zeros(num_images).index_add(0, image_index, values)


def _smooth_l1(
    deltas: Tensor, target_deltas: Tensor, beta: float, giou_delta_scale: Sequence[float] | None = None
) -> Tensor:
    """Smooth L1 (Fast R-CNN, equation 3), summed over the last dimension; or 1 - GIoU where a delta scale is given.

    GIoU does not change when both boxes are moved and stretched alike, so any reference box does.
    """
    if giou_delta_scale is not None:
        reference = constant((0.0, 0.0, 1.0, 1.0), deltas.device, deltas.dtype).expand_as(deltas)
        boxes = decode_boxes(deltas, reference, giou_delta_scale)
        return 1 - generalized_iou(boxes, decode_boxes(target_deltas, reference, giou_delta_scale))
    return F.smooth_l1_loss(deltas, target_deltas, reduction="none", beta=beta).sum(dim=-1)


def _mean(
    loss: Tensor, counted: Tensor, image_index: Tensor, num_images: int, normalizer: Normalizer, weight: float = 1.0
) -> Tensor:
    """Sum of losses over the number of counted rows times a weight: of each image, then averaged, or of all images."""
    number = counted.to(loss.dtype)
    if normalizer == "image":
        sums, counts = _sum_by_image(loss, image_index, num_images), _sum_by_image(number, image_index, num_images)
    else:
        sums, counts = loss.sum()[None], number.sum()[None]
    return (sums / (counts * weight).clamp(min=1)).mean()


def _image_index(rows: Tensor) -> Tensor:
    """(B * S,) image of each of the flattened rows (B, S)."""
    return torch.arange(rows.shape[0], device=rows.device)[:, None].expand(rows.shape[:2]).flatten()


def rpn_class_loss(logits: Tensor, positive: Tensor, valid: Tensor, normalizer: Normalizer = "image") -> Tensor:
    """Cross entropy of background and object over the sampled anchors.

    Args:
        logits: (B, S, 2) of the sampled anchors.
        positive: (B, S) bool.
        valid: (B, S) bool, slots that hold an anchor.
        normalizer: see the module.
    """
    loss = F.cross_entropy(logits.transpose(1, 2), positive.long(), reduction="none")  # (B, S)
    loss = torch.where(valid, loss, 0.0)
    return _mean(loss.flatten(), valid.flatten(), _image_index(valid), valid.shape[0], normalizer)


def rpn_bbox_loss(
    deltas: Tensor,
    target_deltas: Tensor,
    positive: Tensor,
    valid: Tensor,
    beta: float,
    normalizer: Normalizer = "image",
    giou_delta_scale: Sequence[float] | None = None,
) -> Tensor:
    """Smooth L1 or GIoU of positive anchors, over the number of sampled anchors (or of positives and four numbers).

    Args:
        deltas: (B, S, 4) predicted.
        target_deltas: (B, S, 4).
        positive: (B, S) bool.
        valid: (B, S) bool, slots that hold an anchor.
        beta: where the loss turns linear.
        normalizer: see the module.
        giou_delta_scale: units of the deltas, for GIoU in place of smooth L1.
    """
    loss = torch.where(positive & valid, _smooth_l1(deltas, target_deltas, beta, giou_delta_scale), 0.0)
    counted, weight = _counted(positive & valid, valid, normalizer, giou_delta_scale)
    return _mean(loss.flatten(), counted.flatten(), _image_index(valid), valid.shape[0], normalizer, weight)


def mrcnn_class_loss(
    logits: Tensor,
    classes: Tensor,
    valid: Tensor,
    image_index: Tensor,
    active_class_ids: Tensor,
    normalizer: Normalizer = "image",
    inactive_classes: Literal["masked", "by_prediction"] = "masked",
) -> Tensor:
    """Cross entropy over the classes that the image's data set has labelled; the others get no gradient at all.

    With `by_prediction` a region does not count while its best class is not labelled. (The original takes the flags of
    the first image for the whole batch, and is NaN when no region counts; here each image has its own, and it is 0.)

    Args:
        logits: (N, C) of all regions; N may be 0.
        classes: (N,) int64 targets, 0 for background.
        valid: (N,) bool.
        image_index: (N,) int64 image of each region.
        active_class_ids: (B, C) bool.
        normalizer: see the module.
        inactive_classes: see above.
    """
    active = active_class_ids[image_index]  # (N, C)
    if inactive_classes == "masked":
        logits = logits.masked_fill(~active, float("-inf"))
    else:
        valid = valid & active.gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    loss = F.cross_entropy(logits, classes, reduction="none")
    loss = torch.where(valid, loss, 0.0)
    return _mean(loss, valid, image_index, active_class_ids.shape[0], normalizer)


def mrcnn_bbox_loss(
    deltas: Tensor,
    target_deltas: Tensor,
    classes: Tensor,
    valid: Tensor,
    image_index: Tensor,
    num_images: int,
    beta: float,
    normalizer: Normalizer = "image",
    giou_delta_scale: Sequence[float] | None = None,
) -> Tensor:
    """Smooth L1 or GIoU of the deltas for the true class, positives only, over the number of sampled regions.

    Args:
        deltas: (N, C, 4) predicted; N may be 0.
        target_deltas: (N, 4).
        classes: (N,) int64 targets, 0 for background.
        valid: (N,) bool.
        image_index: (N,) int64 image of each region.
        num_images: B.
        beta: where the loss turns linear.
        normalizer: see the module.
        giou_delta_scale: units of the deltas, for GIoU in place of smooth L1.
    """
    index = classes[:, None, None].expand(-1, 1, 4)
    loss = _smooth_l1(deltas.gather(1, index)[:, 0], target_deltas, beta, giou_delta_scale)
    positive = valid & (classes > 0)
    loss = torch.where(positive, loss, 0.0)
    counted, weight = _counted(positive, valid, normalizer, giou_delta_scale)
    return _mean(loss, counted, image_index, num_images, normalizer, weight)


def _counted(
    positive: Tensor, valid: Tensor, normalizer: Normalizer, giou_delta_scale: Sequence[float] | None
) -> tuple[Tensor, float]:
    """What a box loss is divided by: all that is real, or the positives with the numbers of each (four, or a GIoU)."""
    if normalizer != "positives":
        return valid, 1.0
    return positive, 4.0 if giou_delta_scale is None else 1.0


def mrcnn_mask_loss(
    mask_logits: Tensor,
    target_masks: Tensor,
    valid: Tensor,
    image_index: Tensor,
    num_images: int,
    normalizer: Normalizer = "image",
) -> Tensor:
    """Binary cross entropy of the true class's mask, mean over cells and over the positives.

    Args:
        mask_logits: (P, M, M) of positive regions; P may be 0.
        target_masks: (P, M, M) in 0..1.
        valid: (P,) bool.
        image_index: (P,) int64 image of each region.
        num_images: B.
        normalizer: see the module.
    """
    loss = F.binary_cross_entropy_with_logits(mask_logits, target_masks, reduction="none").flatten(1).mean(dim=1)
    return _mean(torch.where(valid, loss, 0.0), valid, image_index, num_images, normalizer)
