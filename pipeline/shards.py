"""Prepared data: Arrow IPC shards with a manifest, written by Ray Data and mapped into memory for reading.

A shard holds consecutive rows, one record batch a row, so that any row is read alone, from a local disk or a bucket.
Images are stored at the size they have on their canvas; boxes, areas and mask bits stay in original pixels and exact.
The manifest is written last: without one there is no data set.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.coco import Annotation, ImageRecord
from pipeline.errors import UserError
from pipeline.preprocess import ImageProblem, choose_canvas, decode_image, pack_mask, rasterise, resize_image

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

ROW_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.int32()),
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("height", pa.int32()),  # original
        ("width", pa.int32()),
        ("canvas", pa.int32()),
        ("image_height", pa.int32()),  # as stored: input pixels
        ("image_width", pa.int32()),
        ("image", pa.large_binary()),  # (image_height, image_width, 3) uint8
        ("annotation_ids", pa.list_(pa.int64())),
        ("classes", pa.list_(pa.int32())),
        ("is_crowd", pa.list_(pa.bool_())),
        ("bboxes", pa.list_(pa.float64())),  # 4 an object: x, y, width, height, original pixels
        ("areas", pa.list_(pa.float64())),
        ("mask_boxes", pa.list_(pa.int32())),  # 4 an object: xyxy in whole original pixels
        ("mask_bits", pa.large_binary()),  # of all objects, each from a new byte on
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
    shards: tuple[dict[str, Any], ...]
    """name, first_row, num_rows, num_bytes, sha256 and the canvas of every row."""
    dropped: tuple[dict[str, Any], ...]
    """Annotations left out, with the reason."""
    content_key: str
    """Digest of what the shards were made from."""
    digest: str
    """SHA-256 over all of the above but paths and content_key: the same data elsewhere have the same digest."""

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


def write_shards(
    folder: str,
    records: Sequence[ImageRecord],
    class_names: Sequence[str],
    sources: Sequence[Source],
    canvases: Sequence[tuple[int, int]],
    rows_per_shard: int,
    dropped: Sequence[dict[str, Any]],
    content_key: str,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write records as shards, one Ray Data task a shard, then the manifest.

    Args:
        folder: absolute path or URL; files of the same names are replaced.
        records: in row order.
        class_names: of classes 1..C-1.
        sources: what the records' `source` stands for.
        canvases: see `choose_canvas`.
        rows_per_shard: images in a shard.
        dropped: annotations left out so far.
        content_key: digest of what the shards are made from.
        on_progress: called with the number of images done.

    Raises:
        UserError: images that cannot be used; nothing but complete shards is left, and no manifest.
    """
    storage.delete_file(storage.join(folder, MANIFEST))  # of other content: its shards are about to be replaced
    shards, problems, all_dropped, done = [], [], list(dropped), 0
    for result in _run_tasks(folder, records, canvases, rows_per_shard):
        problems += result["problems"]
        all_dropped += result["dropped"]
        shards.append(result["shard"])
        done += result["shard"]["num_rows"]
        on_progress(done)
    if problems:
        first = sorted(problems)[0]
        more = f" (and {len(problems) - 1} more images)" if len(problems) > 1 else ""
        raise UserError(f"{first}{more}; mend the file or take it out of the annotations")
    shards.sort(key=lambda shard: shard["first_row"])
    content = {
        "format_version": FORMAT_VERSION,
        "content_key": content_key,
        "class_names": list(class_names),
        "sources": [vars(source) for source in sources],
        "canvases": [list(canvas) for canvas in canvases],
        "shards": shards,
        "dropped": sorted(all_dropped, key=lambda entry: (entry["source"], entry["annotation_id"])),
    }
    storage.write_bytes(storage.join(folder, MANIFEST), json.dumps(content, indent=1).encode())
    manifest = read_manifest(folder)
    if manifest.num_rows != len(records):
        raise RuntimeError(f"{folder}: {manifest.num_rows} rows written of {len(records)}")
    return manifest


def _run_tasks(
    folder: str, records: Sequence[ImageRecord], canvases: Sequence[tuple[int, int]], rows_per_shard: int
) -> Iterator[dict[str, Any]]:
    """What `_write_shard` says of every shard, in the order in which they get done."""
    import ray.data

    tables = []
    for first in range(0, len(records), rows_per_shard):
        chunk = records[first : first + rows_per_shard]
        rows = list(range(first, first + len(chunk)))
        tables.append(pa.table({"row": rows, "record": [record.to_json() for record in chunk]}))
    dataset = ray.data.from_arrow(tables).map_batches(
        _write_shard,
        fn_kwargs={"folder": folder, "canvases": tuple(canvases)},
        batch_size=None,
        batch_format="pyarrow",
    )
    return (json.loads(row["result"]) for row in dataset.iter_rows())


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
        raise UserError(f"{path}: damaged ({error}); {_again(folder)}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: format version {version}, expected {FORMAT_VERSION}; {_again(folder)}")
    try:
        return Manifest(
            class_names=tuple(content["class_names"]),
            sources=tuple(
                Source(s["annotations"], tuple(s["active_class_ids"]), tuple(s["category_ids"]))
                for s in content["sources"]
            ),
            canvases=tuple((rows, columns) for rows, columns in content["canvases"]),
            shards=tuple(content["shards"]),
            dropped=tuple(content["dropped"]),
            content_key=content["content_key"],
            digest=_digest(content),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__} {error}); {_again(folder)}") from error


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 over a manifest without what only says where the data lie."""
    data = {name: value for name, value in content.items() if name not in ("content_key", "sources")}
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
        """One row: scalars as numbers, lists and bytes as arrays over the mapped file.

        Raises:
            UserError: the shard is missing or damaged.
        """
        index = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        shard = self.manifest.shards[index]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        path = storage.join(self.folder, shard["name"])
        reader = _open_shard(path, shard["sha256"], shard["num_bytes"])
        try:
            return _to_arrays(reader.get_batch(row - shard["first_row"]))
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: row {row} is damaged ({error}); {_again(self.folder)}") from error

    def read_rows(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Rows one after the other."""
        return (self.read_row(row) for row in rows)


