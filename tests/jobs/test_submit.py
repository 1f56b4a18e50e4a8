"""`make submit`: a head node, the job, its result, and nothing left running."""

import contextlib
from pathlib import Path

import pytest
from mlflow import MlflowClient

from model.losses import LOSS_NAMES
from pipeline.evaluation import AP_METRICS
from pipeline.mlflow_runs import default_uri
from tests.jobs.running import run_job, write_small_experiment

pytestmark = pytest.mark.cluster


def _processes_of(folder: str) -> list[str]:
    """Command lines of running processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if folder in line]


def test_the_job_runs_on_a_head_node_of_its_own(tmp_path: Path) -> None:
    config = write_small_experiment(tmp_path, train={"epochs": 1})
    outcome = run_job("submit", "--config", str(config), "--storage_path", str(tmp_path / "runs"))
    assert outcome.exit_code == 0, outcome.output + outcome.errors
    client = MlflowClient(default_uri(str(tmp_path / "runs")))
    experiment = client.get_experiment_by_name("mask-rcnn")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics.keys() >= {
        "loss", *LOSS_NAMES, "learning_rate", "gradient_norm", "images_per_second", "data_wait_fraction", *AP_METRICS,
    }  # fmt: skip
    assert '"segm_AP50"' in outcome.output
    head = next(line for line in outcome.output.splitlines() if line.startswith("submit: node folder "))
    folder = head.removeprefix("submit: node folder ")
    assert _processes_of(folder) == []
    assert not Path(folder).exists()


def test_a_job_that_fails_fails_the_submission(tmp_path: Path) -> None:
    config = write_small_experiment(tmp_path, scaling={"num_workers": 500})
    outcome = run_job("submit", "--config", str(config), "--storage_path", str(tmp_path / "runs"))
    assert outcome.exit_code == 1
    assert "500 workers of 1 CPU each do not fit" in outcome.output + outcome.errors
