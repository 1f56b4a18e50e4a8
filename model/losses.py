"""The five losses; each is computed per image and then averaged over the images.

So neither the number of workers nor accumulation changes the gradient of the losses: the mean over the global batch is
the mean of the workers' means. (Batch norm, where it is used, still takes its statistics from one worker's images.)
An image without positives contributes 0 to the box and mask losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.boxes import decode_boxes, generalized_iou

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
        reference = deltas.new_tensor([0.0, 0.0, 1.0, 1.0]).expand_as(deltas)
        boxes = decode_boxes(deltas, reference, giou_delta_scale)
        return 1 - generalized_iou(boxes, decode_boxes(target_deltas, reference, giou_delta_scale))
    return F.smooth_l1_loss(deltas, target_deltas, reduction="none", beta=beta).sum(dim=-1)


def rpn_class_loss(logits: Tensor, positive: Tensor, valid: Tensor) -> Tensor:
    """Cross entropy of background and object over the sampled anchors.

    Args:
        logits: (B, S, 2) of the sampled anchors.
        positive: (B, S) bool.
        valid: (B, S) bool, slots that hold an anchor.
    """
    loss = F.cross_entropy(logits.transpose(1, 2), positive.long(), reduction="none")  # (B, S)
    per_image = (loss * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    return per_image.mean()


def rpn_bbox_loss(
    deltas: Tensor,
    target_deltas: Tensor,
    positive: Tensor,
    valid: Tensor,
    beta: float,
    giou_delta_scale: Sequence[float] | None = None,
) -> Tensor:
    """Smooth L1 or GIoU of positive anchors, over the number of sampled anchors of the image.

    Args:
        deltas: (B, S, 4) predicted.
        target_deltas: (B, S, 4).
        positive: (B, S) bool.
        valid: (B, S) bool, slots that hold an anchor.
        beta: where the loss turns linear.
        giou_delta_scale: units of the deltas, for GIoU in place of smooth L1.
    """
    loss = torch.where(positive & valid, _smooth_l1(deltas, target_deltas, beta, giou_delta_scale), 0.0)
    return (loss.sum(dim=1) / valid.sum(dim=1).clamp(min=1)).mean()


def mrcnn_class_loss(
    logits: Tensor, classes: Tensor, valid: Tensor, image_index: Tensor, active_class_ids: Tensor
) -> Tensor:
    """Cross entropy over the classes that the image's data set has labelled; the others get no gradient at all.

    (The original weighs a region by whether its *predicted* class is active, with the flags of the first image of the
    batch, and is NaN when no prediction is active.)

    Args:
        logits: (N, C) of all regions; N may be 0.
        classes: (N,) int64 targets, 0 for background.
        valid: (N,) bool.
        image_index: (N,) int64 image of each region.
        active_class_ids: (B, C) bool.
    """
    active = active_class_ids[image_index]  # (N, C)
    loss = F.cross_entropy(logits.masked_fill(~active, float("-inf")), classes, reduction="none")
    loss = torch.where(valid, loss, 0.0)
    return _mean_over_regions(loss, valid, image_index, active_class_ids.shape[0])


def mrcnn_bbox_loss(
    deltas: Tensor,
    target_deltas: Tensor,
    classes: Tensor,
    valid: Tensor,
    image_index: Tensor,
    num_images: int,
    beta: float,
    giou_delta_scale: Sequence[float] | None = None,
) -> Tensor:
    """Smooth L1 or GIoU of the deltas for the true class, positives only, over the sampled regions of the image.

    Args:
        deltas: (N, C, 4) predicted; N may be 0.
        target_deltas: (N, 4).
        classes: (N,) int64 targets, 0 for background.
        valid: (N,) bool.
        image_index: (N,) int64 image of each region.
        num_images: B.
        beta: where the loss turns linear.
        giou_delta_scale: units of the deltas, for GIoU in place of smooth L1.
    """
    index = classes[:, None, None].expand(-1, 1, 4)
    loss = _smooth_l1(deltas.gather(1, index)[:, 0], target_deltas, beta, giou_delta_scale)
    loss = torch.where(valid & (classes > 0), loss, 0.0)
    return _mean_over_regions(loss, valid, image_index, num_images)


def mrcnn_mask_loss(
    mask_logits: Tensor, target_masks: Tensor, valid: Tensor, image_index: Tensor, num_images: int
) -> Tensor:
    """Binary cross entropy of the true class's mask, mean over cells and over the positives of the image.

    Args:
        mask_logits: (P, M, M) of positive regions; P may be 0.
        target_masks: (P, M, M) of 0 and 1.
        valid: (P,) bool.
        image_index: (P,) int64 image of each region.
        num_images: B.
    """
    loss = F.binary_cross_entropy_with_logits(mask_logits, target_masks, reduction="none").flatten(1).mean(dim=1)
    return _mean_over_regions(torch.where(valid, loss, 0.0), valid, image_index, num_images)


def _mean_over_regions(loss: Tensor, valid: Tensor, image_index: Tensor, num_images: int) -> Tensor:
    """Mean over the valid regions of each image, then over the images; an image without any counts as 0."""
    sums = _sum_by_image(loss, image_index, num_images)
    counts = _sum_by_image(valid.to(loss.dtype), image_index, num_images)
    return (sums / counts.clamp(min=1)).mean()
