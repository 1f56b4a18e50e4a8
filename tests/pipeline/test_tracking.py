"""The tracker: everything once, nothing of it ever stops a training."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.mlflow_models import download_checkpoint
from pipeline.mlflow_runs import PARENT_TAG, default_uri, flatten
from pipeline.tracking import RUNS, Tracker, journal_folder


@pytest.fixture
def uri(new_database: Path, tmp_path: Path) -> str:
    shutil.copy(new_database, tmp_path)
    return default_uri(str(tmp_path))


def make_tracker(uri: str, tmp_path: Path, name: str = "a-run") -> Tracker:
    return Tracker(uri, "experiment", name, str(tmp_path / name), (tmp_path / "artifacts").as_uri())


def started(tracker: Tracker, parameters: dict[str, str] | None = None, known_run_id: str | None = None) -> str:
    """Begin it; the id of its run."""
    run_id = tracker.start(known_run_id, parameters or {}, seconds=60)
    assert run_id is not None
    return run_id


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def quick_deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.FLUSH_SECONDS", 0.05)
    monkeypatch.setattr("pipeline.tracking.RETRY_SECONDS", 0.05)


def steps_of(uri: str, run_id: str, name: str) -> list[int]:
    return [metric.step for metric in MlflowClient(uri).get_metric_history(run_id, name)]


def test_a_run_holds_parameters_metrics_artifacts_and_its_end(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = started(tracker, flatten({"optim": {"learning_rate": 0.1, "name": "sgd"}, "seed": 3}))
    for step in range(1, 4):
        tracker.log(step, {"loss": 1.0 / step, "learning_rate": 0.1})
    tracker.log_picture(b"\x89PNG", "step-3.png")
    tracker.log_text("{}", "config.json")
    tracker.finish("FINISHED", 60)

    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.learning_rate": "0.1", "optim.name": "sgd", "seed": "3"}
    assert run.data.metrics == {"loss": pytest.approx(1 / 3), "learning_rate": 0.1}
    assert steps_of(uri, run_id, "loss") == [1, 2, 3]
    assert {file.path for file in MlflowClient(uri).list_artifacts(run_id)} == {"config.json", "pictures"}
    assert tracker.everything_is_delivered
    assert list((tmp_path / "a-run" / "tracking" / "files").iterdir()) == []


def test_a_resumed_run_is_taken_up_and_logs_no_step_twice(uri: str, tmp_path: Path) -> None:
    first = make_tracker(uri, tmp_path)
    run_id = started(first, {"seed": "3"})
    first.log_rows([(step, {"loss": float(step)}) for step in (1, 2, 3)])
    first.log_rows([(3, {"segm_AP": 0.5, "epoch": 1.0})])
    first.finish("KILLED", 60)
    assert MlflowClient(uri).get_run(run_id).info.status == "KILLED"

    second = make_tracker(uri, tmp_path)
    assert started(second, {"seed": "4"}) == run_id  # parameters are those that the run was begun with
    wait_until(lambda: MlflowClient(uri).get_run(run_id).info.status == "RUNNING")
    second.log_rows([(step, {"loss": 9.0}) for step in (2, 3, 4)])  # it goes on from the checkpoint of step 1
    second.log_rows([(3, {"segm_AP": 0.9, "epoch": 9.0})])
    second.log_rows([(4, {"segm_AP": 0.6, "epoch": 2.0})])
    second.finish("FINISHED", 60)
    assert steps_of(uri, run_id, "loss") == [1, 2, 3, 4]
    assert steps_of(uri, run_id, "segm_AP") == [3, 4]
    assert steps_of(uri, run_id, "epoch") == [3, 4]
    run = MlflowClient(uri).get_run(run_id)
    assert (run.info.status, run.data.params, run.data.metrics["loss"]) == ("FINISHED", {"seed": "3"}, 9.0)


def test_a_child_is_told_of_its_parent_from_the_journal(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow is away while a trial runs; who delivers later knows the run's folder alone."""
    with monkeypatch.context() as away:
        away.setattr(Tracker, "_deliver", lambda *_: False)
        tracker = make_tracker(uri, tmp_path)
        assert tracker.start(None, {}, seconds=0, parent_run_id="f" * 32) is None
        tracker.finish("FAILED", seconds=0)
    later = make_tracker(uri, tmp_path)
    later.deliver(60)
    run = MlflowClient(uri).get_run(str(later.run_id()))
    assert (run.data.tags[PARENT_TAG], run.info.status) == ("f" * 32, "FAILED")
    again = make_tracker(uri, tmp_path)
    assert again.start(None, {}, seconds=60, parent_run_id="f" * 32) == run.info.run_id
    again.finish("FINISHED")
    assert [record["kind"] for _, record in again._journal.records()].count("parent") == 1, "told once"


