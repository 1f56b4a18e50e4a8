import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.structures import Detections
from pipeline import report
from pipeline.report import _COLOURS, draw_comparison, draw_objects
from tests.pipeline.factories import Pixels, noise, png, record_of, row_of


@pytest.fixture(autouse=True)
def side(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the numbers below can be worked out whatever size people find good to look at."""
    monkeypatch.setattr(report, "MIN_PICTURE_SIDE", 256)


NO_MASKS = np.zeros((0, 300, 300), dtype=bool)
NO_BOXES = np.zeros((0, 4), dtype=np.float32)
NAMES = ("cat", "dog")


def found(*scores: float) -> Detections:
    number = len(scores)
    return Detections(
        boxes=torch.tensor([[10.0, 5.0, 30.0, 25.0]] * number).reshape(number, 4),
        scores=torch.tensor(scores),
        classes=torch.ones(number, dtype=torch.int64),
        mask_probabilities=torch.ones(number, 28, 28),
    )


def row(folder: Path, num_objects: int, height: int = 48, width: int = 64) -> dict[str, Any]:
    bitmaps = []
    for index in range(num_objects):
        bitmap = np.zeros((height, width), dtype=bool)
        bitmap[8 + index : 20, 4 + 20 * index : 20 + 20 * index] = True
        bitmaps.append(bitmap)
    (folder / "image.png").write_bytes(png(noise(height, width)))
    return row_of(record_of(folder / "image.png", bitmaps, height, width))


def pixels(file: bytes) -> Pixels:
    with Image.open(io.BytesIO(file)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_nothing_to_draw_leaves_the_image() -> None:
    image = noise(300, 300)
    np.testing.assert_array_equal(np.asarray(draw_objects(image, NO_MASKS, NO_BOXES, [], [])), image)


def test_small_image_is_enlarged_by_a_whole_factor() -> None:
    image = noise(100, 70)
    drawn = np.asarray(draw_objects(image, NO_MASKS, NO_BOXES, [], []))
    np.testing.assert_array_equal(drawn, image.repeat(4, axis=0).repeat(4, axis=1))  # 70 * 4 = 280 >= 256


def test_mask_and_box_by_hand() -> None:
    image = np.full((300, 300, 3), 100, dtype=np.uint8)
    masks = np.zeros((1, 300, 300), dtype=bool)
    masks[0, 120:130, 120:130] = True
    boxes = np.array([[100, 110, 200, 210]], dtype=np.float32)
    drawn = np.asarray(draw_objects(image, masks, boxes, [""], [1]))
    colour = np.array(_COLOURS[1])
    expected = image.copy()
    expected[119:131, 120:130] = expected[120:130, 119:131] = 50  # darker around it, but not beyond corners
    expected[120:130, 120:130] = colour  # its outline
    expected[121:129, 121:129] = (100 + colour) // 2
    expected[110, 100:200] = expected[209, 100:200] = colour  # right and bottom are exclusive
    expected[110:210, 100] = expected[110:210, 199] = colour
    np.testing.assert_array_equal(drawn, expected)


def test_the_outline_of_an_enlarged_mask_is_a_pixel_wide() -> None:
    """A ring: its hole has an outline, too, and what is in the hole stays but for the dark line along it."""
    image = np.full((100, 100, 3), 100, dtype=np.uint8)
    masks = np.zeros((1, 100, 100), dtype=bool)
    masks[0, 20:50, 30:60] = True
    masks[0, 30:40, 40:50] = False
    outside = np.full((1, 4), 400, dtype=np.float32)
    drawn = np.asarray(draw_objects(image, masks, outside, [""], [2]))
    colour = np.array(_COLOURS[2])
    expected = image.repeat(3, axis=0).repeat(3, axis=1)
    expected[59:151, 90:180] = expected[60:150, 89:181] = 50
    expected[60:150, 90:180] = colour
    expected[61:149, 91:179] = (100 + colour) // 2
    expected[90:120, 119] = expected[90:120, 150] = expected[89, 120:150] = expected[120, 120:150] = colour
    expected[90:120, 120:150] = 50
    expected[91:119, 121:149] = 100
    np.testing.assert_array_equal(drawn, expected)


def test_an_empty_mask_draws_nothing() -> None:
    image = noise(300, 300)
    masks = np.zeros((1, 300, 300), dtype=bool)
    outside = np.full((1, 4), 400, dtype=np.float32)
    np.testing.assert_array_equal(np.asarray(draw_objects(image, masks, outside, [""], [0])), image)


def test_colours_repeat_beyond_the_last() -> None:
    image = np.zeros((300, 300, 3), dtype=np.uint8)
    boxes = np.array([[0, 0, 10, 10]], dtype=np.float32)
    masks = np.ones((1, 300, 300), dtype=bool)
    first = np.asarray(draw_objects(image, masks, boxes, [""], [3]))
    again = np.asarray(draw_objects(image, masks, boxes, [""], [3 + len(_COLOURS)]))
    np.testing.assert_array_equal(first, again)


def test_degenerate_box_is_drawn() -> None:
    image = noise(300, 300)
    boxes = np.array([[50, 60, 50, 60]], dtype=np.float32)
    picture = draw_objects(image, np.zeros((1, 300, 300), dtype=bool), boxes, ["cat"], [0])
    assert picture.size == draw_objects(image, NO_MASKS, NO_BOXES, [], []).size


@pytest.mark.parametrize("box", [(20, 20, 30, 30), (140, 150, 165, 175), (270, 0, 299, 30), (0, 280, 300, 300)])
def test_a_label_does_not_hide_its_object(box: tuple[int, int, int, int]) -> None:
    boxes = np.array([box], dtype=np.float32)
    masks = np.zeros((1, 300, 300), dtype=bool)
    without, labelled = (
        np.asarray(draw_objects(noise(300, 300), masks, boxes, [label], [1])) for label in ("", "wheat grain 1.00")
    )
    changed = (without != labelled).any(axis=2)
    assert changed.any()
    assert not changed[box[1] : box[3], box[0] : box[2]].any()


def test_words_of_a_label_stand_apart() -> None:
    """Nothing between two letters is as wide as the space."""
    boxes = np.array([[20, 150, 40, 170]], dtype=np.float32)
    black, masks = np.zeros((300, 300, 3), dtype=np.uint8), np.zeros((1, 300, 300), dtype=bool)
    without, labelled = (np.asarray(draw_objects(black, masks, boxes, [label], [1])) for label in ("", "wheat grain"))
    inked = np.flatnonzero(abs(labelled.astype(int) - without).max(axis=(0, 2)) > 80)  # without what is blurred
    *between_letters, between_words = sorted(np.diff(inked).tolist())
    assert between_words > between_letters[-1] > 1


def test_sheet_has_a_line_for_each_row(tmp_path: Path) -> None:
    rows = [(row(tmp_path, 2), found(0.9, 0.3)), (row(tmp_path, 0), found()), (row(tmp_path, 1, 64, 48), found(0.6))]
    sheet = pixels(draw_comparison(rows, NAMES))
    # 48 x 64 pixels are enlarged 6 times; two pictures beside each other, 12 pixels between all, 44 for the titles,
    # 28 for a name.
    assert sheet.shape == (44 + 28 + 288 + 12 + 28 + 288 + 12 + 28 + 384 + 12, 12 + 384 + 12 + 384 + 12, 3)
    # The last one, 288 pixels wide, stands in the middle of its column.
    ground = np.flatnonzero((sheet[-100] == (228, 231, 235)).all(axis=1))
    beside = [range(12, 60), range(348, 396), range(408, 456), range(744, 792)]
    assert ground.tolist() == [column for columns in beside for column in columns]


def test_every_image_has_its_name(tmp_path: Path) -> None:
    values = row(tmp_path, 1)
    first, second, long, other_end = (
        pixels(draw_comparison([(values | {"file_name": name}, found())], NAMES))
        for name in ("a.png", "b.png", "x" * 500 + ".png", "x" * 500 + ".jpg")
    )
    for one, other in ((first, second), (long, other_end)):
        changed = np.flatnonzero((one != other).any(axis=(1, 2)))
        assert 44 <= changed.min() <= changed.max() < 44 + 28
    assert (long[44:72, -12:] == 255).all()


def test_ground_truth_is_left_and_predictions_are_right(tmp_path: Path) -> None:
    values = row(tmp_path, 0)
    before = pixels(draw_comparison([(values, found())], NAMES))
    left, right = before[72:360, 12:396], before[72:360, 408:792]
    np.testing.assert_array_equal(left, right)
    np.testing.assert_array_equal(
        left[::6, ::6], np.asarray(Image.fromarray(values["image"].reshape(64, 85, 3)).resize((64, 48)))
    )
    after = pixels(draw_comparison([(values, found(0.9))], NAMES))
    changed = np.flatnonzero((after != before).any(axis=(0, 2)))
    # Mask and box reach from 10 to 30 original pixels, six times enlarged, with a dark pixel around the mask; the label
    # stands above or below.
    assert changed.min() == 408 + 60 - 1
    assert changed.max() <= 408 + 180 + 60
    truth = pixels(draw_comparison([(row(tmp_path, 1), found())], NAMES))
    changed = np.flatnonzero((truth != before).any(axis=(0, 2)))
    assert changed.min() == 12 + 4 * 6 - 1
    assert changed.max() < 396


def test_unsure_detections_are_not_shown(tmp_path: Path) -> None:
    values = row(tmp_path, 1)
    without = draw_comparison([(values, found())], NAMES)
    assert draw_comparison([(values, found(0.49, 0.2))], NAMES) == without
    assert draw_comparison([(values, found(0.9, 0.2))], NAMES) == draw_comparison([(values, found(0.9))], NAMES)
    assert draw_comparison([(values, found(0.5))], NAMES) != without


def test_class_is_written_where_there_are_several(tmp_path: Path) -> None:
    values = row(tmp_path, 1)
    assert draw_comparison([(values, found())], ("cat", "dog")) != draw_comparison([(values, found())], ("cow", "dog"))
    # With a single class its name on every object would only hide the picture.
    assert draw_comparison([(values, found())], ("cat",)) == draw_comparison([(values, found())], ("cow",))


@pytest.mark.parametrize("names", [("nucleus",), NAMES])
def test_objects_are_told_apart(tmp_path: Path, names: tuple[str, ...]) -> None:
    """By class where there are several, each by itself where there is one."""
    values = row(tmp_path, 2)
    values["classes"] = np.array([1, 1], dtype=np.int32)
    sheet = pixels(draw_comparison([(values, found())], names))
    left = sheet[72:360, 12:396]
    # Bottom edges of the two boxes: row 19, columns 4 to 20 and 24 to 40, enlarged.
    first, second = left[20 * 6 - 1, 10 * 6], left[20 * 6 - 1, 30 * 6]
    assert tuple(first) in _COLOURS
    assert tuple(second) in _COLOURS
    assert (tuple(first) == tuple(second)) is (len(names) > 1)


def test_a_long_thin_image_is_not_enlarged_beyond_bounds() -> None:
    drawn = draw_objects(noise(1, 20000), NO_MASKS, NO_BOXES, [], [])
    assert max(drawn.size) <= 1024
    assert draw_objects(noise(100, 500), NO_MASKS, NO_BOXES, [], []).size == (1000, 200)


def test_lines_of_a_reduced_picture_are_a_pixel_wide() -> None:
    """A mask and a box of a large image, which is shown at a quarter of its size."""
    image = np.full((400, 800, 3), 100, dtype=np.uint8)
    masks = np.zeros((1, 400, 800), dtype=bool)
    masks[0, 100:200, 400:600] = True
    boxes = np.array([[40, 80, 120, 160]], dtype=np.float32)
    drawn = np.asarray(draw_objects(image, masks, boxes, [""], [1], largest_side=200))
    colour = np.array(_COLOURS[1])
    expected = np.full((100, 200, 3), 100)
    expected[24:51, 100:150] = expected[25:50, 99:151] = 50
    expected[25:50, 100:150] = colour
    expected[26:49, 101:149] = (100 + colour) // 2
    expected[20:40, 10:30] = colour
    expected[21:39, 11:29] = 100
    np.testing.assert_array_equal(drawn, expected)
