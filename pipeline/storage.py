"""Paths and URLs: the same calls for a local folder and a bucket (pyarrow file systems)."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import unquote

from pyarrow import fs as arrow_fs

from pipeline.errors import UserError

_BUCKETS = ("s3", "gs", "gcs")
_FILE_SCHEME = "file://"
COPY_BYTES = 4 * 1024 * 1024


def is_url(path: str) -> bool:
    """Whether a path names a bucket (`s3://...`) rather than a local folder."""
    return "://" in path


def absolute(path: str, root: str = ".") -> str:
    """Absolute form of a path or URL; a relative one lies below root, and `file://` becomes the path that it names."""
    path, root = _local_path(path), _local_path(root)
    if is_url(path):
        return path
    path = os.path.expanduser(path)
    if is_url(root) and not os.path.isabs(path):
        return join(root, path)
    return os.path.abspath(os.path.join(os.path.expanduser(root), path))


def _local_path(path: str) -> str:
    """Without `file://`, so that a local folder is one, however it is named; anything else as it is."""
    if not path.startswith(_FILE_SCHEME):
        return path
    return unquote(path.removeprefix(_FILE_SCHEME).removeprefix("localhost"))


def join(folder: str, name: str) -> str:
    """A file in a folder, for paths and URLs alike; the options of a URL (`?endpoint_override=...`) stay at its end."""
    place, mark, options = folder.partition("?") if is_url(folder) else (folder, "", "")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def open_filesystem(path: str) -> tuple[arrow_fs.FileSystem, str]:
    """File system of an absolute path or URL, and the path in its terms.

    Raises:
        UserError: the URL names no file system that pyarrow knows.
    """
    if not is_url(path):
        return arrow_fs.LocalFileSystem(), os.path.abspath(path)
    scheme, _, rest = path.partition("://")
    place, mark, options = rest.partition("?")
    try:
        if scheme not in _BUCKETS:
            filesystem, inner = arrow_fs.FileSystem.from_uri(path)
            return filesystem, inner
        bucket = place.partition("/")[0]
        return _bucket_filesystem(f"{scheme}://{bucket}{mark}{options}"), place.rstrip("/")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}") from error


@lru_cache(maxsize=16)
def _bucket_filesystem(url: str) -> arrow_fs.FileSystem:
    """File system of a bucket; connecting takes several round trips, so a process keeps it."""
    filesystem, _ = arrow_fs.FileSystem.from_uri(url)
    return filesystem


def exists(path: str) -> bool:
    """Whether there is a file or folder of this name."""
    filesystem, inner = open_filesystem(path)
    return bool(filesystem.get_file_info(inner).type != arrow_fs.FileType.NotFound)


def read_bytes(path: str) -> bytes:
    """The whole file.

    Raises:
        FileNotFoundError: there is none.
    """
    filesystem, inner = open_filesystem(path)
    with filesystem.open_input_file(inner) as file:
        return bytes(file.read())


def write_bytes(path: str, content: bytes) -> None:
    """Write a file whole: a reader sees the old content or the new one, never a part."""
    write_pieces(path, (content,))


def write_pieces(path: str, pieces: Iterable[bytes]) -> None:
    """Write a file out of pieces that need not all be in memory, whole as `write_bytes` does."""
    filesystem, inner = open_filesystem(path)
    if is_url(path):  # object stores show an object when its upload is complete
        with filesystem.open_output_stream(inner) as file:
            for piece in pieces:
                file.write(piece)
        return
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    partial = f"{inner}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as local_file:
            local_file.writelines(pieces)
            local_file.flush()
            os.fsync(local_file.fileno())
        os.replace(partial, inner)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def stamp(path: str) -> str | None:
    """What changes when a file is written, size and time; None where there is none."""
    filesystem, inner = open_filesystem(path)
    info = filesystem.get_file_info(inner)
    return _stamp(info) if info.type == arrow_fs.FileType.File else None


def _stamp(info: arrow_fs.FileInfo) -> str:
    return f"{info.size} {info.mtime_ns}"


def delete_file(path: str) -> None:
    """Remove a file; nothing where there is none."""
    filesystem, inner = open_filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(inner)


def upload(local_path: str, path: str) -> None:
    """Copy a local file, piece by piece."""
    filesystem, inner = open_filesystem(path)
    if path.partition("://")[0] not in _BUCKETS:  # which have no folders
        filesystem.create_dir(inner.rpartition("/")[0], recursive=True)
    with open(local_path, "rb") as source, filesystem.open_output_stream(inner) as target:
        shutil.copyfileobj(source, target, COPY_BYTES)


def download(path: str, local_path: str) -> None:
    """Copy a file to a local path, piece by piece."""
    filesystem, inner = open_filesystem(path)
    os.makedirs(os.path.dirname(local_path), exist_ok=True)
    with filesystem.open_input_stream(inner) as source, open(local_path, "wb") as target:
        shutil.copyfileobj(source, target, COPY_BYTES)


def list_folders(folder: str) -> list[str]:
    """Names of the folders directly in a folder, in order; empty where there is no such folder."""
    filesystem, inner = open_filesystem(folder)
    selector = arrow_fs.FileSelector(inner, recursive=False, allow_not_found=True)
    entries = filesystem.get_file_info(selector)
    return sorted(entry.base_name for entry in entries if entry.type == arrow_fs.FileType.Directory)


def list_files(folder: str) -> set[str]:
    """Paths, relative to a folder, of all files below it; empty where there is no such folder."""
    return set(list_stamps(folder))


def list_stamps(folder: str) -> dict[str, str]:
    """Of every file below a folder, by its path relative to it, what changes when it is written: size and time."""
    filesystem, inner = open_filesystem(folder)
    selector = arrow_fs.FileSelector(inner, recursive=True, allow_not_found=True)
    prefix = len(inner.rstrip("/")) + 1
    try:
        found = filesystem.get_file_info(selector)
        return {info.path[prefix:]: _stamp(info) for info in found if info.type == arrow_fs.FileType.File}
    except NotADirectoryError as error:
        raise UserError(f"{folder}: is a file, expected a folder") from error
    except UnicodeDecodeError as error:
        name = error.object.decode(errors="backslashreplace") if isinstance(error.object, bytes) else "a file"
        raise UserError(f"{folder}: the name of {name} in it is not UTF-8; rename that file") from error


def delete_folder(folder: str) -> None:
    """Remove a folder with all that is in it; nothing where there is none."""
    if exists(folder):
        filesystem, inner = open_filesystem(folder)
        filesystem.delete_dir(inner)
