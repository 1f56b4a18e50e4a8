import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.structures import Detections
from pipeline.coco import classes_of_source, read_coco_file, unite_classes
from pipeline.config import CocoSource, PolicySettings
from pipeline.evaluation import (
    AP_METRICS,
    EvaluatedRow,
    average_precision,
    coco_average_precision,
    coco_results,
    evaluate_rows,
    ground_truth,
    predict_rows,
    rows_of_worker,
)
from pipeline.preprocess import rasterise
from pipeline.record_checks import check_records
from pipeline.shard_writer import Contents, write_shards
from pipeline.shards import ShardSet, Source
from tests.pipeline.factories import CANVASES, SHARED_DATA, Json, Prepared, needs_shared_data, row_settings, thin_model

COCO_MINI = SHARED_DATA / "coco_mini"


def imperfect_detections(values: Json, num_classes: int, seed: int) -> Detections:
    """What a fair model might find: most objects a little off, some twice, some of a wrong class, some invented."""
    rng = np.random.default_rng([seed, values["row"]])
    boxes, classes, masks = [], [], []
    for annotation in ground_truth(values):
        for _ in range(int(rng.choice(3, p=[0.15, 0.7, 0.15]))):
            x, y, width, height = annotation["bbox"]
            shift = rng.normal(0, 0.07, size=4) * [width, height, width, height]
            box = np.array([x, y, x + width, y + height]) + shift
            if box[2] - box[0] < 1 or box[3] - box[1] < 1:
                continue
            boxes.append(box)
            classes.append(annotation["category_id"] if rng.random() < 0.85 else int(rng.integers(1, num_classes)))
            bitmap = coco_mask.decode(annotation["segmentation"])
            left, top = int(x), int(y)
            crop = bitmap[top : max(top + 1, int(np.ceil(y + height))), left : max(left + 1, int(np.ceil(x + width)))]
            cells = F.interpolate(torch.from_numpy(crop.copy())[None, None].float(), size=(28, 28), mode="bilinear")
            masks.append(cells[0, 0] * 0.8 + 0.2 * float(rng.random()))
    if rng.random() < 0.3:
        boxes.append(np.array([1, 2, 0.6 * values["width"], 0.7 * values["height"]]))
        classes.append(int(rng.integers(1, num_classes)))
        masks.append(torch.ones(28, 28))
    if not boxes:
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 28, 28))
    scores = np.sort(rng.random(len(boxes)).round(2))[::-1].copy()  # with equal ones
    return Detections(
        torch.tensor(np.array(boxes), dtype=torch.float32),
        torch.from_numpy(scores).float(),
        torch.tensor(classes),
        torch.stack(masks),
    )


def evaluated(shards: ShardSet, seed: int = 0) -> list[EvaluatedRow]:
    rows = []
    for values in shards.read_rows(range(len(shards))):
        detections = imperfect_detections(values, shards.manifest.num_classes, seed)
        results = coco_results(values, detections, shards.manifest)
        rows.append(EvaluatedRow(values["row"], values["height"], values["width"], ground_truth(values), results))
    return rows


def in_file_terms(rows: list[EvaluatedRow], shards: ShardSet) -> list[Json]:
    """Results with the image and category ids of the annotation file (a single source)."""
    source = shards.manifest.sources[0]
    category_of_class = dict(zip(source.active_class_ids, source.category_ids, strict=True))
    image_ids = [values["image_id"] for values in shards.read_rows(range(len(shards)))]
    return [
        {
            **result,
            "image_id": image_ids[result["image_id"]],
            "category_id": category_of_class[result["category_id"]],
        }
        for row in rows
        for result in row.results
    ]


def reference(annotations: Path, results: Path) -> dict[str, float]:
    """pycocotools on two JSON files, as its documentation does it."""
    truth = COCO(str(annotations))
    found = truth.loadRes(str(results))
    numbers = []
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, found, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        numbers += evaluation.stats[:6].tolist()
    return dict(zip(AP_METRICS, numbers, strict=True))


