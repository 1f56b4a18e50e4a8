"""A sweep as a user runs it: failing trials, kill and resume, MLflow, the best configuration; then without training."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from mlflow import MlflowClient

from pipeline.evaluation import AP_METRICS
from pipeline.mlflow_runs import PARENT_TAG, default_uri
from pipeline.trials import Trial, read_trials
from tests.jobs.running import Outcome, run_job, run_until_then_kill, write_small_experiment

GOOD_RATE, BAD_RATE = 0.001, 1e25
SPACE = {
    "optim.learning_rate": {"choice": [GOOD_RATE, BAD_RATE]},
    "model.anchors.scales": {"choice": "advised"},
    "model.rpn.nms_threshold": {"uniform": [0.5, 0.9]},
}
# The first one fails, the second is interrupted.
START = [{"optim.learning_rate": BAD_RATE}, {"optim.learning_rate": GOOD_RATE}]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--sweep.space", "{model.rpn.nms_treshold: {choice: [0.5]}}"], ["nms_treshold: no such key; did you mean"]),
        (["--sweep.space", "{model.rpn.nms_threshold: {uniform: [0, 2]}}"], ["sweep.space.model.rpn.nms_threshold"]),
        (["--sweep.search", "best"], ["sweep.search: best is none of random, grid, tpe"]),
        (["--sweep.reduction_factor", "1"], ["sweep.reduction_factor", "> 1"]),
        (["--sweep.max_trails", "5"], ["sweep.max_trails: no such key; did you mean sweep.max_trials?"]),
        ([], ["sweep.space: is empty"]),
    ],
)
def test_a_bad_space_ends_with_code_2_and_one_line(arguments: list[str], parts: list[str]) -> None:
    outcome = run_job("tune", *arguments)
    assert outcome.exit_code == 2
    assert len(outcome.error_lines) == 1, outcome.errors
    for part in parts:
        assert part in outcome.errors


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    sweep = {"space": SPACE, "start_points": START, "search": "tpe", "max_trials": 3, "max_concurrent_trials": 1}
    changes: dict[str, Any] = {
        "sweep": {**sweep, "scheduler": "none"},
        "scaling": {"num_workers": 1},
        "data": {"canvases": [[64, 64]], "synthetic": {"training_images": 12, "validation_images": 4, "seed": 0}},
        "train": {"epochs": 3},
    }
    return str(write_small_experiment(folder, **changes))


@pytest.fixture(scope="module")
def sweep_folder(folder: Path) -> Path:
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def before(config: str, sweep_folder: Path) -> list[Trial]:
    """Trials of a sweep that was killed when its second one had a checkpoint."""
    checkpoint = sweep_folder / "trial-0001" / "checkpoint-0000006" / "checkpoint.json"
    run_until_then_kill("tune", "--config", config, until=checkpoint.exists)
    assert not (sweep_folder / "result.json").exists()
    return read_trials(str(sweep_folder))


@pytest.fixture(scope="module")
def swept(before: list[Trial], config: str) -> Outcome:
    assert len(before) == 2
    outcome = run_job("tune", "--config", config)
    assert outcome.exit_code == 0, outcome.errors
    return outcome


@pytest.mark.sweeps
@pytest.mark.cluster
def test_it_goes_on_and_ends_with_the_best(swept: Outcome, before: list[Trial], sweep_folder: Path) -> None:
    summary = swept.last_line
    assert (summary["trials"], summary["finished"], summary["stopped"], summary["failed"]) == (3, 2, 0, 1)
    trials = read_trials(str(sweep_folder))
    assert [trial.state for trial in trials] == ["failed", "finished", "finished"]
    assert trials[0] == before[0], "what had ended stays as it was"
    assert trials[1].point == before[1].point
    assert "loss" in str(trials[0].reason)
    assert "trial-0001: goes on" in swept.output
    assert [entry["step"] for entry in trials[1].evaluations] == [6, 12, 18]
    best = trials[int(summary["best_trial"][-1])]
    assert summary["segm_AP"] == pytest.approx(max(e["segm_AP"] for e in best.evaluations), abs=5e-5)
    assert {"rpn_AR_100", "rpn_AR_1000", "bbox_AP", "loss"} <= best.evaluations[0].keys()


@pytest.mark.sweeps
@pytest.mark.cluster
def test_mlflow_has_a_child_for_every_trial_and_no_step_twice(swept: Outcome, folder: Path) -> None:
    client = MlflowClient(default_uri(str(folder / "runs")))
    parent = swept.last_line["mlflow_run_id"]
    runs = client.search_runs([client.get_run(parent).info.experiment_id])
    children = sorted((run for run in runs if run.data.tags.get(PARENT_TAG) == parent), key=lambda r: r.info.run_name)
    assert len(runs) == 4
    assert [run.info.run_name for run in children] == ["trial-0000", "trial-0001", "trial-0002"]
    assert [run.info.status for run in children] == ["FAILED", "FINISHED", "FINISHED"]
    assert client.get_run(parent).info.status == "FINISHED"
    assert "loss" in children[0].data.tags["sweep.reason"]
    assert children[1].data.tags["sweep.rungs"].startswith("epoch 1: ")
    assert children[0].data.params["optim.learning_rate"] == str(BAD_RATE)
    for run in children[1:]:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
        assert sorted(steps) == list(range(1, 19)), "every step once"
        assert len(client.get_metric_history(run.info.run_id, "rpn_AR_100")) == 3
    names = {file.path for file in client.list_artifacts(parent)}
    assert names >= {"best.yaml", "best_checkpoint", "pictures", "trials.parquet", "trials.txt"}
    pictures = {file.path for file in client.list_artifacts(parent, "pictures")}
    assert pictures >= {"pictures/objective.png", "pictures/parallel_coordinates.png"}


@pytest.mark.sweeps
@pytest.mark.cluster
def test_losers_leave_no_weights_and_the_table_is_whole(swept: Outcome, sweep_folder: Path) -> None:
    best = swept.last_line["best_trial"]
    with_weights = {path.parts[-3] for path in sweep_folder.glob("trial-*/checkpoint-*/model.safetensors")}
    assert with_weights == {best}
    table = pq.read_table(sweep_folder / "trials.parquet")
    assert table["state"].to_pylist() == ["failed", "finished", "finished"]
    assert set(SPACE) <= set(table.column_names)


@pytest.mark.sweeps
@pytest.mark.cluster
def test_a_finished_sweep_is_left_as_it_is(swept: Outcome, config: str, sweep_folder: Path) -> None:
    again = run_job("tune", "--config", config)
    assert again.exit_code == 0
    assert "is finished (3 trials); nothing to do" in again.output
    assert again.last_line == swept.last_line
    changed = run_job("tune", "--config", config, "--train.epochs", "4")
    assert changed.exit_code == 1
    assert "train.epochs 3.0 -> 4.0" in changed.errors


@pytest.mark.sweeps
@pytest.mark.cluster
def test_the_best_configuration_trains_to_what_the_trial_reached(swept: Outcome, sweep_folder: Path) -> None:
    best = sweep_folder / "best.yaml"
    content = yaml.safe_load(best.read_text())
    assert content["run"]["name"] == "small-best"
    assert content["optim"]["learning_rate"] == GOOD_RATE
    outcome = run_job("train", "--config", str(best))
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["segm_AP"] == pytest.approx(swept.last_line["segm_AP"], abs=0.01)


@pytest.mark.sweeps
@pytest.mark.cluster
def test_thresholds_of_a_checkpoint_without_training(swept: Outcome, folder: Path) -> None:
    config = swept.last_line["best_config"]
    space = {
        "model.rpn.nms_threshold": {"grid": [0.3, 0.7]},
        "model.detections.nms_threshold": {"choice": [0.3, 0.5]},
        "model.detections.score_threshold": {"choice": [0.0, 0.05]},
    }
    arguments = (
        "--config", config, "--run.name", "thresholds", "--sweep.checkpoint", swept.last_line["checkpoint"],
        "--sweep.space", json.dumps(space), "--sweep.search", "grid", "--sweep.max_trials", "100",
    )  # fmt: skip
    outcome = run_job("tune", *arguments)
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["trials"] == 8
    table = pq.read_table(folder / "runs" / "thresholds" / "trials.parquet").to_pylist()
    point = {name: table[1][name] for name in space}
    options = [item for name, value in point.items() for item in (f"--{name}", str(value))]
    single = run_job("evaluate", "--config", config, "--checkpoint", swept.last_line["checkpoint"], *options)
    assert single.exit_code == 0, single.errors
    for name in AP_METRICS:
        assert single.last_line[name] == pytest.approx(table[1][name], abs=5.1e-5), name  # printed with 4 digits
    best = yaml.safe_load(Path(outcome.last_line["best_config"]).read_text())
    assert best["model"]["rpn"]["nms_threshold"] == outcome.last_line["best_point"]["model.rpn.nms_threshold"]
    assert run_job("tune", *arguments).last_line == outcome.last_line
