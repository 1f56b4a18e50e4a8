import copy
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipeline.coco import ImageRecord
from pipeline.config import PolicySettings
from pipeline.problems import PolicyError, Problem, Quarantined, count_kinds, quarantine_in_words, raise_errors
from pipeline.record_checks import CheckedRecords, box_problem, check_records, is_short, leaves_folder
from tests.pipeline.factories import ANIMALS, class_map, coco_content, coco_file, rle_string

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

ALL_SHORT = "no polygon with three points and an extent, so that leaving out the short ones leaves nothing"


def changed(part: str, **values: Any) -> dict[str, Any]:
    """The good file with other values in its first image, annotation or category."""
    content = copy.deepcopy(GOOD)
    content[part][0] |= values
    return content


def with_rle(counts: Any, size: Any = (10, 20)) -> dict[str, Any]:
    return changed("annotations", segmentation={"size": list(size), "counts": counts})


def check(
    content: dict[str, Any], present: list[str] | None = None, source: int = 0, **policies: str
) -> CheckedRecords:
    names = None if present is None else dict.fromkeys(present, "")
    return check_records(coco_file(content), source, class_map(), PolicySettings.model_validate(policies), names)


def kinds(checked: CheckedRecords) -> list[str]:
    return [problem.kind for problem in checked.problems]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed("images", id=None), "has no integer id"),
        (changed("images", id="4"), "has no integer id"),
        (changed("images", id=2**63), "has no integer id"),  # the shards could not hold it
        ({**GOOD, "images": GOOD["images"] * 2}, "image id 4 stands there twice"),
        (changed("images", file_name=""), "image 4 has no file_name"),
        (changed("images", file_name=None), "image 4 has no file_name"),
        (changed("images", file_name=3), "image 4 has file_name 3, which no file can have"),
        (changed("images", file_name="a\0.png"), "image 4 has file_name 'a\\x00.png', which no file can have"),
        (changed("images", file_name="\ud800.png"), "image 4 has file_name '\\ud800.png', which no file can have"),
        (changed("images", file_name="C:/data/a.png"), "file_name 'C:/data/a.png' leaves the images folder"),
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
        (changed("annotations", bbox=[0, 0, 1e300, 4]), "bbox [0, 0, 1e+300, 4] lies far outside of any image"),
        (changed("annotations", iscrowd="0"), "annotation 1: iscrowd '0' is neither 0 nor 1"),
        (changed("annotations", iscrowd=float("nan")), "annotation 1: iscrowd nan is neither 0 nor 1"),
        (changed("annotations", iscrowd=2), "annotation 1: iscrowd 2 is neither 0 nor 1"),
        (changed("annotations", segmentation=[[5, 5, 1e10, 5, 5, 9]]), "a polygon reaches far outside of any image"),
        (changed("annotations", segmentation=[[5, 5, -1e10, 5, 5, 9]]), "a polygon reaches far outside of any image"),
        (changed("annotations", segmentation=[[0, 0, 9e5, 9] * 9]), "a polygon reaches far outside of any image"),
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
    """By default an error that names it; left out and written down where the policy says so."""
    checked = check(content)
    problem = checked.problems[0]
    assert problem.policy == "error"
    assert expected in problem.reason
    with pytest.raises(PolicyError) as caught:
        raise_errors("/data/instances.json: ", checked.problems)
    message = str(caught.value)
    assert message.startswith(f"/data/instances.json: {problem.reason}")
    assert message.endswith(f"; mend it or choose another --data.policies.{problem.kind}")
    assert "\n" not in message

    policies = {"unknown_image": "drop", problem.kind: "drop"}
    dropped = check_records(coco_file(content), 0, class_map(), PolicySettings.model_validate(policies), None)
    raise_errors("", dropped.problems)
    levels = [entry.level for entry in dropped.quarantined]
    read = len(content["images"]), len(content["annotations"])
    kept = len(dropped.records), sum(len(record.annotations) for record in dropped.records)
    assert read == (kept[0] + levels.count("image"), kept[1] + levels.count("annotation"))
    assert dropped.quarantined[0].kind == problem.kind
    assert dropped.quarantined[0].reason == problem.reason


