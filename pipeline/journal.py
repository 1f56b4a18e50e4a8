"""A journal on a local disk: records are appended, and a mark says up to where they have been delivered.

records.jsonl   one JSON object a line, only ever appended to
mark.json       bytes delivered, token of the journal, id of the MLflow run; replaced whole
files/          contents of records that are too large for a line, until they are delivered
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import storage

Record = dict[str, Any]
RECORDS_FILE, MARK_FILE, FILES_FOLDER = "records.jsonl", "mark.json", "files"


@dataclass(frozen=True)
class Mark:
    """How far the delivery is."""

    token: str
    """Of this journal and no other."""
    delivered: int = 0
    """Bytes of the records that have been delivered."""
    run_id: str | None = None
    """MLflow run they go to."""


class Journal:
    """Appended to by one thread or several, delivered by one; survives the death of the process at any moment."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._records_path, self._mark_path = self.folder / RECORDS_FILE, self.folder / MARK_FILE
        self._lock = threading.Lock()
        self.is_new = not self._mark_path.exists()
        if self.is_new:
            self.mark = Mark(uuid.uuid4().hex)
        else:
            self.mark = Mark(**json.loads(self._mark_path.read_bytes()))
            self._cut_off_torn_record()

    def _cut_off_torn_record(self) -> None:
        """Remove the end of a line that a crash left unfinished; it was never acknowledged."""
        size = self._size()
        if size == 0:
            return
        with open(self._records_path, "rb+") as file:
            file.seek(max(0, size - 1))
            if file.read(1) == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def append(self, record: Record) -> None:
        """Add a record; it is in the hands of the operating system when this returns.

        Raises:
            OSError: it could not be written, and nothing of it was.
        """
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            if self.is_new:
                self._write_mark(self.mark)
                self.is_new = False
            with open(self._records_path, "ab", buffering=0) as file:
                whole = file.tell()
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(whole)  # what comes after half a record could not be read
                    raise

    def keep_file(self, content: bytes, name: str) -> str:
        """Write down the content that a record is to name; its name in the journal's folder."""
        kept = f"{FILES_FOLDER}/{uuid.uuid4().hex[:12]}-{name}"
        storage.write_bytes(str(self.folder / kept), content)
        return kept

    def keep_copy(self, path: str) -> str:
        """Keep a file as it is now, under another name of the same content where that is possible."""
        kept = f"{FILES_FOLDER}/{uuid.uuid4().hex[:12]}-{os.path.basename(path)}"
        (self.folder / FILES_FOLDER).mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, self.folder / kept)
        except OSError:  # another disk
            shutil.copyfile(path, self.folder / kept)
        return kept

    def path(self, kept: str) -> Path:
        """Of a file from `keep_file`."""
        return self.folder / kept

    def records(self, first_byte: int = 0) -> Iterator[tuple[int, Record]]:
        """Records from a place on, each with the place after it."""
        if self._size() <= first_byte:
            return
        with open(self._records_path, "rb") as file:
            file.seek(first_byte)
            place = first_byte
            for line in file:
                if not line.endswith(b"\n"):
                    return  # being written
                place += len(line)
                yield place, json.loads(line)

    @property
    def num_pending_bytes(self) -> int:
        """Of records that have not been delivered."""
        return self._size() - self.mark.delivered

    def deliver_to(self, run_id: str) -> None:
        """From now on records go to this run, from the first one on if it is another than before."""
        if run_id != self.mark.run_id:
            again = self.mark.run_id is not None
            self._write_mark(replace(self.mark, run_id=run_id, delivered=0 if again else self.mark.delivered))

    def delivered(self, place: int) -> None:
        """Everything up to this place has been delivered."""
        self._write_mark(replace(self.mark, delivered=place))

    def _write_mark(self, mark: Mark) -> None:
        storage.write_bytes(str(self._mark_path), json.dumps(asdict(mark)).encode())
        self.mark = mark

    def _size(self) -> int:
        return self._records_path.stat().st_size if self._records_path.exists() else 0
