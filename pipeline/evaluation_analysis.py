"""What an evaluation says beyond its AP: by class and size, kinds of errors, what is confused, and with what scores.

All of it is counted by hotcoco; here it is only asked and put into one dictionary, `report.json`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.coco_metrics import STATISTICS, Kind, as_datasets
from pipeline.evaluation import EvaluatedRow

Json = dict[str, Any]
KINDS: tuple[Kind, Kind] = ("bbox", "segm")
SHOWN_SCORE = 0.5
"""Least score of detections in the confusion matrix and in the counts of an image: what a user would look at."""
IOU_OF_CURVES = (0.5, 0.75, 0.9)
MOST_PAIRS = 20
LVIS_STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300")
_AREAS = ("", "_small", "_medium", "_large")


@dataclass(frozen=True)
class LvisFields:
    """What an LVIS annotation file says beside its objects, in our terms."""

    negative: Mapping[int, list[int]]
    """By row, classes of which the image surely has none."""
    not_exhaustive: Mapping[int, list[int]]
    """By row, classes of which not every object is labelled."""
    frequency: Mapping[int, str]
    """By class: r, c or f."""


@dataclass(frozen=True)
class RowVerdict:
    """What was right and wrong in one image, at IoU 0.5 of the masks and scores from 0.5 on."""

    row: int
    missed: list[int]
    """Places in the row's annotations."""
    wrong: list[int]
    """Places in the row's results."""
    right: list[int]

    @property
    def num_errors(self) -> int:
        """Missed and wrong together."""
        return len(self.missed) + len(self.wrong)


def analyse(
    rows: Sequence[EvaluatedRow], class_names: Sequence[str], lvis: LvisFields | None = None
) -> tuple[Json, list[RowVerdict]]:
    """Everything about the results of an evaluation.

    Args:
        rows: all, in order.
        class_names: of classes 1..C-1.
        lvis: where the annotations are LVIS's: its protocol counts then, too.

    Returns:
        What `report.json` holds, finite numbers and None only, and a verdict on every row, the worst first.
    """
    images = [{"id": entry.row, "height": entry.height, "width": entry.width} for entry in rows]
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(_unique(class_names))]
    annotations = [annotation for entry in rows for annotation in entry.annotations]
    results = [result for entry in rows for result in entry.results]
    truth, found = as_datasets(images, categories, annotations, results)
    evaluations = {kind: _evaluate(truth, found, kind) for kind in KINDS}
    report: Json = {
        "num_images": len(rows),
        "num_objects": sum(not annotation["iscrowd"] for annotation in annotations),
        "num_crowds": sum(bool(annotation["iscrowd"]) for annotation in annotations),
        "num_detections": len(results),
        "per_class": _per_class(evaluations, class_names, annotations, results),
    }
    for kind, evaluation in evaluations.items():
        report[kind] = {
            "metrics": dict(zip(STATISTICS, (float(value) for value in evaluation.stats), strict=True)),
            "curves": _curves(evaluation),
            "errors": _errors(evaluation, bool(results)),
            "calibration": _calibration(evaluation, bool(results)),
            "confusion": _confusion(evaluation, class_names),
        }
    if lvis is not None:
        report["lvis"] = {kind: _lvis(truth, found, kind, lvis) for kind in KINDS}
    finite: Json = _finite(report)
    return finite, _verdicts(rows, evaluations["segm"])


def _unique(names: Sequence[str]) -> list[str]:
    """Names as they are unless two are equal, which only the numbers tell apart then."""
    return list(names) if len(set(names)) == len(names) else [f"{i + 1} {name}" for i, name in enumerate(names)]