def test_further_problems_are_counted() -> None:
    content = copy.deepcopy(GOOD)
    content["annotations"] = [{**GOOD["annotations"][0], "id": number, "category_id": 99} for number in range(4)]
    with pytest.raises(PolicyError, match=r"annotation 0: category_id 99 .* \(and 3 more problems\); mend it or"):
        raise_errors("", check(content).problems)


def test_compressed_rle_of_any_mask_is_accepted() -> None:
    rng = np.random.default_rng(0)
    masks = [rng.random((10, 20)) < share for share in (0.02, 0.3, 0.5, 0.9) for _ in range(20)]
    masks += [np.zeros((10, 20), dtype=bool), np.ones((10, 20), dtype=bool)]
    for mask in masks:
        checked = check(with_rle(rle_string(mask)["counts"]))
        assert (len(checked.records[0].annotations), checked.problems) == (1, [])


def test_run_of_many_digits_is_accepted() -> None:
    mask = np.zeros((1000, 1000), dtype=np.uint8, order="F")
    mask[3, 999] = 1  # one run of 999,003: four characters
    content = changed("images", height=1000, width=1000)
    counts = coco_mask.encode(mask)["counts"].decode("ascii")
    content["annotations"][0]["segmentation"] = {"size": [1000, 1000], "counts": counts}
    assert len(check(content).records[0].annotations) == 1


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
    checked = check(content, source=1)
    records = checked.records
    assert (kinds(checked), checked.quarantined) == (["crowd", "image_without_annotations"], [])
    assert [(r.image_id, r.file_name, r.path, r.height, r.width, r.source) for r in records] == [
        (4, "four.png", "/data/images/four.png", 30, 40, 1),
        (9, "sub/nine.png", "/data/images/sub/nine.png", 10, 20, 1),
    ]
    assert records[0].annotations == ()
    first, second = records[1].annotations
    assert (first.annotation_id, first.class_id, first.is_crowd, first.area) == (1, 2, True, 5.5)
    assert (second.annotation_id, second.class_id, second.is_crowd, second.area) == (2, 1, False, None)
    assert second.bbox == (1.0, 2.0, 3.0, 4.0)
    assert second.segmentation == [[1, 2, 4, 2, 4, 6]]


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ({"bbox": [1, 2, 0, 4]}, "box_without_size", "box without size (0 x 4)"),
        ({"bbox": [1, 2, 3, -4]}, "box_without_size", "box without size (3 x -4)"),
        ({"bbox": [20, 2, 3, 4]}, "box_outside_image", "box outside the image"),
        ({"bbox": [1, 10, 3, 4]}, "box_outside_image", "box outside the image"),
        ({"bbox": [-3, 2, 3, 4]}, "box_outside_image", "box outside the image"),
        ({"bbox": [1, -4, 3, 4]}, "box_outside_image", "box outside the image"),
        ({"segmentation": []}, "empty_mask", "no polygon with three points and an extent"),
        ({"segmentation": [[1, 2, 3, 4]]}, "empty_mask", ALL_SHORT),
        ({"segmentation": [[1, 2, 3, 2, 9, 2]]}, "empty_mask", ALL_SHORT),
    ],
)
def test_annotation_that_can_teach_nothing_is_dropped(values: dict[str, Any], kind: str, reason: str) -> None:
    checked = check(changed("annotations", **values), source=2)
    assert checked.records[0].annotations == ()
    assert checked.quarantined == [Quarantined(2, "annotation", 4, 1, "a.png", kind, f"annotation 1: {reason}")]
    assert kinds(checked) == [kind, "image_without_annotations"]


def test_boxes_by_hand() -> None:
    assert box_problem([0, 0, 20, 10], 10, 20) == (None, "")
    assert box_problem([19.5, 9.5, 1.5, 1.5], 10, 20) == (None, "")  # beyond the edge by a pixel
    assert box_problem([19.5, 9.5, 3, 4], 10, 20) == ("box_beyond_edge", "box leaves the image by 3.5 pixels")
    assert box_problem([-2, 0, 4, 4], 10, 20)[0] == "box_beyond_edge"
    checked = check(changed("annotations", bbox=[19.5, 9.5, 3, 4]))
    assert (len(checked.records[0].annotations), kinds(checked)) == (1, ["box_beyond_edge"])


