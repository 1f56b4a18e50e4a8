"""Masks: bits inside a box, 28 x 28 targets cut from them, and predicted masks pasted back into the image."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.structures import Batch, Detections

_SAMPLES_PER_SIDE = 2  # in every cell, as ROIAlign takes them


def crop_mask_targets(batch: Batch, image_index: Tensor, gt_index: Tensor, regions: Tensor, size: int) -> Tensor:
    """Cut the masks of objects on the grid of their regions (Mask R-CNN, section 3.1).

    Equal to ROIAlign (aligned, four bilinear samples a cell) on the full bitmap in original resolution and a
    threshold at one half, without ever making the bitmap.

    Args:
        batch: mask bits.
        image_index: (P,) int64 image of each region; P may be 0.
        gt_index: (P,) int64 slot of the object in its image.
        regions: (P, 4) xyxy in input pixels.
        size: M, cells a side.

    Returns:
        (P, M, M) float32 of 0 and 1.
    """
    if batch.mask_bits.numel() == 0:  # no image has an object: there is nothing to index
        return regions.new_zeros(regions.shape[0], size, size)
    mask_box = batch.mask_boxes[image_index, gt_index]  # (P, 4)
    height, width = batch.mask_sizes[image_index, gt_index].unbind(dim=1)  # (P,)
    image_height, image_width = batch.image_sizes[image_index].unbind(dim=1)  # (P,)
    first_bit = batch.mask_offsets[image_index, gt_index] * 8
    # Sample positions in the pixel grid of the mask bits; pixel 0 has its centre at 0.
    steps = (torch.arange(size * _SAMPLES_PER_SIDE, device=regions.device) + 0.5) / (size * _SAMPLES_PER_SIDE)
    x0, x1, weight_x = _neighbours(regions[:, 0::2], mask_box[:, 0::2], width, image_width, steps)
    y0, y1, weight_y = _neighbours(regions[:, 1::2], mask_box[:, 1::2], height, image_height, steps)

    def bits(y: Tensor, x: Tensor) -> Tensor:
        inside = ((y >= 0) & (y < height[:, None]))[:, :, None] & ((x >= 0) & (x < width[:, None]))[:, None, :]
        index = first_bit[:, None, None] + y[:, :, None] * width[:, None, None] + x[:, None, :]
        index = torch.where(inside, index, 0)
        byte = batch.mask_bits[index >> 3] >> (7 - (index & 7)).to(torch.uint8)
        return torch.where(inside, (byte & 1).float(), 0.0)

    wy, wx = weight_y[:, :, None], weight_x[:, None, :]
    top = bits(y0, x0) * (1 - wx) + bits(y0, x1) * wx
    bottom = bits(y1, x0) * (1 - wx) + bits(y1, x1) * wx
    samples = top * (1 - wy) + bottom * wy  # (P, 2M, 2M)
    cells = F.avg_pool2d(samples[:, None], _SAMPLES_PER_SIDE)[:, 0]
    return (cells >= 0.5).float()


def _neighbours(
    region: Tensor, mask_box: Tensor, cells: Tensor, image_extent: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis: the two bits beside every sample, and the weight of the second; (P, S) each."""
    position = region[:, :1] + steps * (region[:, 1:] - region[:, :1])  # (P, S) input pixels
    extent = (mask_box[:, 1:] - mask_box[:, :1]).clamp(min=1e-6)
    position = (position - mask_box[:, :1]) / extent * cells[:, None] - 0.5
    # As in ROIAlign, what lies beyond the centre of the image's outermost pixel has the value of that pixel.
    first_pixel = -mask_box[:, :1] / extent * cells[:, None]
    last_pixel = (image_extent[:, None] - mask_box[:, :1]) / extent * cells[:, None] - 1
    position = torch.minimum(torch.maximum(position, first_pixel), last_pixel)
    low = torch.floor(position)
    return low.long(), low.long() + 1, position - low


def expand_boxes(boxes: npt.NDArray[np.float32], scale: float) -> npt.NDArray[np.float32]:
    """Grow (N, 4) xyxy boxes about their centres."""
    centre = (boxes[:, :2] + boxes[:, 2:]) * np.float32(0.5)
    half = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5 * scale)
    return np.concatenate([centre - half, centre + half], axis=1)


