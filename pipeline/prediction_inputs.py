"""The images that a prediction is about: listed once, in a fixed order, each with a key of its own.

A folder or bucket (recursive, by pattern), a COCO JSON file, a Parquet or Arrow data set with a column of files or of
paths, or shards of ours.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.coco import file_name_of, is_int, is_side
from pipeline.errors import UserError
from pipeline.plain_columns import check_plain
from pipeline.predict_config import PredictSettings
from pipeline.record_checks import leaves_folder
from pipeline.shards import MANIFEST, ShardSet

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".jp2", ".avif",
)  # fmt: skip
TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
Kind = Literal["files", "table", "shards"]


@dataclass(frozen=True)
class Entry:
    """One image, not looked at yet."""

    key: str
    """Its name in the results; no two are the same."""
    path: str
    """The image file; or the table's file, or the folder of shards, that it is a row of."""
    row: int = -1
    """Row of the table or of the shards."""
    image_id: int | None = None
    """Of a COCO file or of shards."""
    height: int | None = None
    """Original rows, where they are known: a file of another size counts as an error."""
    width: int | None = None


@dataclass(frozen=True)
class Inputs:
    """All images of a prediction."""

    kind: Kind
    """How an entry is read."""
    entries: list[Entry]
    categories: dict[str, int] | None = None
    """Category ids of a COCO file by class name."""


def list_inputs(images: str, settings: PredictSettings) -> Inputs:
    """Find out what `--images` names and list it; opens no image.

    Args:
        images: path or URL.
        settings: pattern, columns, images_folder.

    Returns:
        Entries in the order of their names, or of the rows they stand in.

    Raises:
        UserError: nothing there, nothing that is an image, or two images of one key.
    """
    place = storage.absolute(images)
    name = place.partition("?")[0].rstrip("/").lower()
    if name.endswith(".json"):
        inputs = _coco_entries(place, settings)
    elif name.endswith(TABLE_SUFFIXES):
        inputs = Inputs("table", list(_table_entries([(place, place.rpartition("/")[2])], settings)))
    else:
        inputs = _folder_entries(place, settings)
    if not inputs.entries:
        raise UserError(f"{images}: lists no images")
    _check_keys(images, inputs.entries)
    # A column of paths is a list of files.
    return Inputs("files", inputs.entries, inputs.categories) if inputs.entries[0].row < 0 else inputs