def test_a_run_from_before_its_journal_is_taken_up_and_logs_no_step_twice(uri: str, tmp_path: Path) -> None:
    """Its driver ran on another machine, or an earlier version of this program began it."""
    first = make_tracker(uri, tmp_path)
    run_id = started(first)
    first.log_rows([(step, {"loss": float(step)}) for step in (1, 2, 3)])
    first.finish("KILLED", 60)
    shutil.rmtree(tmp_path / "a-run")
    second = make_tracker(uri, tmp_path)
    assert started(second, known_run_id=run_id) == run_id
    second.log_rows([(step, {"loss": 9.0}) for step in (2, 3, 4)])
    second.finish("FINISHED", 60)
    assert steps_of(uri, run_id, "loss") == [1, 2, 3, 4]


def test_workers_that_are_restarted_log_no_step_twice(uri: str, tmp_path: Path) -> None:
    """The tracker outlives them: after a lost worker the steps since the last checkpoint come again."""
    tracker = make_tracker(uri, tmp_path)
    run_id = started(tracker)
    for step in (1, 2, 3, 2, 3, 4):
        tracker.log_rows([(step, {"loss": float(step)})])
    tracker.finish("FINISHED", 60)
    assert steps_of(uri, run_id, "loss") == [1, 2, 3, 4]


def kill(tracker: Tracker) -> None:
    """It writes nothing from here on."""
    tracker._closed.set()
    tracker._deliverer.join()


def begun_and_killed(uri: str, tmp_path: Path, name: str = "a-run") -> str:
    """Id of the run of a tracker that delivers what it has and is no more."""
    tracker = make_tracker(uri, tmp_path, name=name)
    run_id = started(tracker)
    wait_until(lambda: tracker.everything_is_delivered)
    kill(tracker)
    return run_id


def test_a_run_that_was_begun_but_not_written_down_is_found_again(uri: str, tmp_path: Path) -> None:
    run_id = begun_and_killed(uri, tmp_path)
    folder = tmp_path / "a-run" / "tracking"
    mark = json.loads((folder / "mark.json").read_text())
    (folder / "mark.json").write_text(json.dumps({**mark, "run_id": None}))
    assert begun_and_killed(uri, tmp_path) == run_id, "by the journal's tag"
    shutil.rmtree(folder)
    assert begun_and_killed(uri, tmp_path) == run_id, "by the folder's tag"
    other = begun_and_killed(uri, tmp_path, name="b")
    assert other != run_id
    MlflowClient(uri).set_terminated(run_id)
    shutil.rmtree(folder)
    assert begun_and_killed(uri, tmp_path) not in (run_id, other), "a finished run of a deleted folder is left"


def test_in_a_folder_that_was_deleted_another_run_begins(uri: str, tmp_path: Path) -> None:
    first = make_tracker(uri, tmp_path)
    killed = started(first, {"seed": "3"})
    wait_until(lambda: bool(MlflowClient(uri).get_run(killed).data.params))
    kill(first)
    shutil.rmtree(tmp_path / "a-run")
    second = make_tracker(uri, tmp_path)
    assert started(second, {"seed": "4"}) != killed
    second.finish("FINISHED", 60)
    assert second.get_progress()["problem"] is None


