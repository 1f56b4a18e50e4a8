"""From scored anchors to proposals (Ren et al. 2015, section 3.1; FPN section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

from model.boxes import clip_boxes, decode_boxes
from model.config import RpnConfig


@torch.no_grad()
def propose(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    config: RpnConfig,
    num_proposals: int,
    min_size: float,
) -> tuple[Tensor, Tensor]:
    """Best anchors of an image, moved, clipped, thinned by NMS and padded.

    1. top-k by objectness over all levels, 2. apply deltas, 3. clip to the image, drop slivers, 4. NMS, 5. pad.
    No gradient flows through (the original lets the head's box loss leak into the RPN here).

    Args:
        class_logits: (B, A, 2) background and object.
        box_deltas: (B, A, 4).
        anchors: (A, 4) xyxy in input pixels.
        image_sizes: (B, 2) height and width of the image on the canvas, input pixels.
        config: counts, NMS threshold, delta scale.
        num_proposals: K, the fixed number of rows that comes back.
        min_size: proposals with a shorter side are dropped, input pixels.

    Returns:
        (B, K, 4) xyxy in input pixels by falling score, zeros behind the last one, and (B, K) bool, which are real.
    """
    scores = class_logits[..., 1] - class_logits[..., 0]  # monotonic in the softmax probability
    top_scores, top = scores.topk(min(config.pre_nms_top_k, scores.shape[1]), dim=1)
    deltas = box_deltas.gather(1, top[..., None].expand(-1, -1, 4))
    boxes = clip_boxes(decode_boxes(deltas, anchors[top], config.delta_scale), image_sizes)

    proposals = boxes.new_zeros(boxes.shape[0], num_proposals, 4)
    valid = torch.zeros(boxes.shape[0], num_proposals, dtype=torch.bool, device=boxes.device)
    for image in range(boxes.shape[0]):
        size = boxes[image, :, 2:] - boxes[image, :, :2]
        # Slivers become empty boxes of the lowest score: they suppress nothing and end up behind the real ones.
        large_enough = (size >= min_size).all(dim=1)
        candidates = torch.where(large_enough[:, None], boxes[image], 0.0)
        candidate_scores = torch.where(large_enough, top_scores[image], float("-inf"))
        # A wait for the device: nms returns a size. (The other one of a training step is in `pyramid_roi_align`.)
        keep = nms(candidates, candidate_scores, config.nms_threshold)[:num_proposals]
        proposals[image, : len(keep)] = candidates[keep]
        valid[image, : len(keep)] = large_enough[keep]
    return proposals, valid
