"""What anchors and regions are trained towards: matching by IoU, sampling at random.

Letters: B images, A anchors, K proposals, G ground-truth slots.
Sampling fills fixed slots, positives first, so that shapes do not depend on the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.boxes import pairwise_iou
from model.config import ModelConfig
from model.draws import uniform_draws
from model.structures import Batch

_RPN_SALT, _ROI_SALT = 1, 2


@dataclass(frozen=True)
class Samples:
    """Rows drawn from N candidates an image: P slots for positives, then M for negatives."""

    index: Tensor
    """(B, P + M) int64 row of the candidates; meaningless where not valid."""
    valid: Tensor
    """(B, P + M) bool: which slots hold a row."""
    num_positive_slots: int
    """P."""


@dataclass(frozen=True)
class RegionTargets:
    """Regions that the heads are trained on: positives, then negatives, then empty slots."""

    boxes: Tensor
    """(B, R, 4) xyxy in input pixels."""
    valid: Tensor
    """(B, R) bool."""
    classes: Tensor
    """(B, R) int64; 0 in negative and empty slots."""
    matched_gt_index: Tensor
    """(B, R) int64; meaningful for positives alone."""
    num_positive_slots: int
    """P, the most positives an image can have; all lie within the first P slots, which negatives fill up."""


def draw_samples(
    positive: Tensor,
    negative: Tensor,
    random_keys: Tensor,
    salt: int,
    num_positive_slots: int,
    num_negative_slots: int,
    num_samples: int,
    positive_fraction: float | None = None,
) -> Samples:
    """Draw positives, and negatives up to `num_samples` in all.

    Args:
        positive: (B, N) bool.
        negative: (B, N) bool, nowhere true together with `positive`.
        random_keys: (B,) int64; the draw is a function of them, the salt and the row alone.
        salt: tells the draws of anchors from those of regions.
        num_positive_slots: most positives an image.
        num_negative_slots: most negatives an image.
        num_samples: most rows an image.
        positive_fraction: draw only as many negatives as keep this share of positives (none without positives).
    """
    draws = uniform_draws(random_keys, positive.shape[1], salt)
    num_positive_slots = min(num_positive_slots, positive.shape[1])
    num_negative_slots = min(num_negative_slots, positive.shape[1])
    positive_index = torch.where(positive, draws, -1.0).topk(num_positive_slots, dim=1).indices
    negative_index = torch.where(negative, draws, -1.0).topk(num_negative_slots, dim=1).indices
    positive_valid = positive.gather(1, positive_index)
    num_positives = positive_valid.sum(dim=1, keepdim=True)  # (B, 1)
    room = num_samples - num_positives
    if positive_fraction is not None:
        room = (num_positives.float() * (1.0 / positive_fraction)).long() - num_positives
    slot = torch.arange(num_negative_slots, device=positive.device)
    negative_valid = negative.gather(1, negative_index) & (slot < room)
    return Samples(
        index=torch.cat([positive_index, negative_index], dim=1),
        valid=torch.cat([positive_valid, negative_valid], dim=1),
        num_positive_slots=num_positive_slots,
    )


def _object_and_crowd_iou(boxes: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """IoU (B, N, G) with objects (0 at crowds and empty slots), and the largest IoU (B, N) with a crowd."""
    iou = pairwise_iou(boxes, batch.boxes)
    is_object = (batch.classes > 0) & ~batch.is_crowd
    is_crowd = (batch.classes > 0) & batch.is_crowd
    crowd_iou = (iou * is_crowd[:, None, :]).amax(dim=2)
    return iou.mul_(is_object[:, None, :]), crowd_iou


@torch.no_grad()
def match_anchors(anchors: Tensor, batch: Batch, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Which anchors are positive, which negative, and the object each is closest to (Ren et al., section 3.1.2).

    An anchor is positive with IoU >= `positive_iou`, or if no anchor fits one of the objects better; an object that
    overlaps no anchor at all makes none positive (in the original it makes all of them).

    Args:
        anchors: (A, 4) xyxy in input pixels.
        batch: ground truth; images may have no objects.
        config: thresholds.

    Returns:
        positive (B, A) bool, negative (B, A) bool, matched_gt_index (B, A) int64.
    """
    if _sizes_may_vary(anchors.device):
        images = [_match_image(anchors, batch, image, config) for image in range(batch.num_images)]
        positive, negative, matched_gt_index = (torch.stack(parts) for parts in zip(*images, strict=True))
        return positive, negative, matched_gt_index
    iou, crowd_iou = _object_and_crowd_iou(anchors[None].expand(batch.num_images, -1, -1), batch)
    return _match(iou.mT, crowd_iou, config)