def test_polygons_by_hand() -> None:
    assert is_short([1, 2, 3, 4])
    assert is_short([1, 2, 1, 4, 1, 9])
    assert not is_short([1, 2, 4, 2, 4, 6])


def test_parts_without_area_are_left_out_of_an_outline() -> None:
    """pycocotools would take four numbers for a box."""
    content = changed("annotations", segmentation=[[1, 2, 3, 4], [1, 2, 4, 2, 4, 6]])
    checked = check(content)
    assert checked.records[0].annotations[0].segmentation == [[1, 2, 4, 2, 4, 6]]
    assert [(p.kind, p.policy, p.reason) for p in checked.problems] == [
        ("short_polygon", "fix", "annotation 1: 1 of 2 parts of the outline have no area")
    ]
    assert [entry.kind for entry in check(content, short_polygon="drop").quarantined] == ["short_polygon"]
    all_short = changed("annotations", segmentation=[[1, 2, 3, 4]])
    assert kinds(check(all_short, short_polygon="drop", empty_mask="error"))[0] == "short_polygon"


def test_an_id_counts_as_taken_also_where_its_first_record_is_left_out() -> None:
    content = images("gone.png", "a.png")
    content["images"][1]["id"] = 10
    content["annotations"] = [{**GOOD["annotations"][0], "image_id": 10}]
    checked = check(content, ["a.png"], missing_file="drop", duplicate_image_id="drop")
    assert kinds(checked) == ["missing_file", "duplicate_image_id"]
    assert checked.records == []
    box = {**GOOD["annotations"][0], "bbox": [1, 2, 0, 4]}
    twice = {**GOOD, "annotations": [box, GOOD["annotations"][0]]}
    assert kinds(check(twice))[:2] == ["box_without_size", "duplicate_annotation_id"]


def test_names_are_written_in_several_ways() -> None:
    checked = check(images("./a.png", "b//c.png"), ["a.png", "b/c.png"])
    assert [(r.file_name, r.path) for r in checked.records] == [
        ("./a.png", "/data/images/a.png"), ("b//c.png", "/data/images/b/c.png"),
    ]  # fmt: skip
    assert kinds(checked) == ["image_without_annotations"]


def test_a_file_of_another_folder_is_another_file() -> None:
    assert kinds(check(images("dogs/1.png"), ["cats/1.png"]))[0] == "missing_file"
    assert kinds(check(images("dogs/1.png"), ["train/dogs/1.png"]))[0] == "file_in_subfolder"


def test_file_names_that_leave_the_folder() -> None:
    for name in (
        "/a.png",
        "../a.png",
        "b/../../a.png",
        "..",
        "..\\a.png",
        "s3://other/a.png",
        "file:///etc/passwd",
        "C:/a.png",
    ):
        assert leaves_folder(name), name
    for name in ("a.png", "sub/a.png", "a..png", "..a/b.png", "sub/.hidden"):
        assert not leaves_folder(name), name


def test_record_survives_its_way_through_json() -> None:
    content = coco_content("x", [3, 0, 4, 2], ANIMALS, seed=5, first_id=1)  # polygons, RLE of both kinds, crowds
    records = check(content).records
    assert {type(a.segmentation) for record in records for a in record.annotations} == {list, dict}
    for record in records:
        assert "\n" not in record.to_json()
        assert ImageRecord.from_json(record.to_json()) == record


def images(*names: str) -> dict[str, Any]:
    listed = [{**GOOD["images"][0], "id": 10 + n, "file_name": name} for n, name in enumerate(names)]
    return {**GOOD, "images": listed, "annotations": [{**GOOD["annotations"][0], "image_id": 10}]}


