import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.coco import classes_of_source, read_coco_file, unite_classes
from pipeline.config import CocoSource
from pipeline.errors import UserError
from tests.pipeline.factories import ANIMALS, BIRDS, CLASS_NAMES, coco_content, coco_file

GOOD: dict[str, Any] = {
    "images": [{"id": 4, "file_name": "a.png", "height": 10, "width": 20}],
    "annotations": [
        {
            "id": 1,
            "image_id": 4,
            "category_id": 7,
            "bbox": [1, 2, 3, 4],
            "segmentation": [[1, 2, 4, 2, 4, 6]],
        }
    ],
    "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not a JSON file"),
        ("\xff\xfe", "not a JSON file"),
        ("[]", "expected a JSON object"),
        ("{}", "no list of objects named 'images'"),
        ('{"images": {}, "annotations": [], "categories": []}', "named 'images'"),
        ('{"images": [1], "annotations": [], "categories": []}', "named 'images'"),
        ('{"images": [{}], "categories": [{}]}', "named 'annotations'"),
        ('{"images": [{}], "annotations": []}', "named 'categories'"),
        ('{"images": [], "annotations": [], "categories": [{}]}', "lists no images"),
        ('{"images": [{}], "annotations": [], "categories": []}', "lists no categories"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read_coco_file(CocoSource(annotations="broken.json"), str(tmp_path))
    assert str(caught.value).startswith(f"{path}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such annotation file; set data\.root or data\.sources$"):
        read_coco_file(CocoSource(annotations="nowhere.json"), str(tmp_path))


def test_what_may_be_meant_by_a_missing_file_is_told(tmp_path: Path) -> None:
    missing = tmp_path / "fotos"
    with pytest.raises(UserError, match=rf"; there is no folder {missing}; set data\.root$"):
        read_coco_file(CocoSource(annotations="a.json"), str(missing))
    (tmp_path / "annotations").mkdir()
    for name in ("instances_default.json", "b.json", "c.json", "d.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    with pytest.raises(UserError, match=r"annotations/b\.json, annotations/c\.json, annotations/d\.json and 1 more$"):
        read_coco_file(CocoSource(annotations="a.json"), str(tmp_path))


def test_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: cannot be read"):
        read_coco_file(CocoSource(annotations="folder.json"), str(tmp_path))


def test_file_is_read_with_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    file = read_coco_file(CocoSource(annotations="good.json", images="pictures"), str(tmp_path))
    assert (file.path, file.images_folder) == (str(tmp_path / "good.json"), str(tmp_path / "pictures"))
    assert (file.images, file.annotations, file.categories) == tuple(
        GOOD[key] for key in ("images", "annotations", "categories")
    )


def test_classes_are_united_by_name_in_order_of_appearance() -> None:
    animals, birds = coco_file(coco_content("a", [1], ANIMALS, 0, 1)), coco_file(coco_content("b", [1], BIRDS, 0, 1))
    united = unite_classes([animals, birds])
    assert united.names == CLASS_NAMES  # cat, dog, bird
    assert united.num_classes == 4
    assert classes_of_source(animals, united) == ({7: 1, 3: 2}, [1, 2])
    assert classes_of_source(birds, united) == ({1: 2, 2: 3}, [2, 3])
    assert unite_classes([birds, animals]).names == ("dog", "bird", "cat")


def test_class_that_was_not_trained_is_refused() -> None:
    birds = coco_file(coco_content("b", [1], BIRDS, 0, 1))
    with pytest.raises(UserError, match=r"instances\.json: category 'bird' is none of the training classes \(cat, dog"):
        classes_of_source(birds, unite_classes([coco_file(GOOD)]))


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        ({"id": "7", "name": "bird"}, "needs an integer id and a name"),
        ({"id": True, "name": "bird"}, "needs an integer id and a name"),
        ({"id": 5, "name": ""}, "needs an integer id and a name"),
        ({"name": "bird"}, "needs an integer id and a name"),
        ({"id": 7, "name": "bird"}, "category id 7 stands there twice"),
    ],
)
def test_bad_category_is_refused(category: dict[str, Any], expected: str) -> None:
    content = {**GOOD, "categories": [*GOOD["categories"], category]}
    with pytest.raises(UserError) as caught:
        unite_classes([coco_file(content)])
    assert expected in str(caught.value)
    assert str(caught.value).startswith("/data/instances.json: ")
