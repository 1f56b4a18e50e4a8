"""Recall of proposals: by hand, and equal to pycocotools'."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pipeline.proposal_recall import RECALL_METRICS, FloatArray, average_recall, count_found, pairwise_iou


def boxes(*rows: list[float]) -> FloatArray:
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def test_iou_by_hand() -> None:
    first = boxes([0, 0, 10, 10], [0, 0, 0, 0])
    second = boxes([0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 0, 0])
    assert pairwise_iou(first, second).tolist() == [[1.0, pytest.approx(1 / 3), 0.0, 0.0], [0.0] * 4]


def test_one_object_found_up_to_its_iou() -> None:
    """IoU 0.8 is enough for the thresholds 0.50, 0.55, ... 0.80: seven of ten."""
    counts = count_found(boxes([50, 50, 60, 60], [0, 0, 10, 8]), boxes([0, 0, 10, 10]))
    assert counts.num_found.tolist() == [[1] * 7 + [0] * 3] * 2
    assert average_recall([counts]) == {"rpn_AR_100": pytest.approx(0.7), "rpn_AR_1000": pytest.approx(0.7)}


def test_a_proposal_finds_one_object_and_the_best_proposal_chooses_first() -> None:
    """The first proposal takes the object that it overlaps most, though the second could have only that one."""
    objects = boxes([0, 0, 10, 10], [0, 0, 10, 12])
    counts = count_found(boxes([0, 0, 10, 10]), objects)
    assert counts.num_found[0, 0] == 1
    assert count_found(boxes([0, 0, 10, 10], [0, 0, 10, 10]), objects).num_found[0, 0] == 2


def test_proposals_beyond_the_number_do_not_count() -> None:
    far = [[100.0, 100.0, 110.0, 110.0]] * 150
    counts = count_found(boxes(*far, [0, 0, 10, 10]), boxes([0, 0, 10, 10]))
    assert counts.num_found.sum(axis=1).tolist() == [0, 10]


def test_without_objects_or_proposals() -> None:
    assert average_recall([]) == dict.fromkeys(RECALL_METRICS, -1.0)
    nothing = count_found(boxes([0, 0, 1, 1]), boxes())
    assert average_recall([nothing]) == dict.fromkeys(RECALL_METRICS, -1.0)
    missed = count_found(boxes(), boxes([0, 0, 1, 1]))
    assert average_recall([nothing, missed]) == dict.fromkeys(RECALL_METRICS, 0.0)


def _by_pycocotools(proposals: list[FloatArray], objects: list[FloatArray]) -> list[float]:
    def dataset(parts: list[FloatArray]) -> dict[str, object]:
        entries = [
            {
                "id": 1000 * image + index + 1,
                "image_id": image + 1,
                "category_id": 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "score": 1 - index / 2000,
            }
            for image, part in enumerate(parts)
            for index, (x0, y0, x1, y1) in enumerate(part.tolist())
        ]
        images = [{"id": image + 1} for image in range(len(parts))]
        return {"images": images, "annotations": entries, "categories": [{"id": 1, "name": "object"}]}

    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        for coco, content in ((truth, dataset(objects)), (found, dataset(proposals))):
            coco.dataset = content
            coco.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [100, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"]  # (thresholds, categories, areas, maxDets)
    return [float(recall[:, 0, 0, index].mean()) for index in range(2)]


def test_it_equals_pycocotools() -> None:
    rng = np.random.default_rng(0)
    proposals, objects = [], []
    for num_proposals, num_objects in ((300, 12), (40, 7), (0, 3), (25, 0), (1200, 30)):
        corners = rng.uniform(0, 80, size=(num_objects, 2))
        truth = np.concatenate([corners, corners + rng.uniform(5, 40, size=(num_objects, 2))], axis=1)
        near = truth[rng.integers(num_objects, size=num_proposals)] if num_objects else rng.uniform(0, 9, (25, 4))
        found = near + rng.normal(0, 4, size=(num_proposals, 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        proposals.append(found)
        objects.append(truth)
    counts = [count_found(found, truth) for found, truth in zip(proposals, objects, strict=True)]
    ours = average_recall(counts)
    assert 0.2 < ours["rpn_AR_100"] < ours["rpn_AR_1000"] < 1
    np.testing.assert_allclose(list(ours.values()), _by_pycocotools(proposals, objects), rtol=0, atol=1e-12)
