"""Detections of many thresholds from one forward pass are those of as many forward passes."""

from typing import Any

import numpy as np
import pytest
import torch

from model.config import DetectionConfig, ModelConfig
from model.mask_rcnn import MaskRCNN
from model.variants import VARIABLE_KEYS, detect_variants, unique_rows
from tests.model.factories import Scene, Thing, make_batch, noise_image, painted_scene, rectangle, tiny_config

CHANGES: list[dict[str, Any]] = [
    {},
    {"rpn.nms_threshold": 0.3},
    {"rpn.nms_threshold": 0.95, "rpn.proposals_inference": 60},
    {"rpn.pre_nms_top_k": 30},
    {"rpn.pre_nms_top_k_inference": 10},
    {"rpn.proposals_inference": 1},
    {"rpn.min_size": 12.0},
    {"detections.score_threshold": 0.4},
    {"detections.score_threshold": 1.0},
    {"detections.nms_threshold": 0.2},
    {"detections.nms_threshold": 1.0, "detections.max_per_image": 7},
    {"detections.min_size": 20.0},
    {"detections.best_class_only": True, "rpn.nms_threshold": 0.3},
]


def vary(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    settings = config.model_dump()
    for name, value in changes.items():
        part, key = name.split(".")
        settings[part][key] = value
    return ModelConfig.model_validate(settings)


def make_model(**changes: Any) -> MaskRCNN:
    """With random weights, but with opinions: a fresh model gives every region the same scores."""
    torch.manual_seed(0)
    model = MaskRCNN(tiny_config(**changes), 3).eval()
    with torch.no_grad():
        model.box_head.class_logits.weight.mul_(60)
        model.box_head.box_deltas.weight.mul_(30)
        model.rpn.class_logits.weight.mul_(20)
        model.mask_head.mask_logits.weight.mul_(2000)
    return model


def images() -> tuple[torch.Tensor, torch.Tensor]:
    scenes = [
        painted_scene([Thing(rectangle((4, 6, 30, 40), 64, 64))], key=3),
        painted_scene([Thing(rectangle((10, 4, 40, 30), 48, 56), 2)], height=48, width=56, key=4),
        Scene(noise_image(64, 40, seed=5)),
    ]
    batch = make_batch(scenes)
    return batch.images, batch.image_sizes


RANKED_BY_MASKS = DetectionConfig(max_per_image=10, score="class_times_mask")


@pytest.mark.parametrize(
    "changes", [{}, {"boxes": "inclusive", "image_position": "centre"}, {"detections": RANKED_BY_MASKS}]
)
def test_every_variant_equals_a_forward_pass_of_its_own(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    variants = [vary(model.config, change) for change in CHANGES]
    shared = detect_variants(model, *images(), variants)
    numbers = set()
    for index, variant in enumerate(variants):
        model.config = variant
        for image, expected in enumerate(model.detect(*images())):
            rows = torch.from_numpy(shared[image].rows[index])
            found = shared[image].union.where(rows)
            assert found.classes.tolist() == expected.classes.tolist()
            assert (expected.scores[:-1] >= expected.scores[1:]).all()
            for name in ("boxes", "scores", "mask_probabilities"):
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
            numbers.add(len(expected))
    assert 0 in numbers
    assert len(numbers) > 3, "the variants find different numbers of objects"


def test_equal_variants_share_their_detections() -> None:
    model = make_model()
    (shared, *_) = detect_variants(model, *images(), [model.config] * 3)
    assert len(shared.union) == len(shared.rows[0]) > 0
    assert all(np.array_equal(rows, shared.rows[0]) for rows in shared.rows)


def test_every_variable_key_is_tried() -> None:
    assert {name for change in CHANGES for name in change} == set(VARIABLE_KEYS)
    assert all(vary(tiny_config(), change) != tiny_config() for change in CHANGES[1:])


def test_unique_rows() -> None:
    rows = np.array([[1, 2], [0, 0], [1, 2], [1, np.nextafter(np.float32(2), np.float32(3))]], dtype=np.float32)
    first, inverse = unique_rows(rows)
    assert len(first) == 3
    assert np.array_equal(rows[first][inverse], rows)
    assert [len(part) for part in unique_rows(np.zeros((0, 6), dtype=np.float32))] == [0, 0]
