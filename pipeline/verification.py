"""Compares shards with the SHA-256 of their manifest, on the cluster, before a training uses them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from pipeline import storage
from pipeline.errors import UserError
from pipeline.shards import read_manifest

_PIECE_BYTES = 8 * 1024 * 1024
_MAX_TASKS = 1000


def verify_shards(folder: str, on_progress: Callable[[int, int], None] = lambda *_: None) -> None:
    """Read every shard of a folder once; Ray has to be running.

    Args:
        folder: absolute path or URL.
        on_progress: called with the number of shards done and of all.

    Raises:
        UserError: names the first shard that is missing or damaged, and how many more there are.
    """
    import ray

    shards = read_manifest(folder).shards
    compare = ray.remote(_compare)
    waiting = [
        compare.remote([(storage.join(folder, shard["name"]), shard["sha256"]) for shard in shards[first::_MAX_TASKS]])
        for first in range(min(len(shards), _MAX_TASKS))
    ]
    problems: list[str] = []
    done = 0
    while waiting:
        ready, waiting = ray.wait(waiting)
        for number, found in ray.get(ready):
            done += number
            problems += found
        on_progress(done, len(shards))
    if problems:
        more = f" (and {len(problems) - 1} more shards)" if len(problems) > 1 else ""
        raise UserError(f"{sorted(problems)[0]}{more}")


def _compare(shards: Sequence[tuple[str, str]]) -> tuple[int, list[str]]:
    """Ray task: how many shards were looked at, and what is wrong with some."""
    problems = []
    for path, expected in shards:
        try:
            problem = "" if sha256_of_file(path) == expected else "damaged (its SHA-256 is not the manifest's)"
        except OSError as error:
            problem = f"missing or damaged ({error})"
        if problem:
            problems.append(f"{path}: {problem}; delete {path} and run jobs/prepare.py again")
    return len(shards), problems


def sha256_of_file(path: str) -> str:
    """Digest of a file that need not fit into memory."""
    filesystem, inner = storage.open_filesystem(path)
    digest = hashlib.sha256()
    with filesystem.open_input_stream(inner) as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
