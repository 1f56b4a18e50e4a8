"""What a person is told of the problems that stop a job, and of what is left out."""

import dataclasses

from pipeline.coco import CocoFile
from pipeline.problems import (
    Level,
    Problem,
    Quarantined,
    quarantine_in_words,
)
from pipeline.stops import Stop, explain_stops, find_stops
from tests.pipeline.factories import coco_file

FILE = coco_file({"images": [], "annotations": [], "categories": []})
OTHER = dataclasses.replace(FILE, path="/data/other.json", images_folder="/data/other")


def problem(kind: str, reason: str, level: Level = "annotation", name: str = "a.png", policy: str = "error") -> Problem:
    return Problem(kind, policy, level, 0, reason, 4, 1, name)


def missing(number: int) -> list[Problem]:
    return [problem("missing_file", f"image {n} is not there", "image", f"{n}.png") for n in range(number)]


def told(*found: tuple[CocoFile, Problem], listed: int = 10) -> list[Stop]:
    return find_stops(found, {(file.images_folder, file.path): listed for file in (FILE, OTHER)})


TWICE = problem("duplicate_annotation_id", "annotation id 1 stands there twice")


def test_one_problem_is_told_with_its_file_and_the_way_on() -> None:
    assert explain_stops(told((FILE, TWICE), (FILE, problem("crowd", "annotation 1 is a crowd", policy="keep")))) == (
        "/data/instances.json: a.png: annotation id 1 stands there twice; mend the data, "
        "or add --data.policies.duplicate_annotation_id drop"
    )
    assert told((FILE, problem("crowd", "annotation 1 is a crowd", policy="keep"))) == []


def test_of_many_problems_the_first_are_told() -> None:
    found = [(FILE, problem("unknown_category", f"annotation {n}: category_id 99", name="")) for n in range(5)]
    assert explain_stops(told(*found)) == (
        "/data/instances.json: annotation 0: category_id 99; /data/instances.json: annotation 1: category_id 99; "
        "/data/instances.json: annotation 2: category_id 99; and 2 more; mend the data, "
        "or add --data.policies.unknown_category drop"
    )
    image = problem("unreadable_image", "/data/images/a.png: cannot be decoded", "image")
    assert explain_stops(told((FILE, image))).startswith("/data/images/a.png: cannot be decoded; mend")


def test_missing_images_are_counted_by_file() -> None:
    found = [*((FILE, p) for p in missing(1)), *((OTHER, p) for p in missing(4))]
    assert explain_stops(told(*found)) == (
        "/data/other: 4 of 10 images of /data/other.json are not there (0.png, 1.png, 2.png, and 1 more); "
        "/data/images: 1 of 10 images of /data/instances.json are not there (0.png); "
        "set data.root or the source's images folder, or add --data.policies.missing_file drop"
    )


def test_every_kind_that_stops_is_told_with_arguments_to_paste() -> None:
    found = [problem("file_in_subfolder", "only sub/a.png is there", "image"), TWICE, TWICE, *missing(1)]
    stops = told(*((FILE, p) for p in found))
    assert [(stop.kind, stop.count) for stop in stops] == [
        ("file_in_subfolder", 1), ("duplicate_annotation_id", 2), ("missing_file", 1),
    ]  # fmt: skip
    assert explain_stops(stops) == (
        "3 kinds of problem in /data/instances.json stop the job: 1 file_in_subfolder (only sub/a.png is there), "
        "2 duplicate_annotation_id (annotation id 1 stands there twice), 1 missing_file (0.png); mend the data, or add "
        "--data.policies.file_in_subfolder fix --data.policies.duplicate_annotation_id drop "
        "--data.policies.missing_file drop (also possible: file_in_subfolder: drop)"
    )


def test_the_files_of_several_kinds_are_told() -> None:
    text = explain_stops(told((OTHER, TWICE), *((FILE, p) for p in missing(1)), (OTHER, missing(1)[0])))
    assert text.startswith("2 kinds of problem in /data/other.json, /data/instances.json stop the job: 1 duplicate")


def test_a_way_on_is_what_the_policy_allows() -> None:
    """What it is by default where that is no error: a crowd is kept, not left out."""
    for kind, way in (
        ("duplicate_category_name", "fix"),
        ("crowd", "keep (also possible: crowd: drop)"),
        ("box_beyond_edge", "keep (also possible: box_beyond_edge: fix or drop)"),
    ):
        assert explain_stops(told((FILE, problem(kind, "it is so")))).endswith(f"or add --data.policies.{kind} {way}")


def test_where_most_images_are_missing_the_folder_is_told_first_and_no_way_round_it() -> None:
    text = explain_stops(told(*((FILE, p) for p in missing(6))))
    assert text == (
        "/data/images: 6 of 10 images of /data/instances.json are not there (0.png, 1.png, 2.png, and 3 more); "
        "most likely data.root or the source's images folder is wrong"
    )
    both = told((FILE, TWICE), *((FILE, p) for p in missing(6)))
    assert explain_stops(both) == (
        f"{text}; besides 1 duplicate_annotation_id (annotation id 1 stands there twice) in "
        "/data/instances.json; for these mend the data, or add --data.policies.duplicate_annotation_id drop"
    )
    alone = explain_stops(told((FILE, missing(1)[0]), listed=1))
    assert "most likely" not in alone, "a single image tells little about its folder"


def test_annotations_that_go_with_their_image_are_told_apart() -> None:
    def left_out(kind: str, level: Level, image_id: int) -> Quarantined:
        return Quarantined(0, level, image_id, None, None, kind, "")

    entries = [
        left_out("missing_file", "image", 1),
        *[left_out("missing_file", "annotation", 1)] * 15,
        left_out("malformed_record", "image", 2),
        left_out("malformed_record", "annotation", 3),
        left_out("malformed_record", "annotation", 2),
        left_out("duplicate_image_id", "image", 3),
        left_out("box_without_size", "annotation", 3),
    ]
    assert quarantine_in_words(entries) == (
        "1 box_without_size, 1 duplicate_image_id, 2 malformed_record with their annotation, "
        "1 missing_file with its 15 annotations"
    )