def test_missing_files_and_those_in_subfolders() -> None:
    content = images("a.png", "b.png", "sub/c.png", "d.png")
    present = ["sub/a.png", "sub/c.png", "x/d.png", "y/d.png"]
    checked = check(content, present)
    assert [(p.kind, p.file_name, p.policy) for p in checked.problems[:3]] == [
        ("file_in_subfolder", "a.png", "error"),
        ("missing_file", "b.png", "error"),
        ("missing_file", "d.png", "error"),
    ]
    assert "only sub/a.png is" in checked.problems[0].reason
    assert "in 2 folders below it" in checked.problems[2].reason
    mended = check(content, present, file_in_subfolder="fix", missing_file="drop")
    assert [(record.file_name, record.path) for record in mended.records] == [
        ("a.png", "/data/images/sub/a.png"), ("sub/c.png", "/data/images/sub/c.png"),
    ]  # fmt: skip
    assert [(q.kind, q.image_id) for q in mended.quarantined] == [("missing_file", 11), ("missing_file", 13)]
    dropped = check(content, present, file_in_subfolder="drop", missing_file="drop")
    assert [(q.level, q.kind, q.image_id, q.annotation_id) for q in dropped.quarantined] == [
        ("image", "file_in_subfolder", 10, None), ("image", "missing_file", 11, None),
        ("image", "missing_file", 13, None), ("annotation", "file_in_subfolder", 10, 1),
    ]  # fmt: skip


def test_what_stops_the_job_is_not_left_out() -> None:
    """Neither an image nor its annotations are in the quarantine as long as its policy is `error`."""
    content = images("gone.png", "a.png")
    content["annotations"].append({**GOOD["annotations"][0], "id": 2, "image_id": 11, "bbox": [1, 2, 0, 4]})
    assert [q.kind for q in check(content, ["a.png"]).quarantined] == ["box_without_size"]
    dropped = check(content, ["a.png"], missing_file="drop").quarantined
    assert count_kinds(dropped) == {"box_without_size": 1, "missing_file": 2}
    assert quarantine_in_words(dropped) == "1 box_without_size, 1 missing_file with its annotation"


def test_two_images_of_one_file() -> None:
    content = images("a.png", "b.png", "a.png")
    checked = check(content, ["a.png", "b.png"])
    assert count_kinds(checked.problems) == {"duplicate_file_name": 1, "image_without_annotations": 2}
    assert len(checked.records) == 3
    dropped = check(content, ["a.png", "b.png"], duplicate_file_name="drop", image_without_annotations="drop")
    assert [record.image_id for record in dropped.records] == [10]
    assert [(q.kind, q.image_id) for q in dropped.quarantined] == [
        ("duplicate_file_name", 12), ("image_without_annotations", 11),
    ]  # fmt: skip


def test_two_categories_of_one_name() -> None:
    content = {**GOOD, "categories": [*GOOD["categories"], {"id": 5, "name": "cat"}]}
    content["annotations"] = [*GOOD["annotations"], {**GOOD["annotations"][0], "id": 2, "category_id": 5}]
    with pytest.raises(PolicyError, match="category name 'cat' stands there twice"):
        raise_errors("", check(content).problems)
    mended = check(content, duplicate_category_name="fix")
    raise_errors("", mended.problems)
    assert [annotation.class_id for annotation in mended.records[0].annotations] == [1, 1]
    assert mended.quarantined == []


def test_crowds_are_kept_and_counted() -> None:
    content = changed("annotations", iscrowd=1)
    checked = check(content)
    assert (checked.records[0].annotations[0].is_crowd, kinds(checked)) == (True, ["crowd"])
    assert check(content, crowd="drop").records[0].annotations == ()


def test_every_error_is_in_what_is_raised() -> None:
    problems = [Problem("crowd", "keep", "annotation", 0, "a"), Problem("empty_mask", "error", "annotation", 0, "b")]
    with pytest.raises(
        PolicyError, match=r"^file: b; mend it or choose another --data\.policies\.empty_mask$"
    ) as caught:
        raise_errors("file: ", problems)
    assert caught.value.problems == problems
    raise_errors("", problems[:1])
