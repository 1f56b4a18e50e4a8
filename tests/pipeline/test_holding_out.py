import copy
import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.coco import CocoFile, Json
from pipeline.errors import UserError
from pipeline.holding_out import hold_out
from pipeline.prepare import prepare
from pipeline.shards import ShardSet, read_manifest
from tests.pipeline.factories import ANIMALS, BIRDS, coco_content, coco_file, experiment, two_sources


def many_images(number: int = 400) -> Json:
    return coco_content("animal", [1, 2, 0, 1] * (number // 4), ANIMALS, seed=1, first_id=50)


def names(files: Sequence[CocoFile]) -> set[str]:
    return {str(image.get("file_name")) for file in files for image in file.images}


def test_every_image_and_annotation_is_on_one_side() -> None:
    files = [coco_file(many_images()), coco_file(coco_content("bird", [2] * 100, BIRDS, seed=2, first_id=1))]
    training, validation = hold_out(files, 0.2)
    for whole, left, kept in zip(files, training, validation, strict=True):
        for part in ("images", "annotations"):
            both = [*getattr(left, part), *getattr(kept, part)]
            assert sorted(record["id"] for record in both) == sorted(record["id"] for record in getattr(whole, part))
        for side in (left, kept):
            assert {a["image_id"] for a in side.annotations} <= {image["id"] for image in side.images}
            assert (side.path, side.categories) == (whole.path, whole.categories)
    assert 70 <= len(names(validation)) <= 130, "a fifth of 500, give or take three standard deviations"


def test_an_image_stays_on_its_side() -> None:
    content = many_images()
    _, few = hold_out([coco_file(content)], 0.1)
    shuffled = copy.deepcopy(content)
    random.Random(0).shuffle(shuffled["images"])
    assert names(hold_out([coco_file(shuffled)], 0.1)[1]) == names(few)
    half = {**content, "images": content["images"][::2]}
    assert names(hold_out([coco_file(half)], 0.1)[1]) == names(few) & {i["file_name"] for i in half["images"]}
    assert names(few) < names(hold_out([coco_file(content)], 0.3)[1])


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_is_empty(fraction: float) -> None:
    file = coco_file(coco_content("animal", [1, 1], ANIMALS, seed=1, first_id=50))
    training, validation = hold_out([file], fraction)
    assert (len(names(training)), len(names(validation))) == (1, 1)
    with pytest.raises(UserError, match=r"lists one image, .* set data\.validation_sources"):
        hold_out([dataclasses.replace(file, images=file.images[:1])], fraction)


def test_records_that_are_wrong_stay_to_be_told() -> None:
    content = many_images()
    images, annotations = content["images"], content["annotations"]
    images += [{**images[3], "file_name": "again.png"}, {"file_name": "no-id.png"}, {"id": 9999}, {"id": [1]}]
    annotations += [{**annotations[0], "id": 70000, "image_id": wrong} for wrong in (None, [3], 31337)]
    training, validation = hold_out([coco_file(content)], 0.5)
    assert len(training[0].images) + len(validation[0].images) == len(images)
    twice = [side for side in (training, validation) if {images[3]["file_name"], "again.png"} & names(side)]
    assert len(twice) == 1, "records of one id stay together"
    assert sum(a["id"] == 70000 for a in training[0].annotations) == 3


def test_shards_of_one_file(local_ray: None, tmp_path: Path) -> None:
    contents = two_sources(tmp_path)
    (tmp_path / "validation.json").unlink()
    config = experiment(tmp_path, tmp_path / "runs", validation_fraction=0.3)
    said: list[str] = []
    data = prepare(config, said.append)
    in_files = {i["file_name"] for name in ("animals.json", "birds.json") for i in contents[name]["images"]}
    training, validation = (
        {str(row["file_name"]) for row in ShardSet(folder).read_rows(range(read_manifest(folder).num_rows))}
        for folder in (data.training, data.validation)
    )
    assert training | validation == in_files
    assert not training & validation
    assert f"data: keeps {len(validation)} of 21 images back to validate on (data.validation_fraction)" in said
    again: list[str] = []
    assert prepare(config, again.append) == data
    assert any("training shards are there" in line for line in again)
    other = prepare(experiment(tmp_path, tmp_path / "runs", validation_fraction=0.6), said.append)
    assert other != data


def test_images_of_both_splits_are_told_and_left_out(local_ray: None, tmp_path: Path) -> None:
    contents = two_sources(tmp_path)
    (tmp_path / "validation.json").write_bytes((tmp_path / "animals.json").read_bytes())
    said: list[str] = []
    prepare(experiment(tmp_path, tmp_path / "runs"), said.append)
    told = [line for line in said if "12 image_in_both_splits" in line]
    assert [line.split(":")[1] for line in told] == [" training problems"], said
    dropping = experiment(tmp_path, tmp_path / "runs", policies={"image_in_both_splits": "drop"})
    data = prepare(dropping, said.append)
    rows = ShardSet(data.training).read_rows(range(read_manifest(data.training).num_rows))
    assert {row["file_name"] for row in rows} == {image["file_name"] for image in contents["birds.json"]["images"]}
    with pytest.raises(UserError, match="is among the images to validate on"):
        prepare(experiment(tmp_path, tmp_path / "runs", policies={"image_in_both_splits": "error"}), said.append)
