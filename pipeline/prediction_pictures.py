"""Pictures of what was predicted: images with their detections, and objects cut out."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.prediction_decoding import read_original
from pipeline.prediction_inputs import Entry, Kind, read_column
from pipeline.prediction_schema import rle
from pipeline.preprocess import UInt8Array
from pipeline.record_checks import leaves_folder
from pipeline.report import draw_objects

OVERLAYS, CUTOUTS = "overlays", "cutouts"
LONGEST_NAME = 180
"""Of a name in letters, so that with its suffix and while it is written it stays below the 255 of file systems."""


@dataclass(frozen=True)
class PictureSettings:
    """Which pictures are wanted; see `PredictSettings`."""

    overlays: bool
    cutouts: bool
    score: float

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.overlays or self.cutouts


def write_pictures(
    output: str, entry: Entry, row: Mapping[str, Any], kind: Kind, bytes_column: str, settings: PictureSettings
) -> None:
    """Write the pictures of one image; the same again gives the same files.

    Args:
        output: absolute path or URL.
        entry: the image, which is read again.
        row: its results.
        kind: how the entry is read.
        bytes_column: of a table.
        settings: which pictures.
    """
    content = read_column(entry.path, bytes_column, entry.row, entry.row + 1)[0] if kind == "table" else None
    image = read_original(entry, content, kind)
    name = picture_name(entry.key)
    if settings.overlays:
        storage.write_bytes(storage.join(output, f"{OVERLAYS}/{name}.jpg"), overlay(image, row, settings.score))
    if settings.cutouts:
        for label, picture in cut_out(image, row, settings.score):
            storage.write_bytes(storage.join(output, f"{CUTOUTS}/{name}/{label}.png"), picture)


def picture_name(key: str) -> str:
    """A key as a path below a folder; one that would leave it becomes a single plain name, a long one is cut."""
    parts = [key] if leaves_folder(key) or key.startswith(".") else key.split("/")
    return "/".join(_plain_name(part) for part in parts)


def _plain_name(part: str) -> str:
    name = quote(part, safe="")
    if not name.strip("."):  # "." and ".." are folders
        return name.replace(".", "%2E")
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(part.encode()).hexdigest()[:16]}"


def _shown(row: Mapping[str, Any], score: float) -> list[int]:
    return [index for index, value in enumerate(row["scores"]) if value >= score]


def _masks(row: Mapping[str, Any], shown: list[int]) -> Iterator[Any]:
    """One at a time: a hundred masks of a large image would not fit into memory."""
    from pycocotools import mask as coco_mask

    for index in shown:
        yield np.asarray(coco_mask.decode(rle(row, index)), dtype=bool)


def overlay(image: UInt8Array, row: Mapping[str, Any], score: float) -> bytes:
    """A JPEG file of the image with its detections from this score on."""
    shown = _shown(row, score)
    boxes = np.array([row["boxes"][index] for index in shown], dtype=np.float32).reshape(-1, 4)
    labels = [f"{row['class_names'][index]} {row['scores'][index]:.2f}" for index in shown]
    buffer = io.BytesIO()
    colours = [row["class_ids"][index] for index in shown]
    draw_objects(image, _masks(row, shown), boxes, labels, colours).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def cut_out(image: UInt8Array, row: Mapping[str, Any], score: float) -> list[tuple[str, bytes]]:
    """Name and PNG file of every object from this score on: its box, transparent outside its mask."""
    from pycocotools import mask as coco_mask

    pictures = []
    for index in _shown(row, score):
        mask = np.asarray(coco_mask.decode(rle(row, index)), dtype=np.uint8)
        left, top, width, height = (int(number) for number in coco_mask.toBbox(rle(row, index)))
        if width == 0 or height == 0:
            continue
        part = (slice(top, top + height), slice(left, left + width))
        picture = Image.fromarray(np.dstack([image[part], mask[part] * np.uint8(255)]))
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        label = f"{index:03d}-{quote(row['class_names'][index], safe='')}-{row['scores'][index]:.2f}"
        pictures.append((label, buffer.getvalue()))
    return pictures