def assert_same_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert list(found) == list(AP_METRICS)
    np.testing.assert_allclose(list(found.values()), [expected[name] for name in AP_METRICS], rtol=0, atol=1e-12)


def test_names_of_the_metrics() -> None:
    assert AP_METRICS[:3] == ("bbox_AP", "bbox_AP50", "bbox_AP75")
    assert AP_METRICS[6:] == (
        "segm_AP",
        "segm_AP50",
        "segm_AP75",
        "segm_AP_small",
        "segm_AP_medium",
        "segm_AP_large",
    )


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 4, 7])
def test_workers_together_see_every_row_once(num_rows: int, num_workers: int) -> None:
    rows = [row for worker in range(num_workers) for row in rows_of_worker(num_rows, worker, num_workers)]
    assert sorted(rows) == list(range(num_rows))


def square(left: int, size: int = 10) -> Json:
    bitmap = np.zeros((100, 100), dtype=np.uint8, order="F")
    bitmap[20 : 20 + size, left : left + size] = 1
    return {"bbox": [left, 20, size, size], "segmentation": coco_mask.encode(bitmap)}


def test_average_precision_by_hand() -> None:
    truth = [
        {"image_id": 0, "category_id": 1, "area": 100, "iscrowd": 0, **square(0)},
        {"image_id": 0, "category_id": 1, "area": 100, "iscrowd": 0, **square(50)},
    ]
    found = [
        {"image_id": 0, "category_id": 1, "score": 0.9, **square(80)},  # nothing there
        {"image_id": 0, "category_id": 1, "score": 0.8, **square(0)},  # exact
    ]
    images = [{"id": 0, "height": 100, "width": 100}]
    # One of two objects found, as the second detection: precision 1/2 up to recall 1/2, at 51 of 101 recalls.
    metrics = coco_average_precision(images, [1], truth, found)
    expected = 0.5 * 51 / 101
    np.testing.assert_allclose([metrics[f"{kind}_{n}"] for kind in ("bbox", "segm") for n in ("AP", "AP50")], expected)
    np.testing.assert_allclose(metrics["segm_AP_small"], expected)
    assert metrics["bbox_AP_large"] == -1  # no such object
    # The order of the two exchanged: precision 1 up to recall 1/2.
    found[0]["score"] = 0.7
    assert coco_average_precision(images, [1], truth, found)["bbox_AP"] == pytest.approx(51 / 101)
    # A class without objects does not count, a class with objects and without detections counts as zero.
    assert coco_average_precision(images, [1, 2], truth, found)["bbox_AP"] == pytest.approx(51 / 101)
    truth.append({"image_id": 0, "category_id": 2, "area": 100, "iscrowd": 0, **square(20)})
    assert coco_average_precision(images, [1, 2], truth, found)["bbox_AP"] == pytest.approx(51 / 202)


def test_nothing_found_and_nothing_there() -> None:
    images = [{"id": 0, "height": 100, "width": 100}]
    truth = [{"image_id": 0, "category_id": 1, "area": 100, "iscrowd": 0, **square(0)}]
    found = [{"image_id": 0, "category_id": 1, "score": 0.9, **square(80)}]
    assert coco_average_precision(images, [1], truth, [])["segm_AP"] == 0
    assert coco_average_precision(images, [1], [], found)["segm_AP"] == -1
    assert set(coco_average_precision(images, [1], [], []).values()) == {-1.0}


def test_detection_on_a_crowd_is_neither_right_nor_wrong() -> None:
    images = [{"id": 0, "height": 100, "width": 100}]
    truth = [
        {"image_id": 0, "category_id": 1, "area": 100, "iscrowd": 0, **square(0)},
        {"image_id": 0, "category_id": 1, "area": 900, "iscrowd": 1, **square(50, 30)},
    ]
    found = [
        {"image_id": 0, "category_id": 1, "score": 0.9, **square(55)},  # within the crowd
        {"image_id": 0, "category_id": 1, "score": 0.8, **square(65)},  # another one
        {"image_id": 0, "category_id": 1, "score": 0.7, **square(0)},
    ]
    metrics = coco_average_precision(images, [1], truth, found)
    np.testing.assert_allclose([metrics["bbox_AP"], metrics["segm_AP"]], 1, rtol=1e-12)


