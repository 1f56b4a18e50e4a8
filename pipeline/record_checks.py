"""Every record of a COCO file is looked at; what is wrong gets a kind and the policy that is configured for it.

Needs the annotation file and a listing of the images folder, but opens no image. Boxes here are in original pixels.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from pipeline import storage
from pipeline.coco import (
    Annotation,
    ClassMap,
    CocoFile,
    ImageRecord,
    Json,
    categories_of,
    classes_of_source,
    is_finite,
    is_int,
    is_number,
    is_side,
    is_unicode,
)
from pipeline.config import PolicySettings
from pipeline.problems import Level, Problem, Quarantined, quarantined

EDGE_TOLERANCE = 1.0  # pixels by which a box may leave the image without being worth a word
FARTHEST = 1e6  # pixels from the corner of an image that a coordinate may lie: no image is so large
LONGEST_OUTLINE = 1e7  # pixels: drawing a polygon takes memory for every one of them


@dataclass(frozen=True)
class CheckedRecords:
    """Images of a file with their annotations, ordered by image id, and what was found on the way."""

    records: list[ImageRecord]
    problems: list[Problem]
    quarantined: list[Quarantined]
    """Images and annotations that are left out. All of the file's are in `records`, or here, or stop the job, an image
    with its annotations."""


def check_records(
    file: CocoFile,
    source: int,
    class_map: ClassMap,
    policies: PolicySettings,
    present: Mapping[str, Any] | None,
    validated: Container[str] = (),
) -> CheckedRecords:
    """Check every record of a file and bring images and annotations together.

    Args:
        file: as it was read.
        source: its number in the split.
        class_map: classes to train on.
        policies: what to do about each kind of problem.
        present: names of the files that are in the images folder; None where nobody looked.
        validated: paths of the images to validate on, where these are to be trained on.

    Raises:
        UserError: a category that the class map does not have.
    """
    findings = _Findings(file, source, policies)
    class_of_category, _ = classes_of_source(file, class_map)
    _check_categories(file, findings)
    images = _check_images(file, findings, present, validated)
    of_image: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    orphans: list[Quarantined] = []
    seen: set[int] = set()
    for record in file.annotations:
        lost = findings.images_left_out.get(record.get("image_id")) if is_int(record.get("image_id")) else None
        if lost is not None and record["image_id"] not in images:
            if is_int(record.get("id")):
                seen.add(record["id"])
            if lost.policy == "drop":
                orphans.append(_orphan(record, lost))
            continue
        annotation = _check_annotation(record, images, class_of_category, seen, findings)
        if annotation is not None:
            of_image[record["image_id"]].append(annotation)
    for image_id in [image_id for image_id in of_image if not of_image[image_id]]:
        image = images[image_id]
        reason = f"image {image_id} ({image['file_name']}) has no annotation"
        if findings.add("image_without_annotations", "image", reason, image):
            del images[image_id]
    records = [
        ImageRecord(
            source=source,
            image_id=image_id,
            file_name=image["file_name"],
            path=storage.join(file.images_folder, image["stored_as"]),
            height=image["height"],
            width=image["width"],
            annotations=tuple(of_image[image_id]),
        )
        for image_id, image in sorted(images.items())
    ]
    return CheckedRecords(records, findings.problems, quarantined(findings.problems) + orphans)


@dataclass
class _Findings:
    """Collects problems and knows what each kind means for its record."""

    file: CocoFile
    source: int
    policies: PolicySettings
    problems: list[Problem] = field(default_factory=list)
    images_left_out: dict[int | None, Problem] = field(default_factory=dict)

    def add(
        self, kind: str, level: Level, reason: str, image: Json | None = None, annotation_id: int | None = None
    ) -> bool:
        """Note a problem; whether its record is not to be used."""
        policy: str = getattr(self.policies, kind)
        image_id = image.get("id") if image else None
        file_name = image.get("file_name") if image else None
        problem = Problem(
            kind,
            policy,
            level,
            self.source,
            reason,
            image_id if is_int(image_id) else None,
            annotation_id,
            file_name if isinstance(file_name, str) else None,
        )
        self.problems.append(problem)
        gone = policy in ("error", "drop")
        if gone and level == "image":
            self.images_left_out.setdefault(problem.image_id, problem)
        return gone


def _orphan(record: Json, lost: Problem) -> Quarantined:
    """Quarantine entry of an annotation whose image is left out."""
    annotation_id = record.get("id")
    return Quarantined(
        lost.source,
        "annotation",
        lost.image_id,
        annotation_id if is_int(annotation_id) else None,
        lost.file_name,
        lost.kind,
        f"its image is left out: {lost.reason}",
    )


def _check_categories(file: CocoFile, findings: _Findings) -> None:
    names = list(categories_of(file).values())
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        findings.add("duplicate_category_name", "category", f"category name {name!r} stands there twice")


def _check_images(
    file: CocoFile, findings: _Findings, present: Mapping[str, Any] | None, validated: Container[str]
) -> dict[int, Json]:
    """Usable image records by id, each with `stored_as`, its file's place in the images folder."""
    images: dict[int, Json] = {}
    ids: set[int] = set()
    names: set[str] = set()
    by_base_name = paths_by_base_name(present or ())
    for image in file.images:
        kind, reason = _image_problem(image, ids)
        if is_int(image.get("id")):
            ids.add(image["id"])
        if kind is not None and findings.add(kind, "image", reason, image):
            continue
        image_id, name = image["id"], image["file_name"]
        stored_as = posixpath.normpath(name)
        if present is not None and stored_as not in present:
            elsewhere = below_a_folder(stored_as, by_base_name)
            if len(elsewhere) == 1:
                reason = f"image {image_id}: {name} is not in {file.images_folder}, only {elsewhere[0]} is"
                kind, stored_as = "file_in_subfolder", elsewhere[0]
            else:
                also = f" itself, but in {len(elsewhere)} folders below it" if elsewhere else ""
                reason = f"image {image_id}: {name} is not in {file.images_folder}{also}"
                kind = "missing_file"
            if findings.add(kind, "image", reason, image):
                continue
        if stored_as in names:
            reason = f"image {image_id}: another image has the file {stored_as} too"
            if findings.add("duplicate_file_name", "image", reason, image):
                continue
        if storage.join(file.images_folder, stored_as) in validated:
            reason = f"image {image_id}: {name} is among the images to validate on"
            if findings.add("image_in_both_splits", "image", reason, image):
                continue
        names.add(stored_as)
        images[image_id] = {**image, "stored_as": stored_as}
    return images


