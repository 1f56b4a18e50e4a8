"""Random changes of a sample: functions of the random generator that the plan gives it, so the same anywhere.

Masks stay in original resolution and exact; boxes move with the pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from pipeline.config import AugmentSettings
from pipeline.preprocess import UInt8Array, unpack_mask
from pipeline.sample import Sample, mask_offsets


def augment(sample: Sample, settings: AugmentSettings, rng: np.random.Generator) -> Sample:
    """Apply the configured changes; the number of draws never depends on the sample."""
    draws = rng.random(2)
    if draws[0] < settings.horizontal_flip:
        sample = flip(sample, axis=1)
    if draws[1] < settings.vertical_flip:
        sample = flip(sample, axis=0)
    return sample


def flip(sample: Sample, axis: int) -> Sample:
    """Mirror image, boxes and masks; twice is the identity.

    Args:
        sample: N may be 0.
        axis: 0 top to bottom, 1 left to right.
    """
    return dataclasses.replace(
        sample,
        image=np.flip(sample.image, axis=axis),
        boxes=_flip_boxes(sample.boxes, sample.image.shape[axis], axis),
        mask_boxes=_flip_boxes(sample.mask_boxes, sample.image.shape[axis], axis),
        mask_bits=_flip_bits(sample, axis),
    )


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