def test_every_row_exactly_once_or_an_error() -> None:
    rows = [EvaluatedRow(row, 10, 10, [], []) for row in range(3)]
    assert set(average_precision(rows[::-1], 3, 2)) == set(AP_METRICS)
    with pytest.raises(RuntimeError, match=r"evaluation saw 2 rows \(2 different ones\) of 3"):
        average_precision(rows[:2], 3, 2)
    with pytest.raises(RuntimeError, match=r"evaluation saw 4 rows \(3 different ones\) of 3"):
        average_precision([*rows, rows[1]], 3, 2)
    with pytest.raises(RuntimeError, match=r"evaluation saw 3 rows \(2 different ones\) of 3"):
        average_precision([rows[0], rows[1], rows[1]], 3, 2)
    with pytest.raises(RuntimeError, match=r"evaluation saw 3 rows \(3 different ones\) of 2"):
        average_precision(rows, 2, 2)


@pytest.mark.cluster
def test_ground_truth_is_what_the_file_says(prepared: Prepared) -> None:
    shards = ShardSet(prepared.data.validation)
    content = prepared.contents["validation.json"]
    source = shards.manifest.sources[0]
    category_of_class = dict(zip(source.active_class_ids, source.category_ids, strict=True))
    visited = 0
    for values in shards.read_rows(range(len(shards))):
        annotations = [a for a in content["annotations"] if a["image_id"] == values["image_id"]]
        found = ground_truth(values)
        assert len(found) == len(annotations)
        for ours, theirs in zip(found, annotations, strict=True):
            assert category_of_class[ours["category_id"]] == theirs["category_id"]
            assert (ours["bbox"], ours["area"], ours["iscrowd"]) == (theirs["bbox"], theirs["area"], theirs["iscrowd"])
            expected = rasterise(theirs["segmentation"], values["height"], values["width"])
            np.testing.assert_array_equal(coco_mask.decode(ours["segmentation"]).astype(bool), expected)
            visited += 1
    assert visited == len(content["annotations"])


@pytest.mark.cluster
@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_are_those_of_pycocotools_on_the_files(prepared: Prepared, tmp_path: Path, seed: int) -> None:
    """Crowds, images without objects, overlapping classes and imperfect detections, through shards and class map."""
    shards = ShardSet(prepared.data.validation)
    rows = evaluated(shards, seed)
    (tmp_path / "results.json").write_text(json.dumps(in_file_terms(rows, shards)))
    expected = reference(prepared.root / "validation.json", tmp_path / "results.json")
    found = average_precision(rows[::-1], len(shards), shards.manifest.num_classes)
    assert_same_metrics(found, expected)
    for kind in ("bbox", "segm"):  # a comparison worth its name
        assert 0.05 < found[f"{kind}_AP"] < found[f"{kind}_AP50"] < 0.99


