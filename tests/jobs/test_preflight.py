"""Every kind of defect through the job, as a user meets it: kind, policy, quarantine, exit code, report."""

import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from jobs.prepare import main
from pipeline.command_line import run_job
from pipeline.config import PolicySettings
from pipeline.shards import ShardSet
from tests.pipeline.factories import coco_content, experiment, noise, png, write_coco

pytestmark = pytest.mark.cluster

CATEGORIES = {1: "cat", 2: "dog"}
Content = dict[str, Any]
Spoil = Callable[[Content, Path], object]


def image(**values: Any) -> Spoil:
    return lambda content, root: content["images"][0].update(values)


def annotation(**values: Any) -> Spoil:
    return lambda content, root: content["annotations"][0].update(values)


def file_content(make: Callable[[Path], bytes | None]) -> Spoil:
    """Replaces the first image's file, or removes it."""

    def spoil(content: Content, root: Path) -> None:
        path = root / "images" / content["images"][0]["file_name"]
        made = make(path)
        path.unlink()
        if made is not None:
            path.write_bytes(made)

    return spoil


def into_subfolder(content: Content, root: Path) -> None:
    path = root / "images" / content["images"][0]["file_name"]
    (root / "images" / "deeper").mkdir()
    path.rename(root / "images" / "deeper" / path.name)


def turned(path: Path) -> bytes:
    with Image.open(path) as stored:
        exif = stored.getexif()
        exif[0x0112] = 3
        buffer = io.BytesIO()
        stored.save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()


def into_validation(content: Content, root: Path) -> None:
    """The validation file lists the first image too."""
    validation = json.loads((root / "validation.json").read_text())
    validation["images"].append({**content["images"][0], "id": 4711})
    (root / "validation.json").write_text(json.dumps(validation))


def under_another_name(content: Content, root: Path) -> None:
    """The first image once more, behind the others; its copy is then the one told."""
    first = content["images"][0]
    (root / "images" / "copy.png").write_bytes((root / "images" / first["file_name"]).read_bytes())
    content["images"].append({**first, "id": 4711, "file_name": "copy.png"})


def shifted_polygon(content: Content, root: Path) -> None:
    """Outside of the image, so that it covers no pixel; the box stays."""
    content["annotations"][0]["segmentation"] = [[-30, -30, -20, -30, -20, -20]]


def added_polygon(content: Content, root: Path) -> None:
    content["annotations"][0]["segmentation"].append([1, 1, 9, 9])


def twice(part: str, **values: Any) -> Spoil:
    return lambda content, root: content[part].append({**content[part][0], **values})


BOMB = b"GIF89a" + (65535).to_bytes(2, "little") * 2 + b"\0\0\0" + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0;"

# What spoils the data, and what it is said to be at: an image or an annotation of it, first of the file.
DEFECTS: dict[str, tuple[Spoil, str]] = {
    "malformed_record": (annotation(bbox=[1, 2, 3]), "annotation"),
    "non_finite_number": (annotation(bbox=[1, 2, math.nan, 4]), "annotation"),
    "path_outside_folder": (image(file_name="../animals.json"), "image"),
    "duplicate_image_id": (twice("images"), "image"),
    "duplicate_annotation_id": (twice("annotations"), "annotation"),
    "duplicate_file_name": (twice("images", id=999), "image"),
    "duplicate_image": (under_another_name, "image"),
    "image_in_both_splits": (into_validation, "image"),
    "duplicate_category_name": (twice("categories", id=77), "category"),
    "unknown_image": (annotation(image_id=4711), "annotation"),
    "unknown_category": (annotation(category_id=0), "annotation"),
    "no_segmentation": (annotation(segmentation=None), "annotation"),
    "missing_file": (file_content(lambda path: None), "image"),
    "file_in_subfolder": (into_subfolder, "image"),
    "unreadable_image": (file_content(lambda path: path.read_bytes()[:300]), "image"),
    "decompression_bomb": (file_content(lambda path: BOMB), "image"),
    "size_mismatch": (file_content(lambda path: png(noise(64, 48))), "image"),
    "exif_orientation": (file_content(turned), "image"),
    "image_without_annotations": (lambda content, root: content["annotations"].clear(), "image"),
    "box_without_size": (annotation(bbox=[1, 2, 0, 4]), "annotation"),
    "box_outside_image": (annotation(bbox=[500, 2, 5, 4]), "annotation"),
    "box_beyond_edge": (annotation(bbox=[-20, 2, 40, 20]), "annotation"),
    "short_polygon": (added_polygon, "annotation"),
    "empty_mask": (shifted_polygon, "annotation"),
    "box_disagrees_with_mask": (annotation(bbox=[1, 1, 4, 4]), "annotation"),
    "area_disagrees_with_mask": (annotation(area=1.0), "annotation"),
    "crowd": (annotation(iscrowd=1), "annotation"),
}


def allowed(kind: str) -> tuple[str, ...]:
    policies: tuple[str, ...] = get_args(PolicySettings.model_fields[kind].annotation)
    return policies


def test_every_kind_has_its_defect() -> None:
    assert set(DEFECTS) == set(PolicySettings.model_fields)


def write_data(root: Path, spoil: Spoil) -> Content:
    """Two good images and one with a defect, the first of the file and of the annotations; valid validation data."""
    content = coco_content("animal", [1, 1, 1], CATEGORIES, seed=1, first_id=50)
    content["images"].reverse()
    content["annotations"].reverse()
    write_coco(root, "animals.json", content)
    write_coco(root, "validation.json", coco_content("val", [1], {5: "cat", 9: "dog"}, seed=3, first_id=100))
    spoil(content, root)
    (root / "animals.json").write_text(json.dumps(content))
    return content


