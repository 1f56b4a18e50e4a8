"""One checked record and its image file to one row of the shards; what only the pixels can tell is found here."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.coco import Annotation, ImageRecord
from pipeline.config import AugmentSettings, DataSettings, PolicySettings
from pipeline.preprocess import (
    ImageProblem,
    ResizeMethod,
    UInt8Array,
    choose_canvas,
    decode_image,
    exif_orientation,
    pack_mask,
    rasterise,
    resize_image,
    stored_size,
)
from pipeline.problems import Problem
from pipeline.record_checks import box_problem
from pipeline.shards import row_digest

BOX_TOLERANCE = 2.0  # pixels on any side
AREA_TOLERANCE = 0.15  # of the larger of the two

MaskBox = tuple[int, int, int, int]


@dataclass(frozen=True)
class RowSettings:
    """What a row is a function of, beside its record and its image file."""

    canvases: tuple[tuple[int, int], ...]
    policies: PolicySettings
    image_format: str
    jpeg_quality: int
    short_side: int | None = None
    resize_method: ResizeMethod = "antialiased"
    largest_short_side: int | None = None
    """Of images whose size is drawn anew in every epoch, see `stored_size`."""
    largest_scale: float | None = None

    @staticmethod
    def of(data: DataSettings, augment: AugmentSettings | None = None) -> RowSettings:
        """The part of the configuration that rows depend on.

        Args:
            data: settings.
            augment: of rows to train on; None for those that are never changed.
        """
        short_sides = augment.short_side if augment else None
        scales = augment.large_scale_jitter if augment else None
        return RowSettings(
            data.canvases,
            data.policies,
            data.image_format,
            data.jpeg_quality,
            data.short_side,
            data.resize_method,
            short_sides[1] if short_sides else None,
            scales[1] if scales else None,
        )


class ImageLeftOut(Exception):  # noqa: N818 - an outcome that is collected
    """An image that cannot become a row."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


def encode_row(row: int, record: ImageRecord, settings: RowSettings) -> tuple[dict[str, Any], list[Problem]]:
    """Decode, check and resize one image and pack its masks.

    Args:
        row: number of the row.
        record: image and annotations.
        settings: canvases, policies, image format, and how large images may be drawn.

    Returns:
        Values in the order of `ROW_SCHEMA`, and what was found.

    Raises:
        ImageLeftOut: the image cannot be used, or is not to be used.
    """
    problems: list[Problem] = []
    try:
        content = storage.read_bytes(record.path)
        image = decode_image(content, record.height, record.width)
    except (ImageProblem, OSError) as error:
        kind = error.kind if isinstance(error, ImageProblem) else "unreadable_image"
        raise ImageLeftOut(_problem(kind, settings, record, f"{record.path}: {error}")) from error
    orientation = exif_orientation(content)
    if orientation != 1:
        problem = _problem("exif_orientation", settings, record, _orientation_reason(content, orientation, record))
        if problem.policy in ("error", "drop"):
            raise ImageLeftOut(problem)
        problems.append(problem)
    kept: list[Annotation] = []
    mask_boxes: list[int] = []
    mask_bits: list[bytes] = []
    for annotation in record.annotations:
        mask = rasterise(annotation.segmentation, record.height, record.width)
        box, bits = pack_mask(mask)
        checked, found = check_mask(annotation, box, int(mask.sum()), record, settings)
        problems += found
        if checked is not None:
            kept.append(checked)
            mask_boxes += box
            mask_bits.append(bits)
    if record.annotations and not kept:
        reason = f"image {record.image_id} ({record.file_name}) has no annotation that can be used"
        problem = _problem("image_without_annotations", settings, record, reason)
        if problem.policy in ("error", "drop"):
            raise ImageLeftOut(problem)
        problems.append(problem)
    canvas, image_height, image_width = choose_canvas(
        record.height, record.width, settings.canvases, settings.short_side
    )
    drawn = settings.largest_short_side, settings.largest_scale
    if drawn != (None, None):
        image_height, image_width = stored_size(record.height, record.width, settings.canvases[canvas], *drawn)
    resized = resize_image(image, image_height, image_width, settings.resize_method)
    values = {
        "row": row,
        "source": record.source,
        "image_id": record.image_id,
        "file_name": record.file_name,
        "file_sha256": hashlib.sha256(content).digest(),
        "height": record.height,
        "width": record.width,
        "canvas": canvas,
        "image_height": image_height,
        "image_width": image_width,
        "image": _encode_image(resized, settings),
        "annotation_ids": [annotation.annotation_id for annotation in kept],
        "classes": [annotation.class_id for annotation in kept],
        "is_crowd": [annotation.is_crowd for annotation in kept],
        "bboxes": [number for annotation in kept for number in annotation.bbox],
        "areas": [annotation.area for annotation in kept],
        "mask_boxes": mask_boxes,
        "mask_bits": b"".join(mask_bits),
    }
    return {**values, "digest": row_digest(values)}, problems


