"""Every image exactly once, in the rows or in the errors; the rows are what the model says of each image alone."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pycocotools.coco import COCO
from torch import Tensor

from model.mask_rcnn import MaskRCNN
from model.masks import encode_detections
from model.structures import Detections
from pipeline import prediction
from pipeline.config import ExperimentConfig
from pipeline.errors import UserError
from pipeline.inference import Predictor
from pipeline.prediction import counted, find_plan, part_settings, predict
from pipeline.prediction_inputs import Entry
from pipeline.prediction_model import load_predictor
from pipeline.prediction_parts import PartPredictor
from pipeline.prediction_pool import Part, Pool
from pipeline.prediction_schema import read_predictions
from pipeline.preprocess import decode_image
from tests.pipeline.factories import SHARED_DATA, Json, Prepared, needs_shared_data, noise, png
from tests.pipeline.small import write_small_checkpoint

pytestmark = pytest.mark.cluster


def config(**settings: Any) -> ExperimentConfig:
    """One image a pass, so that the numbers are those of the model called alone."""
    chosen = {"images_per_part": 8, "batch_size": 1, "precision": "fp32", "num_workers": 1, **settings}
    return ExperimentConfig.model_validate({"predict": chosen})


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> str:
    return str(write_small_checkpoint(folder / "checkpoint"))


@pytest.fixture(scope="module")
def predictor(checkpoint: str) -> Predictor:
    return load_predictor(config(), checkpoint, print)


def rows_of(output: Path) -> list[Json]:
    manifest = json.loads((output / "manifest.json").read_text())
    rows = list(read_predictions(str(output), [part["name"] for part in manifest["parts"]]))
    errors = pq.read_table(output / "errors.parquet")
    assert manifest["num_images"] == len(rows) + len(errors) == manifest["num_predicted"] + manifest["num_errors"]
    keys = [row["key"] for row in rows] + errors["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    return rows


def assert_equal_to_the_model(rows: list[Json], files: dict[str, bytes], predictor: Predictor) -> None:
    """Each row is what the model called directly finds: boxes to 1e-3, masks to the pixel."""
    for row in rows:
        pixels = decode_image(files[row["key"]])
        alone = predictor.predict(pixels)
        assert (row["height"], row["width"]) == pixels.shape[:2]
        np.testing.assert_allclose(np.array(row["boxes"]), alone.boxes.numpy(), rtol=0, atol=1e-3)
        np.testing.assert_allclose(row["scores"], alone.scores.numpy(), rtol=0, atol=1e-5)
        assert row["class_ids"] == alone.classes.tolist()
        assert row["class_names"] == [predictor.class_names[class_id - 1] for class_id in row["class_ids"]]
        masks = encode_detections(alone, row["height"], row["width"])
        assert row["mask_counts"] == [mask["counts"] for mask in masks]


@needs_shared_data("coco_mini", "nuclei", "nasty")
def test_odd_images(local_ray: None, predictor: Predictor, tmp_path: Path) -> None:
    """The unreadable ones are exactly those that the README of the images names."""
    nasty = SHARED_DATA / "nasty"
    told = re.findall(
        r"^\| `([^`]+)` .*must be reported as unreadable", (nasty / "README.md").read_text(), re.MULTILINE
    )
    assert len(told) == 6
    settings = config(max_error_fraction=0.25, overlays=True, cutouts=True, picture_score=0.0)
    summary = predict(settings, predictor, str(nasty), str(tmp_path), print)
    assert (summary["num_images"], summary["num_predicted"], summary["num_errors"]) == (24, 18, 6)
    errors = pq.read_table(tmp_path / "errors.parquet").to_pylist()
    assert {error["key"] for error in errors} == set(told)
    assert {error["key"] for error in errors if error["kind"] != "unreadable_image"} == {"decompression_bomb.gif"}
    rows = rows_of(tmp_path)
    assert_equal_to_the_model(rows, {path.name: path.read_bytes() for path in nasty.iterdir()}, predictor)
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {f"{row['key']}.jpg" for row in rows}
    assert len(list(tmp_path.glob("cutouts/*/*.png"))) > 100


@needs_shared_data("coco_mini", "nuclei", "nasty")
def test_coco(local_ray: None, checkpoint: str, tmp_path: Path) -> None:
    """Image ids, category ids by name, and a COCO results file that pycocotools takes."""
    content = json.loads((SHARED_DATA / "coco_mini" / "annotations" / "instances_val.json").read_text())
    content["images"] = content["images"][:30]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    annotations = tmp_path / "val.json"
    annotations.write_text(json.dumps(content))
    folder = write_small_checkpoint(tmp_path / "checkpoint", ["dog", "unicorn", "person"])
    images_folder = SHARED_DATA / "coco_mini" / "images"
    settings = config(coco_results=True, images_folder=str(images_folder))
    predictor = load_predictor(settings, str(folder), print)
    summary = predict(settings, predictor, str(annotations), str(tmp_path / "out"), print)
    assert (summary["num_images"], summary["num_errors"]) == (30, 0)
    rows = rows_of(tmp_path / "out")
    assert [(row["key"], row["image_id"]) for row in rows] == [(i["file_name"], i["id"]) for i in content["images"]]
    assert_equal_to_the_model(rows, {row["key"]: (images_folder / row["key"]).read_bytes() for row in rows}, predictor)
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    category_ids = {category["name"]: category["id"] for category in content["categories"]}
    unicorns = sum(row["class_names"].count("unicorn") for row in rows)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["coco_results"] == {"detections": len(results), "of_other_classes": unicorns}
    assert len(results) + unicorns == summary["num_detections"]
    assert {result["category_id"] for result in results} <= {category_ids["dog"], category_ids["person"]}
    loaded = COCO(str(annotations)).loadRes(str(tmp_path / "out" / "coco_results.json"))
    assert len(loaded.anns) == len(results)


@needs_shared_data("coco_mini", "nuclei", "nasty")
def test_a_parquet_data_set_gives_the_rows_of_its_files(local_ray: None, predictor: Predictor, tmp_path: Path) -> None:
    names = sorted(path.name for path in (SHARED_DATA / "nuclei" / "images").iterdir())[:20]
    files = {name: (SHARED_DATA / "nuclei" / "images" / name).read_bytes() for name in names}
    table = pa.table({"bytes": [*files.values(), None], "name": [*files, "nothing"]})
    pq.write_table(table, tmp_path / "set.parquet", row_group_size=6)
    settings, said = config(key_column="name", coco_results=True), list[str]()
    predict(settings, predictor, str(tmp_path / "set.parquet"), str(tmp_path / "out"), said.append)
    assert said[-1] == "predict: 1 of 21 images could not be predicted; which, and why: errors.parquet in the output"
    loaded = COCO(str(tmp_path / "out" / "coco_images.json"))  # what the ids stand for, as there is no file of yours
    assert [image["file_name"] for image in loaded.loadImgs(loaded.getImgIds())] == names
    assert [category["name"] for category in loaded.loadCats(loaded.getCatIds())] == list(predictor.class_names)
    assert len(loaded.loadRes(str(tmp_path / "out" / "coco_results.json")).anns) > 0
    rows = rows_of(tmp_path / "out")
    assert [row["key"] for row in rows] == names
    assert_equal_to_the_model(rows, files, predictor)
    (error,) = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
    assert (error["key"], error["reason"]) == ("nothing", "has no bytes in its row")


def test_shards(local_ray: None, prepared: Prepared, predictor: Predictor, tmp_path: Path) -> None:
    """Rows of shards are predicted as they are stored; boxes are in pixels of the original images."""
    predict(config(images_per_part=3), predictor, prepared.data.validation, str(tmp_path), print)
    content = prepared.contents["validation.json"]
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    rows = rows_of(tmp_path)
    assert [row["key"] for row in rows] == [f"row-{row:09d}" for row in range(7)]
    assert {row["image_id"]: (row["height"], row["width"]) for row in rows} == sizes
    assert all(row["boxes"] for row in rows)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of noise, two of them broken."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(40):
        content = png(noise(60 + index, 90, seed=index))
        (folder / f"{index:02d}.png").write_bytes(content[:2000] if index in (5, 33) else content)
    return folder


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, predictor: Predictor, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    summary = predict(config(images_per_part=4), predictor, str(images), str(output), print)
    assert (summary["num_images"], summary["num_errors"], summary["computed_now"]) == (40, 2, 40)
    return output


def test_once_more_computes_nothing(undisturbed: Path, predictor: Predictor, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    shutil.copytree(undisturbed, output)
    before = {path.name: path.stat().st_mtime_ns for path in (output / "parts").iterdir()}
    summary = predict(config(images_per_part=4), predictor, str(images), str(output), print)
    assert summary["computed_now"] == 0
    assert {path.name: path.stat().st_mtime_ns for path in (output / "parts").iterdir()} == before
    for name in ("manifest.json", "errors.parquet"):
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()


def test_only_what_is_missing_or_damaged_is_computed(
    undisturbed: Path, predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    """And images that have come since then are not in the plan."""
    output = tmp_path / "again"
    shutil.copytree(undisturbed, output)
    parts = sorted((output / "parts").iterdir())
    parts[2].unlink()
    parts[5].write_bytes(parts[5].read_bytes()[:-100])
    (output / "parts" / "part-0000001.parquet.77.partial").write_bytes(b"half")
    (output / "manifest.json").unlink()
    summary = predict(config(images_per_part=4), predictor, str(images), str(output), print)
    assert summary["computed_now"] == 8
    assert (output / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    assert {path.name for path in (output / "parts").iterdir()} == {path.name for path in parts}


def test_few_images_are_shared_out_and_their_rows_are_the_same(
    undisturbed: Path, predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default size of a part, two processes, and then one that goes on with the plan of the two."""
    monkeypatch.setattr(prediction, "PROGRESS_SECONDS", 0.0)
    said: list[str] = []
    shared = config(images_per_part=256, num_workers=2)
    summary = predict(shared, predictor, str(images), str(tmp_path), said.append)
    assert summary["computed_now"] == 40
    assert said[:2] == [
        f"predict: 40 images of {images}, in 5 parts to {tmp_path}",
        "predict: 2 processes with the model (CPU, 1 thread each)",
    ]
    assert len([line for line in said if " of 40 images  " in line]) == 5
    ours, theirs = ([{**row, "config_digest": ""} for row in rows_of(path)] for path in (tmp_path, undisturbed))
    assert ours == theirs
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == 5
    parts[1].unlink()
    said.clear()
    one = config(images_per_part=256, num_workers=1)
    assert predict(one, predictor, str(images), str(tmp_path), said.append)["computed_now"] == 8
    assert said[:3] == [
        f"predict: going on with the plan in {tmp_path}: 40 images in 5 parts",
        "predict: there already: 4 of 5 parts",
        "predict: 1 process with the model (CPU, 1 thread each)",
    ]
    assert "40 of 40 images  2 errors" in said[3]


