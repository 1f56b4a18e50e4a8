import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from pipeline import synthetic
from pipeline.config import SyntheticSettings
from pipeline.errors import UserError
from pipeline.synthetic import (
    EMPTY_FRACTION,
    IMAGE_SIZE,
    MAX_OBJECTS,
    MIN_VISIBLE_FRACTION,
    SHAPE_NAMES,
    digest_of_shapes,
    draw_example,
    write_shapes,
)

SMALL = SyntheticSettings(training_images=30, validation_images=7, seed=5)


def test_the_data_set_is_pinned() -> None:
    """Results are comparable only while every machine trains on exactly these pixels and annotations."""
    assert digest_of_shapes(SyntheticSettings()) == "2e46ce8cbfc56ce9f3b6f70bd76f8781f094509bfed414da6b702a969ad70ddd"


def test_digest_depends_on_every_setting() -> None:
    others = [
        SMALL,
        SMALL.model_copy(update={"seed": 6}),
        SMALL.model_copy(update={"training_images": 31}),
        SMALL.model_copy(update={"validation_images": 8}),
    ]
    assert len({digest_of_shapes(settings) for settings in others}) == 4
    assert digest_of_shapes(SMALL) == digest_of_shapes(SMALL.model_copy())


def test_pictures_and_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[synthetic.Mask] = []
    draw = synthetic._draw_shape

    def remembered(rng: np.random.Generator) -> tuple[str, synthetic.Mask]:
        name, mask = draw(rng)
        drawn.append(mask)
        return name, mask

    monkeypatch.setattr(synthetic, "_draw_shape", remembered)
    counts = []
    names = set()
    hidden = 0
    for number in range(300):
        drawn.clear()
        pixels, objects = draw_example(7, "train", number)
        assert pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        assert pixels.dtype == np.uint8
        counts.append(len(objects))
        covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=int)
        for name, mask in objects:
            names.add(name)
            assert mask.shape == (IMAGE_SIZE, IMAGE_SIZE)
            assert mask.dtype == np.bool_
            for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
                assert not side.any()  # wholly inside
            whole = min(int(shape.sum()) for shape in drawn if not (mask & ~shape).any())
            assert mask.sum() >= MIN_VISIBLE_FRACTION * whole
            hidden += int(mask.sum() < whole)
            covered += mask
        assert covered.max(initial=0) <= 1  # what lies behind another shape is not visible
    assert hidden > 50  # objects do overlap
    assert names == set(SHAPE_NAMES)
    assert set(counts) == set(range(MAX_OBJECTS + 1))
    assert counts.count(0) / 300 == pytest.approx(EMPTY_FRACTION, abs=0.04)


def test_object_differs_from_what_is_behind_it() -> None:
    """The pixels of an object have its colour: their mean is far from the noise."""
    seen = 0
    for number in range(40):
        pixels, objects = draw_example(0, "val", number)
        background = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        for _, mask in objects:
            background &= ~mask
        for _, mask in objects:
            spread = pixels[mask].std(axis=0)
            assert spread.max() < 25  # one colour and noise of at most 20
            seen += int(np.abs(pixels[mask].mean(axis=0) - pixels[background].mean(axis=0)).max() > 10)
    assert seen > 60


def test_splits_and_numbers_differ() -> None:
    pictures = [draw_example(0, split, number)[0].tobytes() for split in ("train", "val") for number in range(20)]
    assert len(set(pictures)) == 40


def test_files_are_ordinary_coco(tmp_path: Path) -> None:
    assert write_shapes(str(tmp_path), SMALL)
    for split, count in (("train", 30), ("val", 7)):
        coco = COCO(str(tmp_path / "annotations" / f"instances_{split}.json"))
        assert len(coco.imgs) == count
        assert [coco.cats[number]["name"] for number in (1, 2, 3)] == list(SHAPE_NAMES)
        for number, image in enumerate(coco.imgs.values()):
            pixels, objects = draw_example(5, split, number)
            with Image.open(tmp_path / "images" / image["file_name"]) as file:
                np.testing.assert_array_equal(np.asarray(file), pixels)
            annotations = coco.imgToAnns[image["id"]]
            assert len(annotations) == len(objects)
            for annotation, (name, mask) in zip(annotations, objects, strict=True):
                assert coco.cats[annotation["category_id"]]["name"] == name
                np.testing.assert_array_equal(coco.annToMask(annotation).astype(bool), mask)
                assert annotation["area"] == mask.sum()
                x, y, width, height = annotation["bbox"]
                columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
                assert (x, y, x + width, y + height) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_small_set_is_the_beginning_of_a_large_one(tmp_path: Path) -> None:
    write_shapes(str(tmp_path / "small"), SMALL.model_copy(update={"training_images": 10}))
    write_shapes(str(tmp_path / "large"), SMALL)
    contents = [
        json.loads((tmp_path / size / "annotations" / "instances_train.json").read_text())
        for size in ("small", "large")
    ]
    small, large = contents
    assert large["images"][:10] == small["images"]
    assert large["annotations"][: len(small["annotations"])] == small["annotations"]
    for image in small["images"]:
        paths = [tmp_path / size / "images" / image["file_name"] for size in ("small", "large")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    write_shapes(str(tmp_path), SMALL)
    (tmp_path / "images" / "train_000000.png").write_bytes(b"mine")
    assert not write_shapes(str(tmp_path), SMALL)
    assert (tmp_path / "images" / "train_000000.png").read_bytes() == b"mine"


def test_interrupted_set_is_written_again(tmp_path: Path) -> None:
    """The annotations come last, so without them the images are not trusted."""
    write_shapes(str(tmp_path), SMALL)
    (tmp_path / "annotations" / "instances_val.json").unlink()
    (tmp_path / "images" / "val_000003.png").unlink()
    assert write_shapes(str(tmp_path), SMALL)
    assert (tmp_path / "annotations" / "instances_val.json").exists()
    assert (tmp_path / "images" / "val_000003.png").exists()


@pytest.mark.parametrize("change", [{"training_images": 13}, {"seed": 1}, {"validation_images": 1}])
def test_another_data_set_than_the_one_asked_for_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    write_shapes(str(tmp_path), SMALL)
    with pytest.raises(UserError, match=r"instances_train.json: holds other data than data.synthetic asks for"):
        write_shapes(str(tmp_path), SMALL.model_copy(update=change))
    assert not write_shapes(str(tmp_path), SMALL)
