"""Scale and crop of a sample: masks keep their own bits, boxes follow what is left to see of the masks.

Pixels are resampled once, from the stored image, whatever is cut out of it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.preprocess import UInt8Array, unpack_mask
from pipeline.sample import Sample, mask_offsets

MIN_VISIBLE_SIDE = 1.0
"""Objects of which less than so many input pixels in width or height are left are dropped."""
_SLIVER = 1e-3
"""Part of a mask's cell that rounding may put on the wrong side of an edge."""


def jitter_short_side(
    sample: Sample,
    short_sides: tuple[int, int],
    step: int,
    canvas: tuple[int, int],
    draw: float,
    size: tuple[int, int] | None = None,
) -> Sample:
    """Bring the short side of the image to a drawn length, or as near to it as the canvas allows.

    Args:
        sample: as stored.
        short_sides: smallest and largest length, input pixels.
        step: between the lengths that occur.
        canvas: rows and columns that the image may take.
        draw: in [0, 1).
        size: rows and columns that the drawn size is told from; by default the stored image's.
    """
    low, high = short_sides
    length = low + step * int(draw * ((high - low) // step + 1))
    height, width = size or sample.image.shape[:2]
    scale = min(length / min(height, width), canvas[0] / height, canvas[1] / width)
    return scale_and_crop(sample, scale, canvas, (0.0, 0.0), (height, width))


def large_scale_jitter(
    sample: Sample,
    scales: tuple[float, float],
    canvas: tuple[int, int],
    draws: tuple[float, float, float],
    size: tuple[int, int] | None = None,
) -> Sample:
    """Scale the image as it fits the canvas by a drawn factor, and cut out the canvas where it is larger.

    (Ghiasi et al. 2021, as detectron2's ResizeScale and FixedSizeCrop.) Boxes are recomputed from the masks.

    Args:
        sample: as stored.
        scales: smallest and largest factor.
        canvas: rows and columns of the crop.
        draws: scale, top and left, in [0, 1).
        size: rows and columns that the drawn size is told from; by default the stored image's.
    """
    height, width = size or sample.image.shape[:2]
    fit = min(canvas[0] / height, canvas[1] / width)
    scale = fit * (scales[0] + (scales[1] - scales[0]) * draws[0])
    return boxes_from_masks(scale_and_crop(sample, scale, canvas, draws[1:], (height, width)))


def scale_and_crop(
    sample: Sample,
    scale: float,
    most: tuple[int, int],
    places: tuple[float, float],
    size: tuple[int, int] | None = None,
) -> Sample:
    """Resize, then cut a window out of what is larger than allowed; masks and boxes move along and are not cut.

    Args:
        sample: N may be 0.
        scale: of the resizing; sides are rounded to whole pixels.
        most: rows and columns that may be left.
        places: where between the ends the window begins, in [0, 1], top and left.
        size: rows and columns that are scaled; by default the stored image's.
    """
    old_height, old_width = sample.image.shape[:2]
    height, width = (max(1, round(side * scale)) for side in size or (old_height, old_width))
    rows, columns = min(height, most[0]), min(width, most[1])
    if (rows, columns) == (old_height, old_width) == (height, width):
        return sample
    top, left = round((height - rows) * places[0]), round((width - columns) * places[1])
    scales = np.array([width / old_width, height / old_height] * 2)
    offset = np.array([left, top] * 2)
    return Sample(
        image=_resample(sample.image, height, width, (top, left, rows, columns)),
        classes=sample.classes,
        is_crowd=sample.is_crowd,
        boxes=(sample.boxes * scales - offset).astype(np.float32),
        mask_boxes=(sample.mask_boxes * scales - offset).astype(np.float32),
        mask_sizes=sample.mask_sizes,
        mask_bits=sample.mask_bits,
    )


def _resample(image: UInt8Array, height: int, width: int, window: tuple[int, int, int, int]) -> UInt8Array:
    """The window (top, left, rows, columns) of the image resized to (height, width); the rest is never made.

    A whole image takes PyTorch's kernel: at most a level off Pillow's, and about three times as fast; it cuts nothing.
    """
    top, left, rows, columns = window
    if (rows, columns) == (height, width):
        import torch  # seconds and 250 MB of a data task's process, so only where it is used
        from torch.nn import functional

        pixels = torch.tensor(image)[None].permute(0, 3, 1, 2)  # channels last, by all its strides
        resized = functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
        return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()
    old_height, old_width = image.shape[:2]
    x_scale, y_scale = old_width / width, old_height / height
    box = (left * x_scale, top * y_scale, (left + columns) * x_scale, (top + rows) * y_scale)
    inside = (box[0], box[1], min(box[2], old_width), min(box[3], old_height))  # not beyond the edge by rounding
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BILINEAR, box=inside))


