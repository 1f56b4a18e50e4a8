"""Mask targets: the bits of objects cut on the grid of their regions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from model.boxes import last_pixel_inside
from model.nms import has_kernels
from model.structures import Batch

TargetKind = Literal["thresholded", "soft", "crop_and_resize"]

_SAMPLES_PER_SIDE = 2  # in every cell, as ROIAlign takes them


def crop_mask_targets(
    batch: Batch, windows: Tensor, image_index: Tensor, gt_index: Tensor, regions: Tensor, size: int, kind: TargetKind
) -> Tensor:
    """Cut the masks of objects on the grid of their regions (Mask R-CNN, section 3.1), never making a full bitmap.

    - thresholded: ROIAlign (aligned, four bilinear samples a cell) on the bitmap in original resolution, cut at a half.
    - soft: the same without half-pixel centres, with as many samples as the cell has pixels, and not cut, as
      torchvision does it.
    - crop_and_resize: one sample a cell, the grid's corners on the region's, rounded, as the original does it; regions
      have their last pixel inside.

    Args:
        batch: mask bits.
        windows: (B, 4) xyxy in input pixels of the images on their canvas.
        image_index: (P,) int64 image of each region; P may be 0.
        gt_index: (P,) int64 slot of the object in its image.
        regions: (P, 4) xyxy in input pixels.
        size: M, cells a side.
        kind: see above.

    Returns:
        (P, M, M) float32 in 0..1; 0 or 1 unless soft.
    """
    if batch.mask_bits.numel() == 0 or regions.shape[0] == 0:  # no image has an object: there is nothing to index
        return regions.new_zeros(regions.shape[0], size, size, dtype=torch.float32)
    first = batch.mask_offsets[image_index, gt_index] * 8  # bits
    height, width = batch.mask_sizes[image_index, gt_index].unbind(dim=1)
    mask_box = batch.mask_boxes[image_index, gt_index]  # (P, 4)
    window = windows[image_index]  # (P, 4)
    if kind == "soft" and has_kernels(regions.device):  # which reads the bits as they are
        from model.mask_target_kernels import covered_shares

        size_xy = torch.stack([width, height], dim=1)
        of_region, of_window = (_in_mask_pixels(boxes, mask_box, size_xy) for boxes in (regions, window))
        return covered_shares(batch.mask_bits, first, size_xy.flip(1), of_region, of_window, size)
    mask = _Pixels(_unpacked(batch.mask_bits), first, height, width)
    if kind == "crop_and_resize":
        steps = torch.arange(size, device=regions.device, dtype=regions.dtype) / (size - 1)
        # Corners on corners: the mask's outermost pixels, too, count as its edges.
        mask_box = last_pixel_inside(mask_box)
        x = _position(regions[:, 0::2], mask_box[:, 0::2], mask.width - 1, steps)
        y = _position(regions[:, 1::2], mask_box[:, 1::2], mask.height - 1, steps)
        inside_y = (y >= 0) & (y <= mask.height[:, None] - 1)
        inside_x = (x >= 0) & (x <= mask.width[:, None] - 1)
        inside = inside_y[:, :, None] & inside_x[:, None, :]
        return ((mask.interpolate(y, x) > 0.5) & inside).float()
    if kind == "soft":
        return torch.stack(
            [_covered_share(mask, row, mask_box[row], window[row], regions[row], size) for row in range(len(regions))]
        )
    steps = (torch.arange(size * _SAMPLES_PER_SIDE, device=regions.device) + 0.5) / (size * _SAMPLES_PER_SIDE)
    x = _position(regions[:, 0::2], mask_box[:, 0::2], mask.width, steps) - 0.5
    y = _position(regions[:, 1::2], mask_box[:, 1::2], mask.height, steps) - 0.5
    # As in ROIAlign, what lies beyond the centre of the image's outermost pixel has the value of that pixel.
    x = _clamp_to(x, _position(window[:, 0::2], mask_box[:, 0::2], mask.width))
    y = _clamp_to(y, _position(window[:, 1::2], mask_box[:, 1::2], mask.height))
    cells = F.avg_pool2d(mask.interpolate(y, x)[:, None], _SAMPLES_PER_SIDE)[:, 0]
    return (cells >= 0.5).float()


def _unpacked(mask_bits: Tensor) -> Tensor:
    """(bytes,) uint8 to (8 * bytes,) of 0 and 1: to look a pixel up is then one step, and every pixel is read often."""
    return ((mask_bits[:, None] >> torch.arange(7, -1, -1, device=mask_bits.device, dtype=torch.uint8)) & 1).flatten()


@dataclass(frozen=True)
class _Pixels:
    """The masks of P objects inside their boxes."""

    content: Tensor
    """(pixels of all objects,) uint8, 0 or 1."""
    first: Tensor
    """(P,) int64, of each object."""
    height: Tensor
    """(P,) int64 rows."""
    width: Tensor
    """(P,) int64 columns."""

    def interpolate(self, y: Tensor, x: Tensor) -> Tensor:
        """Bilinear samples (P, R, S) at rows y (P, R) and columns x (P, S); pixel 0 is centred at 0, outside is 0."""
        y0, x0 = torch.floor(y), torch.floor(x)
        weight_y, weight_x = (y - y0)[:, :, None], (x - x0)[:, None, :]
        y0, x0 = y0.long(), x0.long()
        left, right = (1 - weight_x) * self._has_column(x0), weight_x * self._has_column(x0 + 1)
        above, below = (1 - weight_y) * self._has_row(y0), weight_y * self._has_row(y0 + 1)
        top = self._nearest(y0, x0) * left + self._nearest(y0, x0 + 1) * right
        bottom = self._nearest(y0 + 1, x0) * left + self._nearest(y0 + 1, x0 + 1) * right
        return top * above + bottom * below

    def crop(self, row: int, top: int, left: int, height: int, width: int) -> Tensor:
        """(height, width) float32 pixels of one mask from a row and column of its grid on; outside is 0."""
        device = self.content.device
        one = slice(row, row + 1)
        of_row = _Pixels(self.content, self.first[one], self.height[one], self.width[one])
        y, x = (
            torch.arange(top, top + height, device=device)[None],
            torch.arange(left, left + width, device=device)[None],
        )
        return (of_row._nearest(y, x) * of_row._has_row(y) * of_row._has_column(x))[0]

    def _has_row(self, y: Tensor) -> Tensor:
        """(P, R) rows to (P, R, 1), 1 for those of the mask and 0 outside."""
        return ((y >= 0) & (y < self.height[:, None])).float()[:, :, None]

    def _has_column(self, x: Tensor) -> Tensor:
        """(P, S) columns to (P, 1, S), likewise."""
        return ((x >= 0) & (x < self.width[:, None])).float()[:, None, :]

    def _nearest(self, y: Tensor, x: Tensor) -> Tensor:
        """Pixels (P, R, S) at rows y (P, R) and columns x (P, S); outside of the mask those of its border.

        Of a mask without pixels any pixel: it has no row or no column either.
        """
        width = torch.where(self.height > 0, self.width, 0)[:, None]
        row = torch.minimum(y, self.height[:, None] - 1).clamp(min=0)
        column = torch.minimum(x, width - 1).clamp(min=0)
        first_of_row = self.first.clamp(max=len(self.content) - 1)[:, None] + row * width
        index = first_of_row[:, :, None] + column[:, None, :]
        return self.content.index_select(0, index.flatten()).reshape(index.shape)


def _position(region: Tensor, mask_box: Tensor, cells: Tensor, steps: Tensor | None = None) -> Tensor:
    """Along one axis: input pixels to mask pixels, 0 at the start of the mask box and `cells` at its end.

    Args:
        region: (P, 2) start and end.
        mask_box: (P, 2) start and end.
        cells: (P,) mask pixels along the axis.
        steps: (S,) shares of the way from start to end; None for start and end.
    """
    position = region if steps is None else region[:, :1] + steps * (region[:, 1:] - region[:, :1])  # (P, S)
    extent = (mask_box[:, 1:] - mask_box[:, :1]).clamp(min=1e-6)
    return (position - mask_box[:, :1]) / extent * cells[:, None]


def _in_mask_pixels(boxes: Tensor, mask_box: Tensor, size_xy: Tensor) -> Tensor:
    """(P, 4) xyxy in input pixels to xyxy in mask pixels, of masks of (P, 2) columns and rows."""
    ends = [_position(boxes[:, axis::2], mask_box[:, axis::2], size_xy[:, axis]) for axis in (0, 1)]
    return torch.stack(ends, dim=2).flatten(1)


def _clamp_to(position: Tensor, ends: Tensor) -> Tensor:
    """Clamp (P, S) pixel positions to the centres of the first and last pixel of an image from `ends` (P, 2)."""
    return torch.minimum(torch.maximum(position, ends[:, :1]), ends[:, 1:] - 1)


def _covered_share(mask: _Pixels, row: int, mask_box: Tensor, window: Tensor, region: Tensor, size: int) -> Tensor:
    """(M, M) share of each cell of one region that the object covers: torchvision's operator on the part it reads."""
    axes = []
    for axis, cells in ((0, mask.width[row]), (1, mask.height[row])):
        ends = [_position(box[None, axis::2], mask_box[None, axis::2], cells[None])[0] for box in (region, window)]
        axes.append([value for pair in ends for value in pair.tolist()])
    (x0, x1, first_x, last_x), (y0, y1, first_y, last_y) = axes
    # The image's border is that of the part read, so that the operator treats it as it treats the full bitmap's.
    left, right = max(math.floor(x0) - 1, round(first_x)), min(math.ceil(x1) + 2, round(last_x))
    top, bottom = max(math.floor(y0) - 1, round(first_y)), min(math.ceil(y1) + 2, round(last_y))
    pixels = mask.crop(row, top, left, max(bottom - top, 1), max(right - left, 1))
    roi = pixels.new_tensor([[0.0, x0 - left, y0 - top, x1 - left, y1 - top]])
    share: Tensor = roi_align(pixels[None, None], roi, size)[0, 0]
    return share
