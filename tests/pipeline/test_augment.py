import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as reference

from pipeline.augment import augment, change_colours, flip
from pipeline.config import AugmentSettings
from pipeline.preprocess import resize_image, unpack_mask
from pipeline.sample import Sample, mask_offsets, sample_from_row
from tests.pipeline.factories import Bitmap, bitmap_of, ellipse_polygon, noise, png, record_of, row_of


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """Three objects whose boxes have whole numbers, at the image's own size."""
    rng = np.random.default_rng(3)
    bitmaps = [bitmap_of([ellipse_polygon(rng, 48, 64)], 48, 64) for _ in range(3)]
    (tmp_path / "image.png").write_bytes(png(noise(48, 64)))
    return sample_from_row(row_of(record_of(tmp_path / "image.png", bitmaps, 48, 64), canvases=((48, 64),)))


@pytest.fixture
def empty(tmp_path: Path) -> Sample:
    (tmp_path / "empty.png").write_bytes(png(noise(48, 64)))
    return sample_from_row(row_of(record_of(tmp_path / "empty.png", [], 48, 64)))


def assert_same(found: Sample, expected: Sample) -> None:
    for field in dataclasses.fields(Sample):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), err_msg=field.name)


def bitmaps_of(sample: Sample) -> list[Bitmap]:
    """Masks as full bitmaps of the image."""
    offsets = mask_offsets(sample.mask_sizes)
    full = []
    for index, (x0, y0, x1, y1) in enumerate(sample.mask_boxes.astype(int)):
        bitmap = np.zeros(sample.image.shape[:2], dtype=bool)
        bits = sample.mask_bits[offsets[index] : offsets[index + 1]]
        bitmap[y0:y1, x0:x1] = unpack_mask(bits, y1 - y0, x1 - x0)
        full.append(bitmap)
    return full


def test_flip_by_hand() -> None:
    sample = Sample(
        image=np.arange(2 * 10 * 3, dtype=np.uint8).reshape(2, 10, 3),
        classes=np.array([1], dtype=np.int32),
        is_crowd=np.array([False]),
        boxes=np.array([[1, 0, 4, 1]], dtype=np.float32),
        mask_boxes=np.array([[1, 0, 4, 2]], dtype=np.float32),
        mask_sizes=np.array([[2, 3]], dtype=np.int32),
        mask_bits=np.array([0b11001000], dtype=np.uint8),  # 110 / 010
    )
    mirrored = flip(sample, axis=1)
    assert mirrored.boxes.tolist() == [[6, 0, 9, 1]]
    assert mirrored.mask_boxes.tolist() == [[6, 0, 9, 2]]
    assert mirrored.mask_bits.tolist() == [0b01101000]  # 011 / 010
    assert mirrored.image[0, 0].tolist() == [27, 28, 29]
    upside_down = flip(sample, axis=0)
    assert upside_down.boxes.tolist() == [[1, 1, 4, 2]]
    assert upside_down.mask_boxes.tolist() == [[1, 0, 4, 2]]
    assert upside_down.mask_bits.tolist() == [0b01011000]  # 010 / 110
    assert upside_down.image[0, 0].tolist() == [30, 31, 32]


@pytest.mark.parametrize("axis", [0, 1])
def test_twice_is_the_identity(sample: Sample, empty: Sample, axis: int) -> None:
    once = flip(sample, axis)
    assert not np.array_equal(once.image, sample.image)
    assert not np.array_equal(once.boxes, sample.boxes)
    assert not np.array_equal(once.mask_bits, sample.mask_bits)
    assert_same(flip(once, axis), sample)
    assert_same(flip(flip(empty, axis), axis), empty)


@pytest.mark.parametrize("axis", [0, 1])
def test_masks_move_with_the_pixels(sample: Sample, axis: int) -> None:
    flipped = flip(sample, axis)
    np.testing.assert_array_equal(flipped.image, np.flip(sample.image, axis))
    for before, after in zip(bitmaps_of(sample), bitmaps_of(flipped), strict=True):
        np.testing.assert_array_equal(after, np.flip(before, axis))


def test_the_two_flips_commute(sample: Sample) -> None:
    assert_same(flip(flip(sample, 0), 1), flip(flip(sample, 1), 0))


def test_share_of_zero_and_one(sample: Sample) -> None:
    rng = np.random.default_rng(0)
    assert_same(augment(sample, AugmentSettings(horizontal_flip=0, vertical_flip=0), rng), sample)
    assert_same(augment(sample, AugmentSettings(horizontal_flip=1, vertical_flip=0), rng), flip(sample, 1))
    assert_same(augment(sample, AugmentSettings(horizontal_flip=0, vertical_flip=1), rng), flip(sample, 0))
    both = augment(sample, AugmentSettings(horizontal_flip=1, vertical_flip=1), rng)
    assert_same(both, flip(flip(sample, 0), 1))


def test_share_is_kept_and_the_two_are_independent(sample: Sample) -> None:
    settings = AugmentSettings(horizontal_flip=0.3, vertical_flip=0.8)
    counts = np.zeros((2, 2))
    variants = [[sample, flip(sample, 0)], [flip(sample, 1), flip(flip(sample, 1), 0)]]
    for seed in range(1000):
        image = augment(sample, settings, np.random.default_rng(seed)).image
        matches = [(h, v) for h in (0, 1) for v in (0, 1) if np.array_equal(image, variants[h][v].image)]
        counts[matches[0]] += 1
    expected = np.outer([0.7, 0.3], [0.2, 0.8])
    np.testing.assert_allclose(counts / 1000, expected, atol=0.06)  # four standard deviations


