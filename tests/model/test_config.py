import functools
from typing import Any

import pytest
from pydantic import ValidationError

from model.config import ModelConfig
from model.losses import LOSS_NAMES


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("anchors.scales", (32, 64, 128, 256, 512)),
        ("anchors.ratios", (0.5, 1.0, 2.0)),
        ("rpn.pre_nms_top_k", 6000),
        ("rpn.proposals_training", 2000),
        ("rpn.proposals_inference", 1000),
        ("rpn.positive_iou", 0.7),
        ("rpn.negative_iou", 0.3),
        ("rpn.anchors_per_image", 256),
        ("roi.rois_per_image", 200),
        ("roi.positive_fraction", 0.25),
        ("roi.positive_iou", 0.5),
        ("box_head.pool_size", 7),
        ("mask_head.pool_size", 14),
        ("detections.score_threshold", 0.05),
        ("detections.nms_threshold", 0.5),
        ("detections.max_per_image", 100),
    ],
)
def test_the_defaults_are_the_documented_ones(path: str, value: object) -> None:
    assert functools.reduce(getattr, path.split("."), ModelConfig()) == value


def test_every_loss_has_a_weight_of_its_name() -> None:
    assert [getattr(ModelConfig().losses, name) for name in LOSS_NAMES] == [1.0] * 5


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"rpn": {"nms_treshold": 0.5}}, "nms_treshold"),
        ({"rpn": {"nms_threshold": 1.5}}, "less than or equal to 1"),
        ({"rpn": {"negative_iou": 0.8}}, "negative_iou 0.8 is above positive_iou 0.7"),
        ({"anchors": {"ratios": []}}, "at least 1 item"),
        ({"anchors": {"scales": [32, 64, 128, 256]}}, "scales"),
        ({"backbone": {"depth": 20}}, "18, 34, 50 or 101"),
        ({"roi": {"rois_per_image": 0}}, "greater than or equal to 4"),
    ],
)
def test_a_mistake_is_named(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        ModelConfig.model_validate(values)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().rpn.channels = 3  # type: ignore[misc]


def test_a_configuration_survives_json() -> None:
    config = ModelConfig(crowd_iou=0.25)
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
