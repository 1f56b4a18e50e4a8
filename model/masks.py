"""Predicted masks pasted back into the image, as bitmaps and as RLE."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from model.resize import resize_bilinear
from model.structures import Detections


def expand_boxes(boxes: npt.NDArray[np.float32], scale: float) -> npt.NDArray[np.float32]:
    """Grow (N, 4) xyxy boxes about their centres."""
    centre = (boxes[:, :2] + boxes[:, 2:]) * np.float32(0.5)
    half = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5 * scale)
    return np.concatenate([centre - half, centre + half], axis=1)


def paste_masks_in_boxes(
    detections: Detections, height: int, width: int, whole_pixels: bool = False
) -> list[tuple[int, int, npt.NDArray[np.bool_]]]:
    """Resize predicted masks to their boxes: the part of the image that each covers, never a full bitmap.

    Args:
        detections: boxes in pixels of an image of this height and width.
        height: rows of the image.
        width: columns of the image.
        whole_pixels: boxes are whole pixels inside the image, and the mask is resized to exactly its box, as the
            original does (`unmold_mask`); else the convention is torchvision's: one cell of padding, box grown alike,
            corners truncated to whole pixels.

    Returns:
        For each detection the top row, the left column, and the (h, w) mask; h or w is 0 where the box lies outside.
    """
    cells = detections.mask_probabilities.shape[-1] if len(detections) else 0
    pasted: list[tuple[int, int, npt.NDArray[np.bool_]]] = []
    if not len(detections):
        return pasted
    if whole_pixels:
        masks = detections.mask_probabilities.float().cpu().numpy()
        for (x0, y0, x1, y1), mask in zip(detections.boxes.round().int().tolist(), masks, strict=True):
            pasted.append((y0, x0, resize_bilinear(mask, y1 - y0, x1 - x0) >= 0.5))
        return pasted
    padded = F.pad(detections.mask_probabilities.float().cpu(), (1, 1, 1, 1))
    boxes = expand_boxes(detections.boxes.float().cpu().numpy(), (cells + 2) / cells).astype(np.int64)
    for (x0, y0, x1, y1), mask in zip(boxes.tolist(), padded, strict=True):
        box_height, box_width = max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)
        top, left = max(y0, 0), max(x0, 0)
        bottom, right = min(y1 + 1, height), min(x1 + 1, width)
        resized = F.interpolate(mask[None, None], size=(box_height, box_width), mode="bilinear", align_corners=False)
        crop = resized.numpy()[0, 0, top - y0 : max(bottom, top) - y0, left - x0 : max(right, left) - x0] > 0.5
        pasted.append((top, left, crop))
    return pasted


def paste_masks(detections: Detections, height: int, width: int, whole_pixels: bool = False) -> npt.NDArray[np.bool_]:
    """Full bitmaps of predicted masks: (N, height, width); N may be 0. For pictures and small sets."""
    masks = np.zeros((len(detections), height, width), dtype=bool)
    for index, (top, left, crop) in enumerate(paste_masks_in_boxes(detections, height, width, whole_pixels)):
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
    total, h, w = height * width, *crop.shape
    # Where a pixel differs from the one above it a run starts or ends; a row of zeros above and below ends them all.
    # Row by row and then sorted: cheaper than to turn the crop into columns first.
    framed = np.zeros((h + 2, w), dtype=bool)
    framed[1:-1] = crop
    change = np.flatnonzero(framed[1:] != framed[:-1])
    if not change.size:
        return [total]
    row, column = np.divmod(change, w)
    position = (left + column) * height + top + row
    position.sort()  # starts and ends of runs, alternating
    if h == height:  # a run that ends at the bottom and one that starts at the next column's top are one run
        joined = np.flatnonzero(position[1:-1:2] == position[2::2]) * 2 + 1
        position = np.delete(position, np.concatenate([joined, joined + 1]))
    ends = [position, [total]] if position[-1] < total else [position]
    lengths: list[int] = np.diff(np.concatenate([[0], *ends])).tolist()
    return lengths


def encode_detections(
    detections: Detections, height: int, width: int, whole_pixels: bool = False
) -> list[dict[str, Any]]:
    """Masks of detections as COCO RLE (`{"size": [h, w], "counts": str}`), in order.

    Args:
        detections: boxes in original pixels.
        height: rows of the original image.
        width: columns of the original image.
        whole_pixels: see `paste_masks_in_boxes`.
    """
    from pycocotools import mask as coco_mask  # only here, so that the model runs without it

    encoded = []
    for top, left, crop in paste_masks_in_boxes(detections, height, width, whole_pixels):
        counts = run_lengths(crop, top, left, height, width)
        rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        encoded.append({"size": [height, width], "counts": rle["counts"].decode("ascii")})
    return encoded
