"""Texts on pictures: their letters, and the places beside objects where they hide none."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

SMALLEST_LETTERS, LARGEST_LETTERS = 10, 13  # pixels
LETTERS_OF_SIDE = 0.25  # of an object's shorter side
CROWDED = 25  # with more objects than that all letters are small
MOST_LABELS = 60  # with more of them one sees nothing but letters
MOST_HIDDEN = 0.35  # of objects, their shares added up
_PLATE = (0, 0, 0, 145)  # black that lets what is below shine through

Array = npt.NDArray[np.float64]


@functools.cache
def font(letters: int) -> ImageFont.FreeTypeFont:
    """Letters of that many pixels, of European languages; others become boxes.

    Those that come with Pillow are English ones only, and have hardly a space.
    """
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), letters)


def shortened(text: str, letters: int, width: float) -> str:
    """The text in one line, without its middle where it is wider than that."""
    text = " ".join(text.split())  # names may hold line breaks
    kept, short = len(text), text
    while kept and font(letters).getlength(short) > width:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def write_labels(
    picture: Image.Image, boxes: Array, labels: Sequence[str], paints: Sequence[tuple[int, int, int]]
) -> None:
    """Write the first labels beside their boxes; one is left out where it has no place.

    Args:
        picture: is changed.
        boxes: (N, 4) xyxy in pixels of the picture.
        labels: N texts, the most important first; an empty one is not written.
        paints: N colours.
    """
    draw = ImageDraw.Draw(picture, "RGBA")
    boxes = np.concatenate([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])], axis=1)
    written = np.zeros((0, 4))
    largest = SMALLEST_LETTERS if len(boxes) > CROWDED else LARGEST_LETTERS
    for index in [index for index, label in enumerate(labels) if label][:MOST_LABELS]:
        box = boxes[index]
        side = min(box[2] - box[0], box[3] - box[1])
        letters = int(np.clip(side * LETTERS_OF_SIDE, SMALLEST_LETTERS, largest))
        text = shortened(labels[index], letters, picture.width - 2)
        place = find_place(picture.size, box, _extent(text, letters), boxes, written)
        if place is None:
            continue
        written = np.concatenate([written, place[None]])
        left, top, right, bottom = place.tolist()
        draw.rectangle((left, top, right - 1, bottom - 1), fill=_PLATE)
        light = tuple((colour + 255) // 2 for colour in paints[index])
        draw.text((left + 1, top), text, font=font(letters), fill=light)


def _extent(text: str, letters: int) -> tuple[int, int]:
    """Width and height of a label."""
    return math.ceil(font(letters).getlength(text)) + 2, sum(font(letters).getmetrics())


def find_place(
    size: tuple[int, int], box: Array, extent: tuple[int, int], boxes: Array, written: Array
) -> Array | None:
    """(4,) xyxy of a label: above its box, else below, right or left, else within; None where all hide too much.

    Args:
        size: width and height of the picture.
        box: (4,) xyxy of the label's own object.
        extent: width and height of the label.
        boxes: (N, 4) of all objects, its own with them.
        written: (M, 4) of the labels that are there, which it must not meet.
    """
    (x0, y0, x1, y1), (width, height) = box, extent
    furthest = np.array(size) - extent
    corners = np.array(
        [
            (x0, y0 - height), (x0, y1), (x1, y0), (x0 - width, y0),
            (x1 - width, y0 - height), (x1 - width, y1), (x1, y1 - height), (x0 - width, y1 - height),
            (x0 + 1, y0 + 1), (x0 + 1, y1 - height - 1),
        ]
    )  # fmt: skip
    # Along its side of the box a label may slide into the picture, but not onto the object.
    slides = np.array([(1, 0), (1, 0), (0, 1), (0, 1), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)], dtype=bool)
    corners = np.where(slides, np.clip(corners, 0, furthest), corners)
    outside = ((corners < 0) | (corners > furthest)).any(axis=1)
    places = np.concatenate([corners, corners + extent], axis=1)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    hidden = (_common_areas(places, boxes) / np.maximum(areas, 1)).sum(axis=1)
    unusable = outside | (_common_areas(places, written) > 0).any(axis=1) | (hidden > MOST_HIDDEN)
    best = int(np.argmin(np.where(unusable, np.inf, np.round(hidden, 1))))  # of those that are as good the first
    return None if unusable[best] else places[best]


def _common_areas(first: Array, second: Array) -> Array:
    """(N, M) pixels that boxes (N, 4) and (M, 4) share."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common: Array = np.clip(high - low, 0, None).prod(axis=2)
    return common
