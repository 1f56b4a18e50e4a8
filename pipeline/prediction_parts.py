"""The process that holds the model and predicts parts: decoding before it and masks behind it are Ray tasks on CPUs."""

from __future__ import annotations

import copy
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from model.folded import for_inference
from model.mask_rcnn import MaskRCNN
from model.masks import encode_detections
from model.structures import Detections
from pipeline.errors import last_line
from pipeline.prediction_decoding import DecodedImage, FailedImage, decode_images, failed_image, read_contents
from pipeline.prediction_inputs import Entry, Kind
from pipeline.prediction_pictures import PictureSettings, write_pictures
from pipeline.prediction_schema import PartSummary, PredictionError, write_part
from pipeline.training import autocast_dtype
from pipeline.views import View, Viewing, detect_views, unite

CHUNKS_AHEAD = 3
"""Chunks of a part that are decoded before the model has asked for them."""
PARTS_AT_ONCE = 2
"""Parts of one process on their way: the images of the next are decoded, the masks of the last encoded meanwhile."""


@dataclass(frozen=True)
class PartSettings:
    """What every part of a prediction has in common."""

    output: str
    kind: Kind
    identity: str
    model_id: str
    config_digest: str
    class_names: tuple[str, ...]
    """Of classes 1..C-1."""
    viewing: Viewing
    precision: str
    batch_size: int
    timeout_seconds: float
    bytes_column: str
    pictures: PictureSettings


@dataclass
class _Waiting:
    """An image whose views are with the model."""

    image: DecodedImage
    found: list[Detections | None]

    @property
    def is_done(self) -> bool:
        """Whether all of its views have been looked at."""
        return all(detections is not None for detections in self.found)


@dataclass(frozen=True)
class FoundImage:
    """An image on its way to its row."""

    index: int
    height: int
    width: int
    image_id: int | None
    views: list[View]
    """Without pixels."""
    found: list[Detections]
    """Of each view."""


@dataclass
class _Part:
    """A part in work."""

    number: int
    entries: Sequence[Entry]
    rows: list[Any] = field(default_factory=list)
    """Object references of lists of rows and errors."""
    failed: list[FailedImage] = field(default_factory=list)
    finished: list[FoundImage] = field(default_factory=list)
    """Looked at, not yet sent to be encoded."""


class PartPredictor:
    """Predicts parts, of which two may be in work at once; only one forward pass runs at a time."""

    def __init__(self, model: MaskRCNN, settings: PartSettings, device_type: str, num_threads: int) -> None:
        import ray

        device = torch.device(device_type)
        if device.type == "cpu":
            torch.set_num_threads(num_threads)
        self._settings = settings
        self._model = copy.deepcopy(model)  # what comes out of the object store is read-only
        self._model.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._dtype = autocast_dtype(settings.precision, device.type)
        self._model = for_inference(self._model, self._dtype)
        self._lock = threading.Lock()
        # Made once: every call of ray.remote is another function for Ray to keep.
        self._read, self._decode = ray.remote(read_contents), ray.remote(max_retries=1)(decode_images)
        self._encode, self._write = ray.remote(encode_images), ray.remote(_write)

    def process_id(self) -> int:
        """Of this process; an answer means that the model is there."""
        return os.getpid()

    def predict_part(self, number: int, entries: Sequence[Entry]) -> PartSummary:
        """Predict the images of a part and write its file."""
        import ray

        part = _Part(number, entries)
        waiting: dict[tuple[int, int], list[tuple[_Waiting, int]]] = {}  # by canvas: image, and which of its views
        for result in self._decoded(part):
            if isinstance(result, FailedImage):
                part.failed.append(result)
                continue
            image = _Waiting(result, [None] * len(result.views))
            for index, view in enumerate(result.views):
                group = waiting.setdefault(view.canvas, [])
                group.append((image, index))
                if len(group) == self._settings.batch_size:
                    self._detect(part, group)
                    group.clear()
        for group in waiting.values():
            if group:
                self._detect(part, group)
        self._send(part, at_least=1)
        keys = [entry.key for entry in entries]
        written = self._write.remote(self._settings, number, keys, part.failed, *part.rows)
        summary: PartSummary = ray.get(written)
        return summary

    def _decoded(self, part: _Part) -> Iterator[DecodedImage | FailedImage]:
        """Images of a part in order, some chunks decoded ahead."""
        import ray

        settings = self._settings
        numbered = list(enumerate(part.entries))
        size = settings.batch_size
        chunks = [numbered[start : start + size] for start in range(0, len(numbered), size)]
        contents: list[Any] = [None] * len(chunks)
        if settings.kind == "table":
            first, last = part.entries[0], part.entries[-1]
            read = self._read.options(num_returns=len(chunks))
            cells = read.remote(first.path, settings.bytes_column, first.row, last.row + 1, size)
            contents = [cells] if len(chunks) == 1 else cells
        waiting = deque(zip(chunks, contents, strict=True))
        running: deque[tuple[list[tuple[int, Entry]], Any, Any]] = deque()
        while waiting or running:
            while waiting and len(running) < CHUNKS_AHEAD:
                chunk, content = waiting.popleft()
                task = self._decode.remote(chunk, content, settings.kind, settings.viewing, settings.timeout_seconds)
                running.append((chunk, content, task))
            chunk, content, task = running.popleft()
            try:
                yield from ray.get(task)
            except ray.exceptions.RayError:
                yield from self._decoded_alone(chunk, content)

    def _decoded_alone(self, chunk: list[tuple[int, Entry]], content: Any) -> Iterator[DecodedImage | FailedImage]:
        """Images of a chunk whose task died, each in a task of its own: the one that kills it is an error."""
        import ray

        settings = self._settings
        try:
            cells = None if content is None else ray.get(content)
        except ray.exceptions.RayError as error:
            for index, entry in chunk:
                yield failed_image(index, entry, "missing_file", f"its table cannot be read ({last_line(error)})")
            return
        for position, (index, entry) in enumerate(chunk):
            cell = None if cells is None else [cells[position]]
            try:
                alone = [(index, entry)]
                yield from ray.get(
                    self._decode.remote(alone, cell, settings.kind, settings.viewing, settings.timeout_seconds)
                )
            except ray.exceptions.RayError as error:
                yield failed_image(
                    index, entry, "decoder_crash", f"the process that decoded it died ({last_line(error)})"
                )

    def _detect(self, part: _Part, group: Sequence[tuple[_Waiting, int]]) -> None:
        """One forward pass; where it fails, one for each view, so that an image's failure is its own."""
        views = [image.image.views[index] for image, index in group]
        try:
            with self._lock:
                results: list[Detections | Exception] = list(detect_views(self._model, views, self._dtype))
        except Exception:  # CUDA out of memory, or an image that breaks the model
            results = [self._detect_alone(view) for view in views]
        for (image, index), detections in zip(group, results, strict=True):
            if isinstance(detections, Exception):
                entry = part.entries[image.image.index]
                reason = f"the model failed on it ({type(detections).__name__}: {last_line(detections)})"
                if all(failed.index != image.image.index for failed in part.failed):
                    part.failed.append(failed_image(image.image.index, entry, "model_error", reason))
                continue
            image.found[index] = detections
            if image.is_done:
                part.finished.append(_found(image))
        self._send(part, at_least=self._settings.batch_size)

    def _detect_alone(self, view: View) -> Detections | Exception:
        try:
            with self._lock:
                return detect_views(self._model, [view], self._dtype)[0]
        except Exception as error:
            return error

    def _send(self, part: _Part, at_least: int) -> None:
        """Give finished images to a task that encodes their masks."""
        if len(part.finished) >= at_least:
            entries = [part.entries[image.index] for image in part.finished]
            part.rows.append(self._encode.remote(part.finished, entries, self._settings, self._model.config))
            part.finished = []


