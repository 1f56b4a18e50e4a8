"""One image: decode, orient, resize; masks to bits inside their box. Pure functions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from model.resize import resize_bilinear

ResizeMethod = Literal["antialiased", "original"]
UInt8Array = npt.NDArray[np.uint8]


class ImageProblem(Exception):  # noqa: N818 - it describes the image, and is collected rather than shown as a crash
    """Why an image cannot be used."""

    def __init__(self, reason: str, kind: str = "unreadable_image") -> None:
        super().__init__(reason)
        self.kind = kind
        """Of the policies in `PolicySettings`."""


def decode_image(content: bytes, height: int | None = None, width: int | None = None) -> UInt8Array:
    """Decode an image file to RGB, turned as its EXIF orientation says.

    Where only the unturned pixels have the size that the annotations give, the annotations were made on those.

    Args:
        content: bytes of a file in any format that Pillow reads; of an animation the first picture.
        height: rows that the annotations give, or None where there are none.
        width: columns that the annotations give, or None.

    Returns:
        (H, W, 3) uint8. Gray, palette, CMYK and 16-bit images are converted, transparency is dropped.

    Raises:
        ImageProblem: unreadable, or of another size than the annotations say.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            stored: Image.Image = image.copy() if getattr(image, "is_animated", False) else image
            turned = ImageOps.exif_transpose(stored)
            chosen = turned
            if (width, height) == stored.size and (width, height) != turned.size:
                chosen = stored
            array = _to_rgb(chosen)
    except UnidentifiedImageError as error:  # its message names a place in memory
        raise ImageProblem("cannot be decoded (no image format that Pillow knows)") from error
    except Image.DecompressionBombError as error:
        raise ImageProblem(f"is refused ({error})", "decompression_bomb") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageProblem(f"cannot be decoded ({error})") from error
    except MemoryError:
        raise
    except Exception as error:  # bytes that make no sense end in errors of many kinds, by format
        raise ImageProblem(f"cannot be decoded ({type(error).__name__}: {error})") from error
    if height is not None and array.shape[:2] != (height, width):
        found = f"{array.shape[1]} x {array.shape[0]}"
        exchanged = array.shape[:2] == (width, height)
        hint = "; height and width are exchanged: has the file lost its EXIF orientation?" if exchanged else ""
        raise ImageProblem(f"is {found} pixels, its annotations say {width} x {height}{hint}", "size_mismatch")
    return array


def exif_orientation(content: bytes) -> int:
    """EXIF orientation of an image file that can be decoded, 1 (upright) to 8; 1 where it has none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block ends in errors of many kinds
        return 1
    return orientation if isinstance(orientation, int) and 2 <= orientation <= 8 else 1


def image_to_rgb(image: Image.Image) -> UInt8Array:
    """(H, W, 3) uint8 of an open Pillow image, as `decode_image` gives it for its file."""
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> UInt8Array:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bit and more: Pillow would clip instead of scale
        values = np.asarray(image, dtype=np.float64)
        largest = 65535.0 if values.max(initial=0.0) > 255 else 255.0
        gray = np.clip(np.rint(values * (255.0 / largest)), 0, 255).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def choose_canvas(
    height: int, width: int, canvases: Sequence[tuple[int, int]], short_side: int | None = None
) -> tuple[int, int, int]:
    """The canvas on which an image comes out largest, and its size there.

    Args:
        height: rows of the original image.
        width: columns of the original image.
        canvases: (rows, columns) of each; the first of equals is taken.
        short_side: pixels that the shorter side of the resized image has at most.

    Returns:
        Index of the canvas, and rows and columns of the resized image, at least 1 and at most the canvas's.
    """
    most = math.inf if short_side is None else short_side / min(height, width)
    scales = [min(rows / height, columns / width, most) for rows, columns in canvases]
    index = int(np.argmax(scales))
    rows, columns = canvases[index]
    return (
        index,
        min(rows, max(1, round(height * scales[index]))),
        min(columns, max(1, round(width * scales[index]))),
    )


def stored_size(
    height: int,
    width: int,
    canvas: tuple[int, int],
    largest_short_side: int | None = None,
    largest_scale: float | None = None,
) -> tuple[int, int]:
    """Size at which an image is kept whose size on the canvas is drawn: the largest draw's, but never enlarged.

    Args:
        height: rows of the original image.
        width: columns of the original image.
        canvas: rows and columns of the image's canvas.
        largest_short_side: pixels that the shorter side is brought to at most, as far as the canvas allows.
        largest_scale: instead of that the largest factor of the size that fits the canvas.

    Returns:
        Rows and columns, at least 1.
    """
    fit = min(canvas[0] / height, canvas[1] / width)
    asked = fit * largest_scale if largest_scale is not None else fit
    if largest_short_side is not None:
        asked = min(asked, largest_short_side / min(height, width))
    scale = min(asked, 1.0)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_image(image: UInt8Array, height: int, width: int, method: ResizeMethod = "antialiased") -> UInt8Array:
    """Resize (H, W, 3) uint8 to (height, width, 3), bilinear.

    Args:
        image: (H, W, 3).
        height: rows wanted.
        width: columns wanted.
        method: antialiased, as Pillow does it; or original, as `model.resize` says, fractions cut off.
    """
    if image.shape[:2] == (height, width):
        return image
    if method == "original":
        return resize_bilinear(image, height, width).astype(np.uint8)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def minimise_mask(mask: npt.NDArray[np.bool_], size: int) -> npt.NDArray[np.bool_]:
    """Mini mask of the original: (h, w) inside its box to (size, size), exact no more.

    Raises:
        ValueError: a mask without pixels.
    """
    if mask.size == 0:
        raise ValueError("a mask without pixels has no mini mask")
    # NumPy rounds a half to the even neighbour, 0, as the original does.
    return np.around(resize_bilinear(mask, size, size)).astype(bool)


def rasterise(segmentation: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Full bitmap of a COCO segmentation, pixel for pixel as pycocotools draws it.

    Args:
        segmentation: polygons, or RLE with counts as a list or a string.
        height: rows of the image.
        width: columns of the image.

    Returns:
        (height, width) bool.
    """
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return np.asarray(coco_mask.decode(rle), dtype=bool)


def pack_mask(mask: npt.NDArray[np.bool_]) -> tuple[tuple[int, int, int, int], bytes]:
    """Bits of a mask inside its tight box; exact, and far smaller than the bitmap.

    Args:
        mask: (H, W) bool.

    Returns:
        The box xyxy in whole pixels, and the bits row by row, most significant first, in as many bytes as they need.
        An empty mask has the box (0, 0, 0, 0) and no bytes.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return (0, 0, 0, 0), b""
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    return (left, top, right, bottom), np.packbits(mask[top:bottom, left:right]).tobytes()


def unpack_mask(bits: UInt8Array, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Inverse of `pack_mask` for the part inside the box: (height, width) bool from its bytes."""
    return np.unpackbits(bits, count=height * width).reshape(height, width).astype(bool)


def num_mask_bytes(height: int, width: int) -> int:
    """Bytes that the bits of a mask of this size take."""
    return (height * width + 7) // 8
