"""COCO instances files: read, checked record by record, classes united by name.

Sizes, boxes and areas here are in original pixels.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from pipeline import storage
from pipeline.config import CocoSource
from pipeline.errors import UserError

Json = dict[str, Any]


@dataclass(frozen=True)
class CocoFile:
    """One annotation file as it was read, its lists known to be there."""

    path: str
    """Absolute path or URL of the JSON file."""
    images_folder: str
    """Absolute path or URL."""
    images: list[Json]
    annotations: list[Json]
    categories: list[Json]


@dataclass(frozen=True)
class ClassMap:
    """Names of the classes 1..C-1; class 0 is the background."""

    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """C, with the background."""
        return len(self.names) + 1

    def class_of(self, name: str) -> int:
        """Class of a category name; KeyError where it is none of ours."""
        try:
            return self.names.index(name) + 1
        except ValueError:
            raise KeyError(name) from None


@dataclass(frozen=True)
class Annotation:
    """One object or crowd."""

    annotation_id: int
    class_id: int
    """1..C-1."""
    bbox: tuple[float, float, float, float]
    """x, y, width, height as the file has them."""
    area: float
    is_crowd: bool
    segmentation: Any
    """Polygons (list of flat x, y lists), or RLE (`{"size": ..., "counts": ...}`)."""


@dataclass(frozen=True)
class ImageRecord:
    """One image with its checked annotations."""

    source: int
    """Which of the sources it belongs to."""
    image_id: int
    file_name: str
    path: str
    """Absolute path or URL."""
    height: int
    width: int
    annotations: tuple[Annotation, ...]

    def to_json(self) -> str:
        """One line that `from_json` reads back."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> ImageRecord:
        """Inverse of `to_json`."""
        record = json.loads(text)
        annotations = tuple(Annotation(**{**a, "bbox": tuple(a["bbox"])}) for a in record.pop("annotations"))
        return ImageRecord(annotations=annotations, **record)


@dataclass(frozen=True)
class Dropped:
    """An annotation that is left out, and why."""

    source: int
    file_name: str
    annotation_id: int
    reason: str


def read_coco_file(source: CocoSource, root: str) -> CocoFile:
    """Read one annotation file.

    Raises:
        UserError: it is missing, no JSON, not in the COCO instances format, or lists no images.
    """
    path = storage.absolute(source.annotations, root)
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file; set data.root or data.sources") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a JSON file ({error}); export it again as COCO instances JSON") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list) or not all(isinstance(item, dict) for item in content[key]):
            raise UserError(f"{path}: no list of objects named {key!r}; expected the COCO instances format")
    if not content["images"]:
        raise UserError(f"{path}: lists no images; nothing can be trained or evaluated on it")
    if not content["categories"]:
        raise UserError(f"{path}: lists no categories")
    return CocoFile(
        path, storage.absolute(source.images, root), content["images"], content["annotations"], content["categories"]
    )


def unite_classes(files: Sequence[CocoFile]) -> ClassMap:
    """Classes of all files by name, in the order of first appearance.

    Raises:
        UserError: a category without a name or id, or two of one file that share one.
    """
    names: list[str] = []
    for file in files:
        for name in _categories(file).values():
            if name not in names:
                names.append(name)
    return ClassMap(tuple(names))


def _categories(file: CocoFile) -> dict[int, str]:
    """Category names of a file by their id."""
    by_id: dict[int, str] = {}
    for category in file.categories:
        category_id, name = category.get("id"), category.get("name")
        if not _is_int(category_id) or not isinstance(name, str) or not name:
            raise UserError(f"{file.path}: category {category!r} needs an integer id and a name")
        if category_id in by_id or name in by_id.values():
            raise UserError(f"{file.path}: category id {category_id} or name {name!r} stands there twice")
        by_id[category_id] = name
    return by_id


def classes_of_source(file: CocoFile, class_map: ClassMap) -> tuple[dict[int, int], list[int]]:
    """Class of each category id of a file, and the classes that the file has labelled.

    Raises:
        UserError: the class map does not have one of the file's categories.
    """
    class_of_category: dict[int, int] = {}
    for category_id, name in _categories(file).items():
        try:
            class_of_category[category_id] = class_map.class_of(name)
        except KeyError:
            known = ", ".join(class_map.names[:10])
            raise UserError(f"{file.path}: category {name!r} is none of the training classes ({known})") from None
    return class_of_category, sorted(class_of_category.values())


def check_records(file: CocoFile, source: int, class_map: ClassMap) -> tuple[list[ImageRecord], list[Dropped]]:
    """Check every record of a file and bring images and annotations together, ordered by image id.

    Annotations that can teach nothing (no size, no outline) are dropped and listed; what must not be guessed is an
    error.

    Raises:
        UserError: names the first offending record, how many there are, and what to do.
    """
    class_of_category, _ = classes_of_source(file, class_map)
    problems: list[str] = []
    images: dict[int, Json] = {}
    for image in file.images:
        problem = _image_problem(image, images)
        if problem:
            problems.append(problem)
        else:
            images[image["id"]] = image
    _raise_first(file, problems)

    dropped: list[Dropped] = []
    of_image: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    seen: set[int] = set()
    for record in file.annotations:
        problem = _annotation_problem(record, images, class_of_category, seen)
        if problem:
            problems.append(problem)
            continue
        seen.add(record["id"])
        image = images[record["image_id"]]
        reason = _reason_to_drop(record, image)
        if reason:
            dropped.append(Dropped(source, image["file_name"], record["id"], reason))
        else:
            of_image[record["image_id"]].append(_annotation(record, class_of_category))
    _raise_first(file, problems)

    records = [
        ImageRecord(
            source=source,
            image_id=image_id,
            file_name=image["file_name"],
            path=storage.join(file.images_folder, image["file_name"]),
            height=image["height"],
            width=image["width"],
            annotations=tuple(of_image[image_id]),
        )
        for image_id, image in sorted(images.items())
    ]
    return records, dropped


