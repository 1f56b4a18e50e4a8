import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.coco import (
    Dropped,
    ImageRecord,
    check_files_exist,
    check_records,
    classes_of_source,
    count_reasons,
    read_coco_file,
    unite_classes,
)
from pipeline.config import CocoSource
from pipeline.errors import UserError
from tests.pipeline.factories import ANIMALS, BIRDS, CLASS_NAMES, class_map, coco_content, coco_file, rle_string

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


def changed(part: str, **values: Any) -> dict[str, Any]:
    """The good file with other values in its first image, annotation or category."""
    content = copy.deepcopy(GOOD)
    content[part][0] |= values
    return content


def with_rle(counts: Any, size: Any = (10, 20)) -> dict[str, Any]:
    return changed("annotations", segmentation={"size": list(size), "counts": counts})


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
        ({"id": 7, "name": "bird"}, "id 7 or name 'bird' stands there twice"),
        ({"id": 5, "name": "cat"}, "id 5 or name 'cat' stands there twice"),
    ],
)
def test_bad_category_is_refused(category: dict[str, Any], expected: str) -> None:
    content = {**GOOD, "categories": [*GOOD["categories"], category]}
    with pytest.raises(UserError) as caught:
        unite_classes([coco_file(content)])
    assert expected in str(caught.value)
    assert str(caught.value).startswith("/data/instances.json: ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed("images", id=None), "has no integer id"),
        (changed("images", id="4"), "has no integer id"),
        (changed("images", id=2**63), "has no integer id"),  # the shards could not hold it
        ({**GOOD, "images": GOOD["images"] * 2}, "image id 4 stands there twice"),
        (changed("images", file_name=""), "image 4 has no file_name"),
        (changed("images", file_name=3), "image 4 has no file_name"),
        (changed("images", file_name="../a.png"), "file_name '../a.png' leaves the images folder"),
        (changed("images", file_name="b/../../a.png"), "leaves the images folder"),
        (changed("images", file_name="/etc/a.png"), "file_name '/etc/a.png' leaves the images folder"),
        (changed("images", file_name="..\\a.png"), "leaves the images folder"),
        (changed("images", height=0), "image 4 (a.png): height is 0, expected a positive integer"),
        (changed("images", width=2.5), "image 4 (a.png): width is 2.5, expected a positive integer"),
        (changed("images", width=None), "width is None"),
        (changed("annotations", id=None), "has no integer id"),
        ({**GOOD, "annotations": GOOD["annotations"] * 2}, "annotation id 1 stands there twice"),
        (changed("annotations", image_id=5), "annotation 1: image_id 5 is none of the images"),
        (changed("annotations", image_id=[4]), "annotation 1: image_id [4] is none of the images"),
        (changed("annotations", image_id=None), "image_id None is none of the images"),
        (changed("annotations", category_id=1), "annotation 1: category_id 1 is none of the categories"),
        (changed("annotations", category_id={}), "category_id {} is none of the categories"),
        (changed("annotations", bbox=None), "annotation 1: bbox None is not four finite numbers"),
        (changed("annotations", bbox=[1, 2, 3]), "is not four finite numbers"),
        (changed("annotations", bbox=[1, 2, 3, float("nan")]), "is not four finite numbers"),
        (changed("annotations", bbox=[1, 2, 3, float("inf")]), "is not four finite numbers"),
        (changed("annotations", bbox=[1, 2, 3, 10**400]), "is not four finite numbers"),
        (changed("annotations", bbox=[1, 2, 3, "4"]), "is not four finite numbers"),
        (changed("annotations", area=float("nan")), "annotation 1: area nan is not a finite number"),
        (changed("annotations", segmentation=None), "annotation 1: no segmentation"),
        (changed("annotations", segmentation=[1, 2, 3, 4, 5, 6]), "a polygon is not a list of finite numbers"),
        (changed("annotations", segmentation=[[1, 2, 3, 4, 5, float("inf")]]), "not a list of finite numbers"),
        (changed("annotations", segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "an odd number of coordinates"),
        (with_rle([200], size=(20, 10)), "RLE size [20, 10] is not that of its image"),
        (with_rle(None), "RLE counts are neither a string nor a list of integers"),
        (with_rle([1.5, 198.5]), "RLE counts are neither a string nor a list of integers"),
        (with_rle([199]), "annotation 1: RLE counts do not add up to the image"),
        (with_rle([-1, 201]), "RLE counts do not add up to the image"),
        (with_rle([]), "RLE counts do not add up to the image"),
        (with_rle(""), "RLE counts do not add up to the image"),
        (with_rle("abc"), "RLE counts do not add up to the image"),
        (with_rle("\u00e9!"), "RLE counts do not add up to the image"),
        (with_rle(rle_string(np.eye(10, 20, dtype=bool))["counts"][:-1]), "RLE counts do not add up to the image"),
    ],
)
def test_record_that_must_not_be_guessed_is_an_error(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        check_records(coco_file(content), 0, class_map())
    message = str(caught.value)
    assert message.startswith("/data/instances.json: ")
    assert expected in message
    assert "\n" not in message


def test_further_problems_are_counted() -> None:
    content = copy.deepcopy(GOOD)
    content["annotations"] = [{**GOOD["annotations"][0], "id": number, "category_id": 99} for number in range(4)]
    with pytest.raises(UserError, match=r"annotation 0: category_id 99 .* \(and 3 more problems\)$"):
        check_records(coco_file(content), 0, class_map())


def test_compressed_rle_of_any_mask_is_accepted() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((10, 20)) < share for share in (0.02, 0.3, 0.5, 0.9) for _ in range(20)]
    masks += [np.zeros((10, 20), dtype=bool), np.ones((10, 20), dtype=bool)]
    for mask in masks:
        records, dropped = check_records(coco_file(with_rle(rle_string(mask)["counts"])), 0, class_map())
        assert (len(records[0].annotations), dropped) == (1, [])


