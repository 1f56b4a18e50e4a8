"""What hotcoco counts, against pycocotools and against numbers worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline import evaluation_report
from pipeline.coco_metrics import STATISTICS
from pipeline.evaluation import AP_METRICS, EvaluatedRow, average_precision
from pipeline.evaluation_analysis import LvisFields, analyse
from tests.pipeline.factories import SHARED_DATA, Json, needs_shared_data
from tests.pipeline.test_evaluation import square

pytest.importorskip("hotcoco")


def row(
    number: int, truth: list[tuple[int, Json]], found: list[tuple[int, float, Json]], crowds: int = 0
) -> EvaluatedRow:
    """Objects (class, place), the last ones crowds; detections (class, score, place)."""
    annotations = [
        {"image_id": number, "category_id": c, "area": 100, "iscrowd": int(i >= len(truth) - crowds), **place}
        for i, (c, place) in enumerate(truth)
    ]
    results = [{"image_id": number, "category_id": c, "score": s, **place} for c, s, place in found]
    return EvaluatedRow(number, 100, 100, annotations, results)


ROWS = [
    row(0, [(1, square(0)), (2, square(50))], [(1, 0.9, square(0)), (1, 0.8, square(50)), (2, 0.3, square(80))]),
    row(1, [(1, square(0)), (1, square(50, 30))], [(1, 0.7, square(55)), (1, 0.6, square(2))], crowds=1),
    row(2, [], []),
    row(3, [(2, square(20))], [(2, 0.95, square(20)), (2, 0.94, square(20)), (1, 0.6, square(70))]),
]


def test_counts_by_hand() -> None:
    report, verdicts = analyse(ROWS, ("cat", "dog"))
    assert (report["num_images"], report["num_objects"], report["num_crowds"], report["num_detections"]) == (4, 4, 1, 8)
    cat, dog = report["per_class"]
    assert (cat["class"], cat["objects"], cat["crowds"], cat["detections"]) == ("cat", 2, 1, 5)
    assert (dog["class"], dog["objects"], dog["crowds"], dog["detections"]) == ("dog", 2, 0, 3)
    # Scores from 0.5 on: a dog taken for a cat, a dog found twice, a cat where nothing is, and one on a crowd.
    assert report["segm"]["confusion"]["matrix"] == [[2, 0, 0], [1, 1, 0], [2, 1, 0]]
    assert report["segm"]["confusion"]["pairs"] == [{"truth": "dog", "predicted": "cat", "count": 1}]
    counts = report["segm"]["errors"]["counts"]
    assert (counts["Cls"], counts["Dupe"], counts["Bkg"], counts["Miss"]) == (1, 1, 2, 0)
    assert sum(entry["count"] for entry in report["segm"]["calibration"]["bins"]) == 7  # that on the crowd is ignored
    by_row = {verdict.row: verdict for verdict in verdicts}
    assert [verdict.row for verdict in verdicts] == [0, 3, 1, 2]
    # The dog of the first image is missed; its cat at the dog's place is wrong; below 0.5 nothing counts.
    assert (by_row[0].missed, by_row[0].wrong, by_row[0].right) == ([1], [1], [0])
    assert (by_row[1].missed, by_row[1].wrong, by_row[1].right) == ([], [], [1])
    assert (by_row[3].missed, by_row[3].wrong, by_row[3].right) == ([], [1, 2], [0])
    assert by_row[2].num_errors == 0


def test_an_object_found_with_a_low_score_is_missed_for_those_who_look() -> None:
    _, (verdict,) = analyse([row(0, [(1, square(0))], [(1, 0.4, square(0))])], ("cat",))
    assert (verdict.missed, verdict.wrong, verdict.right) == ([0], [], [])


def test_nothing_found_and_nothing_there() -> None:
    for rows in ([row(0, [(1, square(0))], [])], [row(0, [], [])], [row(0, [], [(1, 0.9, square(0))])]):
        report, (verdict,) = analyse(rows, ("cat",))
        assert json.loads(json.dumps(report, allow_nan=False)), "no NaN, which JSON does not have"
        assert (len(verdict.missed), len(verdict.wrong), len(verdict.right)) == (
            len(rows[0].annotations), len(rows[0].results), 0,
        )  # fmt: skip


def coco_rows(seed: int = 0) -> tuple[list[EvaluatedRow], list[str], Json]:
    """The small piece of COCO with imperfect results."""
    content = json.loads((SHARED_DATA / "coco_mini" / "annotations" / "instances_val.json").read_text())
    rng = np.random.default_rng(seed)
    class_of = {category["id"]: index + 1 for index, category in enumerate(content["categories"])}
    rows = []
    for number, image in enumerate(content["images"]):
        height, width = image["height"], image["width"]
        annotations: list[Json] = []
        results: list[Json] = []
        for a in (a for a in content["annotations"] if a["image_id"] == image["id"]):
            outline = a["segmentation"]
            mask = coco_mask.frPyObjects(outline, height, width)
            rle = coco_mask.merge(mask) if isinstance(mask, list) else mask
            entry = {"image_id": number, "category_id": class_of[a["category_id"]], "segmentation": rle}
            annotations.append({**entry, "bbox": a["bbox"], "area": a["area"], "iscrowd": a["iscrowd"]})
            if rng.random() < 0.8:
                bitmap = np.roll(coco_mask.decode(rle), int(rng.integers(-4, 5)), axis=1)
                moved = coco_mask.encode(np.asfortranarray(bitmap))
                class_id = entry["category_id"] if rng.random() < 0.9 else int(rng.integers(1, 81))
                box = coco_mask.toBbox(moved).tolist()
                results.append({**entry, "category_id": class_id, "bbox": box, "segmentation": moved})
                results[-1]["score"] = float(rng.random())
        rows.append(EvaluatedRow(number, height, width, annotations, results))
    return rows, [category["name"] for category in content["categories"]], content


@needs_shared_data("coco_mini")
def test_on_coco_it_is_pycocotools_class_by_class() -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from pipeline.coco_metrics import as_datasets

    rows, names, _ = coco_rows()
    report, verdicts = analyse(rows, names)
    metrics = average_precision(rows, len(rows), len(names) + 1)
    for name in AP_METRICS:
        kind, _, statistic = name.partition("_")
        assert report[kind]["metrics"][statistic] == pytest.approx(metrics[name], abs=1e-9)
    images = [{"id": r.row, "height": r.height, "width": r.width} for r in rows]
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(names)]
    truth, found = as_datasets(
        images, categories, [a for r in rows for a in r.annotations], [a for r in rows for a in r.results]
    )
    for kind in ("bbox", "segm"):
        ground, detections = COCO(), COCO()
        for coco, dataset in ((ground, truth), (detections, found)):
            coco.dataset = dataset
            coco.createIndex()
        evaluation = COCOeval(ground, detections, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        ours = [report[kind]["metrics"][name] for name in STATISTICS]
        np.testing.assert_allclose(ours, evaluation.stats, rtol=0, atol=1e-9)
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        for index, entry in enumerate(report["per_class"]):
            of_class = precision[:, :, index]
            expected = of_class[of_class > -1].mean() if (of_class > -1).any() else -1
            assert entry[f"{kind}_AP"] == pytest.approx(expected, abs=1e-9), entry["class"]
        curve = np.array([line[line > -1].mean() for line in precision[0]])
        np.testing.assert_allclose(report[kind]["curves"]["0.5"], curve, rtol=0, atol=1e-9)
    assert len(verdicts) == 91
    assert sum(len(verdict.missed) for verdict in verdicts) > 100


def test_lvis_counts_only_what_an_image_speaks_about() -> None:
    """A class in an image that neither has it nor excludes it is left out; excluded, it counts."""
    rows = [
        row(0, [(1, square(0))], [(1, 0.9, square(0))]),
        row(1, [(2, square(0))], [(2, 0.8, square(0)), (1, 0.95, square(50))]),
    ]
    frequency = {1: "r", 2: "f"}
    silent, _ = analyse(rows, ("cat", "dog"), LvisFields({}, {}, frequency))
    assert silent["lvis"]["segm"]["AP"] == pytest.approx(1)
    assert silent["segm"]["metrics"]["AP"] == pytest.approx(0.75)  # COCO: a wrong cat before the right one
    told, _ = analyse(rows, ("cat", "dog"), LvisFields({1: [1]}, {}, frequency))
    assert told["lvis"]["segm"]["APr"] == pytest.approx(0.5)
    assert told["lvis"]["segm"]["APf"] == pytest.approx(1)
    half, _ = analyse(rows, ("cat", "dog"), LvisFields({}, {1: [1]}, frequency))
    assert half["lvis"]["segm"]["AP"] == pytest.approx(1)


class Shards:
    """What the report wants of shards: pictures, names, and where the annotations are."""

    def __init__(self, annotations: Path, content: Json, names: list[str]) -> None:
        from pipeline.shards import Manifest, Source

        ids = tuple(category["id"] for category in content["categories"])
        source = Source(str(annotations), tuple(range(1, len(ids) + 1)), ids)
        self.manifest = Manifest(tuple(names), (source,), ((64, 64),), None, "raw", (), (0, 0), "", "", "")
        self._images = content["images"]

    def __len__(self) -> int:
        return len(self._images)

    def read_row(self, number: int) -> dict[str, Any]:
        image = self._images[number]
        pixels = np.full((48, 64, 3), 90, dtype=np.uint8)
        return {
            "row": number, "source": 0, "image_id": image["id"], "file_name": image["file_name"],
            "image": pixels.ravel(), "image_height": 48, "image_width": 64,
            "height": image["height"], "width": image["width"],
        }  # fmt: skip

    def read_rows(self, rows: Any) -> Any:
        return (self.read_row(number) for number in rows)


@needs_shared_data("coco_mini")
def test_the_page_needs_no_network_and_has_its_pictures(tmp_path: Path) -> None:
    rows, names, content = coco_rows()
    annotations = tmp_path / "val.json"
    annotations.write_text(json.dumps(content))
    shards: Any = Shards(annotations, content, names)
    assert evaluation_report.lvis_fields(shards) is None
    evaluation_report.write_report(
        str(tmp_path / "report"), rows, shards, "x & <y>", None, "/runs/x & <y>/checkpoint-9"
    )
    page = (tmp_path / "report" / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "<h1>Evaluation: x &amp; &lt;y&gt;</h1>" in page
    assert '<p class="place">/runs/x &amp; &lt;y&gt;/checkpoint-9</p>' in page
    assert page.count("data:image/jpeg;base64,") == 2 * 24
    assert page.count("data:image/png;base64,") == 3
    assert "LVIS protocol" not in page  # LVIS alone may stand in a coded picture
    json.loads((tmp_path / "report" / "report.json").read_text())


@needs_shared_data("coco_mini")
def test_annotations_of_lvis_are_recognised(tmp_path: Path) -> None:
    rows, names, content = coco_rows()
    for index, category in enumerate(content["categories"]):
        category["frequency"] = "rcf"[index % 3]
    rows, content["images"] = rows[:10], content["images"][:10]
    for image in content["images"]:
        image |= {"neg_category_ids": [90], "not_exhaustive_category_ids": [1]}
    annotations = tmp_path / "lvis.json"
    annotations.write_text(json.dumps(content))
    shards: Any = Shards(annotations, content, names)
    fields = evaluation_report.lvis_fields(shards)
    assert fields is not None
    assert fields.negative[3] == [80]
    assert fields.not_exhaustive[3] == [1]
    assert [fields.frequency[class_id] for class_id in (1, 2, 3, 4)] == ["r", "c", "f", "r"]
    evaluation_report.write_report(str(tmp_path / "report"), rows, shards, "x", fields)
    assert "LVIS protocol" in (tmp_path / "report" / "report.html").read_text()


def test_detections_that_all_lie_in_a_crowd_leave_a_page(tmp_path: Path) -> None:
    content: Json = {
        "images": [{"id": 1, "file_name": "a"}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    annotations = tmp_path / "val.json"
    annotations.write_text(json.dumps(content))
    only = row(0, [(1, square(0))], [(1, 0.9, square(0))])
    only.annotations[0]["iscrowd"] = 1
    shards: Any = Shards(annotations, content, ["cat"])
    report = evaluation_report.write_report(str(tmp_path / "report"), [only], shards, "x", None)
    assert report["num_crowds"] == 1
    page = (tmp_path / "report" / "report.html").read_text()
    assert '<p class="place">' not in page, "the title is all there is to say"


def test_the_line_for_people_has_a_dash_where_there_are_no_objects() -> None:
    metrics = {"bbox_AP": 0.41234, "bbox_AP_large": -1.0, "segm_AP": 0.0, "rpn_AR_100": 0.5}
    assert evaluation_report.metrics_line(metrics, "bbox") == "bbox_AP 0.412  bbox_AP_large -"
    assert evaluation_report.metrics_line(metrics, "segm") == "segm_AP 0.000"


def test_classes_that_lvis_does_not_have_are_left_out_of_its_protocol() -> None:
    rows = [
        row(0, [(1, square(0)), (2, square(50))], [(1, 0.9, square(0)), (2, 0.9, square(0))]),
    ]
    report, _ = analyse(rows, ("cat", "unicorn"), LvisFields({}, {}, {1: "r"}))
    assert report["lvis"]["segm"]["AP"] == pytest.approx(1)