def check_mask(
    annotation: Annotation, mask_box: MaskBox, num_pixels: int, record: ImageRecord, settings: RowSettings
) -> tuple[Annotation | None, list[Problem]]:
    """Compare an annotation's box and area with its mask.

    Args:
        annotation: as the record has it.
        mask_box: xyxy of its mask, see `pack_mask`.
        num_pixels: that the mask covers.
        record: its image.
        settings: policies.

    Returns:
        The annotation, mended where a policy says so, or None where it is left out; and what was found.
    """
    problems: list[Problem] = []

    def note(kind: str, reason: str) -> str:
        text = f"annotation {annotation.annotation_id}: {reason}"
        problems.append(_problem(kind, settings, record, text, annotation.annotation_id))
        return problems[-1].policy

    if num_pixels == 0:
        note("empty_mask", "mask covers no pixel")
        return None, problems
    left, top, right, bottom = mask_box
    of_mask = (float(left), float(top), float(right - left), float(bottom - top))
    kind, _ = box_problem(annotation.bbox, record.height, record.width)
    if kind is not None and getattr(settings.policies, kind) == "fix":  # told already by the check of the records
        annotation = dataclasses.replace(annotation, bbox=of_mask)
    difference = _largest_difference(annotation.bbox, mask_box)
    if difference > BOX_TOLERANCE:
        policy = note("box_disagrees_with_mask", f"box and mask differ by {difference:.1f} pixels")
        if policy in ("error", "drop"):
            return None, problems
        if policy == "fix":
            annotation = dataclasses.replace(annotation, bbox=of_mask)
    area = num_pixels if annotation.area is None else annotation.area
    annotation = dataclasses.replace(annotation, area=float(area))
    if abs(area - num_pixels) > AREA_TOLERANCE * max(area, num_pixels):
        policy = note("area_disagrees_with_mask", f"area is {area:g}, the mask has {num_pixels} pixels")
        if policy in ("error", "drop"):
            return None, problems
        if policy == "fix":
            annotation = dataclasses.replace(annotation, area=float(num_pixels))
    return annotation, problems


def _largest_difference(bbox: Sequence[float], mask_box: MaskBox) -> float:
    """Pixels by which the sides of a box x, y, width, height are off another box xyxy."""
    x, y, width, height = bbox
    return max(abs(a - b) for a, b in zip((x, y, x + width, y + height), mask_box, strict=True))


def _problem(
    kind: str, settings: RowSettings, record: ImageRecord, reason: str, annotation_id: int | None = None
) -> Problem:
    level = "image" if annotation_id is None else "annotation"
    policy: str = getattr(settings.policies, kind)
    return Problem(
        kind, policy, level, record.source, reason, record.image_id, annotation_id, record.file_name  # type: ignore[arg-type]
    )  # fmt: skip


def _orientation_reason(content: bytes, orientation: int, record: ImageRecord) -> str:
    with Image.open(io.BytesIO(content)) as image:
        stored = image.size
    turned = stored[::-1] if orientation >= 5 else stored
    given = (record.width, record.height)
    if given == turned == stored:
        how = "it is turned; its size does not tell whether the annotations were made before or after"
    elif given == turned:
        how = "it is turned, as its annotations have it"
    else:
        how = "it is not turned: its annotations were made on the stored pixels"
    return f"image {record.image_id}: {record.file_name} has EXIF orientation {orientation}; {how}"


def _encode_image(image: UInt8Array, settings: RowSettings) -> bytes:
    if settings.image_format == "raw":
        return np.ascontiguousarray(image).tobytes()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=settings.jpeg_quality)
    return buffer.getvalue()
