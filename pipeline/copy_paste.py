"""Copy-paste: objects of one image laid over another (Ghiasi et al. 2021, arXiv 2012.07177), without blending."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from pipeline.jitter import boxes_from_masks, with_masks
from pipeline.preprocess import unpack_mask
from pipeline.sample import Sample, mask_offsets

Bitmap = npt.NDArray[np.bool_]
PASTED_SHARE = 0.5
"""Of the objects of a partner."""
_PARTNER = 1  # tells the draw of the partner from those for the row itself
_TIE = 1e-3  # a pixel whose centre lies on the edge of two cells takes the latter, whatever rounding says


def planned_partner(seed: int, epoch: int, row: int, num_rows: int, share: float) -> int | None:
    """Row of whose objects some are pasted into a row in an epoch, if any are; not where it is of another source.

    Args:
        seed: of the plan.
        epoch: as the plan numbers it.
        row: what is pasted into.
        num_rows: stored rows.
        share: of rows that have a partner.
    """
    if share == 0:
        return None
    rng = np.random.default_rng([seed, epoch, row, _PARTNER])
    return int(rng.integers(num_rows)) if rng.random() < share else None


def copy_paste(sample: Sample, partner: Sample, chosen: npt.NDArray[np.bool_]) -> Sample:
    """Paste some of the partner's objects in front of the sample's, both laid on each other at their top left corner.

    The image keeps its size; what would be pasted outside is cut off. An object that is covered in part is drawn on the
    pixels of the image, less those that are covered, and gets the box of what is left; one that is covered whole is
    dropped; all others keep their bits and their boxes.

    Args:
        sample: what is pasted into.
        partner: augmented by itself.
        chosen: (N of the partner,) bool; crowds are never pasted.
    """
    height, width = sample.image.shape[:2]
    rows, columns = min(height, partner.image.shape[0]), min(width, partner.image.shape[1])
    pasted = _choose(partner, np.flatnonzero(chosen & ~partner.is_crowd).tolist())
    pasted = boxes_from_masks(dataclasses.replace(pasted, image=pasted.image[:rows, :columns]))
    cover = np.zeros((height, width), dtype=bool)
    for index in range(len(pasted.classes)):
        (top, bottom, left, right), mask = draw_mask(pasted, index)
        cover[top:bottom, left:right] |= mask
    if not cover.any():
        return sample
    image = sample.image.copy()
    image[:rows, :columns][cover[:rows, :columns]] = pasted.image[cover[:rows, :columns]]
    below = _cover_objects(sample, cover)
    return Sample(
        image=image,
        classes=np.concatenate([below.classes, pasted.classes]),
        is_crowd=np.concatenate([below.is_crowd, pasted.is_crowd]),
        boxes=np.concatenate([below.boxes, pasted.boxes]),
        mask_boxes=np.concatenate([below.mask_boxes, pasted.mask_boxes]),
        mask_sizes=np.concatenate([below.mask_sizes, pasted.mask_sizes]),
        mask_bits=np.concatenate([below.mask_bits, pasted.mask_bits]),
    )


def draw_mask(sample: Sample, index: int) -> tuple[tuple[int, int, int, int], Bitmap]:
    """An object on the pixels of the image: one belongs to it where its centre does.

    Returns:
        Top, bottom, left, right of a window of the image, and the (bottom - top, right - left) bitmap in it.
    """
    offsets = mask_offsets(sample.mask_sizes[: index + 1])
    rows, columns = (int(number) for number in sample.mask_sizes[index])
    mask = unpack_mask(sample.mask_bits[offsets[-2] : offsets[-1]], rows, columns)
    left, top, right, bottom = sample.mask_boxes[index].astype(np.float64)
    y, y_cells = _pixels(top, bottom, rows, sample.image.shape[0])
    x, x_cells = _pixels(left, right, columns, sample.image.shape[1])
    return (y, y + len(y_cells), x, x + len(x_cells)), mask[np.ix_(y_cells, x_cells)]


def _pixels(start: float, end: float, cells: int, extent: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Along one axis: the first pixel of the image with its centre in start..end, and the cell under each."""
    first, last = max(0, int(np.ceil(start - 0.5 - _TIE))), min(extent, int(np.ceil(end - 0.5 - _TIE)))
    centres = np.arange(first, max(first, last)) + 0.5 + _TIE
    index = np.floor((centres - start) * (cells / (end - start)))
    return first, np.clip(index, 0, cells - 1).astype(np.int64)


def _choose(sample: Sample, kept: list[int]) -> Sample:
    """The sample with some of its objects."""
    offsets = mask_offsets(sample.mask_sizes)
    bits = [sample.mask_bits[offsets[index] : offsets[index + 1]] for index in kept]
    return Sample(
        image=sample.image,
        classes=sample.classes[kept],
        is_crowd=sample.is_crowd[kept],
        boxes=sample.boxes[kept],
        mask_boxes=sample.mask_boxes[kept],
        mask_sizes=sample.mask_sizes[kept],
        mask_bits=np.concatenate(bits) if bits else sample.mask_bits[:0],
    )


def _cover_objects(sample: Sample, cover: Bitmap) -> Sample:
    """The sample's objects without what is covered."""
    parts: list[Sample] = []
    for index in range(len(sample.classes)):
        (top, bottom, left, right), mask = draw_mask(sample, index)
        seen = mask & ~cover[top:bottom, left:right]
        if not mask.any():  # smaller than a pixel, and without one's centre: the pixels that it touches decide
            x0, y0, x1, y1 = sample.mask_boxes[index]
            touched = cover[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)]
            if touched.size and touched.all():
                continue
        if (seen == mask).all():
            parts.append(_choose(sample, [index]))
            continue
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        if len(rows):
            tight = seen[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            box = np.array([left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1], dtype=float)
            parts.append(with_masks(sample, [index], [box], [box], [tight]))
    if not parts:
        return _choose(sample, [])
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(Sample)
        if field.name != "image"
    }
    return Sample(image=sample.image, **joined)