def test_a_run_that_was_deleted_in_mlflow_is_told_everything_again(
    uri: str, new_database: Path, tmp_path: Path
) -> None:
    first = make_tracker(uri, tmp_path)
    run_id = started(first, {"seed": "3"})
    first.log_rows([(1, {"loss": 1.0})])
    first.finish("KILLED", 60)
    other = default_uri(str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    shutil.copy(new_database, tmp_path / "other")
    second = make_tracker(other, tmp_path)
    new_id = started(second)
    second.log_rows([(2, {"loss": 2.0})])
    second.finish("FINISHED", 60)
    assert new_id != run_id
    assert steps_of(other, new_id, "loss") == [1, 2]
    assert MlflowClient(other).get_run(new_id).data.params == {"seed": "3"}


def test_numbers_that_are_not_finite_are_left_out(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = started(tracker)
    tracker.log_rows(
        [(1, {"loss": math.inf, "gradient_norm": math.nan, "learning_rate": 0.5}), (2, {"loss": math.nan})]
    )
    tracker.finish("FINISHED", 60)
    assert MlflowClient(uri).get_run(run_id).data.metrics == {"learning_rate": 0.5}


def test_without_a_server_nobody_waits_and_everything_is_delivered_later(uri: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
        tracker = make_tracker(dead, tmp_path)
        began = time.monotonic()
        tracker.start(None, {"seed": "3"}, seconds=0)
        tracker.log_rows([(1, {"loss": 1.0})])
        tracker.log_picture(b"png", "a.png")
        assert time.monotonic() - began < 0.5
        wait_until(lambda: tracker.get_progress()["problem"])
        assert dead in tracker.get_progress()["problem"]
        assert "\n" not in tracker.get_progress()["problem"]
        assert tracker.run_id() is None
        tracker.finish("FINISHED", 0.5)
        assert "delivered when the same command is started again" in tracker.get_progress()["problem"]
        assert not tracker.everything_is_delivered
    later = make_tracker(uri, tmp_path)
    later.deliver(60)
    assert later.everything_is_delivered
    run_id = later.run_id()
    assert run_id is not None
    run = MlflowClient(uri).get_run(run_id)
    assert (run.info.status, run.data.params, run.data.metrics) == ("FINISHED", {"seed": "3"}, {"loss": 1.0})
    assert [file.path for file in MlflowClient(uri).list_artifacts(run_id, "pictures")] == ["pictures/a.png"]


class Away:
    """Stands between a tracker and MLflow: calls are lost, or arrive and their answers are lost."""

    def __init__(self, client: Any, arrives: bool) -> None:
        self._client, self._arrives = client, arrives

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> None:
            if self._arrives:
                getattr(self._client, name)(*arguments, **named)
            raise ConnectionError("away")

        return call


@pytest.mark.parametrize("arrives", [False, True])
def test_metrics_are_kept_while_the_server_is_away(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = started(tracker)
    wait_until(lambda: tracker.everything_is_delivered)
    with monkeypatch.context() as broken:
        broken.setattr(tracker, "_client", lambda: Away(MlflowClient(uri), arrives))
        tracker.log_rows([(1, {"loss": 1.0})])
        wait_until(lambda: tracker.get_progress()["problem"])
        assert "away" in tracker.get_progress()["problem"]
        assert not tracker.everything_is_delivered
    wait_until(lambda: tracker.get_progress()["notices"])
    assert "answers again" in tracker.get_progress()["notices"][0]
    assert tracker.get_progress()["problem"] is None
    tracker.log_rows([(2, {"loss": 2.0})])
    tracker.finish("FINISHED", 60)
    assert steps_of(uri, run_id, "loss") == [1, 2]


def test_killed_between_a_delivery_and_its_mark(uri: str, tmp_path: Path) -> None:
    first = make_tracker(uri, tmp_path)
    run_id = started(first)
    wait_until(lambda: first.everything_is_delivered)
    mark = (tmp_path / "a-run" / "tracking" / "mark.json").read_bytes()
    first.log_rows([(step, {"loss": 1.0, "learning_rate": 0.5}) for step in (1, 2)])
    wait_until(lambda: first.everything_is_delivered)
    kill(first)
    (tmp_path / "a-run" / "tracking" / "mark.json").write_bytes(mark)
    second = make_tracker(uri, tmp_path)
    assert started(second) == run_id
    second.log_rows([(2, {"loss": 1.0, "learning_rate": 0.5}), (3, {"loss": 1.0, "learning_rate": 0.5})])
    second.finish("FINISHED", 60)
    assert steps_of(uri, run_id, "loss") == [1, 2, 3]
    assert steps_of(uri, run_id, "learning_rate") == [1, 2, 3]


def test_what_mlflow_refuses_for_good_is_told_and_does_not_stop_the_rest(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = started(tracker, {"a key with a \0 in it": "1"})
    tracker.log_folder("file:///nowhere/at/all", "best_checkpoint")
    tracker.log_rows([(1, {"loss": 1.0})])
    wait_until(lambda: tracker.everything_is_delivered)
    tracker.finish("FINISHED", 60)
    notices = tracker.get_progress()["notices"]
    assert any(notice.startswith("MLflow: parameters could not be recorded (") for notice in notices)
    assert any(notice.startswith("MLflow: best_checkpoint could not be recorded (") for notice in notices)
    assert steps_of(uri, run_id, "loss") == [1]
    assert MlflowClient(uri).get_run(run_id).info.status == "FINISHED"


def test_a_full_disk_under_the_journal_stops_nothing(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = make_tracker(uri, tmp_path)
    started(tracker)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker._journal, "append", full)
    monkeypatch.setattr(tracker._journal, "keep_file", full)
    tracker.log_rows([(1, {"loss": 1.0})])
    tracker.log_text("{}", "config.json")
    assert "config.json could not be kept ([Errno 28] No space left" in (tracker.get_progress()["problem"] or "")


def test_many_metrics_are_written_in_calls_of_a_thousand(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = started(tracker)
    tracker.log_rows([(step, {name: float(step) for name in "abcdefg"}) for step in range(1, 351)])
    tracker.finish("FINISHED", 60)
    assert steps_of(uri, run_id, "g") == list(range(1, 351))


def test_the_journal_lies_with_the_run_or_on_this_machine() -> None:
    assert journal_folder("/runs/mine") == "/runs/mine/tracking"
    here = journal_folder("s3://bucket/runs/mine")
    assert Path(here).is_absolute()
    assert here != journal_folder("s3://bucket/runs/other")


def test_a_bucket_needs_a_server() -> None:
    with pytest.raises(UserError, match=r"--run\.mlflow_uri"):
        default_uri("s3://bucket/runs")


def test_downloading_the_checkpoint_of_a_run_without_one_says_so(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = started(tracker)
    with pytest.raises(UserError, match="has no checkpoint"):
        download_checkpoint(run_id, uri)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "checkpoint.json").write_text("{}")
    tracker.log_folder(str(tmp_path / "checkpoint"), "best_checkpoint")
    shutil.rmtree(tmp_path / "checkpoint")
    tracker.deliver(60)
    (tmp_path / "scratch").mkdir()
    program = (
        "import os, sys; from pipeline.mlflow_models import download_checkpoint;"
        "folder = download_checkpoint(*sys.argv[1:]); print(open(os.path.join(folder, 'checkpoint.json')).read())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, run_id, uri],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "{}\n"
    assert list((tmp_path / "scratch").iterdir()) == []  # nothing stays where the process kept it
    with pytest.raises(UserError, match="0" * 32):
        download_checkpoint("0" * 32, uri)


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        (f"sqlite:///{RUNS}/mlflow.db", "http://127.0.0.1:5000{place} after `make ui`"),
        ("sqlite:////data/runs/mlflow.db", "http://127.0.0.1:5000{place} after `make ui RUNS=/data/runs`"),
        ("sqlite:////data/runs/other.db", None),  # whose pages `make ui` does not show
        ("postgresql://user:secret@host/mlflow", None),
        ("databricks", None),
        ("https://host/mlflow/", "https://host/mlflow{place}"),
    ],
)
def test_the_page_of_a_run(uri: str, page: str | None, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    assert tracker.link() is None, "MLflow has not answered yet"
    tracker._run_id, tracker._experiment_id = "r", "3"
    place = "/#/experiments/3/runs/r?workflowType=machine_learning"
    assert tracker.link() == (page and page.format(place=place))
