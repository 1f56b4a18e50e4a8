"""From an entry to the views of its image, and everything that can go wrong on that way as an error of that image."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pipeline import storage
from pipeline.prediction_inputs import Entry, Kind, read_column
from pipeline.prediction_schema import PredictionError
from pipeline.preprocess import ImageProblem, UInt8Array, decode_image
from pipeline.shards import ShardSet
from pipeline.views import View, Viewing, views_of

READ_TRIES = 3
RETRY_SECONDS = 0.5
Result = TypeVar("Result")


@dataclass(frozen=True)
class DecodedImage:
    """An image, ready for the model."""

    index: int
    """Within its part."""
    height: int
    """Original rows."""
    width: int
    image_id: int | None
    views: list[View]


@dataclass(frozen=True)
class FailedImage:
    """An image that cannot be predicted."""

    index: int
    """Within its part."""
    error: PredictionError


def decode_images(
    entries: Sequence[tuple[int, Entry]],
    contents: Sequence[Any] | None,
    kind: Kind,
    viewing: Viewing,
    timeout_seconds: float,
) -> list[DecodedImage | FailedImage]:
    """Read, decode and resize images; a Ray task on a CPU.

    Args:
        entries: with their index in the part.
        contents: their cells of a bytes column, None for other kinds.
        kind: how an entry is read.
        viewing: what the model wants to see.
        timeout_seconds: for each image.

    Returns:
        One for each entry, in order.
    """
    results: list[DecodedImage | FailedImage] = []
    for position, (index, entry) in enumerate(entries):
        content = None if contents is None else contents[position]
        try:
            decoded = _within(timeout_seconds, partial(_decode, index, entry, content, kind, viewing))
            results.append(decoded)
        except Exception as error:  # whatever an image does to a decoder is that image's error
            results.append(failed_image(index, entry, *_explain(error, timeout_seconds)))
    return results


def failed_image(index: int, entry: Entry, kind: str, reason: str) -> FailedImage:
    """An entry's error."""
    return FailedImage(index, PredictionError(entry.key, kind, reason, entry.path))


def read_contents(path: str, column: str, first: int, last: int, images_per_chunk: int) -> list[Any]:
    """Cells of consecutive rows of a table; a Ray task with as many results as there are chunks.

    Returns:
        A list of cells for each chunk; where there is only one, that list itself, as Ray wants it.
    """
    cells = _with_tries(lambda: read_column(path, column, first, last))
    chunks = [cells[start : start + images_per_chunk] for start in range(0, last - first, images_per_chunk)]
    return chunks if len(chunks) > 1 else chunks[0]


def _decode(index: int, entry: Entry, content: Any, kind: Kind, viewing: Viewing) -> DecodedImage:
    if kind == "shards":
        values = ShardSet(entry.path).read_row(entry.row)
        pixels = values["image"].reshape(values["image_height"], values["image_width"], 3)
        height, width = values["height"], values["width"]
        return DecodedImage(index, height, width, values["image_id"], views_of(pixels, height, width, viewing))
    file = _with_tries(lambda: storage.read_bytes(entry.path)) if kind == "files" else _bytes_of(content)
    pixels = decode_image(file, entry.height, entry.width)
    height, width = pixels.shape[:2]
    return DecodedImage(index, height, width, entry.image_id, views_of(pixels, height, width, viewing))


def read_original(entry: Entry, content: Any, kind: Kind) -> UInt8Array:
    """(H, W, 3) pixels of an image that could be decoded, for pictures; of shards enlarged to the original size."""
    import numpy as np
    from PIL import Image

    if kind == "shards":
        values = ShardSet(entry.path).read_row(entry.row)
        stored = values["image"].reshape(values["image_height"], values["image_width"], 3)
        return np.asarray(Image.fromarray(stored).resize((values["width"], values["height"])))
    file = _with_tries(lambda: storage.read_bytes(entry.path)) if kind == "files" else _bytes_of(content)
    return decode_image(file, entry.height, entry.width)


def _bytes_of(content: Any) -> bytes:
    """The file in a cell: bytes, or a struct of bytes and path as the Hugging Face format has it."""
    if isinstance(content, dict):
        content = content.get("bytes")
    if not isinstance(content, bytes):
        raise ImageProblem("has no bytes in its row")
    return content


def _with_tries(read: Callable[[], Result]) -> Result:
    """What `read` gives; a bucket that stumbles is asked again."""
    for attempt in range(READ_TRIES - 1):
        try:
            return read()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(RETRY_SECONDS * 2**attempt)
    return read()


def _explain(error: Exception, timeout_seconds: float) -> tuple[str, str]:
    """Kind and reason of an error, for the errors table."""
    if isinstance(error, ImageProblem):
        return error.kind, str(error)
    if isinstance(error, _TimeoutError):
        return "timeout", f"not read and decoded within {timeout_seconds:g} seconds"
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, OSError):
        return "missing_file", f"cannot be read ({text})"
    return "unreadable_image", f"cannot be decoded ({type(error).__name__}: {text})"


class _TimeoutError(Exception):
    """An image took too long."""


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """What a call gives, if it gives it in time; a call that does not is left to its thread, which ends by itself."""
    answer: queue.Queue[tuple[bool, Any]] = queue.Queue(1)

    def run() -> None:
        try:
            answer.put((True, call()))
        except Exception as error:
            answer.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        succeeded, result = answer.get(timeout=seconds)
    except queue.Empty:
        raise _TimeoutError from None
    if not succeeded:
        raise result
    value: Result = result
    return value
