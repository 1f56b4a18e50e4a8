"""Checkpoints of a run's folder: whole or not there, the newest whole one taken, the best and the latest kept."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.mask_rcnn import MaskRCNN
from pipeline.checkpoint import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    Description,
    TrainingState,
    capture,
    read_description,
    write_state,
)
from pipeline.checkpoint_store import CheckpointStore, best, check_writable
from pipeline.checkpoint_writer import CheckpointWriter, checkpoint_bytes
from pipeline.config import CheckpointSettings, ExperimentConfig, OptimSettings
from pipeline.errors import UserError
from pipeline.optim import build_optimizer
from tests.pipeline.factories import CLASS_NAMES, thin_model

CONFIG = ExperimentConfig(model=thin_model())
MODEL = MaskRCNN(CONFIG.model, 4)
STATE = TrainingState({MODEL_FILE: {"weight": torch.arange(1000.0)}}, {"state": {}, "param_groups": []})


def describe(step: int, **metrics: float) -> Description:
    return Description(step, 1.5, 20.0, metrics, list(CLASS_NAMES), "digest", CONFIG.model_dump(mode="json"))


def nothing() -> None:
    pass


def commit(store: CheckpointStore, step: int, **metrics: float) -> str:
    return store.commit(step, lambda folder: write_state(folder, STATE, describe(step, **metrics)), nothing)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "run"))


def steps(store: CheckpointStore) -> list[int]:
    return [entry.description.step for entry in store.list()]


def test_a_run_without_checkpoints(store: CheckpointStore) -> None:
    assert store.list() == []
    assert best([]) is None
    refused: list[str] = []
    assert store.newest_whole(refused.append) is None
    assert refused == []
    store.prune(1, 2)
    store.remove_unfinished()


def test_a_checkpoint_appears_whole_after_it_was_waited_for(store: CheckpointStore) -> None:
    seen: list[tuple[list[int], list[str]]] = []

    def look() -> None:
        seen.append((steps(store), sorted(os.listdir(store.run_folder))))

    path = store.commit(20, lambda folder: write_state(folder, STATE, describe(20)), look)
    assert path == f"{store.run_folder}/checkpoint-0000020"
    assert seen == [([], [".unfinished-checkpoint-0000020"])]
    assert os.listdir(store.run_folder) == ["checkpoint-0000020"]
    assert read_description(path) == describe(20)


def test_what_fails_leaves_the_checkpoints_before_it_alone(store: CheckpointStore) -> None:
    kept = commit(store, 20)

    def fill_the_disk(folder: str) -> None:
        Path(folder, MODEL_FILE).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError) as caught:
        store.commit(40, fill_the_disk, nothing)
    assert str(caught.value).startswith(f"{store.path(40)}: cannot be written ([Errno 28] No space left on device)")
    assert f"the last checkpoint is {kept}" in str(caught.value)
    assert os.listdir(store.run_folder) == ["checkpoint-0000020"]
    assert store.newest_whole(lambda _: None) == kept


def test_what_a_crash_left_is_no_checkpoint_and_is_removed(store: CheckpointStore) -> None:
    kept = commit(store, 20)
    shutil.copytree(kept, f"{store.run_folder}/.unfinished-checkpoint-0000040")
    shutil.copytree(kept, f"{store.run_folder}/.unfinished-removed-checkpoint-0000010")
    assert steps(store) == [20]
    store.remove_unfinished()
    assert os.listdir(store.run_folder) == ["checkpoint-0000020"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_taken(
    store: CheckpointStore, damage: Callable[[Path], object], name: str
) -> None:
    paths = [commit(store, step) for step in (20, 40, 60)]
    damage(Path(paths[2], name))
    refused: list[str] = []
    assert store.newest_whole(refused.append) == paths[1]
    assert len(refused) == 1
    assert refused[0].startswith(f"{paths[2]} is refused: {paths[2]}/{name}: ")
    damage(Path(paths[1], name))
    damage(Path(paths[0], name))
    assert store.newest_whole(refused.append) is None
    assert len(refused) == 4


def test_a_refused_checkpoint_is_replaced_when_its_step_is_reached_again(store: CheckpointStore) -> None:
    path = commit(store, 20)
    flip(Path(path, MODEL_FILE))
    assert store.newest_whole(lambda _: None) is None
    assert commit(store, 20) == path
    assert store.newest_whole(pytest.fail) == path


def test_steps_are_compared_as_numbers(store: CheckpointStore) -> None:
    commit(store, 9_999_999)
    latest = commit(store, 10_000_000)
    assert store.newest_whole(pytest.fail) == latest


@pytest.mark.parametrize(
    ("keep_best", "keep_last", "expected"),
    [(1, 2, [20, 50, 60]), (2, 2, [20, 40, 50, 60]), (1, 3, [20, 40, 50, 60]), (9, 9, [10, 20, 30, 40, 50, 60])],
)
def test_the_best_and_the_latest_are_kept(
    store: CheckpointStore, keep_best: int, keep_last: int, expected: list[int]
) -> None:
    for step, metrics in (
        (10, {"segm_AP": 0.1}), (20, {"segm_AP": 0.3}), (30, {}), (40, {"segm_AP": 0.2}), (50, {}), (60, {}),
    ):  # fmt: skip
        commit(store, step, **metrics)
    chosen = best(store.list())
    assert chosen is not None
    assert chosen.description.step == 20
    store.prune(keep_best, keep_last)
    assert steps(store) == expected
    assert sorted(os.listdir(store.run_folder)) == [f"checkpoint-{step:07d}" for step in expected]


def test_all_can_be_removed_and_nothing_else(store: CheckpointStore) -> None:
    store.remove_all()  # of a run that never began
    first = commit(store, 10, segm_AP=0.5)
    commit(store, 20)
    truncate(Path(first, MODEL_FILE))
    Path(store.run_folder, "checkpoint-0000030").mkdir()  # half written by an earlier version
    Path(store.run_folder, ".unfinished-checkpoint-0000040").mkdir()
    Path(store.run_folder, "trial.json").write_text("{}")
    store.remove_all()
    assert os.listdir(store.run_folder) == ["trial.json"]


def test_of_equals_the_later_is_the_best_and_none_without_an_evaluation(store: CheckpointStore) -> None:
    for step, metrics in ((1, {"segm_AP": 0.0}), (2, {"segm_AP": 0.0}), (3, {})):
        commit(store, step, **metrics)
    chosen = best(store.list())
    assert chosen is not None
    assert chosen.description.step == 2


def test_a_disk_without_room_is_found_before_anything_is_written(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    store.check_room(1000, 3)
    monkeypatch.setattr("pipeline.checkpoint_store.shutil.disk_usage", lambda _: usage._replace(free=100_000_000))
    store.check_room(20_000_000, 3)  # 4 * 20 + 16 MB
    with pytest.raises(UserError, match=r"100 MB are free, 4 more checkpoints of 30 MB need 137 MB; make room"):
        store.check_room(30_000_000, 3)
    commit(store, 1)
    store.check_room(27_000_000, 3)  # three more
    CheckpointStore("s3://bucket/run").check_room(10**15, 3)  # nobody knows


def test_room_is_reckoned_about_as_large_as_a_checkpoint_is(tmp_path: Path) -> None:
    for name in ("sgd", "adamw"):
        optimizer = build_optimizer(MODEL, OptimSettings.model_validate({"name": name}))
        for parameter in MODEL.parameters():
            parameter.grad = parameter.detach() * 0
        optimizer.step()
        for averaged in (None, MODEL):
            folder = tmp_path / f"{name}-{averaged is None}"
            folder.mkdir()
            write_state(str(folder), capture(MODEL, optimizer, averaged), describe(1))
            written = sum(path.stat().st_size for path in folder.iterdir())
            assert checkpoint_bytes(MODEL, optimizer, averaged) == pytest.approx(written, rel=0.4), (name, averaged)


def test_a_storage_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "runs" / "run"))
    assert not (tmp_path / "runs").exists()
    (tmp_path / "run").mkdir()
    check_writable(str(tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run\.storage_path: .*/file/run cannot be written \("):
        check_writable(str(tmp_path / "file" / "run"))


def test_the_writer_works_beside_the_training_and_tells_what_failed(store: CheckpointStore) -> None:
    writer = CheckpointWriter(store, CheckpointSettings(keep_best=1, keep_last=2))
    assert writer.finish() is None
    for step in (1, 2, 3, 4):
        writer.start(STATE, describe(step), nothing)
        assert writer.finish() is None
    assert steps(store) == [3, 4]

    def fail() -> None:
        raise OSError(errno.EIO, "the disk is gone")

    writer.start(STATE, describe(5), fail)
    problem = writer.finish()
    assert problem is not None
    assert "checkpoint-0000005: cannot be written ([Errno 5] the disk is gone)" in problem
    assert steps(store) == [3, 4]
