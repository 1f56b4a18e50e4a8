"""A training sample: one row of the shards in input pixels, and its way into Arrow; knows no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.preprocess import UInt8Array, minimise_mask, num_mask_bytes, unpack_mask

SAMPLE_SCHEMA = pa.schema(
    [
        ("position", pa.int64()),
        ("row", pa.int64()),
        ("random_key", pa.int64()),
        ("source", pa.int32()),
        ("canvas_height", pa.int32()),
        ("canvas_width", pa.int32()),
        ("image_height", pa.int32()),
        ("image_width", pa.int32()),
        ("image", pa.large_binary()),
        ("classes", pa.list_(pa.int32())),
        ("is_crowd", pa.list_(pa.bool_())),
        ("boxes", pa.list_(pa.float32())),
        ("mask_boxes", pa.list_(pa.float32())),
        ("mask_sizes", pa.list_(pa.int32())),
        ("mask_bits", pa.large_binary()),
    ]
)


@dataclass(frozen=True)
class Sample:
    """One image with its objects; N may be 0. Boxes are xyxy in input pixels."""

    image: UInt8Array
    """(h, w, 3)."""
    classes: npt.NDArray[np.int32]
    """(N,) 1..C-1."""
    is_crowd: npt.NDArray[np.bool_]
    """(N,)."""
    boxes: npt.NDArray[np.float32]
    """(N, 4)."""
    mask_boxes: npt.NDArray[np.float32]
    """(N, 4) what the mask bits cover."""
    mask_sizes: npt.NDArray[np.int32]
    """(N, 2) rows and columns of mask bits, original resolution."""
    mask_bits: UInt8Array
    """Bits of all masks, each from a new byte on."""


def sample_from_row(values: Mapping[str, Any]) -> Sample:
    """A row of the shards in input pixels, nothing changed."""
    height, width = values["image_height"], values["image_width"]
    scale = np.array([width / values["width"], height / values["height"]] * 2)
    bboxes = values["bboxes"].reshape(-1, 4)
    boxes = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1) * scale
    boxes = np.clip(boxes, 0, [width, height, width, height])
    mask_boxes = values["mask_boxes"].reshape(-1, 4)
    return Sample(
        image=values["image"].reshape(height, width, 3),
        classes=values["classes"],
        is_crowd=values["is_crowd"].astype(bool),
        boxes=boxes.astype(np.float32),
        mask_boxes=(mask_boxes * scale).astype(np.float32),
        mask_sizes=np.stack([mask_boxes[:, 3] - mask_boxes[:, 1], mask_boxes[:, 2] - mask_boxes[:, 0]], axis=1),
        mask_bits=values["mask_bits"],
    )


def mask_offsets(mask_sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """(N + 1,) first byte of every mask, and the end of the last."""
    sizes = [num_mask_bytes(int(height), int(width)) for height, width in mask_sizes.reshape(-1, 2)]
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def unpack_row_masks(values: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int, int, int], npt.NDArray[np.bool_]]]:
    """For each object of a row of the shards its mask box xyxy in original pixels and the (h, w) mask inside of it."""
    offset = 0
    for left, top, right, bottom in values["mask_boxes"].reshape(-1, 4).tolist():
        end = offset + num_mask_bytes(bottom - top, right - left)
        yield (left, top, right, bottom), unpack_mask(values["mask_bits"][offset:end], bottom - top, right - left)
        offset = end


def sample_to_values(sample: Sample) -> dict[str, Any]:
    """The sample's part of a row of `SAMPLE_SCHEMA`."""
    return {
        "image_height": sample.image.shape[0],
        "image_width": sample.image.shape[1],
        "image": sample.image.tobytes(),
        "classes": sample.classes,
        "is_crowd": sample.is_crowd,
        "boxes": sample.boxes.ravel(),
        "mask_boxes": sample.mask_boxes.ravel(),
        "mask_sizes": sample.mask_sizes.ravel(),
        "mask_bits": sample.mask_bits.tobytes(),
    }


def with_mini_masks(sample: Sample, size: int) -> Sample:
    """The sample with every mask reduced to a square of so many pixels inside its box, as the original does."""
    masks = [
        minimise_mask(unpack_mask(bits, int(height), int(width)), size)
        for bits, (height, width) in zip(
            np.split(sample.mask_bits, mask_offsets(sample.mask_sizes)[1:-1]), sample.mask_sizes, strict=False
        )
    ]
    return dataclasses.replace(
        sample,
        mask_sizes=np.full_like(sample.mask_sizes, size),
        mask_bits=np.concatenate([np.packbits(mask) for mask in masks]) if masks else sample.mask_bits,
    )
