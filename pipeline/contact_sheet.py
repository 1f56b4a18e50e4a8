"""Contact sheet of the preflight report: images with their masks, the worst problems first."""

from __future__ import annotations

import base64
import io
import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from pipeline import storage
from pipeline.coco import Annotation, ImageRecord
from pipeline.preprocess import ImageProblem, decode_image, rasterise
from pipeline.problems import Problem
from pipeline.record_checks import leaves_folder
from pipeline.report import class_colours, css_colour, draw_objects, object_label

NUM_TILES = 24
TILE_SIDE = 400  # pixels
_RANK = {"error": 0, "drop": 1, "fix": 2, "keep": 3}


@dataclass(frozen=True)
class Tile:
    """One picture of the sheet."""

    file_name: str
    notes: list[str]
    """What is wrong with it, a line each; empty where nothing is."""
    picture: str
    """JPEG as base64; empty where there is nothing to be shown."""
    objects: list[tuple[str, str, int]] = field(default_factory=list)
    """Of each class in it its name, its colour as CSS has it, and how many there are; empty with a single class."""


def make_tiles(
    records: Sequence[ImageRecord], problems: Sequence[Problem], class_names: Sequence[str], folders: Sequence[str]
) -> list[Tile]:
    """Tiles of the images with the worst problems, filled up with images that have none.

    Args:
        records: images that can be shown.
        problems: of these and of others.
        class_names: of classes 1..C-1.
        folders: images folder of each source, for images that are in no record.
    """
    by_image: dict[tuple[int, int | None, str | None], list[Problem]] = {}
    for problem in problems:
        if problem.level != "category":
            by_image.setdefault((problem.source, problem.image_id, problem.file_name), []).append(problem)
    record_of = {(record.source, record.image_id): record for record in records}
    worst = sorted(by_image.items(), key=lambda entry: (min(map(_rank, entry[1])), -len(entry[1]), str(entry[0])))
    tiles = []
    for (source, image_id, file_name), found in worst[:NUM_TILES]:
        known = record_of.get((source, image_id)) if image_id is not None else None
        picture = _picture(known, found, class_names)
        if known is None and file_name and not leaves_folder(file_name):
            picture = _bare_picture(storage.join(folders[source], file_name))
        tiles.append(Tile(file_name or "(no file)", [p.reason for p in found], picture, _objects(known, class_names)))
    marked = {(source, image_id) for source, image_id, _ in by_image}
    others = (record for record in records if (record.source, record.image_id) not in marked and record.annotations)
    for record in itertools.islice(others, NUM_TILES - len(tiles)):
        tiles.append(Tile(record.file_name, [], _picture(record, [], class_names), _objects(record, class_names)))
    return tiles


_HARMLESS = ("crowd", "image_without_annotations", "duplicate_file_name", "duplicate_image")


def _rank(problem: Problem) -> tuple[int, int]:
    """Order of what to show first: by what was done, and images without objects or with crowds last."""
    return _RANK[problem.policy], problem.kind in _HARMLESS


def _picture(record: ImageRecord | None, problems: Sequence[Problem], class_names: Sequence[str]) -> str:
    """An image with its masks, coloured by class; annotations with a problem have their id beside it."""
    if record is None:
        return ""
    try:
        image = decode_image(storage.read_bytes(record.path), record.height, record.width)
    except (ImageProblem, OSError):
        return _bare_picture(record.path)
    noted = {problem.annotation_id for problem in problems if problem.annotation_id is not None}
    annotations = sorted(record.annotations, key=lambda a: a.annotation_id not in noted)  # their labels find a place
    masks = (rasterise(a.segmentation, record.height, record.width) for a in annotations)  # one at a time
    boxes = np.array([_corners(a) for a in annotations], dtype=np.float32).reshape(-1, 4)
    labels = [_label(a, noted, class_names) for a in annotations]
    colours = class_colours([a.class_id for a in annotations], class_names)
    return _encoded(draw_objects(image, masks, boxes, labels, colours, TILE_SIDE))


def _label(annotation: Annotation, noted: Collection[int], class_names: Sequence[str]) -> str:
    """The name of its class where there are several, and its id if something is wrong with it."""
    name = object_label(annotation.class_id, None, class_names)
    return f"{name} {annotation.annotation_id}".strip() if annotation.annotation_id in noted else name


def _objects(record: ImageRecord | None, class_names: Sequence[str]) -> list[tuple[str, str, int]]:
    """See `Tile.objects`."""
    if record is None or len(class_names) == 1:
        return []
    counts = Counter(annotation.class_id for annotation in record.annotations)
    return [(class_names[class_id - 1], css_colour(class_id), counts[class_id]) for class_id in sorted(counts)]


def _corners(annotation: Annotation) -> tuple[float, float, float, float]:
    x, y, width, height = annotation.bbox
    return x, y, x + width, y + height


def _bare_picture(path: str) -> str:
    """An image as it is, or a gray field where it cannot be decoded; empty where it cannot be read."""
    try:
        return _encoded(Image.fromarray(decode_image(storage.read_bytes(path))))
    except OSError:
        return ""
    except ImageProblem as problem:
        field = Image.new("RGB", (TILE_SIDE, TILE_SIDE // 2), (110, 110, 110))
        ImageDraw.Draw(field).text((12, TILE_SIDE // 4), str(problem)[:58], fill=(255, 255, 255))
        return _encoded(field)


def _encoded(picture: Image.Image) -> str:
    picture.thumbnail((TILE_SIDE, TILE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
