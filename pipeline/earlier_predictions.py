"""Predictions that jobs/predict.py has written, as results of an evaluation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline.errors import UserError
from pipeline.evaluation import EvaluatedRow, Json, ground_truth
from pipeline.initial_weights import Say
from pipeline.prediction_plan import ERRORS_FILE, MANIFEST_FILE
from pipeline.prediction_schema import SCHEMA_VERSION, read_plain_table, read_predictions, rle
from pipeline.shards import Manifest, ShardSet


def read_manifest(output: str) -> dict[str, Any]:
    """Manifest of predictions.

    Raises:
        UserError: there is none, or it is of another version.
    """
    path = storage.join(output, MANIFEST_FILE)
    try:
        manifest: dict[str, Any] = json.loads(storage.read_bytes(path))
        version = manifest.get("schema_version")
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; let jobs/predict.py finish first") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema version {version}, expected {SCHEMA_VERSION}")
    return manifest


def evaluated_rows(
    output: str, validation: str, rows: Sequence[int], file_names: dict[str, int], class_names: Sequence[str]
) -> list[EvaluatedRow]:
    """Ground truth of some rows with what was predicted for them before; images that failed have no results.

    Args:
        output: of the prediction, absolute path or URL.
        validation: folder of shards.
        rows: which of them.
        file_names: row by key of the predictions.
        class_names: of classes 1..C-1 of the data; predictions of other classes are left out.
    """
    shards, wanted = ShardSet(validation), set(rows)
    manifest = read_manifest(output)
    class_of = {name: index + 1 for index, name in enumerate(class_names)}
    predictions: dict[int, dict[str, Any]] = {}
    for prediction in read_predictions(output, [part["name"] for part in manifest["parts"]]):
        row = file_names.get(prediction["key"])
        if row in wanted and row is not None:
            predictions[row] = prediction
    evaluated = []
    for values in shards.read_rows(list(rows)):
        found = predictions.get(values["row"])
        if found is not None and manifest["kind"] == "shards" and found["image_id"] != values["image_id"]:
            raise UserError(
                f"{output}: row {values['row']} is image {found['image_id']} there, and image {values['image_id']} of "
                "the validation data; these predictions are of other shards"
            )
        results = [] if found is None else _results(values, found, shards.manifest, class_of)
        evaluated.append(EvaluatedRow(values["row"], values["height"], values["width"], ground_truth(values), results))
    return evaluated


def _results(
    values: dict[str, Any], prediction: dict[str, Any], manifest: Manifest, class_of: dict[str, int]
) -> list[Json]:
    """COCO results of one row; classes that its data set has not labelled are left out, as in `coco_results`."""
    if (prediction["height"], prediction["width"]) != (values["height"], values["width"]):
        raise UserError(
            f"{prediction['key']}: predicted with {prediction['width']} x {prediction['height']} pixels, "
            f"the annotations are of {values['width']} x {values['height']}"
        )
    active = set(manifest.sources[values["source"]].active_class_ids)
    results = []
    for index, ((x0, y0, x1, y1), score) in enumerate(zip(prediction["boxes"], prediction["scores"], strict=True)):
        class_id = class_of.get(prediction["class_names"][index])
        if class_id in active:
            results.append(
                {
                    "image_id": values["row"],
                    "category_id": class_id,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                    "segmentation": rle(prediction, index),
                }
            )
    return results


def match_keys(output: str, shards: ShardSet, say: Say) -> dict[str, int]:
    """Row of the shards for every key of predictions, after a look whether all of them were predicted.

    Predictions of these shards have their rows as keys, others the file names.

    Raises:
        UserError: an image was never predicted, or two share a file name.
    """
    manifest = read_manifest(output)
    if manifest["kind"] == "shards":
        keys = {f"row-{row:09d}": row for row in range(len(shards))}
    else:
        keys = {}
        for values in shards.read_rows(range(len(shards))):
            if values["file_name"] in keys:
                raise UserError(
                    f"{values['file_name']}: two images to evaluate on have this name; predict their shards"
                )
            keys[values["file_name"]] = values["row"]
    errors_path = storage.join(output, ERRORS_FILE)
    errors = read_plain_table(storage.read_bytes(errors_path), errors_path).to_pylist()
    failed = {error["key"] for error in errors}
    predicted: set[str] = set()
    detected: Counter[str] = Counter()
    for row in read_predictions(output, [part["name"] for part in manifest["parts"]], ["key", "class_names"]):
        predicted.add(row["key"])
        detected.update(row["class_names"])
    unknown = sorted(set(detected) - set(shards.manifest.class_names))
    if unknown and len(unknown) == len(detected):
        raise UserError(
            f"{output}: predicts {', '.join(unknown[:5])}, and the validation data have none of these classes but "
            f"{', '.join(shards.manifest.class_names[:5])}"
        )
    if unknown:
        number = sum(detected[name] for name in unknown)
        say(f"evaluate: {number} detections of classes that the data do not have are left out ({unknown[0]})")
    missing = [key for key in keys if key not in predicted and key not in failed]
    if missing:
        raise UserError(f"{output}: has no prediction of {missing[0]} ({len(missing)} of {len(keys)} images missing)")
    lost = sorted(failed & keys.keys())
    if lost:
        say(f"evaluate: {len(lost)} images could not be predicted ({lost[0]}); all of their objects count as missed")
    return keys