def leaves_folder(name: str) -> bool:
    """Whether a file name is an absolute path, a URL, or climbs out of the folder that it is relative to."""
    is_of_a_drive = re.match(r"[A-Za-z]:", name) is not None
    return name.startswith("/") or "\\" in name or ".." in name.split("/") or "://" in name or is_of_a_drive


def paths_by_base_name(present: Iterable[str]) -> dict[str, list[str]]:
    """Paths of files by the last part of each."""
    found: dict[str, list[str]] = {}
    for path in present:
        found.setdefault(posixpath.basename(path), []).append(path)
    return found


def below_a_folder(name: str, by_base_name: Mapping[str, Sequence[str]]) -> list[str]:
    """Where a file of this whole relative name lies, seen from some subfolder, in order."""
    return sorted(path for path in by_base_name.get(posixpath.basename(name), ()) if path.endswith(f"/{name}"))


def _is_file_name(name: object) -> TypeGuard[str]:
    """Whether it is text that a file can be called."""
    return isinstance(name, str) and bool(name) and "\0" not in name and is_unicode(name)


def _image_problem(image: Json, ids: Container[int]) -> tuple[str | None, str]:
    """Kind and description of what makes an image record unusable; None where nothing does."""
    image_id, name = image.get("id"), image.get("file_name")
    if not is_int(image_id):
        return "malformed_record", f"image {image!r:.100} has no integer id"
    if image_id in ids:
        return "duplicate_image_id", f"image id {image_id} stands there twice"
    if not _is_file_name(name):
        given = "has no file_name" if name in (None, "") else f"has file_name {name!r}, which no file can have"
        return "malformed_record", f"image {image_id} {given}"
    if leaves_folder(name):
        return (
            "path_outside_folder",
            f"image {image_id}: file_name {name!r} leaves the images folder; make it relative to that folder",
        )
    for key in ("height", "width"):
        value = image.get(key)
        if is_number(value) and not is_finite(value):
            return "non_finite_number", f"image {image_id} ({name}): {key} is {value!r}, expected a positive integer"
        if not is_side(value):
            return "malformed_record", f"image {image_id} ({name}): {key} is {value!r}, expected a positive integer"
    return None, ""


