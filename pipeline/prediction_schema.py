"""The Parquet schema of predictions, version 1, and how a part is written, checked and summed up.

One row an image that could be predicted, in the order of the plan. What could not be predicted stands in the file's
own metadata (key `errors`), so that a part is one file: there whole, or not there.

| column | type | meaning |
| --- | --- | --- |
| key | string | name of the image, unique in the output |
| image_id | int64 or null | of the COCO file or shards that the image came from |
| height, width | int32 | of the original image, as its EXIF orientation turns it |
| boxes | list of 4 float32 | x0, y0, x1, y1 of each object in original pixels, right and bottom exclusive |
| class_ids | list of int32 | 1..C-1 |
| class_names | list of string | |
| scores | list of float32 | in 0..1, best first |
| mask_counts | list of string | COCO compressed RLE; with `size` [height, width] it is what pycocotools reads |
| model_id | string | SHA-256 of the weights and of the model's configuration |
| config_digest | string | SHA-256 of all settings that the results are a function of |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.plain_columns import check_plain

SCHEMA_VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("image_id", pa.int64()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("boxes", pa.list_(pa.list_(pa.float32(), 4)), nullable=False),
        pa.field("class_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("class_names", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
        pa.field("mask_counts", pa.list_(pa.string()), nullable=False),
        pa.field("model_id", pa.string(), nullable=False),
        pa.field("config_digest", pa.string(), nullable=False),
    ]
)
ERRORS_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
    ]
)
PARTS = "parts"
_VERSION, _PART_KEY, _ERRORS = b"schema_version", b"part_key", b"errors"


@dataclass(frozen=True)
class PredictionError:
    """An image that could not be predicted."""

    key: str
    kind: str
    """unreadable_image, decompression_bomb, size_mismatch, missing_file, timeout, decoder_crash or model_error."""
    reason: str
    path: str


@dataclass(frozen=True)
class PartSummary:
    """What a part that is there holds."""

    part: int
    name: str
    """Of its file, relative to the output."""
    num_bytes: int
    sha256: str
    num_images: int
    """Rows and errors together: as many as the plan has."""
    num_detections: int
    errors: tuple[PredictionError, ...]


def part_name(part: int) -> str:
    """File name of a part, relative to the output."""
    return f"{PARTS}/part-{part:07d}.parquet"


def part_key(identity: str, keys: Sequence[str]) -> str:
    """Digest of what a part is a function of: the run's identity and its images."""
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, identity, list(keys)]).encode()).hexdigest()


def write_part(
    output: str,
    part: int,
    identity: str,
    keys: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
    errors: Sequence[PredictionError],
) -> PartSummary:
    """Write a part, whole or not at all.

    Args:
        output: absolute path or URL.
        part: number of the part.
        identity: of the run.
        keys: of the part's images in the order of the plan.
        rows: of the images that were predicted, in that order, with the columns of `SCHEMA`.
        errors: of all others, in that order.

    Raises:
        RuntimeError: an image is missing or stands there twice; nothing is written.
    """
    predicted, failed = [row["key"] for row in rows], [error.key for error in errors]
    gone = set(failed)
    if len(predicted) + len(failed) != len(keys) or predicted != [key for key in keys if key not in gone]:
        raise RuntimeError(
            f"part {part}: {len(keys)} images gave {len(predicted)} rows and {len(failed)} errors; "
            "this is a defect of the program"
        )
    metadata = {
        _VERSION: str(SCHEMA_VERSION).encode(),
        _PART_KEY: part_key(identity, keys).encode(),
        _ERRORS: json.dumps([asdict(error) for error in errors]).encode(),
    }
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=1024, write_page_checksum=True)
    content = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(output, part_name(part)), content)
    return _summary(part, content, table, errors)


def inspect_part(output: str, part: int, identity: str, keys: Sequence[str]) -> PartSummary | None:
    """Summary of a part that is there, whole, and of this run and these images; None where it has to be computed."""
    try:
        content = storage.read_bytes(storage.join(output, part_name(part)))
        table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        metadata = table.schema.metadata or {}
        if metadata.get(_PART_KEY) != part_key(identity, keys).encode():
            return None
        errors = [PredictionError(**error) for error in json.loads(metadata[_ERRORS])]
    except (OSError, ValueError, KeyError, TypeError):  # missing, cut off, damaged; pa.ArrowInvalid is a ValueError
        return None
    if len(table) + len(errors) != len(keys):
        return None
    return _summary(part, content, table, errors)


def _summary(part: int, content: bytes, table: Any, errors: Sequence[PredictionError]) -> PartSummary:
    num_detections = pc.sum(pc.list_value_length(table["scores"])).as_py() or 0
    return PartSummary(
        part,
        part_name(part),
        len(content),
        hashlib.sha256(content).hexdigest(),
        len(table) + len(errors),
        num_detections,
        tuple(errors),
    )


def read_predictions(output: str, parts: Sequence[str], columns: Sequence[str] | None = None) -> Any:
    """Rows of parts one part after the other, as dicts.

    Args:
        output: absolute path or URL.
        parts: file names as in the manifest.
        columns: those wanted, None for all.
    """
    for name in parts:
        path = storage.join(output, name)
        yield from read_plain_table(storage.read_bytes(path), path, columns).to_pylist()


def read_plain_table(content: bytes, path: str, columns: Sequence[str] | None = None) -> Any:
    """A Parquet file as a table whose values are plain ones.

    Args:
        content: of the file.
        path: of the file, for messages.
        columns: those wanted, None for all.

    Raises:
        UserError: a column is of an extension type, see `check_plain`.
    """
    file = pq.ParquetFile(pa.BufferReader(content))
    wanted = None if columns is None else list(columns)
    check_plain(file.schema_arrow, path, wanted)
    return file.read(columns=wanted)


def rle(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The mask of one object of a row, as pycocotools reads it."""
    return {"size": [row["height"], row["width"]], "counts": row["mask_counts"][index]}