def boxes_from_masks(sample: Sample) -> Sample:
    """Cut masks to the image, drop objects that have left it, and give the others the box of what is to be seen.

    Bits stay those of the original resolution; at an edge that runs through them they reach beyond the image.
    """
    height, width = sample.image.shape[:2]
    offsets = mask_offsets(sample.mask_sizes)
    kept: list[int] = []
    boxes: list[npt.NDArray[np.float64]] = []
    mask_boxes: list[npt.NDArray[np.float64]] = []
    masks: list[npt.NDArray[np.bool_]] = []
    for index, (sides, (rows, columns)) in enumerate(zip(sample.mask_boxes, sample.mask_sizes, strict=True)):
        mask = unpack_mask(sample.mask_bits[offsets[index] : offsets[index + 1]], int(rows), int(columns))
        mask_box = sides.astype(np.float64)
        box = _visible_box(mask_box, mask, height, width)
        if box is None or min(box[2] - box[0], box[3] - box[1]) < MIN_VISIBLE_SIDE:
            continue
        x = _cells_inside(mask_box[0], mask_box[2], int(columns), width, _SLIVER)
        y = _cells_inside(mask_box[1], mask_box[3], int(rows), height, _SLIVER)
        kept.append(index)
        boxes.append(box)
        mask_boxes.append(_box_of_cells(mask_box, mask, y, x))
        masks.append(mask[slice(*y), slice(*x)])
    return with_masks(sample, kept, boxes, mask_boxes, masks)


def _visible_box(
    mask_box: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_], height: int, width: int
) -> npt.NDArray[np.float64] | None:
    """Box in the image of the set bits of which at least half a pixel is to be seen; None where there are none."""
    low_x, high_x = _cells_inside(mask_box[0], mask_box[2], mask.shape[1], width, 0.5)
    low_y, high_y = _cells_inside(mask_box[1], mask_box[3], mask.shape[0], height, 0.5)
    part = mask[low_y:high_y, low_x:high_x]
    rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
    if len(rows) == 0:
        return None
    y, x = (low_y + int(rows[0]), low_y + int(rows[-1]) + 1), (low_x + int(columns[0]), low_x + int(columns[-1]) + 1)
    return np.clip(_box_of_cells(mask_box, mask, y, x), 0, [width, height, width, height])


def _cells_inside(start: float, end: float, cells: int, extent: int, least: float) -> tuple[int, int]:
    """First and last (exclusive) of the cells between start and end of which so many pixels lie in 0..extent.

    A cell that lies inside whole always counts, however small it is.
    """
    size = (end - start) / cells
    low = 0 if start >= -_SLIVER else int(np.clip(np.floor((least - start) / size), 0, cells))
    high = cells if end <= extent + _SLIVER else int(np.clip(np.ceil((extent - least - start) / size), 0, cells))
    return low, max(low, high)


def _box_of_cells(
    mask_box: npt.NDArray[np.float64], mask: npt.NDArray[np.bool_], y: tuple[int, int], x: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Sides of some rows and columns of a mask, input pixels."""
    width, height = (mask_box[2] - mask_box[0]) / mask.shape[1], (mask_box[3] - mask_box[1]) / mask.shape[0]
    sides: npt.NDArray[np.float64] = np.array([x[0] * width, y[0] * height, x[1] * width, y[1] * height])
    return mask_box[[0, 1, 0, 1]] + sides


def with_masks(
    sample: Sample,
    kept: list[int],
    boxes: list[npt.NDArray[np.float64]],
    mask_boxes: list[npt.NDArray[np.float64]],
    masks: list[npt.NDArray[np.bool_]],
) -> Sample:
    """The sample with some of its objects, each with another box and another mask."""
    bits = [np.packbits(mask) for mask in masks]
    return Sample(
        image=sample.image,
        classes=sample.classes[kept],
        is_crowd=sample.is_crowd[kept],
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        mask_boxes=np.array(mask_boxes, dtype=np.float32).reshape(-1, 4),
        mask_sizes=np.array([mask.shape for mask in masks], dtype=np.int32).reshape(-1, 2),
        mask_bits=np.concatenate(bits) if bits else np.zeros(0, dtype=np.uint8),
    )