def check_files_exist(file: CocoFile, records: Sequence[ImageRecord]) -> None:
    """Look whether every image is there, before anything is decoded.

    Raises:
        UserError: names the folder, how many are missing, and the first ones.
    """
    present = storage.list_files(file.images_folder)
    missing = [record.file_name for record in records if record.file_name not in present]
    if missing:
        first = ", ".join(missing[:3])
        raise UserError(
            f"{file.images_folder}: {len(missing)} of {len(records)} images of {file.path} are not there ({first}); "
            "set data.root or the source's images folder"
        )


def _raise_first(file: CocoFile, problems: list[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise UserError(f"{file.path}: {problems[0]}{more}")


def _is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number that the shards can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: object) -> bool:
    """Whether it is a finite number, as a float too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _image_problem(image: Json, images: dict[int, Json]) -> str | None:
    """What makes an image record unusable."""
    image_id, name = image.get("id"), image.get("file_name")
    if not _is_int(image_id):
        return f"image {image!r:.100} has no integer id"
    if image_id in images:
        return f"image id {image_id} stands there twice"
    if not isinstance(name, str) or not name:
        return f"image {image_id} has no file_name"
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        return f"image {image_id}: file_name {name!r} leaves the images folder; make it relative to that folder"
    for key in ("height", "width"):
        if not _is_int(image.get(key)) or image[key] < 1:
            return f"image {image_id} ({name}): {key} is {image.get(key)!r}, expected a positive integer"
    return None


def _annotation_problem(
    record: Json, images: dict[int, Json], class_of_category: dict[int, int], seen: set[int]
) -> str | None:
    """What makes an annotation record one that must not be guessed at."""
    annotation_id = record.get("id")
    if not _is_int(annotation_id):
        return f"annotation {record!r:.100} has no integer id"
    if annotation_id in seen:
        return f"annotation id {annotation_id} stands there twice"
    if not _is_int(record.get("image_id")) or record["image_id"] not in images:
        return f"annotation {annotation_id}: image_id {record.get('image_id')!r} is none of the images"
    if not _is_int(record.get("category_id")) or record["category_id"] not in class_of_category:
        return f"annotation {annotation_id}: category_id {record.get('category_id')!r} is none of the categories"
    bbox = record.get("bbox")
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(number) for number in bbox):
        return f"annotation {annotation_id}: bbox {bbox!r} is not four finite numbers"
    if "area" in record and not _is_number(record["area"]):
        return f"annotation {annotation_id}: area {record['area']!r} is not a finite number"
    segmentation = record.get("segmentation")
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        image = images[record["image_id"]]
        if size != [image["height"], image["width"]]:
            return f"annotation {annotation_id}: RLE size {size!r} is not that of its image"
        if not isinstance(counts, str) and not (isinstance(counts, list) and all(map(_is_int, counts))):
            return f"annotation {annotation_id}: RLE counts are neither a string nor a list of integers"
        lengths = _run_lengths(counts) if isinstance(counts, str) else counts
        if min(lengths, default=0) < 0 or sum(lengths) != image["height"] * image["width"]:
            return f"annotation {annotation_id}: RLE counts do not add up to the image"
        return None
    if not isinstance(segmentation, list):
        return f"annotation {annotation_id}: no segmentation; this pipeline trains on masks"
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all(_is_number(number) for number in polygon):
            return f"annotation {annotation_id}: a polygon is not a list of finite numbers"
        if len(polygon) % 2:
            return f"annotation {annotation_id}: a polygon has an odd number of coordinates"
    return None


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


def _reason_to_drop(record: Json, image: Json) -> str | None:
    """Why an annotation can teach nothing."""
    x, y, width, height = record["bbox"]
    if width <= 0 or height <= 0:
        return f"box without size ({width} x {height})"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return "box outside the image"
    segmentation = record["segmentation"]
    if isinstance(segmentation, list) and not any(len(polygon) >= 6 for polygon in segmentation):
        return "no polygon with three points"
    return None


def _annotation(record: Json, class_of_category: dict[int, int]) -> Annotation:
    segmentation = record["segmentation"]
    if isinstance(segmentation, list):  # pycocotools takes a polygon of two points for a box
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
    x, y, width, height = (float(number) for number in record["bbox"])
    return Annotation(
        annotation_id=record["id"],
        class_id=class_of_category[record["category_id"]],
        bbox=(x, y, width, height),
        area=float(record.get("area", width * height)),
        is_crowd=bool(record.get("iscrowd", 0)),
        segmentation=segmentation,
    )


def count_reasons(dropped: Sequence[Dropped]) -> dict[str, int]:
    """How many annotations were dropped for each reason, numbers in brackets aside."""
    kinds = (entry.reason.split(" (")[0] for entry in dropped)
    return dict(sorted(Counter(kinds).items()))
