from typing import Any

import numpy as np
import pytest
import torch
import yaml

from model.anchors import pyramid_anchors
from model.boxes import pairwise_iou
from model.config import AnchorConfig
from pipeline.anchor_advice import (
    Objects,
    advise,
    anchors_in_words,
    best_doubling,
    best_ious,
    kmeans,
    recalls,
    search_space,
    suggest,
)
from pipeline.coco import read_coco_file, unite_classes
from pipeline.config import CocoSource, ExperimentConfig, PolicySettings
from pipeline.key_mistakes import known_keys
from pipeline.preflight import boxes_on_canvas
from pipeline.record_checks import check_records
from tests.pipeline.factories import SHARED_DATA, needs_shared_data

LEVEL_STRIDES = (4, 8, 16, 32, 64)


def brute_force(objects: Objects, config: AnchorConfig) -> np.ndarray[Any, Any]:
    """(N, 5) from all anchors of the model and all objects."""
    best = np.zeros((len(objects.boxes), 5))
    for canvas in np.unique(objects.canvases, axis=0):
        chosen = np.flatnonzero((objects.canvases == canvas).all(axis=1))
        sizes = [(-(-int(canvas[0]) // s), -(-int(canvas[1]) // s)) for s in LEVEL_STRIDES]
        boxes = torch.from_numpy(objects.boxes[chosen])
        for level, part in enumerate(pyramid_anchors(config, sizes, (int(canvas[0]), int(canvas[1])))):
            for rows in np.array_split(np.arange(len(chosen)), -(-len(chosen) // 64)):
                best[chosen[rows], level] = pairwise_iou(boxes[rows], part.double()).max(dim=1).values.numpy()
    return best


def counted(best: np.ndarray[Any, Any]) -> tuple[float, float, int]:
    overall = best.max(axis=1)
    return float((overall >= 0.5).mean()), float((overall >= 0.7).mean()), int((overall < 0.5).sum())


def random_objects(number: int, seed: int) -> Objects:
    rng = np.random.default_rng(seed)
    canvases = np.array([(128, 192), (192, 128), (160, 160)])[rng.integers(3, size=number)]
    corners = rng.uniform(0, canvases[:, None, ::-1], (number, 2, 2))
    return Objects(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1), canvases)


@pytest.mark.parametrize("anchor_stride", [1, 2, 3])
def test_best_anchor_is_that_of_brute_force(anchor_stride: int) -> None:
    config = AnchorConfig(scales=(8, 16, 32, 64, 128), ratios=(0.5, 1, 2), anchor_stride=anchor_stride)
    objects = random_objects(300, seed=anchor_stride)
    expected = brute_force(objects, config)
    found = best_ious(objects, config.scales, config.ratios, anchor_stride)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.unique(expected.argmax(axis=1))) >= 4


def real_objects(name: str, canvases: tuple[tuple[int, int], ...]) -> Objects:
    """Training objects as the preparation sees them."""
    root = SHARED_DATA / name
    file = read_coco_file(CocoSource(annotations="annotations/instances_train.json"), str(root))
    records = check_records(file, 0, unite_classes([file]), PolicySettings(), None).records
    rows = [[row, a.class_id, a.is_crowd, *a.bbox] for row, record in enumerate(records) for a in record.annotations]
    return boxes_on_canvas(records, np.array(rows, dtype=np.float64), canvases)


@needs_shared_data("coco_mini", "nuclei")
@pytest.mark.parametrize(
    ("name", "canvases", "anchors", "number"),
    [
        ("nuclei", ((320, 320),), AnchorConfig(scales=(8, 16, 32, 64, 128)), 2454),
        ("coco_mini", ((512, 640), (640, 512), (576, 576)), AnchorConfig(), 1004),
    ],
)
def test_recalls_on_real_objects_are_those_of_brute_force(
    name: str, canvases: tuple[tuple[int, int], ...], anchors: AnchorConfig, number: int
) -> None:
    objects = real_objects(name, canvases)
    assert len(objects.boxes) == number
    advice = advise(objects, anchors)
    entries = [advice["configured"], *advice["candidates"]]
    assert len(entries) == 5
    for entry in (entries[0], entries[-1]):
        config = AnchorConfig(scales=tuple(entry["scales"]), ratios=tuple(entry["ratios"]))
        best = brute_force(objects, config)
        expected = counted(best)
        assert (entry["recall_50"], entry["recall_70"]) == pytest.approx(expected[:2], abs=1e-6)
        assert entry["objects_with_none"] == expected[2]
        level_of = best.argmax(axis=1)
        assert [level["objects"] for level in entry["levels"]] == np.bincount(level_of, minlength=5).tolist()
        for index, level in enumerate(entry["levels"]):
            at = best.max(axis=1)[level_of == index]
            assert level["recall_50"] == pytest.approx((at >= 0.5).sum() / number, abs=1e-6)
            assert level["recall_70"] == pytest.approx((at >= 0.7).sum() / number, abs=1e-6)


def test_one_object_by_hand() -> None:
    """A 32 px square around (34, 30): the nearest anchor of P2 stands at (36, 32), 2 pixels off in x and y."""
    objects = Objects(np.array([[18.0, 14.0, 50.0, 46.0]]), np.array([[64, 64]]))
    best = best_ious(objects, (32, 64, 128, 256, 512), (1.0,), 1)
    overlap = 30 * 30
    np.testing.assert_allclose(best[0, 0], overlap / (2 * 32 * 32 - overlap))
    np.testing.assert_allclose(best[0, 1], 32 * 32 / (64 * 64))  # at (32, 32) and half as large
    found = recalls(best)
    assert (found["recall_50"], found["recall_70"], found["objects_with_none"]) == (1.0, 1.0, 0)
    assert [level["objects"] for level in found["levels"]] == [1, 0, 0, 0, 0]


def test_no_objects_at_all() -> None:
    nothing = Objects(np.zeros((0, 4)), np.zeros((0, 2), dtype=np.int64))
    advice = advise(nothing, AnchorConfig())
    assert (advice["configured"]["recall_50"], advice["candidates"]) == (None, [])
    assert yaml.safe_load(search_space(advice))["model.anchors.scales"] == {"choice": [[32, 64, 128, 256, 512]]}


def test_kmeans_by_hand() -> None:
    values = np.array([1.0, 1.2, 5.0, 5.2, 9.0, 9.4])
    np.testing.assert_allclose(kmeans(values, 3), [1.1, 5.1, 9.2])
    np.testing.assert_allclose(kmeans(values[::-1], 3), [1.1, 5.1, 9.2])
    np.testing.assert_allclose(kmeans(np.array([2.0]), 3), [2.0, 2.0, 2.0])
    np.testing.assert_allclose(kmeans(np.array([0.0, 0.0, 0.0, 10.0]), 2), [0.0, 10.0])


def test_suggestions_are_the_sizes_of_the_objects() -> None:
    sides = np.repeat([10.0, 20.0, 40.0, 80.0, 160.0], 4)
    boxes = np.stack([np.full(20, 5.0), np.full(20, 5.0), 5 + 2 * sides, 5 + sides / 2], axis=1)
    objects = Objects(boxes, np.full((20, 2), 512))
    scales, ratios = suggest(objects, 5, 3)
    assert scales == [10, 20, 40, 80, 160]
    assert ratios == [4, 4, 4]
    assert best_doubling(objects, [4.0], 1)[0] == pytest.approx(10, rel=0.2)


def test_no_suggestion_is_without_size() -> None:
    """Cables, two pixels wide, and specks that shrink to a fraction of a pixel on the canvas."""
    cables = Objects(np.tile([5.0, 5.0, 7.0, 605.0], (9, 1)), np.full((9, 2), 1024))
    assert suggest(cables, 5, 3)[1] == [0.0033] * 3
    specks = Objects(np.tile([5.0, 5.0, 5.04, 5.04], (9, 1)), np.full((9, 2), 64))
    assert suggest(specks, 5, 3)[0] == [0.04] * 5
    for objects in (cables, specks):
        assert min(advise(objects, AnchorConfig())["candidates"][0]["scales"]) > 0


def test_search_space_has_keys_of_the_configuration_and_values_that_it_takes() -> None:
    advice = advise(random_objects(200, seed=5), AnchorConfig())
    text = search_space(advice)
    assert text.startswith("# What:")
    space = yaml.safe_load(text)
    assert set(space) == {"model.anchors.scales", "model.anchors.ratios"}
    assert set(space) <= set(known_keys())
    assert space["model.anchors.scales"]["choice"][0] == [32, 64, 128, 256, 512], "the configured ones first"
    for scales in space["model.anchors.scales"]["choice"]:
        for ratios in space["model.anchors.ratios"]["choice"]:
            ExperimentConfig.model_validate({"model": {"anchors": {"scales": scales, "ratios": ratios}}})
    assert len(space["model.anchors.scales"]["choice"]) == 3


def squares(*sides: float) -> Objects:
    """Around the centre of an anchor of every level."""
    half = np.array(sides) / 2
    return Objects(64 + np.stack([-half, -half, half, half], axis=1), np.full((len(half), 2), 128))


def test_anchors_that_reach_enough_objects_by_half_are_kept() -> None:
    """Whatever others would reach by 0.7: squares of 21 pixels overlap those of 16 by (16 / 21) ** 2 = 0.58."""
    configured = AnchorConfig(scales=(16, 32, 64, 128, 256))
    advice = advise(squares(*[21] * 9, 4), configured)
    assert advice["candidates"][0]["recall_70"] > advice["configured"]["recall_70"] == 0
    assert anchors_in_words(advice) == (
        "model.anchors.scales [16.0, 32.0, 64.0, 128.0, 256.0] overlap 90.0% of the objects by 0.5, 0.0% by 0.7; "
        "keep them (90% by 0.5 are enough)"
    )
    assert "; that at 0.5 decides, 0.9 is enough:\n" in search_space(advice)
    assert "; few (90%" in anchors_in_words(advise(squares(*[21] * 8, 4, 4), configured))


def test_anchors_that_reach_few_objects_are_told_with_better_ones() -> None:
    """Objects of 16 pixels: anchors of 32 and more overlap them by a quarter at most."""
    text = anchors_in_words(advise(squares(*[16] * 10), AnchorConfig()))
    assert "overlap 0.0% of the objects by 0.5, 0.0% by 0.7; few (90% by 0.5 are enough): try [" in text
    assert text.endswith("], which overlap 100.0%, and take what trains better")


def test_objects_too_small_for_any_anchor_want_a_larger_canvas() -> None:
    boxes = np.tile([25.0, 25.0, 26.0, 26.0], (10, 1))  # a pixel, between the centres of anchors
    objects = Objects(boxes, np.full((10, 2), 128))
    assert "larger data.canvases would help" in anchors_in_words(advise(objects, AnchorConfig()))


def test_without_objects_nothing_is_said_of_anchors() -> None:
    nothing = Objects(np.zeros((0, 4)), np.zeros((0, 2), dtype=np.int64))
    assert anchors_in_words(advise(nothing, AnchorConfig())) == "there are no objects to judge the anchors by"
