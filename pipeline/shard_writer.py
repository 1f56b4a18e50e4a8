"""Writes shards on the cluster, one Ray Data task a shard; what was written before a kill is found and kept.

A shard carries in its schema what it was made from and what was found on the way, so that it can be recognised without
a manifest. The same records and image files give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.coco import ImageRecord
from pipeline.problems import Problem, Quarantined, quarantined, raise_errors
from pipeline.repeated_images import repeated_images
from pipeline.row_encoding import ImageLeftOut, RowSettings, encode_row
from pipeline.shards import (
    FORMAT_VERSION,
    MANIFEST,
    ROW_SCHEMA,
    Manifest,
    Source,
    read_manifest,
    row_digest,
    row_values,
    shard_name,
)

_KEY, _PROBLEMS = b"content_key", b"problems"
_DIGEST_BYTES = 8  # of an image file in the manifest: two of a million images share one once in 40 million data sets


@dataclass(frozen=True)
class Contents:
    """What a data set is made of, beside its records."""

    class_names: Sequence[str]
    """Of classes 1..C-1."""
    sources: Sequence[Source]
    """What the records' `source` stands for."""
    settings: RowSettings
    rows_per_shard: int
    content_key: str = ""
    """See `Manifest`."""
    files_key: str = ""


@dataclass(frozen=True)
class Written:
    """What came of the records."""

    manifest: Manifest
    problems: list[Problem]
    """What only the images could tell."""
    quarantined: list[Quarantined]
    """What was left out because of it, of the records given."""
    records: list[ImageRecord]
    """Those that became rows, in row order, with the annotations that are kept, as they are kept."""
    objects: npt.NDArray[np.float64]
    """(N, 7) row, class, whether a crowd, and the box x, y, width, height in original pixels."""


def write_shards(
    folder: str,
    records: Sequence[ImageRecord],
    contents: Contents,
    quarantined_before: tuple[int, int] = (0, 0),
    on_progress: Callable[[int], None] = lambda _: None,
    on_cluster: bool = True,
    validated: Container[str] = (),
) -> Written:
    """Write records as shards, then the manifest; shards of the same records and images are left as they are.

    Images that cannot be used are left out where their policy says so, and the rows behind them move up.

    Args:
        folder: absolute path or URL.
        records: in row order.
        contents: see there.
        quarantined_before: images and annotations of the same files that are left out already.
        on_progress: called with the number of images done.
        on_cluster: in Ray Data tasks; else in this process, one shard after the other, to the same bytes.
        validated: digests of the images that are validated on (`Manifest.files`), where these are trained on.

    Raises:
        UserError: a problem with the policy `error`; nothing but complete shards is left, and no manifest.
    """
    storage.delete_file(storage.join(folder, MANIFEST))  # of other content: its shards are about to be replaced
    wanted = list(records)
    left_out: list[Problem] = []
    while True:
        tasks = _run_tasks(folder, wanted, contents, on_progress, on_cluster)
        results = sorted(tasks, key=lambda result: result.first_row)
        unusable = [problem for result in results for problem in result.left_out]
        files = [digest for result in results for digest in result.files]
        found = [problem for result in results for problem in result.problems]
        if not unusable:
            repeated = repeated_images(wanted, files, validated, contents.settings.policies)
            unusable = [problem for problem in repeated if problem.policy == "drop"]
            found += [problem for problem in repeated if problem.policy != "drop"]
        problems = left_out + unusable + found
        _raise_first(sorted(problems, key=lambda problem: problem.reason), contents)
        if not unusable:
            break
        left_out += unusable
        gone = {(problem.source, problem.image_id) for problem in unusable}
        wanted = [record for record in wanted if (record.source, record.image_id) not in gone]
    quarantine = quarantined(problems) + _orphans(records, left_out)
    _delete_strays(folder, {result.shard["name"] for result in results})
    counts = [
        before + sum(entry.level == level for entry in quarantine)
        for before, level in zip(quarantined_before, ("image", "annotation"), strict=True)
    ]
    content = {
        "format_version": FORMAT_VERSION,
        "content_key": contents.content_key,
        "files_key": contents.files_key,
        "class_names": list(contents.class_names),
        "sources": [vars(source) for source in contents.sources],
        "canvases": [list(canvas) for canvas in contents.settings.canvases],
        "short_side": contents.settings.short_side,
        "image_format": contents.settings.image_format,
        "shards": [result.shard for result in results],
        "files": files,
        "num_quarantined": counts,
    }
    storage.write_bytes(storage.join(folder, MANIFEST), json.dumps(content, indent=1).encode())
    objects = np.concatenate([np.zeros((0, 7)), *(result.objects for result in results)])
    manifest = read_manifest(folder)
    num_annotations = sum(len(record.annotations) for record in records)
    gone_annotations = sum(entry.level == "annotation" for entry in quarantine)
    if manifest.num_rows + len(left_out) != len(records) or len(objects) + gone_annotations != num_annotations:
        raise RuntimeError(f"{folder}: images or annotations were lost; this is a defect of the program")
    return Written(manifest, problems, quarantine, _as_kept(wanted, quarantine, objects), objects)