def _check_keys(images: str, entries: Iterable[Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        if entry.key in seen:
            raise UserError(
                f"{images}: two images are called {entry.key}; name a --predict.key_column, or list it once"
            )
        seen.add(entry.key)


def _folder_entries(folder: str, settings: PredictSettings) -> Inputs:
    try:
        present = sorted(storage.list_files(folder))
    except (OSError, UnicodeDecodeError) as error:  # the latter of a name that is not UTF-8
        raise UserError(f"{folder}: cannot be listed ({error})") from error
    if not present:
        raise UserError(f"{folder}: no such folder, or nothing in it")
    if MANIFEST in present and any(name.startswith("rows-") and name.endswith(".arrow") for name in present):
        return _shard_entries(folder)
    tables = _chosen(present, TABLE_SUFFIXES, settings.pattern)
    if settings.pattern is None:
        chosen = _chosen(present, IMAGE_SUFFIXES, None)
        if tables and chosen:
            raise UserError(
                f"{folder}: holds tables ({tables[0]}) and images ({chosen[0]}); "
                "say which with --predict.pattern, such as '*.parquet'"
            )
    else:
        chosen = _chosen(present, ("",), settings.pattern)
        if tables and len(tables) < len(chosen):
            other = next(name for name in chosen if name not in set(tables))
            raise UserError(
                f"{folder}: --predict.pattern {settings.pattern} matches tables ({tables[0]}) and other files ({other})"
            )
    if tables:
        return Inputs("table", list(_table_entries([(storage.join(folder, name), name) for name in tables], settings)))
    if not chosen:
        wanted = f"matches {settings.pattern}" if settings.pattern else "has the suffix of an image format"
        raise UserError(f"{folder}: none of {len(present)} files {wanted}; see --predict.pattern")
    return Inputs("files", [Entry(name, storage.join(folder, name)) for name in chosen])


def _chosen(names: Iterable[str], suffixes: tuple[str, ...], pattern: str | None) -> list[str]:
    """Names with one of the suffixes that a pattern matches; `**/` at its beginning means the folder itself, too."""
    patterns = () if pattern is None else (pattern, pattern.removeprefix("**/"))
    return [
        name
        for name in names
        if name.lower().endswith(suffixes)
        and (pattern is None or any(fnmatch.fnmatchcase(name, one) for one in patterns))
    ]


def _parent(path: str) -> str:
    """Folder of a file, for paths and URLs; options of a URL stay at its end."""
    place, mark, options = path.partition("?") if storage.is_url(path) else (path, "", "")
    return f"{place.rpartition('/')[0]}{mark}{options}"


def _images_folder(file: str, settings: PredictSettings) -> str:
    folder = _parent(file)
    return folder if settings.images_folder is None else storage.absolute(settings.images_folder, folder)


def _coco_entries(path: str, settings: PredictSettings) -> Inputs:
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file that can be read ({error})") from error
    listed = content.get("images") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(f"{path}: no list of objects named 'images'; expected the COCO format")
    folder = _images_folder(path, settings)
    entries = []
    seen: set[int] = set()
    for image in listed:
        name, image_id = (file_name_of(image), image.get("id")) if isinstance(image, dict) else (None, None)
        if not isinstance(name, str) or not name or leaves_folder(name) or not is_int(image_id):
            raise UserError(f"{path}: image {image!r:.100} needs an integer id and a file_name inside its folder")
        if image_id in seen:
            raise UserError(f"{path}: two images have the id {image_id}; each needs one of its own")
        seen.add(image_id)
        height, width = (image[side] if is_side(image.get(side)) else None for side in ("height", "width"))
        known = height is not None and width is not None
        entries.append(
            Entry(name, storage.join(folder, name), -1, image_id, height if known else None, width if known else None)
        )
    categories = {
        category["name"]: category["id"]
        for category in content.get("categories") or []
        if isinstance(category, dict) and isinstance(category.get("name"), str) and is_int(category.get("id"))
    }
    return Inputs("files", entries, categories or None)


def _shard_entries(folder: str) -> Inputs:
    # Named by their rows: a name in them would mean reading every row, image and all.
    return Inputs("shards", [Entry(f"row-{row:09d}", folder, row) for row in range(len(ShardSet(folder)))])


def _table_entries(files: Iterable[tuple[str, str]], settings: PredictSettings) -> Iterator[Entry]:
    """Entries of table files, by their paths and their names within the data set."""
    for path, name in files:
        try:
            columns = table_columns(path)
            has_bytes = settings.bytes_column in columns
            if not has_bytes and settings.path_column not in columns:
                raise UserError(
                    f"{path}: has neither a column {settings.bytes_column} nor a column {settings.path_column} "
                    f"({', '.join(columns)}); see --predict.bytes_column and --predict.path_column"
                )
            wanted = settings.key_column or (settings.path_column if settings.path_column in columns else None)
            if wanted is not None and wanted not in columns:
                raise UserError(f"{path}: has no column {wanted} ({', '.join(columns)}); see --predict.key_column")
            places = None if has_bytes else read_column(path, settings.path_column)
            keys = read_column(path, wanted) if wanted else None
            number = num_rows(path)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: not a Parquet or Arrow file that can be read ({error})") from error
        folder = _images_folder(path, settings)
        for row in range(number):
            key = f"{name}#{row}" if keys is None else str(keys[row])
            if places is None:
                yield Entry(key, path, row)
                continue
            if not isinstance(places[row], str) or not places[row]:
                raise UserError(f"{path}: row {row} has no path in column {settings.path_column}")
            yield Entry(key, storage.absolute(places[row], folder))


def _is_parquet(path: str) -> bool:
    return path.partition("?")[0].lower().endswith(".parquet")


def _open(path: str) -> Any:
    filesystem, inner = storage.open_filesystem(path)
    return filesystem.open_input_file(inner)


def table_columns(path: str) -> list[str]:
    """Names of the columns of a Parquet or Arrow IPC file."""
    with _open(path) as file:
        schema = pq.ParquetFile(file).schema_arrow if _is_parquet(path) else _open_ipc(file).schema
        return list(schema.names)


def num_rows(path: str) -> int:
    """Rows of a Parquet or Arrow IPC file."""
    with _open(path) as file:
        if _is_parquet(path):
            return int(pq.ParquetFile(file).metadata.num_rows)
        return sum(batch.num_rows for batch in _batches(_open_ipc(file)))


def _open_ipc(file: Any) -> Any:
    """Reader of Arrow IPC in its file format, or in its stream format, which the Hugging Face library writes."""
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowInvalid:
        file.seek(0)
        return pa.ipc.open_stream(file)


def _batches(reader: Any) -> Iterator[Any]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        return (reader.get_batch(index) for index in range(reader.num_record_batches))
    return iter(reader)


def read_column(path: str, column: str, first: int = 0, last: int | None = None) -> list[Any]:
    """Values of a column from row `first` to row `last`, excluded; of a Parquet file only its row groups are read."""
    values: list[Any] = []
    with _open(path) as file:
        seen = 0
        for size, batches in _pieces(path, file, column):
            start, end = seen, seen + size
            seen = end
            if last is not None and start >= last:
                break
            if end <= first:
                continue
            for batch in batches():
                stop = start + len(batch)
                until = stop if last is None else min(stop, last)
                if until > max(first, start):
                    values += batch.slice(max(first - start, 0), until - max(first, start)).to_pylist()
                start = stop
                if last is not None and stop >= last:
                    break
    return values


def _pieces(path: str, file: Any, column: str) -> Iterator[tuple[int, Any]]:
    """Rows of each piece that can be skipped, and what reads its column in arrays.

    Raises:
        UserError: the column is of an extension type, see `check_plain`.
    """
    if _is_parquet(path):
        parquet = pq.ParquetFile(file)
        check_plain(parquet.schema_arrow, path, [column])
        for group in range(parquet.num_row_groups):
            yield (
                parquet.metadata.row_group(group).num_rows,
                lambda group=group: (
                    batch.column(0) for batch in parquet.iter_batches(64, row_groups=[group], columns=[column])
                ),
            )
        return
    reader = _open_ipc(file)
    check_plain(reader.schema, path, [column])
    for batch in _batches(reader):
        yield batch.num_rows, lambda batch=batch: [batch.column(batch.schema.get_field_index(column))]
