"""Small data sets and configurations that the tests of the pipeline share."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from model.config import (
    AnchorConfig,
    BackboneConfig,
    BoxHeadConfig,
    DetectionConfig,
    FpnConfig,
    MaskHeadConfig,
    ModelConfig,
    RoiConfig,
    RpnConfig,
)
from pipeline.coco import Annotation, ClassMap, CocoFile, ImageRecord
from pipeline.config import (
    AugmentSettings,
    CocoSource,
    DataSettings,
    ExperimentConfig,
    PolicySettings,
    RunSettings,
    TrainSettings,
)
from pipeline.prepare import PreparedData
from pipeline.preprocess import pack_mask
from pipeline.row_encoding import RowSettings, encode_row
from pipeline.sample import Sample
from pipeline.shards import ROW_SCHEMA

Json = dict[str, Any]
Bitmap = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

LANDSCAPE, PORTRAIT = (48, 64), (64, 48)  # rows and columns of the images
CANVASES = ((64, 96), (96, 64))  # one for each of them
SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def needs_shared_data(*names: str) -> pytest.MarkDecorator:
    """Real images are not ours to give on (licences), and too large: a clone alone tests without them, and says so."""
    lacking = [name for name in names if not (SHARED_DATA / name).is_dir()]
    reason = f"real images, which this repository does not hold: no {', '.join(lacking)} in {SHARED_DATA}"
    return pytest.mark.skipif(bool(lacking), reason=reason)


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Image in which no two pixels agree by chance."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(pixels: Pixels) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def ellipse_polygon(rng: np.random.Generator, height: int, width: int, points: int = 12) -> list[float]:
    """Flat x, y list of a polygon inside the image, with fractions."""
    half = rng.uniform(5, 15, size=2)
    x, y = rng.uniform(half + 1, np.array([width, height]) - half - 1)
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    corners = np.stack([x + half[0] * np.cos(angle), y + half[1] * np.sin(angle)], axis=1)
    return [round(float(number), 2) for number in corners.ravel()]


def bitmap_of(polygons: Sequence[Sequence[float]], height: int, width: int) -> Bitmap:
    """As pycocotools draws it."""
    rle = coco_mask.merge(coco_mask.frPyObjects([list(polygon) for polygon in polygons], height, width))
    return np.asarray(coco_mask.decode(rle), dtype=bool)


def rle_string(bitmap: Bitmap) -> Json:
    """Compressed RLE."""
    rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    return {"size": list(bitmap.shape), "counts": rle["counts"].decode("ascii")}


def rle_list(bitmap: Bitmap) -> Json:
    """RLE with run lengths column by column, zeros first."""
    flat = bitmap.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=0))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return {"size": list(bitmap.shape), "counts": counts.tolist()}


def tight_xywh(bitmap: Bitmap) -> list[float]:
    """Box around the set pixels as COCO writes it."""
    rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    return [float(left), float(top), float(columns[-1] + 1 - left), float(rows[-1] + 1 - top)]


def coco_content(
    prefix: str, numbers_of_objects: Sequence[int], categories: dict[int, str], seed: int, first_id: int
) -> Json:
    """Instances of generated images, landscape and portrait in turn.

    Objects overlap; their outlines are polygons of one and of two parts, RLE lists and RLE strings; the last object of
    an image with three or more is a crowd. Ids have gaps, and the lists are not in the order of the ids.
    """
    rng = np.random.default_rng(seed)
    images: list[Json] = []
    annotations: list[Json] = []
    for number, num_objects in enumerate(numbers_of_objects):
        height, width = LANDSCAPE if number % 2 == 0 else PORTRAIT
        image = {"id": first_id + 3 * number, "file_name": f"{prefix}_{number:03d}.png"}
        images.append(image | {"height": height, "width": width})
        for index in range(num_objects):
            polygons = [ellipse_polygon(rng, height, width) for _ in range(1 + index % 2)]
            bitmap = bitmap_of(polygons, height, width)
            is_crowd = index >= 2 and index == num_objects - 1
            outline: Any = polygons
            if is_crowd or len(annotations) % 4 == 2:
                outline = rle_list(bitmap)
            elif len(annotations) % 4 == 3:
                outline = rle_string(bitmap)
            annotations.append(
                {
                    "id": 10 * first_id + 2 * len(annotations),
                    "image_id": image["id"],
                    "category_id": list(categories)[int(rng.integers(len(categories)))],
                    "bbox": tight_xywh(bitmap),
                    "area": float(bitmap.sum()),
                    "iscrowd": int(is_crowd),
                    "segmentation": outline,
                }
            )
    listed = [{"id": category_id, "name": name} for category_id, name in categories.items()]
    return {"images": images[::-1], "annotations": annotations[::-1], "categories": listed}


def write_coco(root: Path, name: str, content: Json, folder: str = "images") -> CocoSource:
    """Write an annotation file and an image of noise for each record that has none yet."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        path = root / folder / image["file_name"]
        if not path.exists():
            path.write_bytes(png(noise(image["height"], image["width"], seed=image["id"])))
    (root / name).write_text(json.dumps(content))
    return CocoSource(annotations=name, images=folder)


def coco_file(content: Json, path: str = "/data/instances.json", folder: str = "/data/images") -> CocoFile:
    """Annotations as if they had been read."""
    return CocoFile(path, folder, content["images"], content["annotations"], content["categories"])


