"""Predictions as COCO results JSON, which other tools evaluate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import storage
from pipeline.prediction_plan import Plan
from pipeline.prediction_schema import read_predictions, rle

RESULTS_FILE, IDS_FILE = "coco_results.json", "coco_images.json"


def write_coco_results(plan: Plan, parts: Sequence[str], class_names: Sequence[str]) -> dict[str, int]:
    """Write all detections of all parts; one part at a time is in memory.

    Image ids are those of the COCO file or shards that the images came from, else the image's number in the plan, from
    0 on. Category ids are those of the COCO file, by class name; without one they are our class ids. Where neither COCO
    file nor shards say it, IDS_FILE does in COCO's form: which images and categories the ids stand for.

    Args:
        plan: of the prediction.
        parts: names of all its files.
        class_names: of the model.

    Returns:
        How many detections were written, and how many are of classes that the COCO file does not have.
    """
    counts = {"detections": 0, "of_other_classes": 0}

    def pieces() -> Iterator[bytes]:
        yield b"["
        for row in numbered(plan, parts):
            for result in row_results(row, plan.categories):
                if result["category_id"] is None:
                    counts["of_other_classes"] += 1
                    continue
                mark = b",\n" if counts["detections"] else b"\n"
                counts["detections"] += 1
                yield mark + json.dumps(result).encode()
        yield b"\n]\n"

    storage.write_pieces(storage.join(plan.output, RESULTS_FILE), pieces())
    if plan.categories is None and plan.kind != "shards":
        storage.write_pieces(storage.join(plan.output, IDS_FILE), _ids(plan, parts, class_names))
    return counts


def _ids(plan: Plan, parts: Sequence[str], class_names: Sequence[str]) -> Iterator[bytes]:
    """Images and categories as an annotation file lists them, for those who evaluate or show the results elsewhere."""
    categories = [{"id": class_id, "name": name} for class_id, name in enumerate(class_names, start=1)]
    yield b'{"categories": ' + json.dumps(categories).encode() + b', "annotations": [], "images": ['
    for number, row in enumerate(numbered(plan, parts, ("key", "image_id", "height", "width"))):
        image = {"id": row["image_id"], "file_name": row["key"], "height": row["height"], "width": row["width"]}
        yield (b",\n" if number else b"\n") + json.dumps(image).encode()
    yield b"\n]}\n"


def numbered(plan: Plan, parts: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows whose image_id is the image's number in the plan where they have none."""
    number = {}
    if plan.kind != "shards" and any(entry.image_id is None for part in plan.parts for entry in part):
        number = {entry.key: index for index, entry in enumerate(entry for part in plan.parts for entry in part)}
    for row in read_predictions(plan.output, parts, columns):
        yield row if row["image_id"] is not None else {**row, "image_id": number[row["key"]]}


def row_results(row: dict[str, Any], categories: dict[str, int] | None) -> Iterator[dict[str, Any]]:
    """Detections of one row; the category id is None for a class that is none of the categories."""
    for index, ((x0, y0, x1, y1), score) in enumerate(zip(row["boxes"], row["scores"], strict=True)):
        name, class_id = row["class_names"][index], row["class_ids"][index]
        yield {
            "image_id": row["image_id"],
            "category_id": class_id if categories is None else categories.get(name),
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": score,
            "segmentation": rle(row, index),
        }
