"""COCO instances files: read, their classes united by name.

Sizes, boxes and areas here are in original pixels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

from pipeline import storage
from pipeline.config import CocoSource
from pipeline.errors import UserError

Json = dict[str, Any]

MAX_FILES_TOLD = 3


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
    area: float | None
    """None where the file has none: the number of pixels of the mask, then."""
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


def _where_to_look(root: str) -> str:
    """What to do about a missing annotation file, by what there is."""
    if storage.is_url(root):
        return "set data.root or data.sources"
    folder = Path(storage.absolute(root))
    if not folder.is_dir():
        return f"there is no folder {folder}; set data.root"
    there = sorted(str(path.relative_to(folder)) for pattern in ("*.json", "*/*.json") for path in folder.glob(pattern))
    more = f" and {len(there) - MAX_FILES_TOLD} more" if len(there) > MAX_FILES_TOLD else ""
    found = f"; in {folder} there is {', '.join(there[:MAX_FILES_TOLD])}{more}" if there else ""
    return f"set data.root or data.sources{found}"


def read_coco_file(source: CocoSource, root: str) -> CocoFile:
    """Read one annotation file.

    Raises:
        UserError: it is missing, no JSON, not in the COCO instances format, or lists no images.
    """
    path = storage.absolute(source.annotations, root)
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such annotation file; {_where_to_look(root)}") from None
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
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
    images = [{**image, "file_name": file_name_of(image)} for image in content["images"]]
    return CocoFile(path, storage.absolute(source.images, root), images, content["annotations"], content["categories"])


def file_name_of(image: Json) -> Any:
    """Its file_name; of LVIS's records, which have none, the end of COCO's address: `train2017/NUMBER.jpg`."""
    name, address = image.get("file_name"), image.get("coco_url")
    return "/".join(address.split("/")[-2:]) if name is None and isinstance(address, str) else name


def unite_classes(files: Sequence[CocoFile]) -> ClassMap:
    """Classes of all files by name, in the order of first appearance.

    Raises:
        UserError: a category without a name or id, or two of one file that share an id.
    """
    names: list[str] = []
    for file in files:
        for name in categories_of(file).values():
            if name not in names:
                names.append(name)
    return ClassMap(tuple(names))


def categories_of(file: CocoFile) -> dict[int, str]:
    """Category names of a file by their id; a name may stand there twice.

    Raises:
        UserError: a category without a name or id, or two that share an id.
    """
    by_id: dict[int, str] = {}
    for category in file.categories:
        category_id, name = category.get("id"), category.get("name")
        if not is_int(category_id) or not isinstance(name, str) or not name or not is_unicode(name):
            raise UserError(f"{file.path}: category {category!r} needs an integer id and a name")
        if category_id in by_id:
            raise UserError(f"{file.path}: category id {category_id} stands there twice")
        by_id[category_id] = name
    return by_id


def classes_of_source(file: CocoFile, class_map: ClassMap) -> tuple[dict[int, int], list[int]]:
    """Class of each category id of a file, and the classes that the file has labelled.

    Raises:
        UserError: the class map does not have one of the file's categories.
    """
    class_of_category: dict[int, int] = {}
    for category_id, name in categories_of(file).items():
        try:
            class_of_category[category_id] = class_map.class_of(name)
        except KeyError:
            known = ", ".join(class_map.names[:10])
            raise UserError(f"{file.path}: category {name!r} is none of the training classes ({known})") from None
    return class_of_category, sorted(set(class_of_category.values()))


def is_unicode(text: str) -> bool:
    """Whether it can be written: JSON can name halves of characters, which nothing else takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is a whole number that the shards can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_side(value: object) -> TypeGuard[int]:
    """Whether it can be the height or width of an image."""
    return is_int(value) and 0 < value < 2**31


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that may not be finite."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: int | float) -> bool:
    """Whether a number is finite, as a float too."""
    return abs(value) <= sys.float_info.max
