"""Random changes of a sample: functions of the random generator that the plan gives it, so the same anywhere.

Masks stay in original resolution and exact; boxes move with the pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from pipeline.config import AugmentSettings
from pipeline.jitter import jitter_short_side, large_scale_jitter, scale_and_crop
from pipeline.preprocess import UInt8Array, unpack_mask
from pipeline.sample import Sample, mask_offsets

_NUM_DRAWS = 9


def augment(
    sample: Sample,
    settings: AugmentSettings,
    rng: np.random.Generator,
    canvas: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
) -> Sample:
    """Apply the configured changes of one image; the number of draws never depends on the sample.

    Args:
        sample: as stored.
        settings: what to change, and how much.
        rng: of the row in this epoch.
        canvas: rows and columns that the image may take; by default those that it has.
        size: rows and columns that it has where none are drawn; by default those that are stored.
    """
    draws = rng.random(_NUM_DRAWS).tolist()
    size = size or (sample.image.shape[0], sample.image.shape[1])
    canvas = canvas or size
    if settings.short_side is not None:
        sample = jitter_short_side(sample, settings.short_side, settings.short_side_step, canvas, draws[2], size)
    elif settings.large_scale_jitter is not None:
        sample = large_scale_jitter(sample, settings.large_scale_jitter, canvas, (draws[2], draws[3], draws[4]), size)
    else:
        sample = scale_and_crop(sample, 1.0, canvas, (0.0, 0.0), size)
    if draws[0] < settings.horizontal_flip:
        sample = flip(sample, axis=1)
    if draws[1] < settings.vertical_flip:
        sample = flip(sample, axis=0)
    strengths = (settings.brightness, settings.contrast, settings.saturation)
    factors = [1 + strength * (2 * draw - 1) for strength, draw in zip(strengths, draws[5:8], strict=True)]
    hue_shift = settings.hue * (2 * draws[8] - 1)
    if any((*strengths, settings.hue)):
        colours = change_colours(sample.image, factors[0], factors[1], factors[2], hue_shift)
        sample = dataclasses.replace(sample, image=colours)
    return sample


def change_colours(
    image: UInt8Array, brightness: float, contrast: float, saturation: float, hue_shift: float
) -> UInt8Array:
    """Change the colours of (h, w, 3) uint8, in this order; factors of 1 and a shift of 0 change nothing.

    Args:
        image: RGB.
        brightness: factor; 0 is black.
        contrast: factor of the distance from the mean gray.
        saturation: factor; 0 is gray.
        hue_shift: in turns of the colour circle, -0.5 to 0.5.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    for enhancement, factor in (
        (ImageEnhance.Brightness, brightness),
        (ImageEnhance.Contrast, contrast),
        (ImageEnhance.Color, saturation),
    ):
        if factor != 1:
            picture = enhancement(picture).enhance(factor)
    if hue_shift:
        hue, *others = picture.convert("HSV").split()
        turned = Image.fromarray(np.asarray(hue) + np.uint8(round(hue_shift * 255) % 256))
        picture = Image.merge("HSV", (turned, *others)).convert("RGB")
    return np.asarray(picture)


def flip(sample: Sample, axis: int) -> Sample:
    """Mirror image, boxes and masks; twice is the identity.

    Args:
        sample: N may be 0.
        axis: 0 top to bottom, 1 left to right.
    """
    return dataclasses.replace(
        sample,
        image=_flip_pixels(sample.image, axis),
        boxes=_flip_boxes(sample.boxes, sample.image.shape[axis], axis),
        mask_boxes=_flip_boxes(sample.mask_boxes, sample.image.shape[axis], axis),
        mask_bits=_flip_bits(sample, axis),
    )


def _flip_pixels(image: UInt8Array, axis: int) -> UInt8Array:
    """A copy; to copy a view of NumPy's that is mirrored left to right takes four times as long as Pillow does."""
    if axis == 0:
        return np.ascontiguousarray(image[::-1])
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))


def _flip_boxes(boxes: npt.NDArray[np.float32], length: int, axis: int) -> npt.NDArray[np.float32]:
    low, high = (0, 2) if axis == 1 else (1, 3)
    flipped = boxes.copy()
    flipped[:, low], flipped[:, high] = length - boxes[:, high], length - boxes[:, low]
    return flipped


def _flip_bits(sample: Sample, axis: int) -> UInt8Array:
    offsets = mask_offsets(sample.mask_sizes)
    flipped = [
        np.packbits(np.flip(unpack_mask(sample.mask_bits[start:end], int(height), int(width)), axis=axis))
        for start, end, (height, width) in zip(offsets[:-1], offsets[1:], sample.mask_sizes, strict=True)
    ]
    return np.concatenate(flipped) if flipped else sample.mask_bits
