"""What MLflow is told of a sweep: once, and never at the cost of the sweep."""

import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.tracking import PARENT_TAG, SweepRecord, default_uri


def test_a_parent_and_its_children(tmp_path: Path) -> None:
    uri, said = default_uri(str(tmp_path)), list[str]()
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