@pytest.mark.cluster
def test_classes_that_a_source_has_not_labelled_are_left_out(prepared: Prepared, tmp_path: Path) -> None:
    """The training data here: two files with different classes; the reference is one file of both."""
    shards = ShardSet(prepared.data.training)
    values = shards.read_row(0)  # of animals: cat and dog, no bird
    everything = Detections(
        torch.tensor([[1.0, 2.0, 9.0, 8.0]] * 3), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([3, 2, 1]),
        torch.ones(3, 28, 28),
    )  # fmt: skip
    results = coco_results(values, everything, shards.manifest)
    assert [(result["category_id"], result["bbox"]) for result in results] == [(2, [1, 2, 8, 6]), (1, [1, 2, 8, 6])]
    assert [result["score"] for result in results] == pytest.approx([0.8, 0.7])

    rows = evaluated(shards)
    dropped = 0
    images: list[Json] = []
    annotations: list[Json] = []
    found: list[Json] = []
    for source, name in enumerate(("animals.json", "birds.json")):
        content = prepared.contents[name]
        class_of = {c["id"]: ("cat", "dog", "bird").index(c["name"]) + 1 for c in content["categories"]}
        images += [{**image, "id": image["id"] + 1000 * source} for image in content["images"]]
        annotations += [
            {**a, "image_id": a["image_id"] + 1000 * source, "category_id": class_of[a["category_id"]]}
            for a in content["annotations"]
        ]
        for values, row in zip(shards.read_rows(range(21)), rows, strict=True):
            if values["source"] == source:
                found += [{**result, "image_id": values["image_id"] + 1000 * source} for result in row.results]
                assert {result["category_id"] for result in row.results} <= set(class_of.values())
                dropped += len(imperfect_detections(values, 4, 0)) - len(row.results)
    assert dropped > 3
    numbered = [{**annotation, "id": index + 1} for index, annotation in enumerate(annotations)]
    content = {"images": images, "annotations": numbered, "categories": [{"id": n, "name": str(n)} for n in (1, 2, 3)]}
    (tmp_path / "both.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(found))
    assert_same_metrics(average_precision(rows, 21, 4), reference(tmp_path / "both.json", tmp_path / "results.json"))


def shards_of(data: Path, split: str, folder: Path) -> ShardSet:
    """Shards of a whole annotation file of real images."""
    annotations = data / "annotations" / f"instances_{split}.json"
    file = read_coco_file(CocoSource(annotations=str(annotations)), str(data))
    class_map = unite_classes([file])
    class_of_category, active = classes_of_source(file, class_map)
    category_of_class = {class_id: category for category, class_id in class_of_category.items()}
    checked = check_records(file, 0, class_map, PolicySettings(), None)
    assert checked.quarantined == []
    source = Source(file.path, tuple(active), tuple(category_of_class[class_id] for class_id in active))
    write_shards(str(folder), checked.records, Contents(class_map.names, [source], row_settings([(256, 256)]), 32))
    return ShardSet(str(folder))


def truth_as_results(annotations: list[Json]) -> list[Json]:
    kept = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{key: a[key] for key in kept}, "score": 0.5} for a in annotations if not a["iscrowd"]]