def _found(waiting: _Waiting) -> FoundImage:
    image = waiting.image
    views = [view.without_pixels() for view in image.views]
    found = [detections for detections in waiting.found if detections is not None]
    return FoundImage(image.index, image.height, image.width, image.image_id, views, found)


def encode_images(
    images: Sequence[FoundImage], entries: Sequence[Entry], settings: PartSettings, config: Any
) -> list[tuple[int, dict[str, Any]] | FailedImage]:
    """Rows of images, masks as RLE, and their pictures where these are wanted; a Ray task on a CPU."""
    results: list[tuple[int, dict[str, Any]] | FailedImage] = []
    for image, entry in zip(images, entries, strict=True):
        try:
            found = unite(image.views, image.found, image.height, image.width, settings.viewing, config)
            row = result_row(entry.key, image, found, settings, config.detections.whole_pixels)
            if settings.pictures.wanted:
                write_pictures(settings.output, entry, row, settings.kind, settings.bytes_column, settings.pictures)
            results.append((image.index, row))
        except OSError:  # a full disk, a bucket that is away: not the image's fault, so the part is tried again
            raise
        except Exception as error:
            reason = f"its detections cannot be written ({type(error).__name__}: {last_line(error)})"
            results.append(failed_image(image.index, entry, "model_error", reason))
    return results


def result_row(
    key: str, image: FoundImage, found: Detections, settings: PartSettings, whole_pixels: bool
) -> dict[str, Any]:
    """A row of `pipeline.prediction_schema.SCHEMA`."""
    masks = encode_detections(found, image.height, image.width, whole_pixels)
    classes = found.classes.tolist()
    return {
        "key": key,
        "image_id": image.image_id,
        "height": image.height,
        "width": image.width,
        "boxes": found.boxes.tolist(),
        "class_ids": classes,
        "class_names": [settings.class_names[class_id - 1] for class_id in classes],
        "scores": found.scores.tolist(),
        "mask_counts": [mask["counts"] for mask in masks],
        "model_id": settings.model_id,
        "config_digest": settings.config_digest,
    }


def _write(
    settings: PartSettings, number: int, keys: Sequence[str], failed: Sequence[FailedImage], *encoded: list[Any]
) -> PartSummary:
    """Ray task: the file of a part out of what the tasks before it gave."""
    rows: list[tuple[int, dict[str, Any]]] = []
    errors: list[tuple[int, PredictionError]] = [(image.index, image.error) for image in failed]
    for result in (result for results in encoded for result in results):
        if isinstance(result, FailedImage):
            errors.append((result.index, result.error))
        else:
            rows.append(result)
    rows.sort(key=lambda row: row[0])
    errors.sort(key=lambda error: error[0])
    return write_part(
        settings.output, number, settings.identity, keys, [row for _, row in rows], [error for _, error in errors]
    )