def _as_kept(
    records: Sequence[ImageRecord], quarantine: Sequence[Quarantined], objects: npt.NDArray[np.float64]
) -> list[ImageRecord]:
    """Records without the annotations that are left out, with the boxes that policies may have mended."""
    gone = {(entry.source, entry.annotation_id) for entry in quarantine}
    boxes = iter(objects[:, 3:].tolist())
    return [
        replace(
            record,
            annotations=tuple(
                replace(annotation, bbox=tuple(next(boxes)))
                for annotation in record.annotations
                if (record.source, annotation.annotation_id) not in gone
            ),
        )
        for record in records
    ]


def _orphans(records: Sequence[ImageRecord], left_out: Sequence[Problem]) -> list[Quarantined]:
    """Quarantine entries of the annotations of images that are left out."""
    of_image = {(problem.source, problem.image_id): problem for problem in left_out}
    entries = []
    for record in records:
        problem = of_image.get((record.source, record.image_id))
        for annotation in record.annotations if problem else ():
            assert problem is not None
            entries.append(
                Quarantined(
                    record.source,
                    "annotation",
                    record.image_id,
                    annotation.annotation_id,
                    record.file_name,
                    problem.kind,
                    f"its image is left out: {problem.reason}",
                )
            )
    return entries


def _delete_strays(folder: str, names: set[str]) -> None:
    """Remove shards of other row ranges and what a killed writer left half done."""
    for name in storage.list_files(folder):
        if name not in names and name.startswith("rows-") and (name.endswith((".arrow", ".partial"))):
            storage.delete_file(storage.join(folder, name))


@dataclass(frozen=True)
class _Result:
    """What a task says of its shard."""

    first_row: int
    shard: dict[str, Any]
    """Entry of the manifest; empty where an image was unusable, and nothing was written."""
    left_out: list[Problem]
    problems: list[Problem]
    files: list[str]
    """Digest of the image file of each row."""
    objects: npt.NDArray[np.float64]


def _raise_first(problems: Sequence[Problem], contents: Contents) -> None:
    """As `raise_errors`; of an annotation it is said in which file it stands and of which image it is."""
    first = next((problem for problem in problems if problem.policy == "error"), None)
    of_annotation = first is not None and first.level == "annotation"
    place = f"{contents.sources[first.source].annotations}: {first.file_name}: " if first and of_annotation else ""
    raise_errors(place, problems)


def _run_tasks(
    folder: str,
    records: Sequence[ImageRecord],
    contents: Contents,
    on_progress: Callable[[int], None],
    on_cluster: bool,
) -> Iterator[_Result]:
    """What `_write_shard` says of every shard, in the order in which they get done."""
    if not records:
        return
    tables = []
    for first in range(0, len(records), contents.rows_per_shard):
        chunk = records[first : first + contents.rows_per_shard]
        rows = list(range(first, first + len(chunk)))
        tables.append(pa.table({"row": rows, "record": [record.to_json() for record in chunk]}))
    done = 0
    for row in (_rows_from_cluster if on_cluster else _rows_from_here)(tables, folder, contents):
        result = json.loads(row["result"])
        done += result["num_records"]
        on_progress(done)
        yield _Result(
            result["first_row"],
            result["shard"],
            [Problem(**problem) for problem in result["left_out"]],
            [Problem(**problem) for problem in result["problems"]],
            result["files"],
            np.frombuffer(row["objects"], dtype=np.float64).reshape(-1, 7),
        )


def _rows_from_cluster(tables: Sequence[Any], folder: str, contents: Contents) -> Iterator[dict[str, Any]]:
    import ray.data

    dataset = ray.data.from_arrow(list(tables)).map_batches(
        _write_shard,
        fn_kwargs={"folder": folder, "contents": contents},
        batch_size=None,
        batch_format="pyarrow",
    )
    yield from dataset.iter_rows()


def _rows_from_here(tables: Sequence[Any], folder: str, contents: Contents) -> Iterator[dict[str, Any]]:
    for table in tables:
        yield from _write_shard(table, folder, contents).to_pylist()


