"""The checkpoints of a run's folder: written whole or not at all, the best and the latest kept, the newest whole taken.

A checkpoint is `checkpoint-STEP` in the run's folder, local or in a bucket. On a disk it is written under another name,
flushed and renamed; in a bucket its description comes last and goes first. What is there counts, whoever wrote it, so
nothing has to be registered anywhere before a crash may come.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.checkpoint import DESCRIPTION_FILE, Description, parse_description, verify_checkpoint
from pipeline.errors import UserError

NAME = re.compile(r"checkpoint-(\d+)")
UNFINISHED = ".unfinished-"
SPARE_BYTES = 16 * 1024 * 1024  # of logs and the like, beside the checkpoints


@dataclass(frozen=True)
class StoredCheckpoint:
    """One that lies in a run's folder, by its description; its other files have not been looked at."""

    path: str
    """Local path or URL."""
    description: Description

    @property
    def quality(self) -> tuple[float, int]:
        """What decides which is the best: mask AP, then the step; one that was not evaluated is never better."""
        return self.description.metrics.get("segm_AP", -1.0), self.description.step


class CheckpointStore:
    """Writes, finds and removes the checkpoints of one run; one process at a time writes."""

    def __init__(self, run_folder: str) -> None:
        self.run_folder = run_folder
        self._local = not storage.is_url(run_folder)

    def path(self, step: int) -> str:
        """Where the checkpoint after so many steps lies."""
        return storage.join(self.run_folder, f"checkpoint-{step:07d}")

    def commit(self, step: int, write: Callable[[str], None], before_it_counts: Callable[[], None]) -> str:
        """Add a checkpoint; at every moment it is there whole or not at all.

        Args:
            step: steps done.
            write: fills the local folder that it is given, the description last.
            before_it_counts: called when everything is on the disk, before a resume would take it.

        Returns:
            Its path or URL.

        Raises:
            UserError: the disk is full or the storage out of reach; the checkpoints before it are as they were.
        """
        path = self.path(step)
        try:
            if self._local:
                self._commit_on_disk(path, write, before_it_counts)
            else:
                _commit_in_bucket(path, write, before_it_counts)
        except OSError as error:
            kept = [entry.path for entry in self.list()]
            last = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"{path}: cannot be written ({error}); {last}. Mend the storage and start the same command again"
            ) from error
        return path

    def _commit_on_disk(self, path: str, write: Callable[[str], None], before_it_counts: Callable[[], None]) -> None:
        unfinished = os.path.join(self.run_folder, UNFINISHED + os.path.basename(path))
        shutil.rmtree(unfinished, ignore_errors=True)
        os.makedirs(unfinished)
        try:
            write(unfinished)
            _flush_folder(unfinished)
            before_it_counts()
            if os.path.exists(path):  # one that was refused, and has been trained anew
                _remove_folder(path)
            os.rename(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        _flush_folder(self.run_folder)

    def list(self) -> list[StoredCheckpoint]:
        """By step, those whose description can be read."""
        found = []
        for name in storage.list_folders(self.run_folder):
            if NAME.fullmatch(name):
                path = storage.join(self.run_folder, name)
                with contextlib.suppress(UserError, FileNotFoundError):
                    file = storage.join(path, DESCRIPTION_FILE)
                    found.append(StoredCheckpoint(path, parse_description(storage.read_bytes(file), file)[0]))
        return sorted(found, key=lambda entry: entry.description.step)

    def newest_whole(self, refuse: Callable[[str], None]) -> str | None:
        """The latest checkpoint whose every byte is as it was written; None where there is none.

        Args:
            refuse: told of every later one why it is not taken.
        """
        names = [name for name in storage.list_folders(self.run_folder) if NAME.fullmatch(name)]
        for name in sorted(names, key=lambda name: int(name.removeprefix("checkpoint-")), reverse=True):
            path = storage.join(self.run_folder, name)
            try:
                with local_folder(path) as folder:
                    verify_checkpoint(folder)
                return path
            except (UserError, OSError) as error:
                refuse(f"{path} is refused: {error}")
        return None

    def prune(self, keep_best: int, keep_last: int) -> None:
        """Remove all but the latest and, of those that were evaluated, the best."""
        stored = self.list()
        judged = sorted((entry for entry in stored if entry.description.metrics), key=lambda entry: entry.quality)
        kept = {entry.path for entry in [*stored[-keep_last:], *judged[-keep_best:]]}
        for entry in stored:
            if entry.path not in kept:
                self._remove(entry.path)

    def remove_all(self) -> None:
        """Remove every checkpoint, also those that are damaged or half written: nobody will go on with the run."""
        for name in storage.list_folders(self.run_folder):
            if NAME.fullmatch(name):
                self._remove(storage.join(self.run_folder, name))
        self.remove_unfinished()

    def _remove(self, path: str) -> None:
        if self._local:
            _remove_folder(path)
        else:
            storage.delete_file(storage.join(path, DESCRIPTION_FILE))  # first, so that the rest is not taken for one
            storage.delete_folder(path)

    def remove_unfinished(self) -> None:
        """Remove what a crash left half written or half removed."""
        if self._local and os.path.isdir(self.run_folder):
            for name in os.listdir(self.run_folder):
                if name.startswith(UNFINISHED):
                    shutil.rmtree(os.path.join(self.run_folder, name), ignore_errors=True)

    def check_room(self, checkpoint_bytes: int, keep: int) -> None:
        """Find a disk that is too small before anything is computed.

        Args:
            checkpoint_bytes: size of one.
            keep: how many are kept; one more is there while it is written.

        Raises:
            UserError: with what is free and what is needed.
        """
        if not self._local:
            return
        os.makedirs(self.run_folder, exist_ok=True)
        free = shutil.disk_usage(self.run_folder).free
        missing = max(1, keep + 1 - len(self.list()))
        needed = missing * checkpoint_bytes + SPARE_BYTES
        if free < needed:
            raise UserError(
                f"{self.run_folder}: {_megabytes(free)} are free, {missing} more checkpoints of "
                f"{_megabytes(checkpoint_bytes)} need {_megabytes(needed)}; make room, choose another "
                "--run.storage_path, or lower --checkpoints.keep_last"
            )


def best(stored: list[StoredCheckpoint]) -> StoredCheckpoint | None:
    """The one with the largest mask AP, the latest of equals; None of none."""
    return max(stored, key=lambda entry: entry.quality, default=None)


@contextlib.contextmanager
def local_folder(path: str) -> Iterator[str]:
    """The checkpoint as a local folder: a bucket's is downloaded for as long as it is used.

    Raises:
        UserError: there is none in the bucket.
    """
    if not storage.is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        names = storage.list_files(path)
        if not names:
            raise UserError(f"{path}: no checkpoint")
        for name in sorted(names):
            storage.download(storage.join(path, name), os.path.join(folder, name))
        yield folder


def check_writable(run_folder: str) -> None:
    """See whether a run's folder can be written, so that a storage out of reach shows at once; nothing is left behind.

    Raises:
        UserError: it cannot be written.
    """
    probe = storage.join(run_folder, ".writable")
    try:
        missing = _missing_folders(run_folder)
        storage.write_bytes(probe, b"x")
        storage.delete_file(probe)
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there
                os.rmdir(folder)
    except OSError as error:
        raise UserError(f"run.storage_path: {run_folder} cannot be written ({error})") from error


def _missing_folders(folder: str) -> list[str]:
    """Folders of a local path that are not there, the innermost first; a bucket has none."""
    missing = []
    while not storage.is_url(folder) and not os.path.exists(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def _commit_in_bucket(path: str, write: Callable[[str], None], before_it_counts: Callable[[], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        write(folder)
        storage.delete_file(storage.join(path, DESCRIPTION_FILE))
        for name in sorted(set(os.listdir(folder)) - {DESCRIPTION_FILE}):
            storage.upload(os.path.join(folder, name), storage.join(path, name))
        before_it_counts()
        storage.upload(os.path.join(folder, DESCRIPTION_FILE), storage.join(path, DESCRIPTION_FILE))


def _remove_folder(path: str) -> None:
    """Renamed first: a folder that is half removed is not a checkpoint any more."""
    folder, name = os.path.split(path)
    doomed = os.path.join(folder, f"{UNFINISHED}removed-{name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush_folder(folder: str) -> None:
    """Have the disk take the names of its files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.0f} MB"
