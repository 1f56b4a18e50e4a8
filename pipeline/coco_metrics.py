"""The numbers of the COCO evaluation, by hotcoco where it is installed, else by pycocotools: the same to 1e-9."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Sequence
from typing import Any, Literal

Json = dict[str, Any]
Kind = Literal["bbox", "segm"]
Evaluator = Literal["hotcoco", "pycocotools"]

STATISTICS = (
    "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
    "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large",
)  # fmt: skip
"""Names of the twelve numbers in the order in which pycocotools prints them."""


def default_evaluator() -> Evaluator:
    """The fastest that is installed: hotcoco has wheels for fewer platforms than pycocotools."""
    return "hotcoco" if importlib.util.find_spec("hotcoco") is not None else "pycocotools"


def coco_statistics(
    images: Sequence[Json],
    category_ids: Iterable[int],
    annotations: Sequence[Json],
    results: Sequence[Json],
    kinds: Sequence[Kind] = ("bbox", "segm"),
    evaluator: Evaluator | None = None,
) -> dict[str, dict[str, float]]:
    """COCO evaluation of results against annotations.

    Args:
        images: id, height and width of each.
        category_ids: to average over.
        annotations: ground truth, segmentations as polygons or RLE; ids are given anew.
        results: bbox, score and RLE of each; there may be none. The area of the box decides a result's size class, for
            masks too, as pycocotools does with results that have both.
        kinds: of boxes, of masks.
        evaluator: None for the default one.

    Returns:
        For each kind the numbers of `STATISTICS`; -1 where there is no object of that size at all.
    """
    categories = [{"id": category_id, "name": str(category_id)} for category_id in category_ids]
    truth, detections = as_datasets(images, categories, annotations, results)
    with contextlib.redirect_stdout(io.StringIO()):  # both print their progress
        if (evaluator or default_evaluator()) == "hotcoco":
            evaluations = _hotcoco(truth, detections, kinds)
        else:
            evaluations = _pycocotools(truth, detections, kinds)
        statistics = {}
        for kind, evaluation in zip(kinds, evaluations, strict=True):
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values = [float(value) for value in evaluation.stats]
            statistics[str(kind)] = dict(zip(STATISTICS, values, strict=True))
    return statistics


def as_datasets(
    images: Sequence[Json], categories: Sequence[Json], annotations: Sequence[Json], results: Sequence[Json]
) -> tuple[Json, Json]:
    """Ground truth and results as two COCO data sets; ids of both are their places in the lists, from 1 on."""
    truth = {"images": list(images), "categories": list(categories), "annotations": _numbered(annotations)}
    found = [{**result, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0} for result in results]
    return truth, {"images": list(images), "categories": list(categories), "annotations": _numbered(found)}


def _hotcoco(truth: Json, detections: Json, kinds: Sequence[Kind]) -> list[Any]:
    from hotcoco import COCO, COCOeval

    ground_truth, found = COCO(truth), COCO(detections)
    return [COCOeval(ground_truth, found, kind) for kind in kinds]


def _pycocotools(truth: Json, detections: Json, kinds: Sequence[Kind]) -> list[Any]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    ground_truth, found = COCO(), COCO()
    for coco, dataset in ((ground_truth, truth), (found, detections)):
        coco.dataset = dataset
        coco.createIndex()
    return [COCOeval(ground_truth, found, iouType=kind) for kind in kinds]


def _numbered(annotations: Sequence[Json]) -> list[Json]:
    """With ids from 1 on: pycocotools takes 0 for "no match"."""
    return [{**annotation, "id": index + 1} for index, annotation in enumerate(annotations)]
