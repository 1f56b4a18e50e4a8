"""A trained model in a form that runs without this code: a `torch.export` program, and ONNX.

Exported programs have no sizes that depend on the data, so every image has the same number of slots, empty ones last.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from model.boxes import clip_boxes, decode_boxes
from model.canvas import image_windows
from model.mask_rcnn import MaskRCNN
from model.nms import kept_by_nms
from model.postprocess import final_scores
from model.roi_align import as_pooled

INPUT_NAMES = ("images", "image_sizes")
OUTPUT_NAMES = ("boxes", "scores", "classes", "mask_probabilities")
MOST_CANDIDATES = 1000  # of an image that go into the last NMS, best scores first


class ExportableDetector(nn.Module):
    """`MaskRCNN.detect` with outputs of fixed shape."""

    def __init__(self, model: MaskRCNN, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.model = model.eval()
        self.canvas = canvas

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objects of each image, best score first.

        Args:
            images: (B, 3, H, W) uint8 RGB in the top left corner of the canvas, zero elsewhere.
            image_sizes: (B, 2) int64 height and width of the images.

        Returns:
            boxes (B, D, 4) xyxy in input pixels, scores (B, D), classes (B, D) int64 and mask probabilities
            (B, D, M, M) over each box; in empty slots all are 0. D is `detections.max_per_image`.
        """
        model, batch_size = self.model, images.shape[0]
        windows = image_windows(image_sizes, self.canvas, model.config.image_position)
        frame = model.to_frame(windows)
        pyramid = model.features(model.place(images, windows), windows)
        rpn_logits, rpn_deltas = model.rpn(pyramid)
        anchors = model.anchors(self.canvas, pyramid)
        proposals, valid = model.propose(rpn_logits, rpn_deltas, anchors, windows, self.canvas)
        image_index = torch.arange(batch_size, device=images.device).repeat_interleave(proposals.shape[1])
        pool_size = model.config.box_head.pool_size
        pooled_from = as_pooled(pyramid, model.config.roi)
        pooled = model.pool(pooled_from, proposals.flatten(0, 1), image_index, pool_size, self.canvas)
        class_logits, box_deltas = model.box_head(pooled)
        class_logits = class_logits.reshape(batch_size, -1, model.num_classes)
        box_deltas = box_deltas.reshape(batch_size, -1, model.num_classes, 4)
        found = [
            self._select(class_logits[image], box_deltas[image], proposals[image], valid[image], frame[image])
            for image in range(batch_size)
        ]
        boxes, scores, classes = (torch.stack(parts) for parts in zip(*found, strict=True))
        image_index = torch.arange(batch_size, device=images.device).repeat_interleave(boxes.shape[1])
        pool_size = model.config.mask_head.pool_size
        pooled = model.pool(pooled_from, boxes.flatten(0, 1), image_index, pool_size, self.canvas)
        masks = model.mask_head(pooled, classes.flatten()).sigmoid()
        masks = masks.reshape(batch_size, -1, *masks.shape[1:])
        if model.config.detections.score != "class":
            scores = final_scores(scores.flatten(), masks.flatten(0, 1), model.config.detections).reshape(scores.shape)
            scores, order = scores.topk(scores.shape[1])  # sorted; ONNX has no stable sort
            image = torch.arange(batch_size, device=images.device)[:, None]
            boxes, classes, masks = boxes[image, order], classes[image, order], masks[image, order]
        is_object = scores > 0
        boxes = model.from_frame(boxes) - windows[:, None, :2].repeat(1, 1, 2)
        return (
            torch.where(is_object[..., None], boxes, 0.0),
            scores,
            classes,
            torch.where(is_object[..., None, None], masks, 0.0),
        )

    def _select(
        self, class_logits: Tensor, box_deltas: Tensor, proposals: Tensor, valid: Tensor, window: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`model.postprocess.select_detections` with D slots; candidates beyond the best thousand are left out."""
        config, box_head = self.model.config.detections, self.model.config.box_head
        probabilities = class_logits.softmax(dim=1)
        if config.best_class_only:
            scores, classes = probabilities.max(dim=1, keepdim=True)  # (K, 1)
            wanted = (classes > 0) & (scores >= config.score_threshold)
        else:
            scores = probabilities[:, 1:]  # (K, C - 1), without background
            classes = torch.arange(1, self.model.num_classes, device=scores.device).expand_as(scores)
            wanted = scores > config.score_threshold
        scores = torch.where(wanted & valid[:, None], scores, 0.0)
        top_scores, top = scores.flatten().topk(min(MOST_CANDIDATES, scores.numel()))
        top_classes = classes.flatten()[top]
        row = torch.div(top, scores.shape[1], rounding_mode="floor")
        deltas = box_deltas[row, top_classes]
        boxes = clip_boxes(decode_boxes(deltas, proposals[row], box_head.delta_scale), window)
        large_enough = ((boxes[:, 2:] - boxes[:, :2]) >= config.min_size).all(dim=1)
        is_object = (top_scores > 0) & large_enough
        boxes = torch.where(is_object[:, None], boxes, 0.0)  # without area: they suppress nothing
        kept = kept_by_nms(boxes, torch.where(is_object, top_scores, 0.0), top_classes, config.nms_threshold)
        best_scores, best = torch.where(kept & is_object, top_scores, 0.0).topk(min(config.max_per_image, len(top)))
        return boxes[best], best_scores, torch.where(best_scores > 0, top_classes[best], 0)


def export_program(model: MaskRCNN, canvas: tuple[int, int], batch_size: int) -> torch.export.ExportedProgram:
    """A program for batches of one size on one canvas; in float32 on the model's device."""
    device = next(model.parameters()).device
    images = torch.zeros(batch_size, 3, *canvas, dtype=torch.uint8, device=device)
    sizes = torch.tensor([canvas] * batch_size, device=device)
    with torch.no_grad():
        return torch.export.export(ExportableDetector(model, canvas).eval(), (images, sizes), strict=False)


def save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a program as ONNX, with names for its inputs and outputs."""
    exported = torch.onnx.export(
        program, dynamo=True, input_names=INPUT_NAMES, output_names=OUTPUT_NAMES, verbose=False
    )
    assert exported is not None
    exported.save(path)