def _sizes_may_vary(device: torch.device) -> bool:
    """A GPU would make the host wait for a size that depends on the data."""
    return device.type == "cpu"


def _match_image(anchors: Tensor, batch: Batch, image: int, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """As `match_anchors`, (A,) each: without the empty slots, of which a batch with one full image has many."""
    boxes, is_crowd = batch.boxes[image], batch.is_crowd[image]
    is_real = batch.classes[image] > 0
    slots, crowds = torch.nonzero(is_real & ~is_crowd).flatten(), torch.nonzero(is_real & is_crowd).flatten()
    nothing = anchors.new_zeros(1, len(anchors))
    iou = pairwise_iou(boxes[slots], anchors) if len(slots) else nothing
    crowd_iou = pairwise_iou(boxes[crowds], anchors) if len(crowds) else nothing
    positive, negative, row = _match(iou, crowd_iou.amax(dim=0), config)
    return positive, negative, slots[row] if len(slots) else row


def _match(iou: Tensor, crowd_iou: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Positive, negative and the object matched, (..., A), from IoU (..., G, A), and that with crowds (..., A)."""
    best_iou, matched_gt_index = iou.max(dim=-2)
    best_of_object = iou.amax(dim=-1, keepdim=True)
    best_for_an_object = (iou == torch.where(best_of_object > 0, best_of_object, 2.0)).any(dim=-2)
    positive = (best_iou >= config.rpn.positive_iou) | best_for_an_object
    negative = (best_iou < config.rpn.negative_iou) & ~positive & (crowd_iou < config.crowd_iou)
    return positive, negative, matched_gt_index


@torch.no_grad()
def sample_anchors(positive: Tensor, negative: Tensor, batch: Batch, config: ModelConfig) -> Samples:
    """Draw the anchors that enter the RPN losses."""
    num_samples = config.rpn.anchors_per_image
    return draw_samples(
        positive,
        negative,
        batch.random_keys,
        _RPN_SALT,
        num_positive_slots=int(num_samples * config.rpn.positive_fraction),
        num_negative_slots=num_samples,
        num_samples=num_samples,
    )


@torch.no_grad()
def sample_regions(proposals: Tensor, proposals_valid: Tensor, batch: Batch, config: ModelConfig) -> RegionTargets:
    """Match proposals with objects and draw the regions that the heads are trained on (Mask R-CNN, section 3.1).

    Negatives fill up to `rois_per_image` however few positives there are, unless `fixed_ratio` ties their number to
    that of the positives.

    Args:
        proposals: (B, K, 4) xyxy in input pixels.
        proposals_valid: (B, K) bool.
        batch: ground truth, boxes in the frame of the proposals; images may have no objects.
        config: thresholds and counts.
    """
    boxes, valid = proposals, proposals_valid
    if config.roi.add_ground_truth:
        boxes = torch.cat([boxes, batch.boxes], dim=1)
        valid = torch.cat([valid, (batch.classes > 0) & ~batch.is_crowd], dim=1)
    # Boxes of a model that diverges become negatives, so that its losses tell.
    iou, crowd_iou = _object_and_crowd_iou(boxes.nan_to_num(nan=0.0), batch)
    best_iou, matched_gt_index = iou.max(dim=2)
    positive = (best_iou >= config.roi.positive_iou) & (best_iou > 0) & valid
    negative = (best_iou < config.roi.positive_iou) & (crowd_iou < config.crowd_iou) & valid

    num_regions = config.roi.rois_per_image
    samples = draw_samples(
        positive,
        negative,
        batch.random_keys,
        _ROI_SALT,
        num_positive_slots=int(num_regions * config.roi.positive_fraction),
        num_negative_slots=num_regions,
        num_samples=num_regions,
        positive_fraction=config.roi.positive_fraction if config.roi.fixed_ratio else None,
    )
    # Of P + R slots at most R hold a row; what is drawn moves to the front, positives still ahead of negatives.
    order = torch.argsort(samples.valid.int(), dim=1, descending=True, stable=True)[:, :num_regions]
    index, drawn = samples.index.gather(1, order), samples.valid.gather(1, order)
    sampled_gt_index = matched_gt_index.gather(1, index)
    is_positive = positive.gather(1, index) & drawn
    classes = torch.where(is_positive, batch.classes.gather(1, sampled_gt_index), 0)
    return RegionTargets(
        boxes=boxes.gather(1, index[..., None].expand(-1, -1, 4)),
        valid=drawn,
        classes=classes,
        matched_gt_index=sampled_gt_index,
        num_positive_slots=samples.num_positive_slots,
    )
