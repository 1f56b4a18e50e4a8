"""What MLflow is told of a sweep: once, and never at the cost of the sweep."""

import shutil
import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.cluster import Placement
from pipeline.config import ExperimentConfig, RunSettings
from pipeline.launch import TrialOfSweep
from pipeline.mlflow_runs import PARENT_TAG, default_uri
from pipeline.sweep_record import SweepRecord
from pipeline.sweep_result import record_trial
from pipeline.sweep_state import Parent
from pipeline.tracking import Tracker
from pipeline.trial import SweepOfTrials
from pipeline.trials import Trial


@pytest.fixture
def uri(new_database: Path, tmp_path: Path) -> str:
    shutil.copy(new_database, tmp_path)
    return default_uri(str(tmp_path))


def test_a_parent_and_its_children(uri: str, tmp_path: Path) -> None:
    said: list[str] = []
    record = SweepRecord(uri, "experiment", (tmp_path / "artifacts").as_uri(), said.append)
    parameters = {f"knob{number}": "1" for number in range(250)}
    parent = record.begin(None, "sweep", "/runs/it's", parameters)
    assert parent is not None
    assert record.begin(None, "sweep", "/runs/it's", parameters) == parent, "begun, but not written down"
    child = record.begin(None, "trial-0000", "/runs/sweep/trial-0000", {"a": "2"}, parent)
    assert child is not None
    record.tag(child, {"sweep.reason": "out of memory", "sweep.point": "x" * 9000})
    record.end(child, "FAILED")
    record.log_series(parent, [{"segm_AP": 0.25, "bbox_AP": 0.5}] * 600)
    record.log_files(parent, {"best.yaml": b"a: 1", "pictures/objective.png": b"\x89PNG"})
    record.end(parent, "KILLED")
    assert record.begin(parent, "sweep", "/runs/it's", parameters) == parent, "taken up again"
    record.end(parent, "FINISHED")

    client = MlflowClient(uri)
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == 250
    assert PARENT_TAG not in run.data.tags
    assert len(client.get_metric_history(parent, "segm_AP")) == 600
    assert {file.path for file in client.list_artifacts(parent)} == {"best.yaml", "pictures"}
    of_child = client.get_run(child)
    assert of_child.info.status == "FAILED"
    assert of_child.data.tags[PARENT_TAG] == parent
    assert of_child.data.tags["sweep.reason"] == "out of memory"
    assert len(client.search_runs([run.info.experiment_id])) == 2
    assert said == []


def test_an_ended_trial_has_one_run(uri: str, tmp_path: Path) -> None:
    """Recorded twice, with and without the journal of its training."""
    said: list[str] = []
    record = SweepRecord(uri, "mask-rcnn", (tmp_path / "artifacts").as_uri(), said.append)
    parent_id = record.begin(None, "sweep", str(tmp_path / "sweep"), {})
    base = ExperimentConfig(run=RunSettings(mlflow_uri=uri, mlflow_experiment="mask-rcnn")).model_dump(mode="json")
    of_trial = TrialOfSweep(0, "ledger", Placement(False, {"CPU": 1.0}, 1.0), parent_id)
    sweep = SweepOfTrials(base, str(tmp_path / "sweep"), {}, (), "ledger", of_trial, "/")
    trial = Trial(0, {"optim.learning_rate": 0.1}, "failed", "loss = nan")
    folder = tmp_path / "sweep" / trial.name
    tracker = Tracker(uri, "mask-rcnn", trial.name, str(folder), None)
    run_id = tracker.start(None, {"optim.learning_rate": "0.1"}, seconds=60, parent_run_id=parent_id)
    tracker.finish("FAILED")
    record_trial(trial, sweep, Parent(record, parent_id), "segm_AP", said.append)
    shutil.rmtree(folder)  # the sweep goes on on another machine
    record_trial(trial, sweep, Parent(record, parent_id), "segm_AP", said.append)

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_run(str(parent_id)).info.experiment_id])
    children = [run for run in runs if run.data.tags.get(PARENT_TAG) == parent_id]
    assert [run.info.run_id for run in children] == [run_id]
    assert (children[0].info.status, children[0].data.tags["sweep.reason"]) == ("FAILED", "loss = nan")
    assert len(runs) == 2
    assert said == []


def test_without_a_server_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    said: list[str] = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{probe.getsockname()[1]}"
        record = SweepRecord(uri, "experiment", None, said.append)
        assert record.begin(None, "sweep", "/runs/sweep", {}) is None
        record.end("0" * 32, "FINISHED")
    assert len(said) == 2
    assert all(uri in line and "\n" not in line for line in said)
