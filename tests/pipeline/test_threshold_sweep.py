"""Many thresholds over one checkpoint: each point is what an evaluation with its thresholds gives."""

from typing import Any

import pytest
import torch

from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.variants import VARIABLE_KEYS
from pipeline.evaluation import average_precision, evaluate_rows
from pipeline.search_space import apply_point
from pipeline.shards import ShardSet
from pipeline.space_parsing import THRESHOLD_KNOBS
from pipeline.threshold_sweep import point_precision, sweep_rows
from tests.pipeline.factories import Prepared

POINTS: list[dict[str, Any]] = [
    {},
    {"model.rpn.nms_threshold": 0.4, "model.detections.max_per_image": 20},
    {"model.rpn.nms_threshold": 0.9, "model.rpn.proposals_inference": 40},
    {"model.rpn.pre_nms_top_k_inference": 12, "model.detections.nms_threshold": 0.9},
    {"model.detections.score_threshold": 0.45, "model.detections.max_per_image": 20},
    {"model.detections.score_threshold": 1.0},
]


@pytest.mark.cluster
@pytest.mark.parametrize("whole_pixels", [False, True])
def test_every_point_equals_its_own_evaluation(prepared: Prepared, whole_pixels: bool) -> None:
    """The sources of the training rows have labelled different classes."""
    experiment = apply_point(prepared.config, {"model.detections.whole_pixels": whole_pixels})
    torch.manual_seed(0)
    model = MaskRCNN(experiment.model, 4).eval()
    with torch.no_grad():  # random, but with opinions
        model.box_head.class_logits.weight.mul_(60)
        model.rpn.class_logits.weight.mul_(20)
    variants = [apply_point(experiment, point).model for point in POINTS]
    numbers = set()
    shards = ShardSet(prepared.data.validation if whole_pixels else prepared.data.training)
    rows = list(range(len(shards)))
    swept = sweep_rows(model, shards, rows, 3, None, variants)
    for index, variant in enumerate(variants):
        model.config = variant
        single = evaluate_rows(model, shards, rows, 3, None)
        model.config = experiment.model
        of_row = {row.shared.row: row.of_point(index) for row in swept}
        for expected in single:
            found = of_row[expected.row]
            assert found.annotations == expected.annotations
            assert len(found.results) == len(expected.results)
            numbers.add(len(found.results))
            for ours, theirs in zip(found.results, expected.results, strict=True):
                assert ours["category_id"] == theirs["category_id"]
                assert ours["segmentation"] == theirs["segmentation"]
                assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
                assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
        ap = point_precision(swept, index, len(rows), 4)
        assert ap == pytest.approx(average_precision(single, len(rows), 4), abs=1e-6)
    assert 0 in numbers
    assert len(numbers) > 4


def test_the_knobs_are_those_that_the_model_can_vary() -> None:
    assert tuple(f"model.{key}" for key in VARIABLE_KEYS) == THRESHOLD_KNOBS
    for key in VARIABLE_KEYS:
        section, name = key.split(".")
        assert name in type(getattr(ModelConfig(), section)).model_fields
