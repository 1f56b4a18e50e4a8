"""hotcoco against its referee, pycocotools: all twelve numbers of boxes and masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.coco_metrics import STATISTICS, coco_statistics, default_evaluator
from tests.pipeline.factories import SHARED_DATA

Json = dict[str, Any]


def rle(bitmap: np.ndarray[Any, Any]) -> Json:
    encoded = coco_mask.encode(np.asfortranarray(bitmap, dtype=np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def ellipse(rng: np.random.Generator, height: int, width: int) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[:height, :width]
    centre_y, centre_x = rng.uniform(0, height), rng.uniform(0, width)
    radius_y, radius_x = rng.uniform(1, height / 3), rng.uniform(1, width / 3)
    inside: np.ndarray[Any, Any] = ((y - centre_y) / radius_y) ** 2 + ((x - centre_x) / radius_x) ** 2 <= 1
    return inside


def imitation(annotations: list[Json], images: list[Json], categories: list[int], seed: int) -> list[Json]:
    """Results as a model would give them: objects moved, some missed, some of another class, some found twice."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    results = []
    for annotation in annotations:
        for _ in range(int(rng.integers(0, 3))):
            height, width = sizes[annotation["image_id"]]
            segmentation = annotation["segmentation"]
            if isinstance(segmentation, list):
                encoded = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
            elif isinstance(segmentation["counts"], list):
                encoded = coco_mask.frPyObjects(segmentation, height, width)
            else:
                encoded = segmentation
            bitmap = np.roll(coco_mask.decode(encoded), rng.integers(-4, 5, size=2), axis=(0, 1))
            shift = rng.normal(0, 2, size=4)
            category = annotation["category_id"] if rng.random() < 0.8 else int(rng.choice(categories))
            results.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": category,
                    "bbox": [float(value) for value in np.maximum(np.array(annotation["bbox"]) + shift, 0.5)],
                    "score": float(np.round(rng.random(), 2)),  # with ties
                    "segmentation": rle(bitmap),
                }
            )
    return results


def assert_equal(images: list[Json], categories: list[int], annotations: list[Json], results: list[Json]) -> None:
    expected = coco_statistics(images, categories, annotations, results, evaluator="pycocotools")
    found = coco_statistics(images, categories, annotations, results, evaluator="hotcoco")
    for kind in ("bbox", "segm"):
        assert tuple(expected[kind]) == STATISTICS
        for name in STATISTICS:
            assert found[kind][name] == pytest.approx(expected[kind][name], abs=1e-9), (kind, name)


@pytest.mark.parametrize(
    "path",
    [
        "coco_mini/instances_val.json",
        "nuclei/annotations/instances_val.json",
        "nuclei/annotations/instances_train.json",
    ],
)
def test_real_annotations(path: str) -> None:
    found = sorted((SHARED_DATA / path.split("/")[0]).rglob(path.split("/")[-1])) if SHARED_DATA.is_dir() else []
    if not found:
        pytest.skip(f"no {path} below {SHARED_DATA}")
    content = json.loads(Path(found[0]).read_text())
    categories = [category["id"] for category in content["categories"]]
    results = imitation(content["annotations"], content["images"], categories, seed=0)
    assert len(results) > 100
    assert_equal(content["images"], categories, content["annotations"], results)
    if "coco_mini" in path:
        assert any(annotation["iscrowd"] for annotation in content["annotations"])


def synthetic(num_images: int, per_image: int, seed: int = 0) -> tuple[list[Json], list[int], list[Json], list[Json]]:
    """Images of 40 x 48 pixels with objects of five classes, crowds among them, and imitated results."""
    rng = np.random.default_rng(seed)
    images = [{"id": index, "height": 40, "width": 48} for index in range(num_images)]
    categories = [1, 2, 3, 4, 5]
    annotations = []
    for image in images:
        for _ in range(int(rng.integers(0, per_image))):
            bitmap = ellipse(rng, 40, 48)
            if not bitmap.any():
                continue
            encoded = rle(bitmap)
            annotations.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.choice(categories)),
                    "bbox": coco_mask.toBbox(encoded).tolist(),
                    "area": float(bitmap.sum()) * 40,  # of all size classes
                    "iscrowd": int(rng.random() < 0.05),
                    "segmentation": encoded,
                }
            )
    return images, categories, annotations, imitation(annotations, images, categories, seed + 1)


def test_five_thousand_images() -> None:
    assert_equal(*synthetic(5000, 4))


def test_nothing_found_and_nothing_there() -> None:
    images, categories, annotations, results = synthetic(6, 5)
    assert_equal(images, categories, annotations, [])
    assert_equal(images, categories, [], results)
    assert_equal(images, categories, [], [])
    empty = coco_statistics(images, categories, [], [])
    assert set(empty["bbox"].values()) == {-1.0}


def test_ground_truth_against_itself_is_perfect() -> None:
    images, categories, annotations, _ = synthetic(20, 5)
    results = [{**annotation, "score": 0.9} for annotation in annotations if not annotation["iscrowd"]]
    for statistics in coco_statistics(images, categories, annotations, results).values():
        assert statistics["AP"] == pytest.approx(1.0)


def test_pycocotools_steps_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_evaluator() == "hotcoco"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_evaluator() == "pycocotools"