def _write_shard(table: Any, folder: str, contents: Contents) -> Any:
    """Ray Data task: one block of records to one shard file; returns one row that says what is in it."""
    rows = table["row"].to_pylist()
    records = [ImageRecord.from_json(text) for text in table["record"].to_pylist()]
    path = storage.join(folder, shard_name(rows[0], len(rows)))
    key = _shard_key(rows[0], records, contents)
    kept = _kept_shard(path, key, records)
    left_out: list[Problem] = []
    if kept is None:
        encoded, problems = [], []
        for row, record in zip(rows, records, strict=True):
            try:
                values, found = encode_row(row, record, contents.settings)
            except ImageLeftOut as image:
                left_out.append(image.problem)
                continue
            encoded.append(values)
            problems += [asdict(problem) for problem in found]
        content = b"" if left_out else _shard_file(encoded, key, contents, problems)
        if not left_out:
            storage.write_bytes(path, content)
    else:
        content, encoded, problems = kept
    result = {
        "first_row": rows[0],
        "num_records": len(rows),
        "shard": {} if left_out else _manifest_entry(rows[0], encoded, content),
        "left_out": [asdict(problem) for problem in left_out],
        "problems": problems,
        "files": [values["file_sha256"][:_DIGEST_BYTES].hex() for values in encoded],
    }
    objects = np.concatenate([np.zeros((0, 7)), *(_objects(values) for values in encoded)])
    return pa.table({"result": [json.dumps(result)], "objects": [objects.tobytes()]})


def _shard_key(first_row: int, records: Sequence[ImageRecord], contents: Contents) -> str:
    """Digest of all that a shard is a function of, image files excepted; not of where they lie."""
    settings = contents.settings
    # Which of equal images are kept is seen from the records; so shards of versions without this policy stay the same.
    policies = settings.policies.model_dump(exclude={"duplicate_image"})
    digest = hashlib.sha256()
    options = [FORMAT_VERSION, first_row, settings.canvases, settings.image_format, settings.jpeg_quality]
    options += [settings.short_side, settings.resize_method, settings.largest_short_side, settings.largest_scale]
    digest.update(json.dumps([*options, policies, list(contents.class_names)]).encode())
    for record in records:
        digest.update(replace(record, path="").to_json().encode())
    return digest.hexdigest()


def _shard_file(
    rows: Sequence[Mapping[str, Any]], key: str, contents: Contents, problems: Sequence[Mapping[str, Any]]
) -> bytes:
    """Arrow IPC file of rows, one record batch each."""
    schema = ROW_SCHEMA.with_metadata(
        {
            b"format_version": str(FORMAT_VERSION).encode(),
            b"class_names": json.dumps(list(contents.class_names)).encode(),
            b"image_format": contents.settings.image_format.encode(),
            _KEY: key.encode(),
            _PROBLEMS: json.dumps(problems).encode(),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for values in rows:
            writer.write_batch(pa.RecordBatch.from_pylist([values], schema=schema))
    return bytes(sink.getvalue())


def _manifest_entry(first_row: int, rows: Sequence[Mapping[str, Any]], content: bytes) -> dict[str, Any]:
    return {
        "name": shard_name(first_row, len(rows)),
        "first_row": first_row,
        "num_rows": len(rows),
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "offsets": _offsets(content),
        "canvases": [values["canvas"] for values in rows],
        "classes": [
            sorted({int(c) for c, crowd in zip(values["classes"], values["is_crowd"], strict=True) if not crowd})
            for values in rows
        ],
    }


def _offsets(content: bytes) -> list[int]:
    """First byte of every record batch of an Arrow file, and the end of the last."""
    file = pa.BufferReader(content)
    file.seek(8)  # behind the magic bytes the file is a stream: the schema, then one message a batch
    pa.ipc.read_message(file)
    reader = pa.ipc.open_file(pa.BufferReader(content))
    offsets = [file.tell()]
    for _ in range(reader.num_record_batches):
        pa.ipc.read_message(file)
        offsets.append(file.tell())
    return offsets


def _objects(values: Mapping[str, Any]) -> npt.NDArray[np.float64]:
    """Rows of `Written.objects`."""
    number = len(values["classes"])
    columns = [
        np.full(number, values["row"], dtype=np.float64),
        np.asarray(values["classes"], dtype=np.float64),
        np.asarray(values["is_crowd"], dtype=np.float64),
    ]
    return np.column_stack([*columns, np.asarray(values["bboxes"], dtype=np.float64).reshape(-1, 4)])


def _kept_shard(
    path: str, key: str, records: Sequence[ImageRecord]
) -> tuple[bytes, list[dict[str, Any]], list[dict[str, Any]]] | None:
    """Content, rows and problems of a shard that is there, whole, and made from these records and image files."""
    try:
        content = storage.read_bytes(path)
        metadata = pa.ipc.open_file(pa.BufferReader(content)).schema.metadata or {}
        if metadata.get(_KEY) != key.encode():
            return None
        offsets = _offsets(content)
        whole = pa.py_buffer(content)
        rows = [row_values(whole.slice(a, b - a)) for a, b in itertools.pairwise(offsets)]
        if any(row_digest(values) != values["digest"] for values in rows):
            return None
        for values, record in zip(rows, records, strict=True):
            if hashlib.sha256(storage.read_bytes(record.path)).digest() != values["file_sha256"]:
                return None
        return content, rows, json.loads(metadata[_PROBLEMS])
    except (OSError, ValueError, KeyError):  # missing, cut off, damaged; pa.ArrowInvalid is a ValueError
        return None
