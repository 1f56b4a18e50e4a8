"""The worst images of an evaluation: what is there on the left, what was found on the right."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.evaluation import EvaluatedRow
from pipeline.evaluation_analysis import RowVerdict
from pipeline.preprocess import UInt8Array
from pipeline.report import draw_objects, object_label
from pipeline.shards import ShardSet

NUM_PICTURES = 24
PICTURE_SIDE = 570  # pixels
_RED, _GREEN, _YELLOW = 0, 2, 3  # places in the palette of `pipeline.report`


@dataclass(frozen=True)
class GalleryEntry:
    """One image of the gallery."""

    file_name: str
    note: str
    truth: str
    """JPEG as base64: found objects green, missed ones yellow."""
    found: str
    """The same: detections from a score of 0.5 on, right ones green, wrong ones red."""


def make_gallery(
    rows: Sequence[EvaluatedRow], verdicts: Sequence[RowVerdict], shards: ShardSet, class_names: Sequence[str]
) -> list[GalleryEntry]:
    """Entries of the worst images, those with the most errors first; images without errors are left out.

    Args:
        rows: all of the evaluation, in order.
        verdicts: the worst first.
        shards: where the images are.
        class_names: of classes 1..C-1.
    """
    return [
        _entry(rows[verdict.row], verdict, shards.read_row(verdict.row), class_names)
        for verdict in verdicts[:NUM_PICTURES]
        if verdict.num_errors
    ]


def _entry(
    entry: EvaluatedRow, verdict: RowVerdict, values: dict[str, Any], class_names: Sequence[str]
) -> GalleryEntry:
    stored = values["image"].reshape(values["image_height"], values["image_width"], 3)
    image = np.asarray(Image.fromarray(stored).resize((values["width"], values["height"])))
    missed, right = set(verdict.missed), set(verdict.right)
    truth_colours = [_YELLOW if place in missed else _GREEN for place in range(len(entry.annotations))]
    shown = sorted(right | set(verdict.wrong))
    found = [entry.results[place] for place in shown]
    labels = [object_label(result["category_id"], result["score"], class_names) for result in found]
    names = [
        (object_label(a["category_id"], None, class_names) + " (crowd)" * a["iscrowd"]).strip()
        for a in entry.annotations
    ]
    note = f"{len(missed)} missed, {len(verdict.wrong)} wrong, {len(right)} right"
    return GalleryEntry(
        values["file_name"],
        note,
        _picture(image, entry.annotations, names, truth_colours),
        _picture(image, found, labels, [_GREEN if place in right else _RED for place in shown]),
    )


def _picture(
    image: UInt8Array, objects: Sequence[dict[str, Any]], labels: Sequence[str], colours: Sequence[int]
) -> str:
    from pycocotools import mask as coco_mask

    masks = np.zeros((len(objects), *image.shape[:2]), dtype=bool)
    for mask, entry in zip(masks, objects, strict=True):
        mask[:] = coco_mask.decode(entry["segmentation"])
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in objects)], dtype=np.float32)
    picture = draw_objects(image, masks, boxes.reshape(-1, 4), labels, colours, PICTURE_SIDE)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
