"""How the model looks at an image: whole, as tiles, mirrored, at several scales; and one result out of them all.

A view is a part of the image, resized for a canvas. Without tiling and augmentation an image has one view, and what is
found there is the result as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import batched_nms

from model.config import ModelConfig
from model.mask_rcnn import MaskRCNN
from model.masks import encode_detections
from model.postprocess import to_original
from model.structures import Detections
from pipeline.predict_config import PredictSettings, TilingSettings
from pipeline.preprocess import ResizeMethod, UInt8Array, choose_canvas, resize_image
from pipeline.training import autocast

CANVAS_STEP = 32  # pixels: canvases are multiples of the coarsest stride


@dataclass(frozen=True)
class Viewing:
    """How images are looked at."""

    canvases: tuple[tuple[int, int], ...]
    """Rows and columns of each."""
    short_side: int | None = None
    """See `DataSettings`."""
    resize_method: ResizeMethod = "antialiased"
    flip: bool = False
    """See `PredictSettings`, as the others below."""
    scales: tuple[float, ...] = (1.0,)
    tiling: TilingSettings | None = None

    def augmented(self, settings: PredictSettings) -> Viewing:
        """The same with test-time augmentation, tiling and canvases as configured."""
        canvases = settings.canvases or self.canvases
        return Viewing(canvases, self.short_side, self.resize_method, settings.flip, settings.scales, settings.tiling)


@dataclass(frozen=True)
class View:
    """A part of an image as the model sees it."""

    canvas: tuple[int, int]
    """Rows and columns."""
    pixels: UInt8Array
    """(rows, columns, 3) RGB, at most as large as the canvas."""
    top: int
    """First row of the part, original pixels."""
    left: int
    height: int
    """Rows of the part, original pixels."""
    width: int
    flipped: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the resized part."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def without_pixels(self) -> View:
        """The same place, small enough to be sent elsewhere; `size` is lost."""
        nothing = np.zeros((0, 0, 3), dtype=np.uint8)
        return View(self.canvas, nothing, self.top, self.left, self.height, self.width, self.flipped)


def views_of(pixels: UInt8Array, height: int, width: int, viewing: Viewing) -> list[View]:
    """Views of one image, those of a tile one after the other.

    Args:
        pixels: (H, W, 3) RGB, of the original size, or resized already where there is no tiling.
        height: original rows.
        width: original columns.
        viewing: see there.

    Raises:
        ValueError: tiling of an image that is not of its original size.
    """
    tiles = [(0, 0, height, width)]
    if viewing.tiling is not None:
        tiles = tiles_of(height, width, viewing.tiling)
        if len(tiles) > 1 and pixels.shape[:2] != (height, width):
            raise ValueError(f"cannot cut tiles of {height} x {width} pixels out of {pixels.shape[:2]}")
    views = []
    for top, left, tile_height, tile_width in tiles:
        part = pixels if len(tiles) == 1 else pixels[top : top + tile_height, left : left + tile_width]
        for scale in viewing.scales:
            canvases = [_scaled_canvas(canvas, scale) for canvas in viewing.canvases]
            short_side = None if viewing.short_side is None else max(1, round(viewing.short_side * scale))
            index, rows, columns = choose_canvas(tile_height, tile_width, canvases, short_side)
            resized = np.ascontiguousarray(resize_image(part, rows, columns, viewing.resize_method))
            views.append(View(canvases[index], resized, top, left, tile_height, tile_width))
            if viewing.flip:
                mirrored = np.ascontiguousarray(resized[:, ::-1])
                views.append(View(canvases[index], mirrored, top, left, tile_height, tile_width, flipped=True))
    return views


def _scaled_canvas(canvas: tuple[int, int], scale: float) -> tuple[int, int]:
    rows, columns = (max(CANVAS_STEP, round(side * scale / CANVAS_STEP) * CANVAS_STEP) for side in canvas)
    return rows, columns


def tiles_of(height: int, width: int, tiling: TilingSettings) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of the tiles of an image; together they cover it, and neighbours overlap."""
    rows, columns = (_starts(length, tiling) for length in (height, width))
    return [
        (top, left, min(tiling.size, height), min(tiling.size, width)) for top, left in itertools.product(rows, columns)
    ]