@lru_cache(maxsize=64)
def _open_shard(path: str, sha256: str, num_bytes: int) -> Any:
    """Reader of one shard; a process keeps the latest ones open, by their content."""
    del sha256  # part of the cache's key: a file of the same name may have been written anew
    filesystem, inner = storage.open_filesystem(path)
    try:
        file = filesystem.open_input_file(inner) if storage.is_url(path) else pa.memory_map(inner)
        if file.size() != num_bytes:
            raise pa.ArrowInvalid(f"{file.size()} bytes, expected {num_bytes}")
        return pa.ipc.open_file(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: missing or damaged ({error}); {_again(path.rsplit('/', 1)[0])}") from error


def _again(folder: str) -> str:
    return f"delete {folder} and run jobs/prepare.py again"


def _to_arrays(batch: Any) -> dict[str, Any]:
    """A record batch of one row as plain values; arrays are read-only views."""
    values: dict[str, Any] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if pa.types.is_list(field.type):
            values[field.name] = column.flatten().to_numpy(zero_copy_only=False)
        elif pa.types.is_large_binary(field.type):
            values[field.name] = np.frombuffer(column[0].as_buffer(), dtype=np.uint8)
        else:
            values[field.name] = column[0].as_py()
    return values


def _write_shard(table: Any, folder: str, canvases: tuple[tuple[int, int], ...]) -> Any:
    """Ray Data task: one block of records to one shard file; returns one row that says what was written."""
    rows, problems, dropped = [], [], []
    for row, text in zip(table["row"].to_pylist(), table["record"].to_pylist(), strict=True):
        record = ImageRecord.from_json(text)
        try:
            values, left_out = encode_row(row, record, canvases)
        except (ImageProblem, OSError) as problem:
            problems.append(f"{record.path}: {problem}")
            continue
        rows.append(values)
        dropped += left_out
    first_row = table["row"][0].as_py()
    shard: dict[str, Any] = {"first_row": first_row, "num_rows": len(rows)}
    if not problems:
        sink = io.BytesIO()
        with pa.ipc.new_file(sink, ROW_SCHEMA) as writer:
            for values in rows:
                writer.write_batch(pa.RecordBatch.from_pylist([values], schema=ROW_SCHEMA))
        content = sink.getvalue()
        name = shard_name(first_row, len(rows))
        storage.write_bytes(storage.join(folder, name), content)
        shard |= {
            "name": name,
            "num_bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "canvases": [values["canvas"] for values in rows],
        }
    return pa.table({"result": [json.dumps({"shard": shard, "problems": problems, "dropped": dropped})]})


def encode_row(
    row: int, record: ImageRecord, canvases: Sequence[tuple[int, int]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Decode, check and resize one image and pack its masks.

    Args:
        row: number of the row.
        record: image and annotations.
        canvases: see `choose_canvas`.

    Returns:
        Values in the order of `ROW_SCHEMA`, and annotations dropped because they cover no pixel.

    Raises:
        ImageProblem: the image cannot be used.
        OSError: the file cannot be read.
    """
    image = decode_image(storage.read_bytes(record.path), record.height, record.width)
    canvas, image_height, image_width = choose_canvas(record.height, record.width, canvases)
    kept: list[Annotation] = []
    mask_boxes: list[int] = []
    mask_bits: list[bytes] = []
    dropped: list[dict[str, Any]] = []
    for annotation in record.annotations:
        box, bits = pack_mask(rasterise(annotation.segmentation, record.height, record.width))
        if not bits:
            dropped.append(
                {
                    "source": record.source,
                    "file_name": record.file_name,
                    "annotation_id": annotation.annotation_id,
                    "reason": "mask covers no pixel",
                }
            )
            continue
        kept.append(annotation)
        mask_boxes += box
        mask_bits.append(bits)
    values = {
        "row": row,
        "source": record.source,
        "image_id": record.image_id,
        "file_name": record.file_name,
        "height": record.height,
        "width": record.width,
        "canvas": canvas,
        "image_height": image_height,
        "image_width": image_width,
        "image": resize_image(image, image_height, image_width).tobytes(),
        "annotation_ids": [annotation.annotation_id for annotation in kept],
        "classes": [annotation.class_id for annotation in kept],
        "is_crowd": [annotation.is_crowd for annotation in kept],
        "bboxes": [number for annotation in kept for number in annotation.bbox],
        "areas": [annotation.area for annotation in kept],
        "mask_boxes": mask_boxes,
        "mask_bits": b"".join(mask_bits),
    }
    return values, dropped
