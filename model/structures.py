"""What goes into the model and what comes out of it: every shape, order, frame and unit, once.

Letters: B images, G ground-truth slots an image, C classes with background, H and W of the canvas.
Frames: *original* pixels (the image file), *input* pixels (after resize and pad), *feature* cells.
Boxes are xyxy, float, right and bottom exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images of one step on one canvas, with their ground truth padded to G slots (class 0 = empty slot).

    Masks travel as the bits inside their box in *original* resolution, so resizing the image never touches them:
    object g of image b has `mask_sizes[b, g]` = (h, w) rows and columns of bits, row by row, most significant bit
    first, from byte `mask_offsets[b, g]` of `mask_bits`; they cover `mask_boxes[b, g]` in input pixels.
    """

    images: Tensor
    """(B, 3, H, W) uint8 RGB, resized into the top left corner, zero elsewhere."""
    image_sizes: Tensor
    """(B, 2) int64 height and width of the part of the canvas that the image covers, input pixels."""
    boxes: Tensor
    """(B, G, 4) float32 xyxy in input pixels."""
    classes: Tensor
    """(B, G) int64 class of each object, 0 for an empty slot."""
    is_crowd: Tensor
    """(B, G) bool; crowds are neither positives nor negatives."""
    mask_boxes: Tensor
    """(B, G, 4) float32 xyxy in input pixels that the mask bits cover."""
    mask_sizes: Tensor
    """(B, G, 2) int64 rows and columns of the mask bits."""
    mask_offsets: Tensor
    """(B, G) int64 first byte in `mask_bits`."""
    mask_bits: Tensor
    """(bytes,) uint8."""
    active_class_ids: Tensor
    """(B, C) bool: classes that the image's data set has labelled; background always."""
    random_keys: Tensor
    """(B,) int64: what the draws for an image are a function of (with the slot drawn for)."""

    def to(self, device: torch.device | str) -> Batch:
        """Copy to a device, without waiting where the memory is pinned."""
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def pin_memory(self) -> Batch:
        """Move to page-locked memory, from which a copy to a GPU does not make the host wait."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    @property
    def num_images(self) -> int:
        """B."""
        return self.images.shape[0]


@dataclass(frozen=True)
class Detections:
    """Objects found in one image, best score first; N may be 0."""

    boxes: Tensor
    """(N, 4) float32 xyxy; input pixels from the model, original pixels after `model.postprocess.to_original`."""
    scores: Tensor
    """(N,) float32 in 0..1."""
    classes: Tensor
    """(N,) int64 in 1..C-1."""
    mask_probabilities: Tensor
    """(N, M, M) float32 in 0..1 over the box; `model.masks` pastes them into the image."""

    def __len__(self) -> int:
        return self.scores.shape[0]

    def where(self, wanted: Tensor) -> Detections:
        """Those for which (N,) bool is true, in order; or those of a (K,) int64 index."""
        return Detections(**{f.name: getattr(self, f.name)[wanted] for f in fields(self)})