def _starts(length: int, tiling: TilingSettings) -> list[int]:
    """First pixels of the fewest tiles along a side that overlap enough, evenly spread."""
    if length <= tiling.size:
        return [0]
    stride = max(1, int(tiling.size * (1 - tiling.overlap)))
    number = -(-(length - tiling.size) // stride) + 1
    return [round(index * (length - tiling.size) / (number - 1)) for index in range(number)]


def detect_views(model: MaskRCNN, views: Sequence[View], dtype: torch.dtype | None) -> list[Detections]:
    """Detections of each view in original pixels of the whole image, on the CPU.

    Args:
        model: in evaluation mode.
        views: of one canvas; a single forward pass.
        dtype: see `pipeline.training.autocast_dtype`.
    """
    device = next(model.parameters()).device
    images = np.zeros((len(views), *views[0].canvas, 3), dtype=np.uint8)
    for image, view in zip(images, views, strict=True):
        image[: view.size[0], : view.size[1]] = view.pixels
    sizes = torch.tensor([view.size for view in views])
    with autocast(dtype, device.type):
        found = model.detect(torch.from_numpy(images).permute(0, 3, 1, 2).to(device), sizes.to(device))
    return [_in_image(detections, view, model.config) for detections, view in zip(found, views, strict=True)]


def _in_image(detections: Detections, view: View, config: ModelConfig) -> Detections:
    """Input pixels of a view to original pixels of the image."""
    moved = to_original(detections, view.size, (view.height, view.width), config)
    boxes, masks = moved.boxes.float().cpu(), moved.mask_probabilities.float().cpu()
    if view.flipped:
        boxes = torch.stack([view.width - boxes[:, 2], boxes[:, 1], view.width - boxes[:, 0], boxes[:, 3]], dim=1)
        masks = masks.flip(-1)
    boxes = boxes + boxes.new_tensor([view.left, view.top, view.left, view.top])
    return Detections(boxes, moved.scores.float().cpu(), moved.classes.cpu(), masks)


def unite(
    views: Sequence[View], found: Sequence[Detections], height: int, width: int, viewing: Viewing, config: ModelConfig
) -> Detections:
    """One result out of those of all views of an image.

    Views of one tile (test-time augmentation) are united by NMS of boxes; tiles by NMS of masks: what the edge of a
    tile may have cut comes after everything else, then the order is by score. Detections of one tile never compete
    there.

    Args:
        views: of the image; their pixels are not needed.
        found: detections of each, original pixels.
        height: rows of the image.
        width: columns of the image.
        viewing: how the views were made.
        config: thresholds.

    Returns:
        Best score first; from several tiles perhaps more than `max_per_image`.
    """
    if len(views) == 1:
        return found[0]
    tiles: dict[tuple[int, int], list[Detections]] = {}
    for view, detections in zip(views, found, strict=True):
        tiles.setdefault((view.top, view.left), []).append(detections)
    united = [_unite_augmented(of_tile, config) for of_tile in tiles.values()]
    if len(united) == 1 or viewing.tiling is None:
        return united[0]
    return _unite_tiles(list(tiles), united, height, width, viewing.tiling, config)


def _joined(parts: Sequence[Detections]) -> Detections:
    return Detections(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("boxes", "scores", "classes", "mask_probabilities")
        )
    )


def _unite_augmented(found: Sequence[Detections], config: ModelConfig) -> Detections:
    if len(found) == 1:
        return found[0]
    together = _joined(found)
    kept = batched_nms(together.boxes, together.scores, together.classes, config.detections.nms_threshold)
    return together.where(kept[: config.detections.max_per_image])


def _unite_tiles(
    corners: Sequence[tuple[int, int]],
    found: Sequence[Detections],
    height: int,
    width: int,
    tiling: TilingSettings,
    config: ModelConfig,
) -> Detections:
    """NMS over the masks of different tiles."""
    from pycocotools import mask as coco_mask

    together = _joined(found)
    tile = np.repeat(np.arange(len(found)), [len(part) for part in found])
    boxes, scores, classes = together.boxes.numpy(), together.scores.numpy(), together.classes.numpy()
    cut = np.concatenate(
        [_cut(part, top, left, height, width, tiling) for part, (top, left) in zip(found, corners, strict=True)]
    )
    masks = encode_detections(together, height, width, config.detections.whole_pixels)
    areas = coco_mask.area(masks) if masks else np.zeros(0)
    kept: list[int] = []
    for index in np.lexsort((-scores, cut)):
        others = np.array(kept, dtype=np.int64)
        near = others[
            (classes[others] == classes[index])
            & (tile[others] != tile[index])
            & (boxes[others, :2] < boxes[index, 2:]).all(axis=1)
            & (boxes[others, 2:] > boxes[index, :2]).all(axis=1)
        ]
        if len(near):
            iou = coco_mask.iou([masks[index]], [masks[other] for other in near], [0] * len(near))[0]
            shared = iou / (1 + iou) * (areas[index] + areas[near])
            if (shared > tiling.mask_overlap * np.maximum(np.minimum(areas[index], areas[near]), 1)).any():
                continue
        kept.append(int(index))
    order = torch.tensor(sorted(kept, key=lambda index: -scores[index]), dtype=torch.int64)
    return together.where(order)


def _cut(
    found: Detections, top: int, left: int, height: int, width: int, tiling: TilingSettings
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """(N,) whether a box reaches an edge of its tile inside the image, where the rest of the object may be missing."""
    margin = 1.0  # pixels: boxes seldom end exactly at an edge
    boxes = found.boxes.numpy()
    bottom, right = min(top + tiling.size, height), min(left + tiling.size, width)
    reaches = np.zeros(len(boxes), dtype=bool)
    for column, edge, is_inside in (
        (0, left, left > 0), (1, top, top > 0), (2, right, right < width), (3, bottom, bottom < height),
    ):  # fmt: skip
        if is_inside:
            reaches |= np.abs(boxes[:, column] - edge) <= margin
    return reaches
