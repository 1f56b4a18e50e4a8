"""From scored anchors to proposals (Ren et al. 2015, section 3.1; FPN section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.boxes import clip_boxes, decode_boxes
from model.config import RpnConfig
from model.nms import kept_by_batched_nms


@torch.no_grad()
def propose(
    class_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    anchors_per_level: Sequence[int],
    windows: Tensor,
    config: RpnConfig,
    pre_nms_top_k: int,
    num_proposals: int,
) -> tuple[Tensor, Tensor]:
    """Best anchors of an image, moved, clipped, thinned by NMS and padded.

    1. top-k by objectness, over all levels or of each, 2. apply deltas, 3. clip, drop slivers, 4. NMS, 5. pad.
    No gradient flows through (the original lets the head's box loss leak into the RPN here).

    Args:
        class_logits: (B, A, 2) background and object.
        box_deltas: (B, A, 4).
        anchors: (A, 4) xyxy.
        anchors_per_level: how many of the A belong to P2, P3, ...
        windows: (B, 4) xyxy that proposals are clipped to, in the frame of the anchors.
        config: NMS threshold, delta scale, smallest size.
        pre_nms_top_k: anchors that go into NMS, of the image or of each level.
        num_proposals: K, the fixed number of rows that comes back.

    Returns:
        (B, K, 4) xyxy in the frame of the anchors by falling score, zeros behind the last one, and (B, K) bool, which
        are real.
    """
    scores = class_logits[..., 1] - class_logits[..., 0]  # monotonic in the softmax probability
    groups = list(anchors_per_level) if config.per_level else [sum(anchors_per_level)]
    top, sizes = _top_of_groups(scores, groups, pre_nms_top_k)
    top_scores = scores.gather(1, top)
    deltas = box_deltas.gather(1, top[..., None].expand(-1, -1, 4))
    boxes = clip_boxes(decode_boxes(deltas, anchors[top], config.delta_scale), windows)

    # Slivers become empty boxes of the lowest score: they suppress nothing and end up behind the real ones.
    large_enough = ((boxes[..., 2:] - boxes[..., :2]) >= config.min_size).all(dim=2)
    boxes = torch.where(large_enough[..., None], boxes, 0.0)
    top_scores = torch.where(large_enough, top_scores, float("-inf"))
    kept = kept_by_batched_nms(boxes, top_scores, sizes, config.nms_threshold)
    ranked_scores = torch.where(kept & large_enough, top_scores, float("-inf"))
    best_scores, best = ranked_scores.topk(min(num_proposals, boxes.shape[1]), dim=1)
    valid = best_scores > float("-inf")
    proposals = torch.where(valid[..., None], boxes.gather(1, best[..., None].expand(-1, -1, 4)), 0.0)
    missing = num_proposals - best.shape[1]
    return F.pad(proposals, (0, 0, 0, missing)), F.pad(valid, (0, missing))


def _top_of_groups(scores: Tensor, groups: Sequence[int], most: int) -> tuple[Tensor, list[int]]:
    """Index (B, N) of the best scored of each group of consecutive columns, the best first, and how many of each."""
    index = []
    first = 0
    for count in groups:
        index.append(scores[:, first : first + count].topk(min(most, count), dim=1).indices + first)
        first += count
    return torch.cat(index, dim=1), [best.shape[1] for best in index]
