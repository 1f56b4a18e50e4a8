"""The shapes data set: circles, squares and triangles, written as ordinary COCO JSON and PNG files.

Every image is a function of (seed, split, number), so a smaller set is the beginning of a larger one.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from model.structures import Batch
from pipeline import storage
from pipeline.batches import collate
from pipeline.config import SyntheticSettings
from pipeline.errors import UserError
from pipeline.preprocess import pack_mask
from pipeline.sample import Sample, sample_to_values

IMAGE_SIZE = 128  # pixels a side
SHAPE_NAMES = ("circle", "square", "triangle")
EMPTY_FRACTION = 0.05
MAX_OBJECTS = 4
MIN_VISIBLE_FRACTION = 0.35
_SPLITS = ("train", "val")

Mask = npt.NDArray[np.bool_]


def write_shapes(root: str, settings: SyntheticSettings) -> bool:
    """Write the data set below root, unless it is there: annotations/instances_{train,val}.json and images/.

    The annotation files come last, so a set that was interrupted is written again.

    Returns:
        Whether anything was written.

    Raises:
        UserError: there is a data set, but not the one of these settings.
    """
    annotation_paths = [storage.join(root, f"annotations/instances_{split}.json") for split in _SPLITS]
    if all(storage.exists(path) for path in annotation_paths):
        _check_settings(annotation_paths[0], settings)
        return False
    for split, path in zip(_SPLITS, annotation_paths, strict=True):
        content = _annotations(split, settings)
        for image, pixels in zip(content["images"], _pictures(split, settings), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
            storage.write_bytes(storage.join(root, f"images/{image['file_name']}"), buffer.getvalue())
        storage.write_bytes(path, json.dumps(content).encode())
    return True


def _check_settings(path: str, settings: SyntheticSettings) -> None:
    """Refuse a data set that was made from other settings, or by someone else."""
    try:
        info = json.loads(storage.read_bytes(path)).get("info", {})
    except ValueError:
        return  # the reader of the file says what is wrong with it
    if info.get("shapes") != settings.model_dump():
        raise UserError(
            f"{path}: holds other data than data.synthetic asks for; delete the folder, name another data.root, "
            "or leave data.synthetic out to train on what is there"
        )


def digest_of_shapes(settings: SyntheticSettings) -> str:
    """SHA-256 over all annotations and pixels: two machines with the same digest train on the same data."""
    digest = hashlib.sha256()
    for split in _SPLITS:
        content = _annotations(split, settings)
        digest.update(
            json.dumps({key: content[key] for key in sorted(content.keys() - {"info"})}, sort_keys=True).encode()
        )
        for pixels in _pictures(split, settings):
            digest.update(pixels.tobytes())
    return digest.hexdigest()


def draw_example(seed: int, split: str, number: int) -> tuple[npt.NDArray[np.uint8], list[tuple[str, Mask]]]:
    """One picture and its objects.

    Args:
        seed: of the data set.
        split: "train" or "val".
        number: of the image in its split.

    Returns:
        (128, 128, 3) uint8 RGB, and name and visible pixels (128, 128) bool of each object; there may be none.
    """
    rng = np.random.default_rng([seed, _SPLITS.index(split), number])
    pixels = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float64)
    pixels[:] = rng.uniform(0, 255, size=3)
    num_objects = 0 if rng.random() < EMPTY_FRACTION else int(rng.integers(1, MAX_OBJECTS + 1))
    objects: list[tuple[str, Mask]] = []
    areas: list[int] = []
    while len(objects) < num_objects:
        name, mask = _draw_shape(rng)
        colour = rng.uniform(0, 255, size=3)
        visible = [earlier & ~mask for _, earlier in objects]
        if any(part.sum() < MIN_VISIBLE_FRACTION * area for part, area in zip(visible, areas, strict=True)):
            continue  # it would hide one of the others
        objects = [(earlier_name, part) for (earlier_name, _), part in zip(objects, visible, strict=True)]
        objects.append((name, mask))
        areas.append(int(mask.sum()))
        pixels[mask] = colour
    pixels += rng.normal(0, rng.uniform(2, 20), size=pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), objects


def draw_sample(seed: int, split: str, number: int) -> Sample:
    """The same picture and objects as a training sample, without files; for tests and benchmarks."""
    pixels, objects = draw_example(seed, split, number)
    packed = [pack_mask(mask) for _, mask in objects]
    boxes = np.array([box for box, _ in packed], dtype=np.float32).reshape(-1, 4)
    return Sample(
        image=pixels,
        classes=np.array([SHAPE_NAMES.index(name) + 1 for name, _ in objects], dtype=np.int32),
        is_crowd=np.zeros(len(objects), dtype=bool),
        boxes=boxes,
        mask_boxes=boxes,
        mask_sizes=np.stack([boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1).astype(np.int32),
        mask_bits=np.frombuffer(b"".join(bits for _, bits in packed), dtype=np.uint8),
    )


def draw_batch(numbers: Sequence[int], seed: int = 0) -> Batch:
    """Pictures of the training split as a batch."""
    rows = [
        {"random_key": number, "source": 0, "canvas_height": IMAGE_SIZE, "canvas_width": IMAGE_SIZE}
        | sample_to_values(draw_sample(seed, "train", number))
        for number in numbers
    ]
    return collate(rows, np.ones((1, len(SHAPE_NAMES) + 1), dtype=bool))


def _draw_shape(rng: np.random.Generator) -> tuple[str, Mask]:
    """A shape of random kind, place and size, wholly inside the picture."""
    name = SHAPE_NAMES[int(rng.integers(len(SHAPE_NAMES)))]
    radius = float(rng.uniform(9, 28))
    x, y = (float(c) for c in rng.uniform(radius + 1, IMAGE_SIZE - radius - 1, size=2))
    centre = np.arange(IMAGE_SIZE) + 0.5
    dx, dy = (centre - x)[None, :], (centre - y)[:, None]
    if name == "circle":
        return name, dx**2 + dy**2 <= radius**2
    if name == "square":
        return name, np.maximum(np.abs(dx), np.abs(dy)) <= radius * 0.85
    # An upright triangle: half as wide at half its height.
    from_top = dy + radius
    return name, (np.abs(dx) <= from_top / 2) & (from_top <= 2 * radius)


def _examples(
    split: str, settings: SyntheticSettings
) -> Iterator[tuple[npt.NDArray[np.uint8], list[tuple[str, Mask]]]]:
    count = settings.training_images if split == "train" else settings.validation_images
    return (draw_example(settings.seed, split, number) for number in range(count))


def _pictures(split: str, settings: SyntheticSettings) -> Iterator[npt.NDArray[np.uint8]]:
    return (pixels for pixels, _ in _examples(split, settings))


def _annotations(split: str, settings: SyntheticSettings) -> dict[str, Any]:
    """COCO instances of one split."""
    from pycocotools import mask as coco_mask

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (_, objects) in enumerate(_examples(split, settings)):
        image_id = number + 1
        name = f"{split}_{number:06d}.png"
        images.append({"id": image_id, "file_name": name, "height": IMAGE_SIZE, "width": IMAGE_SIZE})
        for shape, mask in objects:
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": SHAPE_NAMES.index(shape) + 1,
                    "bbox": [float(number) for number in coco_mask.toBbox(rle)],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(SHAPE_NAMES)]
    info = {"description": "shapes data set", "shapes": settings.model_dump()}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}
