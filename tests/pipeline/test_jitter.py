"""Scale and crop: masks drawn before and after, pixels against a whole resize, boxes against the drawn masks."""

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pipeline.copy_paste import draw_mask
from pipeline.jitter import boxes_from_masks, jitter_short_side, large_scale_jitter, scale_and_crop
from pipeline.sample import Sample
from tests.pipeline.factories import Bitmap, bitmap_of, ellipse_polygon, noise, pack_sample


@pytest.fixture
def bitmaps() -> list[Bitmap]:
    rng = np.random.default_rng(3)
    return [bitmap_of([ellipse_polygon(rng, 48, 64), ellipse_polygon(rng, 48, 64)], 48, 64) for _ in range(6)]


@pytest.fixture
def sample(bitmaps: list[Bitmap]) -> Sample:
    return pack_sample(noise(48, 64), bitmaps)


def drawn(sample: Sample) -> list[Bitmap]:
    full = []
    for index in range(len(sample.classes)):
        bitmap = np.zeros(sample.image.shape[:2], dtype=bool)
        (top, bottom, left, right), mask = draw_mask(sample, index)
        bitmap[top:bottom, left:right] = mask
        full.append(bitmap)
    return full


def resampled(bitmap: Bitmap, height: int, width: int, top: int, left: int, rows: int, columns: int) -> Bitmap:
    """Each pixel of the window by the pixel of the original under its centre, on an edge by the latter of two."""
    y = ((np.arange(rows) + top + 0.501) * bitmap.shape[0] / height).astype(int)
    x = ((np.arange(columns) + left + 0.501) * bitmap.shape[1] / width).astype(int)
    return bitmap[np.ix_(y, x)]


def tight(bitmap: Bitmap) -> npt.NDArray[np.float64]:
    rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=float)


def test_drawn_masks_are_the_bitmaps(sample: Sample, bitmaps: list[Bitmap]) -> None:
    for found, expected in zip(drawn(sample), bitmaps, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(12))
def test_large_scale_jitter_moves_masks_as_pixels(sample: Sample, bitmaps: list[Bitmap], seed: int) -> None:
    draws = tuple(np.random.default_rng(seed).random(3).tolist())
    jittered = large_scale_jitter(sample, (0.3, 2.0), (64, 64), draws)
    scale = 0.3 + 1.7 * draws[0]  # a 48 x 64 image fits a 64 x 64 canvas as it is
    height, width = round(48 * scale), round(64 * scale)
    rows, columns = min(height, 64), min(width, 64)
    top, left = round((height - rows) * draws[1]), round((width - columns) * draws[2])
    assert jittered.image.shape == (rows, columns, 3)
    whole = np.asarray(Image.fromarray(sample.image).resize((width, height), Image.Resampling.BILINEAR))
    difference = jittered.image.astype(int) - whole[top : top + rows, left : left + columns]
    assert np.abs(difference).max() <= 1  # rounding of the window

    expected = [resampled(bitmap, height, width, top, left, rows, columns) for bitmap in bitmaps]
    kept = (jittered.classes - 1).tolist()  # the objects are of classes 1, 2, ...
    for index, bitmap in enumerate(drawn(jittered)):
        np.testing.assert_array_equal(bitmap, expected[kept[index]])
        if bitmap.any():
            assert np.abs(jittered.boxes[index] - tight(bitmap)).max() <= max(1, scale / 2 + 0.01)
    for index in set(range(len(bitmaps))) - set(kept):
        seen = expected[index]
        assert not seen.any() or min(seen.any(axis=0).sum(), seen.any(axis=1).sum()) <= 1


def test_crop_by_hand() -> None:
    """Twice as large, the 4 x 4 window at row 3, column 1: edges run through the middle of cells."""
    bitmap = np.zeros((5, 6), dtype=bool)
    bitmap[1, 1:4] = bitmap[2, 2] = bitmap[4, 0] = True
    far = np.zeros((5, 6), dtype=bool)
    far[0, 5] = True
    moved = scale_and_crop(pack_sample(noise(5, 6), [bitmap, far]), 2.0, (4, 4), (0.5, 0.125))
    assert moved.boxes.tolist() == moved.mask_boxes.tolist() == [[-1, -1, 7, 7], [9, -3, 11, -1]]
    cut = boxes_from_masks(moved)
    assert cut.classes.tolist() == [1]
    # In input pixels the set cells were rows 2..4 of columns 2..8, and rows 4..6 of columns 4..6; (4, 0) is below.
    assert cut.boxes.tolist() == [[1, 0, 4, 3]]
    # Rows 1..3 and columns 0..2 of the bits lie in the window, the outermost in part.
    assert cut.mask_boxes.tolist() == [[-1, -1, 5, 5]]
    assert cut.mask_sizes.tolist() == [[3, 3]]
    assert np.unpackbits(cut.mask_bits)[:9].tolist() == [0, 1, 1, 0, 0, 1, 0, 0, 0]
    assert drawn(cut)[0].astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]


def test_the_canvas_is_the_limit_and_the_scale_is_relative_to_it(sample: Sample) -> None:
    assert large_scale_jitter(sample, (1.0, 1.0), (96, 128), (0.3, 0.5, 0.5)).image.shape == (96, 128, 3)
    assert large_scale_jitter(sample, (0.5, 0.5), (96, 128), (0.3, 0.5, 0.5)).image.shape == (48, 64, 3)
    assert large_scale_jitter(sample, (2.0, 2.0), (96, 128), (0.3, 0.5, 0.5)).image.shape == (96, 128, 3)
    assert large_scale_jitter(sample, (0.001, 0.001), (96, 128), (0.3, 0.5, 0.5)).image.shape == (1, 1, 3)


def test_short_sides_are_those_of_the_list(sample: Sample) -> None:
    shapes = {
        jitter_short_side(sample, (24, 48), 8, (48, 64), draw).image.shape[:2] for draw in np.linspace(0, 0.999, 50)
    }
    assert shapes == {(24, 32), (32, 43), (40, 53), (48, 64)}
    assert jitter_short_side(sample, (48, 48), 1, (48, 64), 0.5) is sample
    assert jitter_short_side(sample, (96, 96), 1, (48, 64), 0.5) is sample  # the canvas holds no more
    assert jitter_short_side(sample, (96, 96), 1, (200, 110), 0.5).image.shape[:2] == (82, 110)  # a long side's end


def test_short_side_keeps_the_annotated_boxes(sample: Sample) -> None:
    half = jitter_short_side(sample, (24, 24), 1, (48, 64), 0.0)
    np.testing.assert_allclose(half.boxes, sample.boxes / 2)
    np.testing.assert_allclose(half.mask_boxes, sample.mask_boxes / 2)
    np.testing.assert_array_equal(half.mask_bits, sample.mask_bits)


def test_an_image_without_objects() -> None:
    empty = pack_sample(noise(48, 64), [])
    for scales in ((0.2, 0.2), (2.0, 2.0)):
        jittered = large_scale_jitter(empty, scales, (64, 64), (0.5, 0.5, 0.5))
        assert (len(jittered.classes), jittered.boxes.shape, jittered.mask_sizes.shape) == (0, (0, 4), (0, 2))
        assert jittered.mask_bits.size == 0