def test_number_of_draws_depends_on_nothing(sample: Sample, empty: Sample) -> None:
    """So that a further augmentation gets the same draws whatever happens before it."""
    after = []
    for given in (sample, empty):
        for settings in (AugmentSettings(horizontal_flip=0), AugmentSettings(horizontal_flip=1, vertical_flip=1)):
            rng = np.random.default_rng(5)
            augment(given, settings, rng)
            after.append(rng.random())
    assert len(set(after)) == 1


def test_input_is_left_alone(sample: Sample) -> None:
    before = {field.name: getattr(sample, field.name).copy() for field in dataclasses.fields(Sample)}
    augment(sample, AugmentSettings(horizontal_flip=1, vertical_flip=1), np.random.default_rng(0))
    assert_same(sample, Sample(**before))


def test_colours_change_as_torchvision_changes_them() -> None:
    pixels = noise(20, 30, seed=4)
    picture = Image.fromarray(pixels)
    cases = [
        (change_colours(pixels, 1.4, 1, 1, 0), reference.adjust_brightness(picture, 1.4)),
        (change_colours(pixels, 1, 0.6, 1, 0), reference.adjust_contrast(picture, 0.6)),
        (change_colours(pixels, 1, 1, 0.3, 0), reference.adjust_saturation(picture, 0.3)),
        (change_colours(pixels, 1, 1, 1, 0.2), reference.adjust_hue(picture, 0.2)),
        (change_colours(pixels, 1, 1, 1, -0.2), reference.adjust_hue(picture, -0.2)),
    ]
    for index, (found, expected) in enumerate(cases):
        np.testing.assert_array_equal(found, np.asarray(expected), err_msg=str(index))
        assert not np.array_equal(found, pixels)
    np.testing.assert_array_equal(change_colours(pixels, 1, 1, 1, 0), pixels)


def test_colour_jitter_leaves_masks_and_boxes_alone(sample: Sample) -> None:
    settings = AugmentSettings(horizontal_flip=0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    changed = augment(sample, settings, np.random.default_rng(0))
    assert not np.array_equal(changed.image, sample.image)
    assert_same(dataclasses.replace(changed, image=sample.image), sample)


def test_scale_comes_from_the_settings_and_is_bounded_by_the_canvas(sample: Sample) -> None:
    short = AugmentSettings(short_side=(24, 24), horizontal_flip=0)
    assert augment(sample, short, np.random.default_rng(0)).image.shape == (24, 32, 3)
    large = AugmentSettings(large_scale_jitter=(2.0, 2.0), horizontal_flip=0)
    assert augment(sample, large, np.random.default_rng(0)).image.shape == (48, 64, 3)
    assert augment(sample, large, np.random.default_rng(0), (96, 96)).image.shape == (96, 96, 3)
    with pytest.raises(ValueError, match="both set the scale"):
        AugmentSettings(short_side=(24, 24), large_scale_jitter=(0.1, 2.0))
    with pytest.raises(ValueError, match="has to rise"):
        AugmentSettings(short_side=(25, 24))


@pytest.mark.parametrize("stored", [(48, 64), (97, 129), (30, 40)])
def test_what_is_drawn_does_not_depend_on_the_stored_size(tmp_path: Path, stored: tuple[int, int]) -> None:
    """Kept at the size on the canvas, larger or smaller: same sizes, same boxes, same mask bits."""
    rng = np.random.default_rng(5)
    bitmaps = [bitmap_of([ellipse_polygon(rng, 97, 129)], 97, 129) for _ in range(3)]
    (tmp_path / "image.png").write_bytes(png(noise(97, 129)))
    values = row_of(record_of(tmp_path / "image.png", bitmaps, 97, 129), canvases=((48, 64),))
    planned = (values["image_height"], values["image_width"])
    assert planned == (48, 64)
    pixels = values["image"].reshape(*planned, 3)
    other = resize_image(pixels, *stored)
    kept = {**values, "image_height": stored[0], "image_width": stored[1], "image": other.ravel()}
    variants = (
        AugmentSettings(horizontal_flip=0.5),
        AugmentSettings(horizontal_flip=0.5, short_side=(20, 48)),
        AugmentSettings(horizontal_flip=0.5, large_scale_jitter=(0.3, 2.0)),
    )
    for settings in variants:
        for seed in range(10):
            expected = augment(sample_from_row(values), settings, np.random.default_rng(seed), (48, 64))
            found = augment(sample_from_row(kept), settings, np.random.default_rng(seed), (48, 64), planned)
            assert found.image.shape == expected.image.shape
            np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)
            np.testing.assert_allclose(found.mask_boxes, expected.mask_boxes, atol=1e-4)
            np.testing.assert_array_equal(found.mask_sizes, expected.mask_sizes)
            np.testing.assert_array_equal(found.mask_bits, expected.mask_bits)
    one = AugmentSettings(horizontal_flip=0, large_scale_jitter=(1.0, 1.0))
    drawn = augment(sample_from_row(kept), one, np.random.default_rng(0), (48, 64), planned)
    assert drawn.image.shape == (48, 64, 3)
    plain = AugmentSettings(horizontal_flip=0)
    unchanged = augment(sample_from_row(kept), plain, np.random.default_rng(0), (48, 64), planned)
    assert unchanged.image.shape == (48, 64, 3)
    np.testing.assert_allclose(unchanged.boxes, sample_from_row(values).boxes, atol=1e-4)