ANIMALS = {7: "cat", 3: "dog"}
BIRDS = {1: "dog", 2: "bird"}
VALIDATION = {5: "bird", 9: "cat", 4: "dog"}
CLASS_NAMES = ("cat", "dog", "bird")


@dataclass(frozen=True)
class Prepared:
    """The data set of these tests, as files and as shards."""

    root: Path
    config: ExperimentConfig
    data: PreparedData
    said: list[str]
    contents: dict[str, Json]
    """Annotation files by name, as they were written."""


def two_sources(root: Path) -> dict[str, Json]:
    """Write two training files with different classes and ids, and a validation file."""
    contents = {
        "animals.json": coco_content("animal", [2, 0, 3, 1, 4, 2, 0, 1, 2, 3, 1, 2], ANIMALS, seed=1, first_id=50),
        "birds.json": coco_content("bird", [1, 2, 0, 3, 2, 1, 4, 1, 2], BIRDS, seed=2, first_id=11),
        "validation.json": coco_content("val", [3, 2, 0, 4, 1, 5, 2], VALIDATION, seed=3, first_id=100),
    }
    for name, content in contents.items():
        write_coco(root, name, content)
    return contents


def experiment(root: Path, storage_path: Path, **data: Any) -> ExperimentConfig:
    """Configuration for `two_sources` and a thin model."""
    settings = {
        "root": str(root),
        "sources": (CocoSource(annotations="animals.json"), CocoSource(annotations="birds.json")),
        "validation_sources": (CocoSource(annotations="validation.json"),),
        "canvases": CANVASES,
        "rows_per_shard": 4,
        "shuffle_window": 2,
    }
    return ExperimentConfig(
        model=thin_model(),
        data=DataSettings.model_validate(settings | data),
        augment=AugmentSettings(horizontal_flip=0.5, vertical_flip=0.5),
        train=TrainSettings(batch_size_per_worker=2, seed=3),
        run=RunSettings(name="test", storage_path=str(storage_path)),
    )


def thin_model() -> ModelConfig:
    """A Mask R-CNN whose forward pass takes milliseconds."""
    return ModelConfig(
        backbone=BackboneConfig(depth=18),
        fpn=FpnConfig(channels=8),
        anchors=AnchorConfig(scales=(8, 16, 32, 48, 64)),
        rpn=RpnConfig(
            channels=8, anchors_per_image=32, pre_nms_top_k=50, proposals_training=20, proposals_inference=10
        ),
        roi=RoiConfig(rois_per_image=8, canonical_size=32),
        box_head=BoxHeadConfig(channels=16, norm="group"),
        mask_head=MaskHeadConfig(channels=8, num_convolutions=1, norm="group"),
        detections=DetectionConfig(score_threshold=0.0, max_per_image=5),
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder; a folder without files counts as nothing."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def record_of(
    path: Path, bitmaps: Sequence[Bitmap], height: int, width: int, classes: Sequence[int] | None = None
) -> ImageRecord:
    """Record of an image file whose objects have these bitmaps."""
    annotations = tuple(
        Annotation(
            annotation_id=index + 1,
            class_id=classes[index] if classes else 1 + index % 2,
            bbox=(numbers[0], numbers[1], numbers[2], numbers[3]),
            area=float(bitmap.sum()),
            is_crowd=False,
            segmentation=rle_string(bitmap),
        )
        for index, bitmap in enumerate(bitmaps)
        for numbers in [tight_xywh(bitmap)]
    )
    return ImageRecord(0, 1, path.name, str(path), height, width, annotations)


def row_settings(canvases: Sequence[tuple[int, int]] = CANVASES, policies: dict[str, str] | None = None) -> RowSettings:
    """Raw images; policies by kind, the others by default."""
    return RowSettings(tuple(canvases), PolicySettings.model_validate(policies or {}), "raw", 95)


def row_of(record: ImageRecord, canvases: Sequence[tuple[int, int]] = CANVASES) -> dict[str, Any]:
    """The row that a record becomes, with the types that `ShardSet.read_row` gives it."""
    values, _ = encode_row(0, record, row_settings(canvases))
    for field in ROW_SCHEMA:
        if pa.types.is_list(field.type):
            values[field.name] = np.array(values[field.name], dtype=field.type.value_type.to_pandas_dtype())
        elif pa.types.is_large_binary(field.type):
            values[field.name] = np.frombuffer(values[field.name], dtype=np.uint8)
    return values


def pack_sample(image: Pixels, bitmaps: Sequence[Bitmap], is_crowd: bool = False) -> Sample:
    """Objects of classes 1, 2, ... with these bitmaps of the whole image and the boxes of these."""
    packed = [pack_mask(bitmap) for bitmap in bitmaps]
    boxes = np.array([box for box, _ in packed], dtype=np.float32).reshape(-1, 4)
    sizes = np.stack([boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1).astype(np.int32)
    bits = np.frombuffer(b"".join(bits for _, bits in packed), dtype=np.uint8)
    classes = np.arange(1, len(packed) + 1, dtype=np.int32)
    return Sample(image, classes, np.full(len(packed), is_crowd), boxes, boxes.copy(), sizes, bits)


def class_map() -> ClassMap:
    """Classes of the two training files together."""
    return ClassMap(CLASS_NAMES)
