"""The whole forward pass of Mask R-CNN (He et al. 2017, arXiv 1703.06870) on one screen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model import losses
from model.anchors import pyramid_anchors
from model.backbone import Backbone
from model.box_head import BoxHead
from model.boxes import encode_boxes
from model.config import ModelConfig
from model.fpn import FeaturePyramid
from model.mask_head import MaskHead
from model.masks import crop_mask_targets
from model.postprocess import select_detections
from model.proposals import propose
from model.roi_align import pyramid_roi_align
from model.rpn import RegionProposalNetwork
from model.structures import Batch, Detections
from model.targets import RegionTargets, match_anchors, sample_anchors, sample_regions


class MaskRCNN(nn.Module):
    """Images in, five losses or detections out; `num_classes` counts the background."""

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes counts the background and must be at least 2, got {num_classes}")
        channels = config.fpn.channels
        self.config = config
        self.num_classes = num_classes
        self.backbone = Backbone(config.backbone)
        self.fpn = FeaturePyramid(self.backbone.out_channels, channels)
        self.rpn = RegionProposalNetwork(channels, config.rpn, len(config.anchors.ratios), config.anchors.anchor_stride)
        self.box_head = BoxHead(channels, num_classes, config.box_head)
        self.mask_head = MaskHead(channels, num_classes, config.mask_head)
        self._anchors: dict[tuple[torch.Size, torch.device], Tensor] = {}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The five losses, each a scalar averaged over the images, without weights.

        Images without objects are legal, alone and all together; every parameter takes part in the graph.
        """
        pyramid = self.features(batch.images, batch.image_sizes)
        rpn_logits, rpn_deltas = self.rpn(pyramid)
        anchors = self.anchors(batch.images, pyramid)
        rpn_class_loss, rpn_bbox_loss = self._rpn_losses(rpn_logits, rpn_deltas, anchors, batch)

        proposals, valid = self._propose(rpn_logits, rpn_deltas, anchors, batch.image_sizes)
        targets = sample_regions(proposals, valid, batch, self.config)
        mrcnn_class_loss, mrcnn_bbox_loss = self._box_losses(pyramid, targets, batch)
        mrcnn_mask_loss = self._mask_loss(pyramid, targets, batch)
        return {
            "rpn_class_loss": rpn_class_loss,
            "rpn_bbox_loss": rpn_bbox_loss,
            "mrcnn_class_loss": mrcnn_class_loss,
            "mrcnn_bbox_loss": mrcnn_bbox_loss,
            "mrcnn_mask_loss": mrcnn_mask_loss,
        }

    @torch.no_grad()
    def detect(self, images: Tensor, image_sizes: Tensor) -> list[Detections]:
        """Objects of each image, boxes in input pixels.

        Args:
            images: (B, 3, H, W) uint8 RGB, zero outside the image.
            image_sizes: (B, 2) int64 height and width of the image on its canvas.
        """
        pyramid = self.features(images, image_sizes)
        rpn_logits, rpn_deltas = self.rpn(pyramid)
        proposals, valid = self._propose(rpn_logits, rpn_deltas, self.anchors(images, pyramid), image_sizes)
        image_index, slot = torch.nonzero(valid, as_tuple=True)
        regions = proposals[image_index, slot]
        pool, canonical_size = self.config.box_head.pool_size, self.config.roi.canonical_size
        class_logits, box_deltas = self.box_head(
            pyramid_roi_align(pyramid[:4], regions, image_index, pool, canonical_size)
        )
        found = []
        for image in range(images.shape[0]):
            rows = image_index == image
            boxes, scores, classes = select_detections(
                class_logits[rows],
                box_deltas[rows],
                regions[rows],
                image_sizes[image],
                self.config.box_head,
                self.config.detections,
            )
            features = [level[image : image + 1] for level in pyramid[:4]]
            first_image = torch.zeros_like(classes)
            pooled = pyramid_roi_align(features, boxes, first_image, self.config.mask_head.pool_size, canonical_size)
            mask_logits = self.mask_head(pooled, classes)
            found.append(Detections(boxes, scores, classes, mask_logits.sigmoid()))
        return found

    def features(self, images: Tensor, image_sizes: Tensor) -> list[Tensor]:
        """P2..P6 of (B, 3, H, W) uint8 RGB images; outside the image the network sees the mean pixel."""
        mean = torch.tensor(self.config.pixel_mean, device=images.device)[:, None, None]
        std = torch.tensor(self.config.pixel_std, device=images.device)[:, None, None]
        x = (images.float() / 255.0 - mean) / std
        rows = torch.arange(images.shape[2], device=images.device) < image_sizes[:, :1]  # (B, H)
        columns = torch.arange(images.shape[3], device=images.device) < image_sizes[:, 1:]  # (B, W)
        x = x * (rows[:, None, :, None] & columns[:, None, None, :])
        pyramid: list[Tensor] = self.fpn(self.backbone(x.contiguous(memory_format=torch.channels_last)))
        return pyramid

    def anchors(self, images: Tensor, pyramid: list[Tensor]) -> Tensor:
        """(A, 4) xyxy in input pixels; kept for each canvas seen."""
        key = (images.shape[2:], images.device)
        if key not in self._anchors:
            sizes = [(level.shape[2], level.shape[3]) for level in pyramid]
            self._anchors[key] = pyramid_anchors(self.config.anchors, sizes).to(images.device)
        return self._anchors[key]

    def _propose(
        self, rpn_logits: Tensor, rpn_deltas: Tensor, anchors: Tensor, image_sizes: Tensor
    ) -> tuple[Tensor, Tensor]:
        config = self.config.rpn
        number = config.proposals_training if self.training else config.proposals_inference
        return propose(rpn_logits, rpn_deltas, anchors, image_sizes, config, number, self.config.detections.min_size)

    def _rpn_losses(
        self, rpn_logits: Tensor, rpn_deltas: Tensor, anchors: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        positive, negative, matched_gt_index = match_anchors(anchors, batch, self.config)
        samples = sample_anchors(positive, negative, batch, self.config)
        rows = samples.index[..., None]
        sampled_positive = positive.gather(1, samples.index) & samples.valid
        gt_boxes = batch.boxes.gather(1, matched_gt_index.gather(1, samples.index)[..., None].expand(-1, -1, 4))
        target_deltas = encode_boxes(gt_boxes, anchors[samples.index], self.config.rpn.delta_scale)
        class_loss = losses.rpn_class_loss(
            rpn_logits.gather(1, rows.expand(-1, -1, 2)), sampled_positive, samples.valid
        )
        bbox_loss = losses.rpn_bbox_loss(
            rpn_deltas.gather(1, rows.expand(-1, -1, 4)),
            target_deltas,
            sampled_positive,
            samples.valid,
            self.config.losses.smooth_l1_beta,
            giou_delta_scale=self.config.rpn.delta_scale if self.config.losses.box_loss == "giou" else None,
        )
        return class_loss, bbox_loss

    def _box_losses(self, pyramid: list[Tensor], targets: RegionTargets, batch: Batch) -> tuple[Tensor, Tensor]:
        image_index, slot = _slots(targets.valid)
        regions = targets.boxes[image_index, slot]
        valid, classes = targets.valid[image_index, slot], targets.classes[image_index, slot]
        gt_boxes = batch.boxes[image_index, targets.matched_gt_index[image_index, slot]]
        config = self.config.box_head
        pooled = pyramid_roi_align(pyramid[:4], regions, image_index, config.pool_size, self.config.roi.canonical_size)
        class_logits, box_deltas = self.box_head(pooled, _rows_to_mask(valid))
        class_loss = losses.mrcnn_class_loss(class_logits, classes, valid, image_index, batch.active_class_ids)
        bbox_loss = losses.mrcnn_bbox_loss(
            box_deltas,
            encode_boxes(gt_boxes, regions, config.delta_scale),
            classes,
            valid,
            image_index,
            batch.num_images,
            self.config.losses.smooth_l1_beta,
            giou_delta_scale=config.delta_scale if self.config.losses.box_loss == "giou" else None,
        )
        return class_loss, bbox_loss

    def _mask_loss(self, pyramid: list[Tensor], targets: RegionTargets, batch: Batch) -> Tensor:
        image_index, slot = _slots(targets.valid[:, : targets.num_positive_slots])
        regions = targets.boxes[image_index, slot]
        valid, classes = targets.valid[image_index, slot], targets.classes[image_index, slot]
        gt_index = targets.matched_gt_index[image_index, slot]
        config = self.config.mask_head
        pooled = pyramid_roi_align(pyramid[:4], regions, image_index, config.pool_size, self.config.roi.canonical_size)
        mask_logits = self.mask_head(pooled, classes, _rows_to_mask(valid))
        target_masks = crop_mask_targets(batch, image_index, gt_index, regions, 2 * config.pool_size)
        return losses.mrcnn_mask_loss(mask_logits, target_masks, valid, image_index, batch.num_images)


def _slots(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Image and slot of the regions a head runs on.

    On a CPU only those that are real (30 ms a mask each); on a GPU all slots, since asking how many are real would make
    the host wait for the device in every step.
    """
    if valid.device.type == "cpu":
        image_index, slot = torch.nonzero(valid, as_tuple=True)
        return image_index, slot
    image_index = torch.arange(valid.shape[0], device=valid.device).repeat_interleave(valid.shape[1])
    return image_index, torch.arange(valid.shape[1], device=valid.device).repeat(valid.shape[0])


def _rows_to_mask(valid: Tensor) -> Tensor | None:
    """What a norm has to leave out: nothing on a CPU, where `_slots` has left it out already."""
    return None if valid.device.type == "cpu" else valid