def test_run_of_many_digits_is_accepted() -> None:
    mask = np.zeros((1000, 1000), dtype=np.uint8, order="F")
    mask[3, 999] = 1  # one run of 999,003: four characters
    content = changed("images", height=1000, width=1000)
    counts = coco_mask.encode(mask)["counts"].decode("ascii")
    content["annotations"][0]["segmentation"] = {"size": [1000, 1000], "counts": counts}
    records, _ = check_records(coco_file(content), 0, class_map())
    assert len(records[0].annotations) == 1


def test_records_come_in_the_order_of_image_ids_with_their_annotations() -> None:
    content = {
        "images": [
            {"id": 9, "file_name": "sub/nine.png", "height": 10, "width": 20},
            {"id": 4, "file_name": "four.png", "height": 30, "width": 40},
        ],
        "annotations": [
            {**GOOD["annotations"][0], "image_id": 9, "category_id": 3, "iscrowd": 1, "area": 5.5},
            {**GOOD["annotations"][0], "id": 2, "image_id": 9},
        ],
        "categories": GOOD["categories"],
    }
    records, dropped = check_records(coco_file(content), 1, class_map())
    assert dropped == []
    assert [(r.image_id, r.file_name, r.path, r.height, r.width, r.source) for r in records] == [
        (4, "four.png", "/data/images/four.png", 30, 40, 1),
        (9, "sub/nine.png", "/data/images/sub/nine.png", 10, 20, 1),
    ]
    assert records[0].annotations == ()
    first, second = records[1].annotations
    assert (first.annotation_id, first.class_id, first.is_crowd, first.area) == (1, 2, True, 5.5)
    assert (second.annotation_id, second.class_id, second.is_crowd, second.area) == (2, 1, False, 12.0)
    assert second.bbox == (1.0, 2.0, 3.0, 4.0)
    assert second.segmentation == [[1, 2, 4, 2, 4, 6]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bbox": [1, 2, 0, 4]}, "box without size (0 x 4)"),
        ({"bbox": [1, 2, 3, -4]}, "box without size (3 x -4)"),
        ({"bbox": [20, 2, 3, 4]}, "box outside the image"),
        ({"bbox": [1, 10, 3, 4]}, "box outside the image"),
        ({"bbox": [-3, 2, 3, 4]}, "box outside the image"),
        ({"bbox": [1, -4, 3, 4]}, "box outside the image"),
        ({"segmentation": []}, "no polygon with three points"),
        ({"segmentation": [[1, 2, 3, 4]]}, "no polygon with three points"),
    ],
)
def test_annotation_that_can_teach_nothing_is_dropped(values: dict[str, Any], reason: str) -> None:
    records, dropped = check_records(coco_file(changed("annotations", **values)), 2, class_map())
    assert records[0].annotations == ()
    assert dropped == [Dropped(source=2, file_name="a.png", annotation_id=1, reason=reason)]


def test_box_that_only_touches_the_image_from_within_is_kept() -> None:
    records, dropped = check_records(coco_file(changed("annotations", bbox=[19.5, 9.5, 3, 4])), 0, class_map())
    assert (len(records[0].annotations), dropped) == (1, [])


def test_parts_of_two_points_are_left_out_of_an_outline() -> None:
    """pycocotools would take four numbers for a box."""
    content = changed("annotations", segmentation=[[1, 2, 3, 4], [1, 2, 4, 2, 4, 6]])
    records, _ = check_records(coco_file(content), 0, class_map())
    assert records[0].annotations[0].segmentation == [[1, 2, 4, 2, 4, 6]]


def test_dropped_annotations_are_counted_by_kind() -> None:
    reasons = ["box without size (0 x 4)", "box without size (3 x -4)", "box outside the image"]
    assert count_reasons([Dropped(0, "a.png", 1, reason) for reason in reasons]) == {
        "box without size": 2,
        "box outside the image": 1,
    }


def test_record_survives_its_way_through_json() -> None:
    content = coco_content("x", [3, 0, 4, 2], ANIMALS, seed=5, first_id=1)  # polygons, RLE of both kinds, crowds
    records, _ = check_records(coco_file(content), 0, class_map())
    assert {type(a.segmentation) for record in records for a in record.annotations} == {list, dict}
    for record in records:
        assert "\n" not in record.to_json()
        assert ImageRecord.from_json(record.to_json()) == record


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    content = {**GOOD, "images": [{**GOOD["images"][0], "id": n, "file_name": f"sub/{n}.png"} for n in range(6)]}
    content["annotations"] = []
    file = coco_file(content, folder=str(tmp_path / "images"))
    records, _ = check_records(file, 0, class_map())
    with pytest.raises(UserError, match=r"6 of 6 images of /data/instances\.json are not there"):
        check_files_exist(file, records)
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "sub" / "3.png").touch()
    with pytest.raises(UserError) as caught:
        check_files_exist(file, records)
    assert str(caught.value).startswith(f"{tmp_path / 'images'}: 5 of 6 images ")
    assert "(sub/0.png, sub/1.png, sub/2.png)" in str(caught.value)
    for number in range(6):
        (tmp_path / "images" / "sub" / f"{number}.png").touch()
    check_files_exist(file, records)
