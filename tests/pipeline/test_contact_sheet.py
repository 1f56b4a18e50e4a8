import base64
import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.coco import ImageRecord
from pipeline.contact_sheet import Tile, make_tiles
from pipeline.problems import Problem
from pipeline.report import class_colours, css_colour
from tests.pipeline.factories import Pixels, png, record_of

NAMES = ("wheat grain", "pea")


def record(folder: Path, *classes: int) -> ImageRecord:
    """A black image of 400 x 400 pixels with an object of each class, one to the right of the other."""
    bitmaps = []
    for index, _ in enumerate(classes):
        bitmap = np.zeros((400, 400), dtype=bool)
        bitmap[100:140, 20 + 120 * index : 60 + 120 * index] = True
        bitmaps.append(bitmap)
    (folder / "image.png").write_bytes(png(np.zeros((400, 400, 3), dtype=np.uint8)))
    return record_of(folder / "image.png", bitmaps, 400, 400, classes)


def picture(tile: Tile) -> Pixels:
    with Image.open(io.BytesIO(base64.b64decode(tile.picture))) as image:
        return np.asarray(image.convert("RGB")).astype(np.uint8)


def test_objects_have_the_colour_of_their_class_and_the_legend_tells_it(tmp_path: Path) -> None:
    (tile,) = make_tiles([record(tmp_path, 2, 1, 2)], [], NAMES, [])
    assert tile.objects == [("wheat grain", css_colour(1), 1), ("pea", css_colour(2), 2)]
    shown = picture(tile).astype(int)
    first, second, third = (shown[120, column] for column in (40, 160, 280))
    assert abs(first - third).max() < 10  # of a JPEG
    assert abs(first - second).max() > 50
    for colour, (_, css, _) in ((second, tile.objects[0]), (first, tile.objects[1])):
        legend = np.array([int(number) for number in css.removeprefix("rgb(").removesuffix(")").split(",")])
        assert abs(colour - legend // 2).max() < 10  # half of it, on black


def test_names_stand_beside_the_objects(tmp_path: Path) -> None:
    known = record(tmp_path, 2)
    named, other = (picture(make_tiles([known], [], names, [])[0]).astype(int) for names in (NAMES, ("", "bean")))
    changed = np.argwhere(abs(named - other).max(axis=2) > 60)
    assert len(changed)
    assert changed[:, 0].max() < 100


def test_an_annotation_with_a_problem_has_its_id(tmp_path: Path) -> None:
    known = record(tmp_path, 1, 2)
    problem = Problem("crowd", "keep", "annotation", 0, "a crowd", known.image_id, 2, known.file_name)
    (noted,) = make_tiles([known], [problem], NAMES, [])
    (plain,) = make_tiles([known], [], NAMES, [])
    assert noted.objects == plain.objects
    changed = np.argwhere(abs(picture(noted).astype(int) - picture(plain).astype(int)).max(axis=2) > 60)
    assert 140 <= changed[:, 1].min() <= changed[:, 1].max() < 260  # above the second


def test_a_single_class_needs_no_legend_and_its_objects_are_told_apart(tmp_path: Path) -> None:
    (tile,) = make_tiles([record(tmp_path, 1, 1)], [], ("nucleus",), [])
    assert tile.objects == []
    shown = picture(tile).astype(int)
    assert abs(shown[120, 40] - shown[120, 160]).max() > 50
    assert class_colours([1, 1], ("nucleus",)) == [0, 1]


def test_tiles_that_were_stored_before_there_was_a_legend_can_be_read(tmp_path: Path) -> None:
    (tile,) = make_tiles([record(tmp_path, 1)], [], NAMES, [])
    stored = json.loads(json.dumps(asdict(tile)))
    assert [tuple(entry) for entry in Tile(**stored).objects] == tile.objects
    del stored["objects"]
    assert Tile(**stored) == replace(tile, objects=[])
