"""What a user gets wrong: an exit code, one line that says what and what to do, nothing left behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import SyntheticSettings
from pipeline.synthetic import write_shapes
from tests.jobs.running import Outcome, run_job, write_small_experiment


def assert_one_line(outcome: Outcome, exit_code: int, *parts: str) -> None:
    assert outcome.exit_code == exit_code, outcome.errors
    assert len(outcome.error_lines) == 1, outcome.errors
    assert outcome.error_lines[0].startswith("error: ")
    for part in parts:
        assert part in outcome.errors
    assert "Traceback" not in outcome.errors + outcome.output


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model.rpn.nms_treshold", "0.6"], ["model.rpn.nms_treshold: no such key", "model.rpn.nms_threshold?"]),
        (["--model.rpn.nms_threshold", "6"], ["model.rpn.nms_threshold", ">= 0 and <= 1", "got 6"]),
        (["--scaling.num_workers", "two"], ["scaling.num_workers", "valid integer", "got two"]),
        (["--run.name", "a/b"], ["run", "plain folder name"]),
        (["--config", "nowhere.yaml"], ["config", "nowhere.yaml"]),
    ],
)
def test_a_wrong_configuration_ends_with_code_2(arguments: list[str], parts: list[str]) -> None:
    assert_one_line(run_job("train", *arguments), 2, *parts)


def _break_data(root: Path, how: str) -> None:
    annotations = root / "annotations" / "instances_train.json"
    content: dict[str, Any] = json.loads(annotations.read_text())
    if how == "missing":
        annotations.unlink()
    elif how == "broken":
        annotations.write_text(annotations.read_text()[:100])
    elif how == "without images":
        annotations.write_text(json.dumps({**content, "images": []}))
    elif how == "images gone":
        for image in content["images"][:3]:
            (root / "images" / image["file_name"]).unlink()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("how", "parts"),
    [
        ("missing", ["instances_train.json: no such annotation file", "data.root"]),
        ("broken", ["instances_train.json: not a JSON file"]),
        ("without images", ["instances_train.json: lists no images"]),
        ("images gone", ["3 of 24 images", "train_000000.png"]),
    ],
)
def test_data_that_cannot_be_used_leave_nothing_behind(tmp_path: Path, how: str, parts: list[str]) -> None:
    config = write_small_experiment(tmp_path, data={"synthetic": None})
    write_shapes(str(tmp_path / "shapes"), SyntheticSettings(training_images=24, validation_images=7))
    _break_data(tmp_path / "shapes", how)
    assert_one_line(run_job("train", "--config", str(config)), 1, *parts)
    left = {path.name for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert left <= {"report.json", "report.html", "quarantine.parquet", "anchor_search.yaml"}


@pytest.mark.cluster
def test_more_workers_than_the_machine_holds(tmp_path: Path) -> None:
    config = write_small_experiment(tmp_path, scaling={"num_workers": 500})
    outcome = run_job("train", "--config", str(config))
    assert_one_line(outcome, 1, "500 workers of 1 CPU each do not fit", "--scaling.num_workers")
    assert not (tmp_path / "runs" / "small").exists()


@pytest.mark.cluster
def test_losses_that_are_not_finite_stop_the_training_with_their_names(tmp_path: Path) -> None:
    config = write_small_experiment(
        tmp_path,
        optim={"name": "sgd", "learning_rate": 1e30, "gradient_clip_norm": 1e30, "warmup_steps": 0},
        run={"max_failures": 0},
    )
    outcome = run_job("train", "--config", str(config))
    assert_one_line(outcome, 1, "step ", "lower optim.learning_rate")


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    config = write_small_experiment(tmp_path)
    outcome = run_job("evaluate", "--config", str(config), "--checkpoint", "nothing")
    assert_one_line(outcome, 1, "nothing: neither a checkpoint folder, nor a run")