def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the job, in this process."""
    sources = ({"annotations": "animals.json"},)
    config = experiment(tmp_path / "data", tmp_path / "runs", sources=sources, shards=str(tmp_path / "shards"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--config", str(tmp_path / "config.yaml"), *arguments])
    try:
        run_job(main)
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


@pytest.mark.parametrize("kind", list(DEFECTS))
def test_every_kind_by_every_policy(
    kind: str, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, level = DEFECTS[kind]
    content = write_data(tmp_path / "data", spoil)
    read = len(content["images"]), len(content["annotations"])
    # What the defect brings along must not stop the job.
    others = ["--data.policies.unknown_image=drop"] if kind != "unknown_image" else []
    for policy in allowed(kind):
        exit_code = prepare(tmp_path, monkeypatch, f"--data.policies.{kind}={policy}", *others)
        out, errors = capsys.readouterr()
        report = json.loads((tmp_path / "shards" / "report.json").read_text())["splits"]["training"]
        (problem,) = [problem for problem in report["problems"] if problem["kind"] == kind]
        assert (problem["policy"], len(problem["first"])) == (policy, min(20, problem["count"]))
        assert problem["first"][0]["reason"]
        if level == "image":
            assert problem["first"][0]["file_name"]
        quarantine = pq.read_table(tmp_path / "shards" / "quarantine.parquet").to_pylist()
        mine = [row for row in quarantine if row["kind"] == kind and row["split"] == "training"]
        assert kind.replace("_", " ") in (tmp_path / "shards" / "report.html").read_text()
        if policy == "error":
            assert exit_code == 1
            assert errors.startswith("error: ")
            assert errors.count("\n") == 1, errors
            assert problem["first"][0]["reason"] in errors or kind == "missing_file"
            assert f"--data.policies.{kind}" in errors
            assert report["stopped"]
            assert not (tmp_path / "shards" / "training" / "manifest.json").exists()
            continue
        assert (exit_code, errors) == (0, "")
        summary = json.loads(out.strip().splitlines()[-1])
        shards = ShardSet(summary["training"])
        rows = list(shards.read_rows(range(len(shards))))
        kept = len(rows), sum(len(row["classes"]) for row in rows)
        lost = tuple(sum(row["level"] == which for row in quarantine) for which in ("image", "annotation"))
        assert read == (kept[0] + lost[0], kept[1] + lost[1]), "read = kept + quarantined"
        if policy == "drop":
            assert {row["level"] for row in mine if "its image is left out" not in row["reason"]} == {level}
            assert all(row["reason"] and row["source"] == 0 for row in mine)
            known = [row for row in mine if row["file_name"]]
            assert known or kind == "unknown_image"
            assert (summary["quarantined_images"], summary["quarantined_annotations"]) == lost
        else:
            assert mine == []


def test_a_mended_box_is_that_of_the_mask(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("box_without_size", "box_outside_image", "box_beyond_edge", "box_disagrees_with_mask"):
        content = write_data(tmp_path / kind / "data", lambda content, root: None)
        right = content["annotations"][0]["bbox"]
        write_data(tmp_path / kind / "data", DEFECTS[kind][0])
        assert prepare(tmp_path / kind, monkeypatch, f"--data.policies.{kind}=fix") == 0
        values = ShardSet(str(tmp_path / kind / "shards" / "training")).read_row(0)
        assert values["bboxes"].tolist() == right


def test_all_defects_of_the_real_images_are_found(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the README of the images lists: 6 crowds by area, 21 boxes, 35 crowds, two images without annotation."""
    from tests.pipeline.factories import SHARED_DATA

    root = SHARED_DATA / "coco_mini"
    if not root.is_dir():
        pytest.skip("the small piece of COCO is not there")
    arguments = ["--data.root", str(root), "--data.shards", str(tmp_path), "--data.canvases", "[[256, 256]]"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments, "--run.storage_path", str(tmp_path)])
    run_job(main)
    splits = json.loads((tmp_path / "report.json").read_text())["splits"]
    found: dict[str, int] = {}
    crowds: set[int] = set()
    crowd_areas = 0
    for split in splits.values():
        for problem in split["problems"]:
            found[problem["kind"]] = found.get(problem["kind"], 0) + problem["count"]
            ids = {entry["annotation_id"] for entry in problem["first"]}
            crowds |= ids if problem["kind"] == "crowd" else set()
        areas = [p for p in split["problems"] if p["kind"] == "area_disagrees_with_mask"]
        crowd_areas += sum(entry["annotation_id"] in crowds for p in areas for entry in p["first"])
    assert found["crowd"] == 35
    assert found["box_disagrees_with_mask"] == 21
    assert crowd_areas == 6
    assert found["image_without_annotations"] == 2
    empty = [p for p in splits["validation"]["problems"] if p["kind"] == "image_without_annotations"]
    assert {entry["image_id"] for entry in empty[0]["first"]} == {58636, 226111}
    counts = [(split["images"]["kept"], split["annotations"]["kept"]) for split in splits.values()]
    assert counts == [(93, 1019), (91, 1002)]
    largest = next(p for p in splits["training"]["problems"] if p["kind"] == "box_disagrees_with_mask")
    assert any(e["annotation_id"] == 390340 and "9.9 pixels" in e["reason"] for e in largest["first"])