def _check_annotation(
    record: Json, images: dict[int, Json], class_of_category: dict[int, int], seen: set[int], findings: _Findings
) -> Annotation | None:
    """An annotation that can be used, or None."""
    annotation_id, image_id = record.get("id"), record.get("image_id")
    image = images.get(image_id) if is_int(image_id) else None
    known_id = annotation_id if is_int(annotation_id) else None
    kind, reason = _annotation_problem(record, image, class_of_category, seen)
    if known_id is not None:
        seen.add(known_id)
    if kind is not None and findings.add(kind, "annotation", reason, image, known_id):
        return None
    assert image is not None
    assert known_id is not None
    bbox: tuple[float, float, float, float] = tuple(float(number) for number in record["bbox"])  # type: ignore[assignment]
    kind, reason = box_problem(bbox, image["height"], image["width"])
    if kind is not None and findings.add(kind, "annotation", f"annotation {known_id}: {reason}", image, known_id):
        return None
    segmentation = record["segmentation"]
    if isinstance(segmentation, list):
        short = [polygon for polygon in segmentation if is_short(polygon)]
        if short and len(short) < len(segmentation):
            reason = f"annotation {known_id}: {len(short)} of {len(segmentation)} parts of the outline have no area"
            if findings.add("short_polygon", "annotation", reason, image, known_id):
                return None
        segmentation = [polygon for polygon in segmentation if not is_short(polygon)]
        if not segmentation:
            nothing_left = ", so that leaving out the short ones leaves nothing" if short else ""
            reason = f"annotation {known_id}: no polygon with three points and an extent{nothing_left}"
            findings.add("empty_mask" if findings.policies.short_polygon == "fix" else "short_polygon",
                         "annotation", reason, image, known_id)  # fmt: skip
            return None
    is_crowd = bool(record.get("iscrowd", 0))
    if is_crowd and findings.add("crowd", "annotation", f"annotation {known_id} is a crowd", image, known_id):
        return None
    area = record.get("area")
    return Annotation(
        annotation_id=known_id,
        class_id=class_of_category[record["category_id"]],
        bbox=bbox,
        area=None if area is None else float(area),
        is_crowd=is_crowd,
        segmentation=segmentation,
    )


def is_short(polygon: Sequence[float]) -> bool:
    """Whether a polygon has fewer than three points (pycocotools would take two for a box) or no extent."""
    x, y = polygon[::2], polygon[1::2]
    return len(polygon) < 6 or min(x) == max(x) or min(y) == max(y)


def box_problem(bbox: Sequence[float], height: int, width: int) -> tuple[str | None, str]:
    """Kind and description of what is wrong with a box x, y, width, height in an image of a size."""
    x, y, box_width, box_height = bbox
    if box_width <= 0 or box_height <= 0:
        return "box_without_size", f"box without size ({box_width:g} x {box_height:g})"
    if x >= width or y >= height or x + box_width <= 0 or y + box_height <= 0:
        return "box_outside_image", "box outside the image"
    beyond = max(-x, -y, x + box_width - width, y + box_height - height)
    if beyond > EDGE_TOLERANCE:
        return "box_beyond_edge", f"box leaves the image by {beyond:.1f} pixels"
    return None, ""


