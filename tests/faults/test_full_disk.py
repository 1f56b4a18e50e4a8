"""A disk that is really full: a small file system in memory."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import MODEL_FILE, OPTIMIZER_FILE, Description, TrainingState
from pipeline.checkpoint_store import CheckpointStore, check_writable
from pipeline.checkpoint_writer import CheckpointWriter
from pipeline.config import CheckpointSettings
from pipeline.errors import UserError
from pipeline.tracking import Tracker

LARGE, SMALL = 700_000, 1000  # bytes; the disk has a million


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", folder], capture_output=True)
    if mount.returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def state(weights: int, optimizer: int = SMALL) -> TrainingState:
    tensors = {MODEL_FILE: {"weight": torch.zeros(weights, dtype=torch.uint8)}}
    return TrainingState(tensors, {"state": {0: torch.zeros(optimizer, dtype=torch.uint8)}, "param_groups": []})


def write(writer: CheckpointWriter, step: int, what: TrainingState) -> str | None:
    writer.start(what, Description(step, 0.5, 1.0, {}, ["a"], "digest", {}), lambda: None)
    return writer.finish()


@pytest.mark.parametrize(
    ("too_large", "file"),
    [(state(LARGE, SMALL), MODEL_FILE), (state(SMALL, LARGE), OPTIMIZER_FILE)],
    ids=["weights", "optimiser"],
)
def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_whole(
    small_disk: Path, too_large: TrainingState, file: str
) -> None:
    store = CheckpointStore(str(small_disk / "run"))
    writer = CheckpointWriter(store, CheckpointSettings(keep_last=2))
    assert write(writer, 1, state(LARGE // 2)) is None
    problem = write(writer, 2, too_large)
    assert problem is not None
    assert problem.startswith(f"{store.path(2)}: cannot be written (")
    assert "No space left on device" in problem or file in problem
    assert f"the last checkpoint is {store.path(1)}" in problem
    assert "\n" not in problem
    assert [path.name for path in (small_disk / "run").iterdir()] == ["checkpoint-0000001"]
    assert store.newest_whole(pytest.fail) == store.path(1)
    assert write(writer, 2, state(SMALL)) is None
    assert store.newest_whole(pytest.fail) == store.path(2)


def test_a_full_disk_is_found_before_the_first_step(small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(1000 * 1024))
    with pytest.raises(UserError, match=r"^run\.storage_path: .* cannot be written \(.*No space left on device"):
        check_writable(str(small_disk / "run"))
    with pytest.raises(UserError, match=r"0 MB are free, 4 more checkpoints of 1 MB need 21 MB; make room"):
        CheckpointStore(str(small_disk / "run")).check_room(1_000_000, 3)


def test_a_journal_on_a_full_disk_stops_nobody(small_disk: Path) -> None:
    tracker = Tracker("http://127.0.0.1:1", "e", "run", str(small_disk), None)
    tracker.log_rows([(1, {"loss": 1.0})])
    with open(small_disk / "full", "wb", buffering=0) as file:
        while True:
            try:
                if not file.write(bytes(4096)):
                    break
            except OSError:
                break
    tracker.log_rows([(step, {"loss": 1.0, "learning_rate": 0.5}) for step in range(2, 200)])
    assert "could not be kept ([Errno 28] No space left on device" in (tracker.get_progress()["problem"] or "")
    (small_disk / "full").unlink()
    tracker.log_rows([(200, {"loss": 1.0})])
    steps = [record["step"] for _, record in tracker._journal.records()]
    assert steps[0] == 1
    assert steps[-1] == 200, "records after a torn one are whole"
    assert steps == sorted(set(steps))
