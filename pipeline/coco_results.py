"""Predictions as COCO results JSON, which other tools evaluate."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import storage
from pipeline.prediction_plan import Plan
from pipeline.prediction_schema import read_predictions, rle

RESULTS_FILE = "coco_results.json"


def write_coco_results(plan: Plan, parts: Sequence[str]) -> dict[str, int]:
    """Write all detections of all parts; one part at a time is in memory.

    Image ids are those of the COCO file or shards that the images came from, else the image's number in the plan, from
    0 on. Category ids are those of the COCO file, by class name; without one they are our class ids.

    Args:
        plan: of the prediction.
        parts: names of all its files.

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
    return counts


def numbered(plan: Plan, parts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows whose image_id is the image's number in the plan where they have none."""
    number = {}
    if plan.kind != "shards" and any(entry.image_id is None for part in plan.parts for entry in part):
        number = {entry.key: index for index, entry in enumerate(entry for part in plan.parts for entry in part)}
    for row in read_predictions(plan.output, parts):
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
