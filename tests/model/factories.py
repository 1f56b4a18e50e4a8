"""Small batches and configurations that the tests of the model share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.config import (
    AnchorConfig,
    BackboneConfig,
    BoxHeadConfig,
    DetectionConfig,
    FpnConfig,
    MaskHeadConfig,
    ModelConfig,
    NormKind,
    RoiConfig,
    RpnConfig,
)
from model.structures import Batch

Bitmap = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Thing:
    """An object: its bitmap has the size of the original image."""

    bitmap: Bitmap
    class_id: int = 1
    is_crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """An image in input pixels, with objects in original pixels."""

    image: Tensor  # (3, h, w) uint8
    things: tuple[Thing, ...] = ()
    key: int = 7
    active: tuple[int, ...] | None = None  # None: all classes


def rectangle(box: tuple[int, int, int, int], height: int, width: int) -> Bitmap:
    """Bitmap of an xyxy box."""
    bitmap = np.zeros((height, width), dtype=bool)
    bitmap[box[1] : box[3], box[0] : box[2]] = True
    return bitmap


def ellipse(box: tuple[int, int, int, int], height: int, width: int) -> Bitmap:
    """Bitmap of the ellipse inside an xyxy box."""
    y, x = np.mgrid[:height, :width] + 0.5
    u = (x - (box[0] + box[2]) / 2) / ((box[2] - box[0]) / 2)
    v = (y - (box[1] + box[3]) / 2) / ((box[3] - box[1]) / 2)
    return np.asarray(u**2 + v**2 <= 1)


def tight_box(bitmap: Bitmap) -> tuple[int, int, int, int]:
    """Smallest xyxy box around the set pixels."""
    rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def noise_image(height: int, width: int, seed: int = 0) -> Tensor:
    """Dim noise, (3, height, width) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 60, (3, height, width), dtype=torch.uint8, generator=generator)


def painted_scene(things: Sequence[Thing], height: int = 64, width: int = 64, key: int = 7) -> Scene:
    """Scene at scale 1 in which each class has its own colour."""
    image = noise_image(height, width, seed=key)
    for thing in things:
        image[(thing.class_id - 1) % 3, torch.from_numpy(thing.bitmap)] = 250
    return Scene(image, tuple(things), key)


def make_batch(scenes: Sequence[Scene], slots: int = 4, num_classes: int = 3, canvas: int = 64) -> Batch:
    """Put scenes onto a square canvas, and their objects into padded slots."""
    num = len(scenes)
    images = torch.zeros(num, 3, canvas, canvas, dtype=torch.uint8)
    image_sizes = torch.zeros(num, 2, dtype=torch.int64)
    boxes = torch.zeros(num, slots, 4)
    classes = torch.zeros(num, slots, dtype=torch.int64)
    is_crowd = torch.zeros(num, slots, dtype=torch.bool)
    mask_sizes = torch.zeros(num, slots, 2, dtype=torch.int64)
    mask_offsets = torch.zeros(num, slots, dtype=torch.int64)
    active = torch.zeros(num, num_classes, dtype=torch.bool)
    bits: list[npt.NDArray[np.uint8]] = []
    for b, scene in enumerate(scenes):
        height, width = scene.image.shape[1:]
        images[b, :, :height, :width] = scene.image
        image_sizes[b] = torch.tensor([height, width])
        active[b, list(range(num_classes)) if scene.active is None else list(scene.active)] = True
        for g, thing in enumerate(scene.things):
            original_height, original_width = thing.bitmap.shape
            x0, y0, x1, y1 = tight_box(thing.bitmap)
            scale = torch.tensor([width / original_width, height / original_height] * 2)
            boxes[b, g] = torch.tensor([x0, y0, x1, y1]) * scale
            classes[b, g] = thing.class_id
            is_crowd[b, g] = thing.is_crowd
            mask_sizes[b, g] = torch.tensor([y1 - y0, x1 - x0])
            mask_offsets[b, g] = sum(len(part) for part in bits)
            bits.append(np.packbits(thing.bitmap[y0:y1, x0:x1]))
    mask_bits = torch.from_numpy(np.concatenate(bits)) if bits else torch.zeros(0, dtype=torch.uint8)
    keys = torch.tensor([scene.key for scene in scenes], dtype=torch.int64)
    return Batch(
        images, image_sizes, boxes, classes, is_crowd, boxes.clone(), mask_sizes, mask_offsets, mask_bits, active, keys
    )


