"""Non-maximum suppression of many groups of boxes at once on a GPU, without a wait for the device, as Triton kernels.

torchvision's operator returns as many boxes as are kept, so that the host has to wait for it, and it takes one image at
a time, each with a scan over thousands of boxes that keeps the GPU waiting too. Here all groups are scanned side by
side, and the result has a fixed size, so that a whole training step can be one CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # of a program of the first kernel


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _either(bits, others):  # type: ignore[no-untyped-def]
    """Union of two sets of bits."""
    return bits | others


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _overlap_bits(boxes, bits, number, words, threshold, ROWS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """bits[group, row, word]: which of the 32 boxes of the word come after the row's box and overlap it too much."""
    group, first_row, word = tl.program_id(0), tl.program_id(1) * ROWS, tl.program_id(2)
    row = first_row + tl.arange(0, ROWS)
    bit = tl.arange(0, 32)
    column = word * 32 + bit
    corners = boxes + group * number * 4
    left = tl.load(corners + row * 4, mask=row < number, other=0.0)[:, None]
    top = tl.load(corners + row * 4 + 1, mask=row < number, other=0.0)[:, None]
    right = tl.load(corners + row * 4 + 2, mask=row < number, other=0.0)[:, None]
    bottom = tl.load(corners + row * 4 + 3, mask=row < number, other=0.0)[:, None]
    other_left = tl.load(corners + column * 4, mask=column < number, other=0.0)[None, :]
    other_top = tl.load(corners + column * 4 + 1, mask=column < number, other=0.0)[None, :]
    other_right = tl.load(corners + column * 4 + 2, mask=column < number, other=0.0)[None, :]
    other_bottom = tl.load(corners + column * 4 + 3, mask=column < number, other=0.0)[None, :]
    width = tl.maximum(tl.minimum(right, other_right) - tl.maximum(left, other_left), 0.0)
    height = tl.maximum(tl.minimum(bottom, other_bottom) - tl.maximum(top, other_top), 0.0)
    intersection = width * height
    area = (right - left) * (bottom - top)
    other_area = (other_right - other_left) * (other_bottom - other_top)
    overlaps = intersection / (area + other_area - intersection) > threshold  # 0 / 0, of boxes without area, is not
    overlaps = overlaps & (column[None, :] > row[:, None])
    packed = tl.reduce(tl.where(overlaps, 1 << bit[None, :], 0), 1, _either)
    tl.store(bits + (group * number + row) * words + word, packed, mask=row < number)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _scan(bits, dropped, number, words, WORDS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """dropped[group, word]: which boxes of a group a kept one suppresses; from the best to the worst."""
    group = tl.program_id(0)
    word = tl.arange(0, WORDS)
    rows = bits + group * number * words + word
    so_far = tl.full([WORDS], 0, tl.int32)
    next_row = tl.load(rows, mask=word < words, other=0)
    for row in range(number):
        overlaps = next_row
        # Ahead of its use, and whether or not the box is kept: the load does not wait for the decision. After the last
        # row it reads what it does not use.
        next_row = tl.load(rows + (row + 1) * words, mask=word < words, other=0)
        own_word = tl.reduce(tl.where(word == row // 32, so_far, 0), 0, _either)
        is_dropped = (own_word >> (row % 32)) & 1
        so_far = tl.where(is_dropped == 0, so_far | overlaps, so_far)
    tl.store(dropped + group * words + word, so_far, mask=word < words)


def kept_in_groups(boxes: Tensor, iou_threshold: float) -> Tensor:
    """(G, N) bool: boxes that no better one of their group overlaps by more than the threshold.

    Args:
        boxes: (G, N, 4) float32 xyxy, the best of each group first; those without area overlap nothing.
        iou_threshold: strictly more than this is dropped.
    """
    groups, number = boxes.shape[:2]
    words = -(-number // 32)
    if groups * number == 0:
        return torch.ones(groups, number, dtype=torch.bool, device=boxes.device)
    bits = torch.empty(groups * number + 1, words, dtype=torch.int32, device=boxes.device)
    dropped = torch.empty(groups, words, dtype=torch.int32, device=boxes.device)
    boxes = boxes.float().contiguous()
    _overlap_bits[(groups, triton.cdiv(number, _ROWS), words)](boxes, bits, number, words, iou_threshold, ROWS=_ROWS)
    width = triton.next_power_of_2(words)
    _scan[(groups,)](bits, dropped, number, words, WORDS=width, num_warps=max(1, min(8, width // 64)))
    place = torch.arange(32, dtype=torch.int32, device=boxes.device)
    return (((dropped[:, :, None] >> place) & 1) == 0).flatten(1)[:, :number]
