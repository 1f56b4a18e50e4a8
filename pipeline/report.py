"""Pictures for people: predictions beside ground truth."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from model.masks import paste_masks
from model.structures import Detections
from pipeline.preprocess import UInt8Array
from pipeline.sample import unpack_row_masks

_COLOURS = (
    (230, 60, 60), (60, 160, 240), (70, 200, 90), (250, 190, 40), (180, 90, 230), (60, 210, 210), (245, 130, 190),
    (160, 120, 60),
)  # fmt: skip
MIN_PICTURE_SIDE = 400
MAX_PICTURE_SIDE = 1024
SHOWN_SCORE = 0.5
_MARGIN = 4


def draw_objects(
    image: UInt8Array,
    masks: Iterable[npt.NDArray[np.bool_]],
    boxes: npt.NDArray[np.float32],
    labels: Sequence[str],
    colours: Sequence[int],
    largest_side: int = MAX_PICTURE_SIDE,
) -> Image.Image:
    """An image with masks laid over it, their outlines and boxes, and labels; small images are enlarged, large reduced.

    Lines and letters are drawn at the size that is shown, so that they can be seen however large the image is.

    Args:
        image: (H, W, 3) RGB.
        masks: N of (H, W); N may be 0.
        boxes: (N, 4) xyxy in pixels of the image.
        labels: N texts.
        colours: N numbers; equal ones get the same colour.
        largest_side: pixels that the picture has at most.
    """
    height, width = image.shape[:2]
    factor = max(1, min(-(-MIN_PICTURE_SIDE // min(height, width)), largest_side // max(height, width)))
    picture = Image.fromarray(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((largest_side, largest_side))
    shown = np.array(picture)
    for mask, colour in zip(masks, colours, strict=True):
        _lay_over(shown, mask, np.array(_COLOURS[colour % len(_COLOURS)], dtype=np.uint16))
    picture = Image.fromarray(shown)
    scale = (shown.shape[1] / width, shown.shape[0] / height) * 2
    draw = ImageDraw.Draw(picture)
    for box, label, colour in zip(boxes, labels, colours, strict=True):
        x0, y0, x1, y1 = (float(number) * along for number, along in zip(box, scale, strict=True))
        paint = _COLOURS[colour % len(_COLOURS)]
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=paint)
        if label:
            place = draw.textbbox((x0 + 1, y0), label)
            draw.rectangle(place, fill=(0, 0, 0))
            draw.text((x0 + 1, y0), label, fill=paint)
    return picture


def _lay_over(shown: UInt8Array, mask: npt.NDArray[np.bool_], paint: npt.NDArray[np.uint16]) -> None:
    """Tint what a mask covers and draw its outline, a pixel wide, in a picture that may be larger or smaller."""
    size = shown.shape[1], shown.shape[0]
    covered = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    if not len(rows):
        return
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    inside, area = covered[part], shown[part]
    padded = np.pad(inside, 1)
    surrounded = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    area[inside] = (area[inside] + paint) // 2
    area[inside & ~surrounded] = paint


def draw_comparison(rows: Sequence[tuple[dict[str, Any], Detections]], class_names: Sequence[str]) -> bytes:
    """Ground truth on the left, detections with a score of at least 0.5 on the right, a line for each row.

    Args:
        rows: rows of the shards with their detections in original pixels; at least one.
        class_names: of classes 1..C-1.

    Returns:
        A PNG file.
    """
    lines = []
    for values, detections in rows:
        image = np.asarray(
            Image.fromarray(values["image"].reshape(values["image_height"], values["image_width"], 3)).resize(
                (values["width"], values["height"])
            )
        )
        lines.append(
            (_ground_truth_picture(image, values, class_names), _found_picture(image, detections, class_names))
        )
    width = max(left.width + right.width for left, right in lines) + 3 * _MARGIN
    title = 16
    height = sum(max(left.height, right.height) + _MARGIN for left, right in lines) + _MARGIN + title
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, 2), "ground truth", fill=(0, 0, 0))
    draw.text((lines[0][0].width + 2 * _MARGIN, 2), f"predicted (score >= {SHOWN_SCORE})", fill=(0, 0, 0))
    top = title + _MARGIN
    for left, right in lines:
        sheet.paste(left, (_MARGIN, top))
        sheet.paste(right, (left.width + 2 * _MARGIN, top))
        top += max(left.height, right.height) + _MARGIN
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _label(name: str, score: float | None, class_names: Sequence[str]) -> str:
    """With a single class its name on every object would only hide the picture."""
    shown = "" if len(class_names) == 1 else name
    return shown if score is None else f"{shown} {score:.2f}".strip()


def _ground_truth_picture(image: UInt8Array, values: dict[str, Any], class_names: Sequence[str]) -> Image.Image:
    boxes = values["mask_boxes"].reshape(-1, 4)
    masks = np.zeros((len(boxes), *image.shape[:2]), dtype=bool)
    for mask, ((left, top, right, bottom), crop) in zip(masks, unpack_row_masks(values), strict=True):
        mask[top:bottom, left:right] = crop
    classes = values["classes"].tolist()
    labels = [_label(class_names[class_id - 1], None, class_names) for class_id in classes]
    return draw_objects(image, masks, boxes.astype(np.float32), labels, _colours(classes, class_names))


def _found_picture(image: UInt8Array, detections: Detections, class_names: Sequence[str]) -> Image.Image:
    sure = detections.scores >= SHOWN_SCORE
    chosen = Detections(
        *(getattr(detections, name)[sure] for name in ("boxes", "scores", "classes", "mask_probabilities"))
    )
    masks = paste_masks(chosen, image.shape[0], image.shape[1])
    classes = chosen.classes.tolist()
    labels = [
        _label(class_names[class_id - 1], score, class_names)
        for class_id, score in zip(classes, chosen.scores.tolist(), strict=True)
    ]
    return draw_objects(image, masks, chosen.boxes.cpu().numpy(), labels, _colours(classes, class_names))


def _colours(classes: Sequence[int], class_names: Sequence[str]) -> list[int]:
    """By class, or one for each object where there is a single class."""
    return list(range(len(classes))) if len(class_names) == 1 else list(classes)
