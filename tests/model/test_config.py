import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
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
        ("image_position", "top_left"),
        ("padding", "mean"),
        ("boxes", "exclusive"),
        ("norms.epsilon", 1e-5),
        ("norms.convolution_bias", False),
        ("rpn.objectness", "softmax"),
        ("rpn.per_level", False),
        ("rpn.clip_to", "image"),
        ("roi.pooling", "aligned"),
        ("roi.fixed_ratio", False),
        ("box_head.kind", "conv7x7"),
        ("mask_head.targets", "thresholded"),
        ("losses.normalizer", "image"),
        ("losses.inactive_classes", "masked"),
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
        ({"roi": {"pooling": "max"}}, "'aligned', 'unaligned' or 'crop_and_resize'"),
        ({"norms": {"epsilon": 0}}, "greater than 0"),
        ({"box_head": {"norm": "layer"}}, "frozen_statistics"),
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


PRESETS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        # What the documents say of the original and of torchvision, where it is not the default.
        ("matterport", "backbone.variant", "keras"),
        ("matterport", "norms.epsilon", 1e-3),
        ("matterport", "norms.convolution_bias", True),
        ("matterport", "roi.rois_per_image", 200),
        ("matterport", "roi.positive_fraction", 0.33),
        ("matterport", "roi.add_ground_truth", False),
        ("matterport", "roi.pooling", "crop_and_resize"),
        ("matterport", "rpn.pre_nms_top_k", 6000),
        ("matterport", "detections.score_threshold", 0.7),
        ("matterport", "detections.nms_threshold", 0.3),
        ("matterport", "detections.max_per_image", 100),
        ("matterport", "losses.normalizer", "positives"),
        ("torchvision_v1", "box_head.kind", "fc2"),
        ("torchvision_v1", "box_head.norm", "none"),
        ("torchvision_v1", "backbone.norm", "frozen"),
        ("torchvision_v1", "rpn.num_convolutions", 1),
        ("torchvision_v2", "box_head.kind", "conv4fc1"),
        ("torchvision_v2", "fpn.norm", "batch"),
        ("torchvision_v2", "mask_head.norm", "batch"),
        ("torchvision_v2", "rpn.num_convolutions", 2),
        *[
            (name, path, value)
            for name in ("torchvision_v1", "torchvision_v2")
            for path, value in (
                ("rpn.channels", 256),
                ("rpn.delta_scale", (1.0, 1.0, 1.0, 1.0)),
                ("rpn.pre_nms_top_k", 2000),
                ("rpn.pre_nms_top_k_inference", 1000),
                ("rpn.proposals_training", 2000),
                ("rpn.proposals_inference", 1000),
                ("roi.rois_per_image", 512),
                ("roi.positive_fraction", 0.25),
                ("roi.pooling", "unaligned"),
                ("losses.smooth_l1_beta", 1 / 9),
                ("detections.score_threshold", 0.05),
            )
        ],
    ],
)
def test_presets_are_the_documented_ones(name: str, path: str, value: object) -> None:
    config = ModelConfig.model_validate(yaml.safe_load((PRESETS / f"{name}.yaml").read_text())["model"])
    assert functools.reduce(getattr, path.split("."), config) == value