def paste_masks_in_boxes(
    detections: Detections, height: int, width: int
) -> list[tuple[int, int, npt.NDArray[np.bool_]]]:
    """Resize predicted masks to their boxes: the part of the image that each covers, never a full bitmap.

    The convention is torchvision's: one cell of padding, box grown alike, corners truncated to whole pixels.

    Args:
        detections: boxes in pixels of an image of this height and width.
        height: rows of the image.
        width: columns of the image.

    Returns:
        For each detection the top row, the left column, and the (h, w) mask; h or w is 0 where the box lies outside.
    """
    cells = detections.mask_probabilities.shape[-1] if len(detections) else 0
    pasted: list[tuple[int, int, npt.NDArray[np.bool_]]] = []
    if not len(detections):
        return pasted
    padded = F.pad(detections.mask_probabilities.float().cpu(), (1, 1, 1, 1))
    boxes = expand_boxes(detections.boxes.float().cpu().numpy(), (cells + 2) / cells).astype(np.int64)
    for (x0, y0, x1, y1), mask in zip(boxes.tolist(), padded, strict=True):
        box_height, box_width = max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)
        top, left = max(y0, 0), max(x0, 0)
        bottom, right = min(y1 + 1, height), min(x1 + 1, width)
        resized = F.interpolate(mask[None, None], size=(box_height, box_width), mode="bilinear", align_corners=False)
        crop = resized[0, 0, top - y0 : max(bottom, top) - y0, left - x0 : max(right, left) - x0] > 0.5
        pasted.append((top, left, crop.numpy()))
    return pasted


def paste_masks(detections: Detections, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Full bitmaps of predicted masks: (N, height, width); N may be 0. For pictures and small sets."""
    masks = np.zeros((len(detections), height, width), dtype=bool)
    for index, (top, left, crop) in enumerate(paste_masks_in_boxes(detections, height, width)):
        masks[index, top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    return masks


def run_lengths(crop: npt.NDArray[np.bool_], top: int, left: int, height: int, width: int) -> list[int]:
    """COCO run lengths (column by column, zeros first) of an image that is empty but for a crop.

    Args:
        crop: (h, w) mask, which lies inside the image.
        top: row of the crop's first row.
        left: column of the crop's first column.
        height: rows of the image.
        width: columns of the image.

    Returns:
        Lengths that add up to height * width.
    """
    total = height * width
    if crop.size == 0 or not crop.any():
        return [total]
    # One zero below each column keeps runs of neighbouring columns apart; the other marks the start of the first.
    columns = np.zeros((crop.shape[1], crop.shape[0] + 1), dtype=np.int8)
    columns[:, :-1] = crop.T
    change = np.flatnonzero(np.diff(columns.ravel(), prepend=0))  # starts and ends of runs, alternating
    column, row = np.divmod(change, crop.shape[0] + 1)
    position = (left + column) * height + top + row
    # A run that ends at the bottom of a full-height crop and one that starts at the next column's top are one run.
    joined = np.flatnonzero(position[1:-1:2] == position[2::2]) * 2 + 1
    position = np.delete(position, np.concatenate([joined, joined + 1]))
    return np.diff(np.concatenate([[0], position, [total]])).tolist() if position[-1] < total else _open_end(position)


def _open_end(position: npt.NDArray[np.int64]) -> list[int]:
    """Run lengths of a mask that reaches the last pixel: no zeros follow."""
    lengths: list[int] = np.diff(np.concatenate([[0], position])).tolist()
    return lengths


def encode_detections(detections: Detections, height: int, width: int) -> list[dict[str, Any]]:
    """Masks of detections as COCO RLE (`{"size": [h, w], "counts": str}`), in order.

    Args:
        detections: boxes in original pixels.
        height: rows of the original image.
        width: columns of the original image.
    """
    from pycocotools import mask as coco_mask  # only here, so that the model runs without it

    encoded = []
    for top, left, crop in paste_masks_in_boxes(detections, height, width):
        counts = run_lengths(crop, top, left, height, width)
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        encoded.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return encoded