def _annotation_problem(
    record: Json, image: Json | None, class_of_category: dict[int, int], seen: set[int]
) -> tuple[str | None, str]:
    """Kind and description of what makes an annotation one that must not be guessed at."""
    annotation_id = record.get("id")
    if not is_int(annotation_id):
        return "malformed_record", f"annotation {record!r:.100} has no integer id"
    if annotation_id in seen:
        return "duplicate_annotation_id", f"annotation id {annotation_id} stands there twice"
    if image is None:
        return "unknown_image", f"annotation {annotation_id}: image_id {record.get('image_id')!r} is none of the images"
    category_id = record.get("category_id")
    if not is_int(category_id) or category_id not in class_of_category:
        return "unknown_category", f"annotation {annotation_id}: category_id {category_id!r} is none of the categories"
    bbox = record.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(is_number, bbox)):
        return "malformed_record", f"annotation {annotation_id}: bbox {bbox!r} is not four finite numbers"
    if not all(map(is_finite, bbox)):
        return "non_finite_number", f"annotation {annotation_id}: bbox {bbox!r} is not four finite numbers"
    if any(abs(number) > FARTHEST for number in bbox):
        return "malformed_record", f"annotation {annotation_id}: bbox {bbox!r} lies far outside of any image"
    area = record.get("area")
    if area is not None and not (is_number(area) and is_finite(area)):
        kind = "non_finite_number" if is_number(area) else "malformed_record"
        return kind, f"annotation {annotation_id}: area {area!r} is not a finite number"
    if record.get("iscrowd") not in (None, 0, 1):
        return "malformed_record", f"annotation {annotation_id}: iscrowd {record['iscrowd']!r} is neither 0 nor 1"
    return _segmentation_problem(annotation_id, record.get("segmentation"), image)


def _segmentation_problem(annotation_id: int, segmentation: Any, image: Json) -> tuple[str | None, str]:
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [image["height"], image["width"]]:
            return "malformed_record", f"annotation {annotation_id}: RLE size {size!r} is not that of its image"
        if not isinstance(counts, str) and not (isinstance(counts, list) and all(map(is_int, counts))):
            reason = "RLE counts are neither a string nor a list of integers"
            return "malformed_record", f"annotation {annotation_id}: {reason}"
        lengths = _run_lengths(counts) if isinstance(counts, str) else counts
        if min(lengths, default=0) < 0 or sum(lengths) != image["height"] * image["width"]:
            return "malformed_record", f"annotation {annotation_id}: RLE counts do not add up to the image"
        return None, ""
    if segmentation is None:
        return "no_segmentation", f"annotation {annotation_id}: no segmentation; this pipeline trains on masks"
    if not isinstance(segmentation, list):
        return "malformed_record", f"annotation {annotation_id}: segmentation is neither polygons nor RLE"
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(map(is_number, polygon)):
            return "malformed_record", f"annotation {annotation_id}: a polygon is not a list of finite numbers"
        if not all(map(is_finite, polygon)):
            return "non_finite_number", f"annotation {annotation_id}: a polygon is not a list of finite numbers"
        if len(polygon) % 2:
            return "malformed_record", f"annotation {annotation_id}: a polygon has an odd number of coordinates"
        if any(abs(number) > FARTHEST for number in polygon) or _outline_length(polygon) > LONGEST_OUTLINE:
            return "malformed_record", f"annotation {annotation_id}: a polygon reaches far outside of any image"
    return None, ""


def _outline_length(polygon: Sequence[float]) -> float:
    """Pixels that a closed outline passes."""
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    return sum(max(abs(x - v), abs(y - w)) for (x, y), (v, w) in itertools.pairwise([*points, *points[:1]]))


def _run_lengths(text: str) -> list[int]:
    """Run lengths of a compressed RLE; empty where it is none. pycocotools itself would read on beyond its end."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        digit = ord(character) - 48  # five bits of the number, and one that says whether more follow
        if not 0 <= digit < 64:
            return []
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))  # from the fourth on: differences
        value = shift = 0
    return lengths if shift == 0 else []