@pytest.mark.cluster
@needs_shared_data("coco_mini")
def test_numbers_on_coco_are_those_of_pycocotools(local_ray: None, tmp_path: Path) -> None:
    annotations = COCO_MINI / "annotations" / "instances_val.json"
    shards = shards_of(COCO_MINI, "val", tmp_path / "shards")
    rows = evaluated(shards)
    assert (len(rows), sum(len(row.annotations) for row in rows)) == (91, 1002)
    assert sum(annotation["iscrowd"] for row in rows for annotation in row.annotations) == 20
    assert sum(not row.annotations for row in rows) == 2
    (tmp_path / "results.json").write_text(json.dumps(in_file_terms(rows, shards)))
    found = average_precision(rows, 91, 81)
    assert_same_metrics(found, reference(annotations, tmp_path / "results.json"))
    assert all(0.02 < value < 0.98 for value in found.values())

    itself = [
        EvaluatedRow(row.row, row.height, row.width, row.annotations, truth_as_results(row.annotations)) for row in rows
    ]
    content = json.loads(annotations.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    of_file = truth_as_results(content["annotations"])
    for result in of_file:
        result["segmentation"] = coco_mask.encode(
            np.asfortranarray(rasterise(result["segmentation"], *sizes[result["image_id"]]), dtype=np.uint8)
        )
        result["segmentation"]["counts"] = result["segmentation"]["counts"].decode()
    (tmp_path / "results.json").write_text(json.dumps(of_file))
    assert_same_metrics(average_precision(itself, 91, 81), reference(annotations, tmp_path / "results.json"))


@pytest.mark.cluster
@pytest.mark.parametrize(("split", "num_images", "num_objects"), [("train", 120, 2454), ("val", 40, 880)])
def test_ground_truth_against_itself_through_shards_is_perfect(
    local_ray: None, tmp_path: Path, split: str, num_images: int, num_objects: int
) -> None:
    if not (SHARED_DATA / "nuclei").is_dir():
        pytest.skip(f"no nuclei below {SHARED_DATA}")
    shards = shards_of(SHARED_DATA / "nuclei", split, tmp_path / "shards")
    rows = []
    for values in shards.read_rows(range(len(shards))):
        truth = ground_truth(values)
        rows.append(EvaluatedRow(values["row"], values["height"], values["width"], truth, truth_as_results(truth)))
    assert sum(len(row.results) for row in rows) == num_objects
    for name, value in average_precision(rows, num_images, 2).items():
        assert value == pytest.approx(1.0, abs=1e-9) or (name.endswith("large") and value == -1), name


class WholeImage(nn.Module):
    """Finds one object in every image: the image, with its mean as the score."""

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []

    def detect(self, images: Tensor, image_sizes: Tensor) -> list[Detections]:
        assert not self.training
        self.shapes.append(tuple(images.shape))
        found = []
        for image, (height, width) in zip(images, image_sizes.tolist(), strict=True):
            assert not image[:, height:].any()
            assert not image[:, :, width:].any()
            box = torch.tensor([[0.0, 0.0, width, height]])
            score = image[:, :height, :width].double().mean().float()[None] / 255
            found.append(Detections(box, score, torch.tensor([3]), torch.ones(1, 28, 28)))
        return found


@pytest.mark.cluster
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_every_row_is_predicted_once_whatever_the_batch(prepared: Prepared, batch_size: int) -> None:
    shards = ShardSet(prepared.data.training)
    model = WholeImage()
    found = list(predict_rows(cast(MaskRCNN, model.eval()), shards, range(21), batch_size, None))
    assert sorted(values["row"] for values, _ in found) == list(range(21))
    for values, detections in found:
        expected = torch.tensor([[0.0, 0.0, values["width"], values["height"]]])  # original pixels
        torch.testing.assert_close(detections.boxes, expected, rtol=0, atol=1e-4)
        mean = torch.tensor([values["image"].mean() / 255], dtype=torch.float32)
        torch.testing.assert_close(detections.scores, mean)  # the detections are those of this image
    canvases = np.bincount(shards.manifest.row_canvases())
    assert {shape[2:] for shape in model.shapes} == set(CANVASES)
    assert all(shape[0] <= batch_size for shape in model.shapes)
    assert len(model.shapes) == sum(-(-int(count) // batch_size) for count in canvases)


@pytest.mark.cluster
@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_in_its_mode(prepared: Prepared, training: bool) -> None:
    shards = ShardSet(prepared.data.training)
    model = WholeImage().train(training)
    rows = evaluate_rows(cast(MaskRCNN, model), shards, [3, 12, 0], 2, None)
    assert model.training is training
    assert sorted(row.row for row in rows) == [0, 3, 12]
    by_row = {row.row: row for row in rows}
    assert (by_row[0].results, by_row[3].results) == ([], [])  # class 3 is not labelled in that source
    assert [result["category_id"] for result in by_row[12].results] == [3]
    assert len(by_row[12].annotations) == len(shards.read_row(12)["classes"])


@pytest.mark.cluster
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_real_model_is_evaluated(prepared: Prepared, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    shards = ShardSet(prepared.data.validation)
    model = MaskRCNN(thin_model(), shards.manifest.num_classes)
    rows: list[EvaluatedRow] = []
    for worker in range(2):
        rows += evaluate_rows(model, shards, rows_of_worker(len(shards), worker, 2), 2, dtype)
    metrics = average_precision(rows, len(shards), shards.manifest.num_classes)
    assert list(metrics) == list(AP_METRICS)
    assert all(-1 <= value <= 1 for value in metrics.values())
    json.dumps([row.results for row in rows])  # can be sent and written as it is
    assert any(row.results for row in rows)