def _evaluate(truth: Json, found: Json, kind: Kind, lvis: bool = False) -> Any:
    from hotcoco import COCO, COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its summary
        evaluation = COCOeval(COCO(truth), COCO(found), kind, lvis_style=lvis)
        evaluation.run()
    return evaluation


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Of what is there; -1 where there is nothing, as in pycocotools."""
    there = values[values > -1]
    return float(there.mean()) if there.size else -1.0


def _per_class(
    evaluations: Mapping[Kind, Any], class_names: Sequence[str], annotations: Sequence[Json], results: Sequence[Json]
) -> list[Json]:
    """AP of every class by size; precision is (IoU, recall, class, area, detections)."""
    classes = [{"class": name, "objects": 0, "crowds": 0, "detections": 0} for name in class_names]
    for annotation in annotations:
        classes[annotation["category_id"] - 1]["crowds" if annotation["iscrowd"] else "objects"] += 1
    for result in results:
        classes[result["category_id"] - 1]["detections"] += 1
    for kind, evaluation in evaluations.items():
        precision, thresholds = evaluation.eval["precision"], evaluation.params.iou_thrs
        for index, entry in enumerate(classes):
            of_class = precision[:, :, index, :, -1]
            for area, name in enumerate(_AREAS):
                entry[f"{kind}_AP{name}"] = _mean(of_class[:, :, area])
            for iou, name in ((0.5, "AP50"), (0.75, "AP75")):
                entry[f"{kind}_{name}"] = _mean(of_class[int(np.argmin(np.abs(np.array(thresholds) - iou))), :, 0])
    return classes


def _curves(evaluation: Any) -> Json:
    """Precision over recall, the mean over the classes that have objects."""
    precision, thresholds = evaluation.eval["precision"], np.array(evaluation.params.iou_thrs)
    curves: Json = {"recall": [float(value) for value in evaluation.params.rec_thrs]}
    for iou in IOU_OF_CURVES:
        of_iou = precision[int(np.argmin(np.abs(thresholds - iou))), :, :, 0, -1]  # (recall, class)
        curves[f"{iou:g}"] = [_mean(line) for line in of_iou]
    return curves


def _errors(evaluation: Any, has_results: bool) -> Json | None:
    """Kinds of errors (TIDE, arXiv 2008.08115): how many, and how much AP50 each costs."""
    return dict(evaluation.tide_errors(pos_thr=0.5, bg_thr=0.1)) if has_results else None


def _calibration(evaluation: Any, has_results: bool) -> Json | None:
    """How often a detection of a score is right at IoU 0.5, and the expected calibration error."""
    return dict(evaluation.calibration(n_bins=10, iou_threshold=0.5)) if has_results else None


def _confusion(evaluation: Any, class_names: Sequence[str]) -> Json:
    """Which classes are taken for which, at IoU 0.5; the last row and column are the background, as crowds are here."""
    matrix = evaluation.confusion_matrix(iou_thr=0.5, min_score=SHOWN_SCORE)["matrix"]
    names = [*class_names, "background"]
    pairs: list[Json] = [
        {"truth": names[row], "predicted": names[column], "count": int(matrix[row, column])}
        for row, column in np.argwhere(matrix[:-1, :-1] > 0).tolist()
        if row != column
    ]
    pairs.sort(key=lambda pair: -pair["count"])
    return {"matrix": matrix.astype(int).tolist(), "pairs": pairs[:MOST_PAIRS]}


def _lvis(truth: Json, found: Json, kind: Kind, fields: LvisFields) -> dict[str, float]:
    """The LVIS protocol: 300 detections an image, classes an image says nothing about left out, AP by frequency."""
    images = [
        {
            **image,
            "neg_category_ids": fields.negative.get(image["id"], []),
            "not_exhaustive_category_ids": fields.not_exhaustive.get(image["id"], []),
        }
        for image in truth["images"]
    ]
    # Classes that other data have brought into the model are none of LVIS's.
    known = [category for category in truth["categories"] if category["id"] in fields.frequency]
    categories = [{**category, "frequency": fields.frequency[category["id"]]} for category in known]
    evaluation = _evaluate({**truth, "images": images, "categories": categories}, found, kind, lvis=True)
    counted = evaluation.get_results()
    return {name: float(counted[name]) for name in LVIS_STATISTICS if name in counted}


def _verdicts(rows: Sequence[EvaluatedRow], evaluation: Any) -> list[RowVerdict]:
    """A detection below the score that is shown neither finds an object nor counts as wrong."""
    diagnostics = evaluation.image_diagnostics(iou_thr=0.5, score_thr=SHOWN_SCORE)
    matched, status = diagnostics["gt_match"], diagnostics["dt_status"]
    score_of: dict[int, float] = {}
    first_annotation = first_result = 1
    verdicts = []
    for entry in rows:
        results = {first_result + place: result["score"] for place, result in enumerate(entry.results)}
        score_of |= results
        shown = [place for place, score in enumerate(results.values()) if score >= SHOWN_SCORE]
        missed = [
            place
            for place, annotation in enumerate(entry.annotations)
            if not annotation["iscrowd"] and score_of.get(matched.get(first_annotation + place, 0), 0.0) < SHOWN_SCORE
        ]
        wrong = [place for place in shown if status.get(first_result + place) == "fp"]
        right = [place for place in shown if status.get(first_result + place) == "tp"]
        verdicts.append(RowVerdict(entry.row, missed, wrong, right))
        first_annotation, first_result = first_annotation + len(entry.annotations), first_result + len(entry.results)
    return sorted(verdicts, key=lambda verdict: (-verdict.num_errors, verdict.row))


def _finite(value: Any) -> Any:
    """The same, for JSON: numbers that are none become None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
