"""Prepared data: Arrow IPC shards with a manifest, mapped into memory or read by range.

A shard holds consecutive rows, one record batch a row, so that any row is read alone, from a local disk or a bucket.
Images are stored at the size they have on their canvas, or, where the augmentation draws that, at the largest that it
asks for but never enlarged; boxes, areas and mask bits stay in original pixels and exact.
A row carries its digest and is compared with it when a process first reads it. The manifest is written last: without
one there is no data set.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline import storage
from pipeline.errors import UserError

FORMAT_VERSION = 3
MANIFEST = "manifest.json"

ROW_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.int32()),
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("file_sha256", pa.binary(32)),  # of the image file that the row was made from
        ("height", pa.int32()),  # original
        ("width", pa.int32()),
        ("canvas", pa.int32()),
        ("image_height", pa.int32()),  # as stored
        ("image_width", pa.int32()),
        ("image", pa.large_binary()),  # (image_height, image_width, 3) uint8, or a JPEG file of them
        ("annotation_ids", pa.list_(pa.int64())),
        ("classes", pa.list_(pa.int32())),
        ("is_crowd", pa.list_(pa.bool_())),
        ("bboxes", pa.list_(pa.float64())),  # 4 an object: x, y, width, height, original pixels
        ("areas", pa.list_(pa.float64())),
        ("mask_boxes", pa.list_(pa.int32())),  # 4 an object: xyxy in whole original pixels
        ("mask_bits", pa.large_binary()),  # of all objects, each from a new byte on
        ("digest", pa.binary(32)),  # see `row_digest`
    ]
)


@dataclass(frozen=True)
class Source:
    """What a row's `source` number stands for."""

    annotations: str
    """Annotation file."""
    active_class_ids: tuple[int, ...]
    """Classes that it has labelled."""
    category_ids: tuple[int, ...]
    """Its own id for each of them."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a folder of shards."""

    class_names: tuple[str, ...]
    """Names of classes 1..C-1."""
    sources: tuple[Source, ...]
    canvases: tuple[tuple[int, int], ...]
    """Rows and columns of each."""
    short_side: int | None
    """See `DataSettings`."""
    image_format: str
    """raw or jpeg."""
    shards: tuple[dict[str, Any], ...]
    """name, first_row, num_rows, num_bytes and sha256; of every row its canvas and its classes (crowds left out); and
    offsets, the first byte of every row and the end of the last."""
    num_quarantined: tuple[int, int]
    """Images and annotations that were left out."""
    content_key: str
    """Digest of what the shards were made from, image files excepted."""
    files_key: str
    """Digest of names, sizes and times of the image files."""
    digest: str
    """SHA-256 over all of the above but paths and keys: the same data elsewhere have the same digest."""
    files: tuple[str, ...] = ()
    """Beginning of the SHA-256 of every row's image file, in hexadecimal; empty in shards of earlier versions."""

    @property
    def num_rows(self) -> int:
        """Images."""
        return sum(shard["num_rows"] for shard in self.shards)

    @property
    def num_classes(self) -> int:
        """C, with the background."""
        return len(self.class_names) + 1

    def row_canvases(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(num_rows,) canvas of every row."""
        return np.array([canvas for shard in self.shards for canvas in shard["canvases"]], dtype=np.int64)

    def row_classes(self) -> list[list[int]]:
        """Classes of the objects of every row, each once, crowds left out."""
        return [classes for shard in self.shards for classes in shard["classes"]]

    def active_classes(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """(sources, C) bool: classes that each source has labelled; background always."""
        active = np.zeros((len(self.sources), self.num_classes), dtype=bool)
        active[:, 0] = True
        for index, source in enumerate(self.sources):
            active[index, list(source.active_class_ids)] = True
        return active


def shard_name(first_row: int, num_rows: int) -> str:
    """File name of a shard by its row range, last row excluded."""
    return f"rows-{first_row:09d}-{first_row + num_rows:09d}.arrow"


def read_manifest(folder: str) -> Manifest:
    """Manifest of a folder of shards.

    Raises:
        UserError: there is none, it is damaged, or of another format version.
    """
    path = storage.join(folder, MANIFEST)
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such manifest; run jobs/prepare.py first") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); {_again(path)}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}; {_again(path)}")
    try:
        return Manifest(
            class_names=tuple(content["class_names"]),
            sources=tuple(
                Source(s["annotations"], tuple(s["active_class_ids"]), tuple(s["category_ids"]))
                for s in content["sources"]
            ),
            canvases=tuple((rows, columns) for rows, columns in content["canvases"]),
            short_side=content["short_side"],
            image_format=content["image_format"],
            shards=tuple(content["shards"]),
            num_quarantined=(content["num_quarantined"][0], content["num_quarantined"][1]),
            content_key=content["content_key"],
            files_key=content["files_key"],
            digest=_digest(content),
            files=tuple(content.get("files", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__} {error}); {_again(path)}") from error


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 over a manifest without what only says where the data lie."""
    data = {
        name: value for name, value in content.items() if name not in ("content_key", "files_key", "sources", "files")
    }
    data["sources"] = [{**source, "annotations": None} for source in content["sources"]]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class ShardSet:
    """Reads single rows of prepared data; cheap to make, nothing is read before it is asked for."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self._first_rows = np.array([shard["first_row"] for shard in self.manifest.shards])

    def __len__(self) -> int:
        return self.manifest.num_rows

    def read_row(self, row: int) -> dict[str, Any]:
        """One row: scalars as numbers, lists and bytes as arrays over the mapped file; images always as pixels.

        Raises:
            UserError: the shard is missing, or this row of it is damaged.
        """
        index = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        shard = self.manifest.shards[index]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        path = storage.join(self.folder, shard["name"])
        file = _open_shard(path, shard["sha256"], shard["num_bytes"])
        number = row - shard["first_row"]
        try:
            values = row_values(file.read_range(*shard["offsets"][number : number + 2]))
            file.verify(number, values)
            if self.manifest.image_format == "jpeg":
                values["image"] = decode_jpeg(values["image"])
        except (OSError, pa.ArrowInvalid, ValueError, KeyError) as error:
            raise UserError(f"{path}: row {row} is damaged ({error}); {_again(path)}") from error
        return values

    def read_rows(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows one after the other."""
        return (self.read_row(row) for row in rows)


class _ShardFile:
    """An open shard: mapped from a local disk, or read by range; knows which rows have been compared already."""

    def __init__(self, path: str, num_bytes: int) -> None:
        filesystem, inner = storage.open_filesystem(path)
        self._file = filesystem.open_input_file(inner) if storage.is_url(path) else pa.memory_map(inner)
        if self._file.size() != num_bytes:
            raise pa.ArrowInvalid(f"{self._file.size()} bytes, expected {num_bytes}")
        self._mapped = None if storage.is_url(path) else self._file.read_buffer()
        self._verified: set[int] = set()

    def read_range(self, start: int, end: int) -> Any:
        """Bytes from start to end, without a copy where the file is mapped."""
        if self._mapped is not None:
            return self._mapped.slice(start, end - start)
        return pa.py_buffer(self._file.read_at(end - start, start))

    def verify(self, number: int, values: Mapping[str, Any]) -> None:
        """Compare a row with its digest, the first time that this process reads it."""
        if number not in self._verified:
            if row_digest(values) != values["digest"]:
                raise ValueError("its content does not have its digest")
            self._verified.add(number)


@lru_cache(maxsize=64)
def _open_shard(path: str, sha256: str, num_bytes: int) -> _ShardFile:
    """One shard; a process keeps the latest ones open, by their content."""
    del sha256  # part of the cache's key: a file of the same name may have been written anew
    try:
        return _ShardFile(path, num_bytes)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {_again(path)}") from error


def _again(path: str) -> str:
    return f"delete {path} and run jobs/prepare.py again"


def row_values(message: Any) -> dict[str, Any]:
    """A row from its bytes in a shard: plain values; arrays are read-only views."""
    batch = pa.ipc.read_record_batch(pa.ipc.read_message(message), ROW_SCHEMA)
    values: dict[str, Any] = {}
    for field, column in zip(ROW_SCHEMA, batch.columns, strict=True):
        if pa.types.is_list(field.type):
            values[field.name] = column.values.to_numpy(zero_copy_only=False)  # all of them: a batch is one row
        elif pa.types.is_large_binary(field.type):
            values[field.name] = np.frombuffer(column[0].as_buffer(), dtype=np.uint8)
        else:
            values[field.name] = column[0].as_py()
    return values


def row_digest(values: Mapping[str, Any]) -> bytes:
    """SHA-256 over the values of a row, however they are laid out in memory."""
    digest = hashlib.sha256()
    for field in ROW_SCHEMA:
        if field.name == "digest":
            continue
        value = values[field.name]
        if pa.types.is_list(field.type):
            numbers = np.ascontiguousarray(value, dtype=field.type.value_type.to_pandas_dtype())
            digest.update(f"{field.name} {len(numbers)} ".encode())
            digest.update(numbers.data)
        elif isinstance(value, bytes | np.ndarray):
            digest.update(f"{field.name} {len(value)} ".encode())
            digest.update(value if isinstance(value, bytes) else value.data)
        else:
            digest.update(f"{field.name} {value!r} ".encode())
    return digest.digest()


def decode_jpeg(content: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Pixels of a stored JPEG image, one after the other."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image, dtype=np.uint8).ravel()