def box_batch(
    boxes: Sequence[Sequence[Sequence[float]]],
    classes: Sequence[Sequence[int]],
    is_crowd: Sequence[Sequence[bool]] | None = None,
    keys: Sequence[int] | None = None,
) -> Batch:
    """Ground truth alone, for the matching: (B, G, 4) boxes on 256 px images, without pixels and masks."""
    shape = (len(classes), len(classes[0]))
    return Batch(
        images=torch.zeros(shape[0], 3, 0, 0, dtype=torch.uint8),
        image_sizes=torch.full((shape[0], 2), 256),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(*shape, 4),
        classes=torch.tensor(classes),
        is_crowd=torch.zeros(shape, dtype=torch.bool) if is_crowd is None else torch.tensor(is_crowd),
        mask_boxes=torch.zeros(*shape, 4),
        mask_sizes=torch.zeros(*shape, 2, dtype=torch.int64),
        mask_offsets=torch.zeros(shape, dtype=torch.int64),
        mask_bits=torch.zeros(0, dtype=torch.uint8),
        active_class_ids=torch.ones(shape[0], 10, dtype=torch.bool),
        random_keys=torch.arange(shape[0]) if keys is None else torch.tensor(keys, dtype=torch.int64),
    )


def take_images(batch: Batch, rows: Sequence[int]) -> Batch:
    """The batch of some of the images, in this order; mask bits are shared."""
    taken: dict[str, Tensor] = {
        f.name: getattr(batch, f.name)[list(rows)] for f in fields(batch) if f.name != "mask_bits"
    }
    return Batch(mask_bits=batch.mask_bits, **taken)


def fill_empty_slots(batch: Batch, as_crowd: bool = False) -> Batch:
    """The same batch with garbage in everything that an empty slot has but its class."""
    empty = batch.classes == 0
    changed: dict[str, Any] = {
        "boxes": torch.where(empty[..., None], torch.tensor([3.0, 5.0, 40.0, 50.0]), batch.boxes),
        "mask_boxes": torch.where(empty[..., None], torch.tensor([3.0, 5.0, 40.0, 50.0]), batch.mask_boxes),
        "is_crowd": (empty & as_crowd) | batch.is_crowd,
    }
    return replace(batch, **changed)


def tiny_config(
    backbone_norm: Literal["batch", "frozen"] = "frozen", head_norm: NormKind = "group", **changes: object
) -> ModelConfig:
    """A thin Mask R-CNN for 64 px canvases."""
    config = ModelConfig(
        backbone=BackboneConfig(depth=18, norm=backbone_norm),
        fpn=FpnConfig(channels=16),
        anchors=AnchorConfig(scales=(8, 16, 32, 48, 64)),
        rpn=RpnConfig(
            channels=16, anchors_per_image=32, pre_nms_top_k=100, proposals_training=40, proposals_inference=20
        ),
        roi=RoiConfig(rois_per_image=16, canonical_size=32),
        box_head=BoxHeadConfig(channels=32, norm=head_norm),
        mask_head=MaskHeadConfig(channels=16, num_convolutions=2, norm=head_norm),
        detections=DetectionConfig(max_per_image=10),
    )
    return config.model_copy(update=changes)


def channels_last_columns(weight: Tensor, cells: int) -> Tensor:
    """Columns in the order channel, cell of a region brought to cell, channel."""
    return torch.cat([weight[:, cell::cells] for cell in range(cells)], dim=1)
