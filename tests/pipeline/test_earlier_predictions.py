"""Predictions that were written before are evaluated as if the model had just made them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.masks import encode_detections
from pipeline.config import ExperimentConfig
from pipeline.earlier_predictions import evaluated_rows, match_keys, read_manifest
from pipeline.errors import UserError
from pipeline.evaluation_tasks import augmented_viewing, evaluate_predictions
from pipeline.prediction_schema import ERRORS_SCHEMA, PredictionError, write_part
from pipeline.shards import ShardSet
from pipeline.views import Viewing
from tests.pipeline.factories import CANVASES, CLASS_NAMES, Json, Prepared
from tests.pipeline.test_evaluation import evaluated, imperfect_detections

pytestmark = pytest.mark.cluster
# As the model may list its classes: in another order, and one that the data do not know.
MODEL_CLASSES = ("unicorn", "bird", "dog", "cat")


def write_predictions(shards: ShardSet, output: Path, kind: str, failed: int | None = None) -> None:
    """What jobs/predict.py writes, with the detections of `imperfect_detections`, in two parts."""
    rows: list[Json] = []
    errors: list[PredictionError] = []
    for values in shards.read_rows(range(len(shards))):
        key = values["file_name"] if kind == "files" else f"row-{values['row']:09d}"
        if values["row"] == failed:
            errors.append(PredictionError(key, "timeout", "too slow", "/x"))
            continue
        found = imperfect_detections(values, 4, 0)
        names = [CLASS_NAMES[class_id - 1] for class_id in found.classes.tolist()]
        masks = encode_detections(found, values["height"], values["width"])
        row: Json = {"key": key, "image_id": values["image_id"], "height": values["height"], "width": values["width"]}
        row |= {"boxes": found.boxes.tolist(), "scores": found.scores.tolist(), "class_names": names}
        row |= {"class_ids": [MODEL_CLASSES.index(name) + 1 for name in names], "model_id": "m", "config_digest": "c"}
        rows.append({**row, "mask_counts": [mask["counts"] for mask in masks]})
    parts = []
    for number, chunk in enumerate((rows[:3], rows[3:])):
        in_part = errors if number else []
        keys = [row["key"] for row in chunk] + [error.key for error in in_part]
        parts.append({"name": write_part(str(output), number, "run", keys, chunk, in_part).name})
    table = pa.Table.from_pylist([{**vars(error), "part": "x"} for error in errors], schema=ERRORS_SCHEMA)
    pq.write_table(table, output / "errors.parquet")
    (output / "manifest.json").write_text(json.dumps({"schema_version": 1, "kind": kind, "parts": parts}))


@pytest.fixture
def shards(prepared: Prepared) -> ShardSet:
    return ShardSet(prepared.data.validation)


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_rows_are_those_of_the_model(shards: ShardSet, tmp_path: Path, kind: str) -> None:
    write_predictions(shards, tmp_path, kind)
    keys = match_keys(str(tmp_path), shards, print)
    rows = evaluate_predictions(ExperimentConfig(), str(tmp_path), shards.folder, keys)
    assert rows == evaluated(shards)
    assert sum(len(row.results) for row in rows) > 5


def test_an_image_that_failed_counts_as_nothing_found(shards: ShardSet, tmp_path: Path) -> None:
    write_predictions(shards, tmp_path, "files", failed=3)
    said: list[str] = []
    keys = match_keys(str(tmp_path), shards, said.append)
    rows = evaluate_predictions(ExperimentConfig(), str(tmp_path), shards.folder, keys)
    assert rows[3].results == []
    assert rows[3].annotations == evaluated(shards)[3].annotations
    assert rows[4] == evaluated(shards)[4]
    assert len(said) == 1
    assert said[0].startswith("evaluate: 1 images could not be predicted")


def test_an_image_that_was_never_predicted_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    write_predictions(shards, tmp_path, "files")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "parts": manifest["parts"][:1]}))
    with pytest.raises(UserError, match=r"has no prediction of .* \(4 of 7 images missing\)"):
        match_keys(str(tmp_path), shards, print)


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "let jobs/predict.py finish first"), ("{", "damaged"), ('{"schema_version": 7}', "schema version 7")],
)
def test_predictions_that_cannot_be_read(tmp_path: Path, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=told):
        read_manifest(str(tmp_path))


def test_augmentation_looks_at_images_as_the_shards_hold_them(shards: ShardSet) -> None:
    def viewing(**settings: Any) -> Viewing | None:
        return augmented_viewing(ExperimentConfig.model_validate({"predict": settings}), shards)

    assert viewing() is None
    assert viewing(flip=True) == Viewing(CANVASES, flip=True)
    assert viewing(scales=[0.5, 1.0], tiling={}) == Viewing(CANVASES, scales=(0.5, 1.0))


def test_predictions_of_other_shards_are_refused(shards: ShardSet, tmp_path: Path) -> None:
    write_predictions(shards, tmp_path, "shards")
    part = json.loads((tmp_path / "manifest.json").read_text())["parts"][0]["name"]
    path = tmp_path / part
    rows = pq.ParquetFile(path).read()
    moved = rows.set_column(
        rows.schema.get_field_index("image_id"), "image_id", pa.array([i + 1 for i in rows["image_id"].to_pylist()])
    )
    pq.write_table(moved.cast(rows.schema), path)
    keys = match_keys(str(tmp_path), shards, print)
    with pytest.raises(
        UserError, match=r"row 0 is image .* there, and image .*; these predictions are of other shards"
    ):
        evaluated_rows(str(tmp_path), shards.folder, [0], keys, CLASS_NAMES)


def test_classes_that_the_data_do_not_have(shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_predictions(shards, tmp_path, "files")
    said: list[str] = []
    match_keys(str(tmp_path), shards, said.append)
    assert said == []
    names = list(shards.manifest.class_names)
    monkeypatch.setattr(shards, "manifest", replace(shards.manifest, class_names=("other", *names[1:])))
    match_keys(str(tmp_path), shards, said.append)
    assert len(said) == 1
    assert f"detections of classes that the data do not have are left out ({names[0]})" in said[0]
    monkeypatch.setattr(shards, "manifest", replace(shards.manifest, class_names=("x", "y", "z")))
    with pytest.raises(UserError, match="the validation data have none of these classes but x, y, z"):
        match_keys(str(tmp_path), shards, said.append)