@pytest.mark.parametrize(
    ("number", "name", "expected"), [(0, "error", "0 errors"), (1, "part", "1 part"), (2, "process", "2 processes")]
)
def test_plurals(number: int, name: str, expected: str) -> None:
    assert counted(number, name) == expected


def test_other_settings_are_refused(undisturbed: Path, predictor: Predictor, images: Path) -> None:
    with pytest.raises(UserError, match=r"was begun otherwise: settings.predict.batch_size 1 -> 2\."):
        predict(config(images_per_part=4, batch_size=2), predictor, str(images), str(undisturbed), print)


def test_too_many_errors_stop_the_job_and_a_larger_budget_goes_on(
    undisturbed: Path, predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    little = config(images_per_part=4, max_error_fraction=0.02)
    with pytest.raises(UserError) as stopped:
        predict(little, predictor, str(images), str(tmp_path), print)
    text = str(stopped.value)
    assert re.match(
        r"stopped: [12] of 40 images failed \([12] unreadable_image\), more than predict.max_error_fra", text
    )
    assert len(pq.read_table(tmp_path / "errors.parquet")) in (1, 2)
    assert not (tmp_path / "manifest.json").exists()
    predict(config(images_per_part=4), predictor, str(images), str(tmp_path), print)
    assert (tmp_path / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()


def test_a_lost_process_loses_nothing(
    undisturbed: Path, predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of one of the two processes with the model, twice."""
    killed: list[int] = []

    class Dying(Pool):
        def predict(self, parts: Any) -> Any:
            for summary in super().predict(parts):
                there = [process for process in self.process_ids.values() if process not in killed]
                if len(killed) < 2 and there:
                    killed.append(there[0])
                    os.kill(killed[-1], signal.SIGKILL)
                yield summary

    monkeypatch.setattr(prediction, "Pool", Dying)
    said: list[str] = []
    two = config(images_per_part=4, num_workers=2)
    summary = predict(two, predictor, str(images), str(tmp_path), said.append)
    assert summary["computed_now"] == 40
    assert len(set(killed)) == 2
    assert any("it is tried again" in line for line in said)
    assert (tmp_path / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()


class DeadlyEntry(Entry):
    """Kills the process that decodes it."""

    def __getattribute__(self, name: str) -> Any:
        if name == "height" and os.environ.get("PREDICTION_TEST_DRIVER") != str(os.getpid()):
            os._exit(1)
        return super().__getattribute__(name)


class Fussy(MaskRCNN):
    """Fails on pictures that are all white."""

    def detect(self, images: Tensor, image_sizes: Tensor) -> list[Detections]:
        for image, (height, width) in zip(images, image_sizes.tolist(), strict=True):
            if (image[:, :height, :width] == 255).all():
                raise RuntimeError("too white")
        return super().detect(images, image_sizes)


def test_crashes_and_failures_of_the_model_are_errors_of_their_image(
    local_ray: None, predictor: Predictor, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREDICTION_TEST_DRIVER", str(os.getpid()))
    model = Fussy(predictor.model.config, 4)
    model.load_state_dict(predictor.model.state_dict())
    fussy = Predictor(model.eval(), predictor.class_names, predictor.viewing, "fp32")
    white = tmp_path / "white.png"
    white.write_bytes(png(np.full((64, 64, 3), 255, dtype=np.uint8)))
    entries = [Entry(f"{index:02d}.png", str(images / f"{index:02d}.png")) for index in range(3)]
    entries[1:1] = [DeadlyEntry("deadly", str(images / "00.png")), Entry("white", str(white))]
    settings = config(batch_size=4)
    plan = find_plan(settings, fussy, str(images), str(tmp_path / "out"), print)
    part = PartPredictor(model, part_settings(settings, fussy, plan), "cpu", 1)
    summary = part.predict_part(0, entries)
    assert [(error.key, error.kind) for error in summary.errors] == [
        ("deadly", "decoder_crash"), ("white", "model_error"),
    ]  # fmt: skip
    assert "too white" in summary.errors[1].reason
    rows = list(read_predictions(str(tmp_path / "out"), [summary.name]))
    assert [row["key"] for row in rows] == ["00.png", "01.png", "02.png"]


def test_a_process_that_never_starts_ends_the_job(
    local_ray: None, predictor: Predictor, images: Path, tmp_path: Path
) -> None:
    from dataclasses import replace

    from pipeline.cluster import Placement

    settings = config(max_failures=1)
    plan = find_plan(settings, predictor, str(images), str(tmp_path), print)
    broken = replace(part_settings(settings, predictor, plan), precision="no such type")
    placement = Placement(False, {"CPU": 1.0}, 1.0)
    with (
        pytest.raises(UserError, match="the start of a process with the model failed 2 times"),
        Pool(predictor.model, broken, placement, 1, 1, print) as pool,
    ):
        list(pool.predict([Part(0, plan.parts[0])]))


def test_tiles_and_augmentation_in_the_job_are_those_in_python(
    local_ray: None, checkpoint: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    content = png(noise(150, 260, seed=3))
    (tmp_path / "images" / "large.png").write_bytes(content)
    settings = config(tiling={"size": 128, "overlap": 0.25}, flip=True, scales=[1.0, 1.25], batch_size=4)
    predictor = load_predictor(settings, checkpoint, print)
    predict(settings, predictor, str(tmp_path / "images"), str(tmp_path / "out"), print)
    (row,) = rows_of(tmp_path / "out")
    alone = predictor.predict(decode_image(content))
    assert len(alone) > 10  # more than one tile finds
    torch.testing.assert_close(torch.tensor(row["boxes"]), alone.boxes, rtol=0, atol=1e-2)
