"""The tracker: everything once, nothing of it ever stops a training."""

import math
import socket
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.tracking import Tracker, default_uri, download_checkpoint, flatten


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return default_uri(str(tmp_path))


def make_tracker(uri: str, tmp_path: Path) -> Tracker:
    return Tracker(uri, "experiment", "a-run", str(tmp_path / "a-run"), (tmp_path / "artifacts").as_uri())


def steps_of(uri: str, run_id: str, name: str) -> list[int]:
    return [metric.step for metric in MlflowClient(uri).get_metric_history(run_id, name)]


def test_a_run_holds_parameters_metrics_artifacts_and_its_end(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = tracker.start(None, flatten({"optim": {"learning_rate": 0.1, "name": "sgd"}, "seed": 3}))
    assert run_id is not None
    for step in range(1, 4):
        tracker.log(step, {"loss": 1.0 / step, "learning_rate": 0.1})
    tracker.log_picture(b"\x89PNG", "step-3.png")
    tracker.log_text("{}", "config.json")
    tracker.finish("FINISHED")

    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.learning_rate": "0.1", "optim.name": "sgd", "seed": "3"}
    assert run.data.metrics == {"loss": pytest.approx(1 / 3), "learning_rate": 0.1}
    assert steps_of(uri, run_id, "loss") == [1, 2, 3]
    assert {file.path for file in MlflowClient(uri).list_artifacts(run_id)} == {"config.json", "pictures"}


def test_a_resumed_run_logs_no_step_twice(uri: str, tmp_path: Path) -> None:
    first = make_tracker(uri, tmp_path)
    run_id = first.start(None, {})
    assert run_id is not None
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.log(3, {"segm_AP": 0.5, "epoch": 1.0})
    first.finish("KILLED")

    second = make_tracker(uri, tmp_path)
    assert second.start(run_id, {}) == run_id
    for step in (2, 3, 4):  # it goes on from the checkpoint of step 1
        second.log(step, {"loss": float(step)})
    second.log(3, {"segm_AP": 0.5, "epoch": 1.0})
    second.log(4, {"segm_AP": 0.6, "epoch": 2.0})
    second.finish("FINISHED")
    assert steps_of(uri, run_id, "loss") == [1, 2, 3, 4]
    assert steps_of(uri, run_id, "segm_AP") == [3, 4]
    assert steps_of(uri, run_id, "epoch") == [3, 4]


def test_workers_that_are_restarted_log_no_step_twice(uri: str, tmp_path: Path) -> None:
    """The tracker outlives them: after a lost worker the steps since the last checkpoint come again."""
    tracker = make_tracker(uri, tmp_path)
    run_id = tracker.start(None, {})
    assert run_id is not None
    for step in (1, 2, 3, 2, 3, 4):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("FINISHED")
    assert steps_of(uri, run_id, "loss") == [1, 2, 3, 4]


def test_a_run_that_was_begun_but_not_written_down_is_found_again(uri: str, tmp_path: Path) -> None:
    run_id = make_tracker(uri, tmp_path).start(None, {})
    assert make_tracker(uri, tmp_path).start(None, {}) == run_id
    assert Tracker(uri, "experiment", "b", str(tmp_path / "b"), None).start(None, {}) != run_id


def test_numbers_that_are_not_finite_are_left_out(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = tracker.start(None, {})
    assert run_id is not None
    tracker.log(1, {"loss": math.inf, "gradient_norm": math.nan, "learning_rate": 0.5})
    tracker.finish("FINISHED")
    assert MlflowClient(uri).get_run(run_id).data.metrics == {"learning_rate": 0.5}


def test_without_a_server_the_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        tracker = make_tracker(uri, tmp_path)
        assert tracker.start(None, {}) is None
        tracker.log(1, {"loss": 1.0})
        tracker.log_picture(b"", "a.png")
        tracker.finish("FINISHED")
    problem = tracker.get_progress()["problem"]
    assert uri in problem
    assert "\n" not in problem


def test_metrics_are_kept_while_the_server_is_away(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.tracking.FLUSH_SECONDS", 0.05)
    monkeypatch.setattr("pipeline.tracking.RETRY_SECONDS", 0.05)
    tracker = make_tracker(uri, tmp_path)
    run_id = tracker.start(None, {})
    assert run_id is not None

    def away() -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as broken:
        broken.setattr(tracker, "_client", away)
        tracker.log(1, {"loss": 1.0})
        deadline = time.monotonic() + 20
        while not (tracker.get_progress()["problem"] or time.monotonic() > deadline):
            time.sleep(0.01)
        assert "away" in tracker.get_progress()["problem"]
    tracker.log(2, {"loss": 2.0})
    tracker.finish("FINISHED")
    assert steps_of(uri, run_id, "loss") == [1, 2]


def test_many_metrics_are_written_in_calls_of_a_thousand(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = tracker.start(None, {})
    assert run_id is not None
    for step in range(1, 351):
        tracker.log(step, {name: float(step) for name in "abcdefg"})
    tracker.finish("FINISHED")
    assert steps_of(uri, run_id, "g") == list(range(1, 351))


def test_a_bucket_needs_a_server() -> None:
    with pytest.raises(UserError, match=r"--run\.mlflow_uri"):
        default_uri("s3://bucket/runs")


def test_downloading_the_checkpoint_of_a_run_without_one_says_so(uri: str, tmp_path: Path) -> None:
    tracker = make_tracker(uri, tmp_path)
    run_id = tracker.start(None, {})
    assert run_id is not None
    with pytest.raises(UserError, match="has no checkpoint"):
        download_checkpoint(run_id, uri)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "checkpoint.json").write_text("{}")
    tracker.log_folder(str(tmp_path / "checkpoint"), "best_checkpoint")
    assert (Path(download_checkpoint(run_id, uri)) / "checkpoint.json").read_text() == "{}"
    with pytest.raises(UserError, match="0" * 32):
        download_checkpoint("0" * 32, uri)
