"""The whole forward pass of Mask R-CNN (He et al. 2017, arXiv 1703.06870) on one screen."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from model import losses
from model.anchors import pyramid_anchors
from model.backbone import Backbone
from model.box_head import BoxHead
from model.boxes import encode_boxes, last_pixel_inside, last_pixel_outside
from model.canvas import image_windows, move_to_windows, normalise
from model.cell_matrix import CellMatrix
from model.config import ModelConfig, RpnConfig
from model.constants import constant
from model.fpn import FeaturePyramid
from model.mask_head import MaskHead
from model.mask_targets import crop_mask_targets
from model.postprocess import final_scores, select_detections
from model.proposals import propose
from model.roi_align import PooledFrom, as_pooled, pyramid_roi_align
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
        self.backbone = Backbone(config.backbone, config.norms)
        self.fpn = FeaturePyramid(self.backbone.out_channels, config.fpn, config.norms)
        self.rpn = RegionProposalNetwork(channels, config.rpn, len(config.anchors.ratios), config.anchors.anchor_stride)
        self.box_head = BoxHead(channels, num_classes, config.box_head, config.norms)
        self.mask_head = MaskHead(channels, num_classes, config.mask_head, config.norms)
        self._anchors: dict[tuple[tuple[int, int], torch.device], list[Tensor]] = {}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The five losses, each a scalar averaged over the images, without weights.

        Images without objects are legal, alone and all together; every parameter takes part in the graph.
        """
        canvas = _canvas(batch.images)
        windows = image_windows(batch.image_sizes, canvas, self.config.image_position)
        batch = self._place_batch(batch, windows)
        pyramid = self.features(batch.images, windows)
        pooled_from = as_pooled(pyramid, self.config.roi)
        anchors = self.anchors(canvas, pyramid)
        rpn_class_loss, rpn_bbox_loss, rpn_logits, rpn_deltas = self._rpn_losses(
            pyramid, pooled_from, torch.cat(anchors), batch
        )
        proposals, valid = self.propose(rpn_logits, rpn_deltas, anchors, windows, canvas)
        batch = replace(batch, boxes=self.to_frame(batch.boxes))
        targets = sample_regions(proposals, valid, batch, self.config)
        mrcnn_class_loss, mrcnn_bbox_loss = self._box_losses(pooled_from, targets, batch)
        mrcnn_mask_loss = self._mask_loss(pooled_from, targets, batch, windows)
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
        return self.detect_with_proposals(images, image_sizes)[0]

    @torch.no_grad()
    def detect_with_proposals(self, images: Tensor, image_sizes: Tensor) -> tuple[list[Detections], list[Tensor]]:
        """As `detect`, and the proposals of each image, (K, 4) xyxy in input pixels, best first."""
        canvas = _canvas(images)
        windows = image_windows(image_sizes, canvas, self.config.image_position)
        pyramid = self.features(self.place(images, windows), windows)
        rpn_logits, rpn_deltas = self.rpn(pyramid)
        anchors = self.anchors(canvas, pyramid)
        proposals, valid = self.propose(rpn_logits, rpn_deltas, anchors, windows, canvas)
        image_index, slot = torch.nonzero(valid, as_tuple=True)
        regions = proposals[image_index, slot]
        pooled_from = as_pooled(pyramid, self.config.roi)
        class_logits, box_deltas = self.box_head(
            self.pool(pooled_from, regions, image_index, self.config.box_head.pool_size, canvas)
        )
        found = []
        for image in range(images.shape[0]):
            rows = image_index == image
            boxes, scores, classes = select_detections(
                class_logits[rows],
                box_deltas[rows],
                regions[rows],
                self.to_frame(windows[image]),
                self.config.box_head,
                self.config.detections,
            )
            this_image = torch.full_like(classes, image)
            pooled = self.pool(pooled_from, boxes, this_image, self.config.mask_head.pool_size, canvas)
            masks = self.mask_head(pooled, classes).sigmoid()
            scores = final_scores(scores, masks, self.config.detections)
            detections = Detections(self.to_input(boxes, windows[image]), scores, classes, masks)
            found.append(detections.where(scores.argsort(descending=True, stable=True)))
        return found, [self.to_input(regions[image_index == i], window) for i, window in enumerate(windows)]

    def features(self, images: Tensor, windows: Tensor) -> list[Tensor]:
        """P2..P6 of (B, 3, H, W) uint8 RGB images that lie in their windows (B, 4)."""
        pyramid: list[Tensor] = self.fpn(self.backbone(normalise(images, windows, self.config)))
        return pyramid

    def anchors(self, canvas: tuple[int, int], pyramid: list[Tensor]) -> list[Tensor]:
        """Anchors of P2..P6, (A, 4) xyxy in input pixels each; kept for each canvas seen."""
        key = (canvas, pyramid[0].device)
        if key not in self._anchors:
            sizes = [(level.shape[2], level.shape[3]) for level in pyramid]
            levels = pyramid_anchors(self.config.anchors, sizes, canvas)
            self._anchors[key] = [level.to(pyramid[0].device) for level in levels]
        return self._anchors[key]

    def propose(
        self,
        rpn_logits: Tensor,
        rpn_deltas: Tensor,
        anchors: list[Tensor],
        windows: Tensor,
        canvas: tuple[int, int],
        config: RpnConfig | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `model.proposals.propose`; boxes are in the frame of arithmetic (`ModelConfig.boxes`) from here on.

        Another config than the model's own changes the thresholds and numbers of this call.
        """
        config = config or self.config.rpn
        number, top_k = config.proposals_training, config.pre_nms_top_k
        if not self.training:
            number, top_k = config.proposals_inference, config.pre_nms_top_k_inference or top_k
        if config.clip_to == "canvas":
            windows = constant((0, 0, canvas[1], canvas[0]), windows.device, windows.dtype).expand_as(windows)
        counts = [len(level) for level in anchors]
        boxes = self.to_frame(torch.cat(anchors))
        return propose(rpn_logits, rpn_deltas, boxes, counts, self.to_frame(windows), config, top_k, number)

    def pool(
        self, pyramid: PooledFrom, regions: Tensor, image_index: Tensor, pool_size: int, canvas: tuple[int, int]
    ) -> Tensor:
        """See `pyramid_roi_align`; P6 has no part in it."""
        return pyramid_roi_align(pyramid, regions, image_index, pool_size, self.config.roi, canvas)

    def place(self, images: Tensor, windows: Tensor) -> Tensor:
        """Images from the top left corner to where the network sees them."""
        return images if self.config.image_position == "top_left" else move_to_windows(images, windows)

    def _place_batch(self, batch: Batch, windows: Tensor) -> Batch:
        """The batch with its images, and with them the boxes, where the network sees them."""
        if self.config.image_position == "top_left":
            return batch
        shift = windows[:, None, :2].repeat(1, 1, 2)  # (B, 1, 4)
        return replace(
            batch,
            images=self.place(batch.images, windows),
            boxes=batch.boxes + shift,
            mask_boxes=batch.mask_boxes + shift,
        )

    def to_frame(self, boxes: Tensor) -> Tensor:
        """Input pixels to the frame of arithmetic."""
        return last_pixel_inside(boxes) if self.config.boxes == "inclusive" else boxes

    def from_frame(self, boxes: Tensor) -> Tensor:
        """Inverse of `to_frame`."""
        return last_pixel_outside(boxes) if self.config.boxes == "inclusive" else boxes

    def to_input(self, boxes: Tensor, window: Tensor) -> Tensor:
        """From the frame of arithmetic to input pixels of an image that the network sees in this window, (4,)."""
        return self.from_frame(boxes) - window[:2].repeat(2)

    def _rpn_losses(
        self, pyramid: list[Tensor], pooled_from: PooledFrom, anchors: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both losses, and logits and deltas of all anchors, which no gradient is asked of any more."""
        positive, negative, matched_gt_index = match_anchors(anchors, batch, self.config)
        samples = sample_anchors(positive, negative, batch, self.config)
        if isinstance(pooled_from, CellMatrix) and self.rpn.can_sample(pooled_from, samples.index):
            logits, deltas = self.rpn.at_anchors(pooled_from, samples.index)
            with torch.no_grad():  # after the other: autocast keeps the weights that it converts, here without gradient
                rpn_logits, rpn_deltas = self.rpn(pyramid)
        else:
            rpn_logits, rpn_deltas = self.rpn(pyramid)
            rows = samples.index[..., None]
            logits = rpn_logits.gather(1, rows.expand(-1, -1, 2))
            deltas = rpn_deltas.gather(1, rows.expand(-1, -1, 4))
        sampled_positive = positive.gather(1, samples.index) & samples.valid
        gt_boxes = batch.boxes.gather(1, matched_gt_index.gather(1, samples.index)[..., None].expand(-1, -1, 4))
        target_deltas = encode_boxes(gt_boxes, anchors[samples.index], self.config.rpn.delta_scale)
        class_loss = losses.rpn_class_loss(
            logits,
            sampled_positive,
            samples.valid,
            self.config.losses.normalizer,
        )
        bbox_loss = losses.rpn_bbox_loss(
            deltas,
            target_deltas,
            sampled_positive,
            samples.valid,
            self.config.losses.smooth_l1_beta,
            self.config.losses.normalizer,
            giou_delta_scale=self.config.rpn.delta_scale if self.config.losses.box_loss == "giou" else None,
        )
        return class_loss, bbox_loss, rpn_logits, rpn_deltas

    def _box_losses(self, pyramid: PooledFrom, targets: RegionTargets, batch: Batch) -> tuple[Tensor, Tensor]:
        image_index, slot = _slots(targets.valid)
        regions = targets.boxes[image_index, slot]
        valid, classes = targets.valid[image_index, slot], targets.classes[image_index, slot]
        gt_boxes = batch.boxes[image_index, targets.matched_gt_index[image_index, slot]]
        config, loss_config = self.config.box_head, self.config.losses
        pooled = self.pool(pyramid, regions, image_index, config.pool_size, _canvas(batch.images))
        class_logits, box_deltas = self.box_head(pooled, _rows_to_mask(valid))
        class_loss = losses.mrcnn_class_loss(
            class_logits,
            classes,
            valid,
            image_index,
            batch.active_class_ids,
            loss_config.normalizer,
            loss_config.inactive_classes,
        )
        bbox_loss = losses.mrcnn_bbox_loss(
            box_deltas,
            encode_boxes(gt_boxes, regions, config.delta_scale),
            classes,
            valid,
            image_index,
            batch.num_images,
            loss_config.smooth_l1_beta,
            loss_config.normalizer,
            giou_delta_scale=config.delta_scale if self.config.losses.box_loss == "giou" else None,
        )
        return class_loss, bbox_loss

    def _mask_loss(self, pyramid: PooledFrom, targets: RegionTargets, batch: Batch, windows: Tensor) -> Tensor:
        is_positive = targets.classes[:, : targets.num_positive_slots] > 0
        image_index, slot = _slots(is_positive)
        regions = targets.boxes[image_index, slot]
        valid, classes = is_positive[image_index, slot], targets.classes[image_index, slot]
        gt_index = targets.matched_gt_index[image_index, slot]
        config = self.config.mask_head
        canvas = _canvas(batch.images)
        pooled = self.pool(pyramid, regions, image_index, config.pool_size, canvas)
        mask_logits = self.mask_head(pooled, classes, _rows_to_mask(valid))
        target_masks = crop_mask_targets(
            batch, windows, image_index, gt_index, regions, 2 * config.pool_size, config.targets
        )
        return losses.mrcnn_mask_loss(
            mask_logits, target_masks, valid, image_index, batch.num_images, self.config.losses.normalizer
        )


def _canvas(images: Tensor) -> tuple[int, int]:
    """Rows and columns."""
    return images.shape[2], images.shape[3]


def _slots(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Image and slot of the regions a head runs on.

    On a CPU only those that are real (30 ms a mask each); on a GPU all slots, since asking how many are real would make
    the host wait for the device in every step.
    """
    if valid.device.type == "cpu":
        image_index, slot = torch.nonzero(valid, as_tuple=True)
        return image_index, slot
    image_index = torch.arange(valid.shape[0], device=valid.device)[:, None].expand_as(valid)
    slot = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    return image_index.flatten(), slot.flatten()


def _rows_to_mask(valid: Tensor) -> Tensor | None:
    """What a norm has to leave out: nothing on a CPU, where `_slots` has left it out already."""
    return None if valid.device.type == "cpu" else valid
