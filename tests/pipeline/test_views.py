import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.structures import Detections
from pipeline.inference import Predictor
from pipeline.predict_config import PredictSettings, TilingSettings
from pipeline.views import View, Viewing, detect_views, tiles_of, unite, views_of
from tests.pipeline.factories import noise, thin_model

CANVASES = ((64, 96), (96, 64))


@given(
    height=st.integers(1, 300), width=st.integers(1, 300), size=st.integers(8, 120), overlap=st.floats(0, 0.89)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_tiles_cover_the_image_and_overlap(height: int, width: int, size: int, overlap: float) -> None:
    tiles = tiles_of(height, width, TilingSettings(size=size, overlap=overlap))
    seen = np.zeros((height, width), dtype=bool)
    for top, left, rows, columns in tiles:
        assert (rows, columns) == (min(size, height), min(size, width))
        assert top + rows <= height
        assert left + columns <= width
        seen[top : top + rows, left : left + columns] = True
    assert seen.all()
    tops = sorted({top for top, *_ in tiles})
    stride = max(1, int(size * (1 - overlap)))
    assert all(after - before <= stride + 1 for before, after in itertools.pairwise(tops))
    assert len(set(tiles)) == len(tiles)


def test_tiles_by_hand() -> None:
    # 250 rows in tiles of 100 that share 25: starts 0, 75, 150; 90 columns need one.
    assert tiles_of(250, 90, TilingSettings(size=100, overlap=0.25)) == [
        (0, 0, 100, 90), (75, 0, 100, 90), (150, 0, 100, 90),
    ]  # fmt: skip


def test_views_of_an_image_by_hand() -> None:
    pixels = noise(32, 48)
    (view,) = views_of(pixels, 32, 48, Viewing(CANVASES))
    assert (view.canvas, view.size) == ((64, 96), (64, 96))
    assert (view.top, view.left, view.height, view.width, view.flipped) == (0, 0, 32, 48, False)
    views = views_of(pixels, 32, 48, Viewing(CANVASES, flip=True, scales=(0.5, 1.0)))
    assert [(v.canvas, v.size, v.flipped) for v in views] == [
        ((32, 64), (32, 48), False), ((32, 64), (32, 48), True),
        ((64, 96), (64, 96), False), ((64, 96), (64, 96), True),
    ]  # fmt: skip
    np.testing.assert_array_equal(views[0].pixels, pixels)
    np.testing.assert_array_equal(views[1].pixels, pixels[:, ::-1])


def test_tiles_are_cut_out_of_the_image() -> None:
    pixels = noise(150, 60)
    views = views_of(pixels, 150, 60, Viewing(((96, 96),), tiling=TilingSettings(size=96, overlap=0.25)))
    assert [(view.top, view.height) for view in views] == [(0, 96), (54, 96)]
    np.testing.assert_array_equal(views[1].pixels, pixels[54:])
    with pytest.raises(ValueError, match="cannot cut tiles of 150 x 60 pixels"):
        views_of(pixels[:100], 150, 60, Viewing(((96, 96),), tiling=TilingSettings(size=96)))


def found(boxes: list[list[float]], scores: list[float], classes: list[int] | None = None) -> Detections:
    number = len(boxes)
    return Detections(
        torch.tensor(boxes).reshape(number, 4),
        torch.tensor(scores),
        torch.tensor(classes or [1] * number, dtype=torch.int64),
        torch.ones(number, 28, 28),
    )


def place(top: int, left: int, height: int, width: int, flipped: bool = False) -> View:
    return View((96, 96), np.zeros((0, 0, 3), dtype=np.uint8), top, left, height, width, flipped)


TILING = Viewing(((96, 96),), tiling=TilingSettings(size=100, overlap=0.25, mask_overlap=0.5))
LEFT, RIGHT = place(0, 0, 100, 100), place(0, 75, 100, 100)  # of an image of 175 columns


def tiled(left: Detections, right: Detections) -> list[tuple[list[float], float]]:
    united = unite([LEFT, RIGHT], [left, right], 100, 175, TILING, ModelConfig())
    return [(box, round(score, 3)) for box, score in zip(united.boxes.tolist(), united.scores.tolist(), strict=True)]


def test_an_object_that_two_tiles_see_is_one() -> None:
    left = found([[80.0, 10, 95, 30], [10, 10, 30, 30]], [0.8, 0.5])
    right = found([[80.0, 10, 95, 30], [120, 10, 150, 30]], [0.9, 0.7])
    assert tiled(left, right) == [([80, 10, 95, 30], 0.9), ([120, 10, 150, 30], 0.7), ([10, 10, 30, 30], 0.5)]


def test_what_an_edge_has_cut_gives_way_to_the_whole() -> None:
    """Even where the fragment has the better score."""
    left = found([[80.0, 10, 100, 30]], [0.95])  # reaches the right edge of its tile
    right = found([[80.0, 10, 140, 30]], [0.6])
    assert tiled(left, right) == [([80, 10, 140, 30], 0.6)]
    assert tiled(left, found([], [])) == [([80, 10, 100, 30], 0.95)]


def test_neighbours_other_classes_and_one_tile_do_not_compete() -> None:
    left = found([[80.0, 10, 95, 30]], [0.8], [1])
    assert len(tiled(left, found([[80.0, 10, 95, 30]], [0.9], [2]))) == 2
    assert len(tiled(left, found([[90.0, 10, 140, 30]], [0.9]))) == 2  # a third of the smaller mask is shared
    assert len(tiled(found([[10.0, 10, 30, 30], [11, 10, 31, 30]], [0.9, 0.8]), found([], []))) == 2


def test_nothing_found_anywhere() -> None:
    assert tiled(found([], []), found([], [])) == []
    assert len(unite([LEFT, LEFT], [found([], [])] * 2, 100, 175, Viewing(((96, 96),), flip=True), ModelConfig())) == 0


def test_views_of_one_place_are_united_by_boxes() -> None:
    viewing = Viewing(((96, 96),), flip=True)
    views = [place(0, 0, 100, 175), place(0, 0, 100, 175, flipped=True)]
    both = [found([[10.0, 10, 30, 30]], [0.6]), found([[11.0, 10, 31, 30], [50, 50, 90, 90]], [0.7, 0.2])]
    united = unite(views, both, 100, 175, viewing, ModelConfig())
    assert united.boxes.tolist() == [[11, 10, 31, 30], [50, 50, 90, 90]]


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MaskRCNN(thin_model(), 3).eval()


def test_a_mirrored_image_gives_the_mirrored_detections_of_its_mirror_image(model: MaskRCNN) -> None:
    """The flipped view of an image is the plain view of its mirror image, boxes and masks turned back."""
    pixels = noise(64, 90, seed=4)
    flipped = views_of(pixels, 64, 90, Viewing(CANVASES, flip=True))[1]
    mirror = views_of(np.ascontiguousarray(pixels[:, ::-1]), 64, 90, Viewing(CANVASES))[0]
    ours, theirs = detect_views(model, [flipped], None)[0], detect_views(model, [mirror], None)[0]
    assert len(ours) > 0
    torch.testing.assert_close(ours.boxes[:, 0], 90 - theirs.boxes[:, 2])
    torch.testing.assert_close(ours.boxes[:, 1], theirs.boxes[:, 1])
    torch.testing.assert_close(ours.mask_probabilities, theirs.mask_probabilities.flip(-1))


def test_tiles_of_an_image_that_fits_change_nothing(model: MaskRCNN) -> None:
    pixels = noise(64, 90, seed=5)
    plain = Predictor(model, ["a", "b"], Viewing(CANVASES), "fp32").predict(pixels)
    tiling = TilingSettings(size=96)
    also = Predictor(model, ["a", "b"], Viewing(CANVASES, tiling=tiling), "fp32").predict(pixels)
    assert len(plain) > 0
    for name in ("boxes", "scores", "classes", "mask_probabilities"):
        torch.testing.assert_close(getattr(also, name), getattr(plain, name), rtol=0, atol=0)


def test_detections_of_a_tile_lie_where_the_tile_lies(model: MaskRCNN) -> None:
    pixels = noise(64, 150, seed=6)
    viewing = Viewing(CANVASES, tiling=TilingSettings(size=90, overlap=0.2))
    views = views_of(pixels, 64, 150, viewing)
    assert [view.left for view in views] == [0, 60]
    alone = Predictor(model, ["a", "b"], Viewing(CANVASES), "fp32").predict(np.ascontiguousarray(pixels[:, 60:]))
    tile = detect_views(model, [views[1]], None)[0]
    torch.testing.assert_close(tile.boxes, alone.boxes + torch.tensor([60.0, 0, 60, 0]))
    torch.testing.assert_close(tile.mask_probabilities, alone.mask_probabilities)


def test_canvases_that_are_asked_for_replace_the_checkpoints() -> None:
    asked: dict[str, Any] = {"canvases": [[320, 320]], "flip": True, "scales": [1.0, 1.5]}
    viewing = Viewing(CANVASES, 64).augmented(PredictSettings.model_validate(asked))
    assert viewing == Viewing(((320, 320),), 64, flip=True, scales=(1.0, 1.5))
    assert Viewing(CANVASES, 64).augmented(PredictSettings()) == Viewing(CANVASES, 64)
