"""Pictures for people: objects on an image, predictions beside annotations."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from model.masks import paste_masks
from model.structures import Detections
from pipeline.picture_labels import font, shortened, write_labels
from pipeline.preprocess import UInt8Array
from pipeline.sample import unpack_row_masks

_COLOURS = (
    (230, 60, 60), (60, 160, 240), (70, 200, 90), (250, 190, 40), (180, 90, 230), (60, 210, 210), (245, 130, 190),
    (160, 120, 60), (190, 230, 60), (110, 110, 250), (255, 165, 130), (205, 205, 205),
)  # fmt: skip
MIN_PICTURE_SIDE = 400
MAX_PICTURE_SIDE = 1024
SHOWN_SCORE = 0.5
SHEET_SIDE = 512  # pixels of a picture of the comparison: MLflow shows two beside each other in half a window
_MARGIN = 12
_TITLE_LETTERS, _TITLE_HEIGHT = 24, 44
_NAME_LETTERS, _NAME_HEIGHT = 18, 28
_GROUND = (228, 231, 235)  # beside narrow pictures


def object_label(class_id: int, score: float | None, class_names: Sequence[str]) -> str:
    """Class and score of an object; with a single class its name on every object would only hide the picture."""
    name = "" if len(class_names) == 1 else class_names[class_id - 1]
    return name if score is None else f"{name} {score:.2f}".strip()


def class_colours(classes: Sequence[int], class_names: Sequence[str]) -> list[int]:
    """Numbers of colours: by class, or one for each object where there is a single class."""
    return list(range(len(classes))) if len(class_names) == 1 else list(classes)


def css_colour(number: int) -> str:
    """The colour of that number for an HTML page."""
    return f"rgb{_COLOURS[number % len(_COLOURS)]}"


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
    shown_boxes = boxes * np.array((shown.shape[1] / width, shown.shape[0] / height) * 2)
    paints = [_COLOURS[colour % len(_COLOURS)] for colour in colours]
    draw = ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), paint in zip(shown_boxes.tolist(), paints, strict=True):
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=paint)
    write_labels(picture, shown_boxes, labels, paints)
    return picture


def _lay_over(shown: UInt8Array, mask: npt.NDArray[np.bool_], paint: npt.NDArray[np.uint16]) -> None:
    """Tint what a mask covers and draw its outline in a picture that may be larger or smaller.

    The outline is a pixel wide, and darkens the pixels around it: so it shows on things of its own colour.
    """
    size = shown.shape[1], shown.shape[0]
    covered = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    if not len(rows):
        return
    part = slice(max(0, rows[0] - 1), rows[-1] + 2), slice(max(0, columns[0] - 1), columns[-1] + 2)
    inside, area = covered[part], shown[part]
    padded = np.pad(inside, 1)
    above, below, left, right = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    area[inside] = (area[inside] + paint) // 2
    area[inside & ~(above & below & left & right)] = paint
    area[~inside & (above | below | left | right)] //= 2


def draw_comparison(rows: Sequence[tuple[dict[str, Any], Detections]], class_names: Sequence[str]) -> bytes:
    """Annotations on the left, detections with a score of at least 0.5 on the right, a line for each row.

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
        left = _ground_truth_picture(image, values, class_names)
        lines.append((values["file_name"], left, _found_picture(image, detections, class_names)))
    column = max(MIN_PICTURE_SIDE, *(left.width for _, left, _ in lines))
    width = 2 * column + 3 * _MARGIN
    height = _TITLE_HEIGHT + sum(_NAME_HEIGHT + left.height + _MARGIN for _, left, _ in lines)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, title in enumerate(("annotations", f"predictions (score ≥ {SHOWN_SCORE})")):
        place = _MARGIN + number * (column + _MARGIN), _TITLE_HEIGHT / 2
        draw.text(place, title, font=font(_TITLE_LETTERS), fill=(0, 0, 0), anchor="lm")
    top = _TITLE_HEIGHT
    for name, left, right in lines:
        name = shortened(name, _NAME_LETTERS, width - 2 * _MARGIN)
        draw.text((_MARGIN, top + _NAME_HEIGHT / 2), name, font=font(_NAME_LETTERS), fill=(60, 60, 60), anchor="lm")
        top += _NAME_HEIGHT
        for number, picture in enumerate((left, right)):
            edge = _MARGIN + number * (column + _MARGIN)
            draw.rectangle((edge, top, edge + column - 1, top + left.height - 1), fill=_GROUND)
            sheet.paste(picture, (edge + (column - picture.width) // 2, top))
        top += left.height + _MARGIN
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _ground_truth_picture(image: UInt8Array, values: dict[str, Any], class_names: Sequence[str]) -> Image.Image:
    boxes = values["mask_boxes"].reshape(-1, 4)
    masks = np.zeros((len(boxes), *image.shape[:2]), dtype=bool)
    for mask, ((left, top, right, bottom), crop) in zip(masks, unpack_row_masks(values), strict=True):
        mask[top:bottom, left:right] = crop
    classes = values["classes"].tolist()
    labels = [object_label(class_id, None, class_names) for class_id in classes]
    return draw_objects(image, masks, boxes.astype(np.float32), labels, class_colours(classes, class_names), SHEET_SIDE)


def _found_picture(image: UInt8Array, detections: Detections, class_names: Sequence[str]) -> Image.Image:
    sure = detections.scores >= SHOWN_SCORE
    chosen = Detections(
        *(getattr(detections, name)[sure] for name in ("boxes", "scores", "classes", "mask_probabilities"))
    )
    masks = paste_masks(chosen, image.shape[0], image.shape[1])
    classes = chosen.classes.tolist()
    labels = [
        object_label(class_id, score, class_names)
        for class_id, score in zip(classes, chosen.scores.tolist(), strict=True)
    ]
    return draw_objects(
        image, masks, chosen.boxes.cpu().numpy(), labels, class_colours(classes, class_names), SHEET_SIDE
    )
