"""The main job as a user runs it: two workers, evaluation, MLflow, run again, killed and resumed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from model.losses import LOSS_NAMES
from pipeline.checkpoint import read_description
from pipeline.checkpoint_reference import best_checkpoint_of_run
from pipeline.evaluation import AP_METRICS
from pipeline.inference import load
from pipeline.mlflow_runs import default_uri
from pipeline.progress import duration
from tests.jobs.running import Outcome, run_job, run_until_then_kill, write_small_experiment

pytestmark = pytest.mark.cluster

SUMMARY_KEYS = {
    "bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50", "images_per_second", "steps", "seconds", "mlflow_run_id",
    "checkpoint",
}  # fmt: skip
LAST_STEP = 18  # 3 epochs of 24 images in steps of 2 x 2


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    return str(write_small_experiment(folder))


@pytest.fixture(scope="module")
def trained(config: str) -> Outcome:
    """A training from beginning to end; the other tests look at what it left."""
    outcome = run_job("train", "--config", config)
    assert outcome.exit_code == 0, outcome.errors
    return outcome


def test_it_ends_with_a_summary(trained: Outcome) -> None:
    summary = trained.last_line
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == LAST_STEP
    assert 0 <= summary["segm_AP"] <= summary["segm_AP50"] <= 1
    assert summary["images_per_second"] > 0
    assert "2 workers (CPU) x 2 images = 4 a step, 18 steps" in trained.output
    for name in LOSS_NAMES:
        assert name in trained.output
    assert "images/s" in trained.output
    assert "left" in trained.output
    assert trained.errors == ""


def test_mlflow_holds_every_metric_for_every_step(trained: Outcome, folder: Path) -> None:
    client = MlflowClient(default_uri(str(folder / "runs")))
    run_id = trained.last_line["mlflow_run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.rpn.nms_threshold"] == "0.7"
    assert run.data.params["optim.learning_rate"] == "0.001"
    for name in ("loss", *LOSS_NAMES, "learning_rate", "gradient_norm", "images_per_second", "data_wait_fraction"):
        steps = [metric.step for metric in client.get_metric_history(run_id, name)]
        assert steps == list(range(1, LAST_STEP + 1)), name
    for name in AP_METRICS:
        assert [metric.step for metric in client.get_metric_history(run_id, name)] == [6, 12, 18], name
    for metric in client.get_metric_history(run_id, "loss"):
        parts = [
            next(m.value for m in client.get_metric_history(run_id, name) if m.step == metric.step)
            for name in LOSS_NAMES
        ]
        assert metric.value == pytest.approx(sum(parts), rel=1e-4)


def test_mlflow_holds_the_artifacts(trained: Outcome, folder: Path, tmp_path: Path) -> None:
    client = MlflowClient(default_uri(str(folder / "runs")))
    run_id = trained.last_line["mlflow_run_id"]
    names = {file.path for file in client.list_artifacts(run_id)}
    assert names == {"best_checkpoint", "last_checkpoint", "class_map.json", "config.json", "pictures"}
    class_map = json.loads(Path(client.download_artifacts(run_id, "class_map.json", str(tmp_path))).read_text())
    assert class_map == {"background": 0, "circle": 1, "square": 2, "triangle": 3}
    assert read_description(client.download_artifacts(run_id, "last_checkpoint", str(tmp_path))).step == LAST_STEP
    pictures = sorted(file.path for file in client.list_artifacts(run_id, "pictures"))
    assert pictures == [f"pictures/step-{step:07d}.png" for step in (6, 12, 18)]
    with Image.open(client.download_artifacts(run_id, pictures[-1], str(tmp_path))) as picture:
        assert picture.width > 2 * 400


def test_a_smoke_test_tells_how_long_the_real_training_takes(config: str, folder: Path) -> None:
    outcome = run_job("train", "--config", config, "--run.name", "tried", "--smoke")
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["steps"] == 10
    assert not (folder / "runs" / "tried").exists()
    assert 0 < outcome.last_line["seconds_a_step"] < outcome.last_line["seconds"] / 10
    whole = duration(LAST_STEP * outcome.last_line["seconds_a_step"])
    assert f"smoke: all 18 steps of tried would take about {whole}, without evaluations" in outcome.output


def test_a_finished_run_is_left_as_it_is(trained: Outcome, config: str, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted((folder / "runs" / "small").rglob("*"))}
    again = run_job("train", "--config", config)
    assert again.exit_code == 0
    assert "is finished (18 steps); nothing to do" in again.output
    assert again.last_line == trained.last_line
    assert {path: path.stat().st_mtime_ns for path in sorted((folder / "runs" / "small").rglob("*"))} == before


def test_going_on_with_another_configuration_is_refused(trained: Outcome, config: str) -> None:
    assert trained.exit_code == 0
    outcome = run_job("train", "--config", config, "--optim.learning_rate", "0.5", "--model.rpn.nms_threshold", "0.6")
    assert outcome.exit_code == 1
    assert len(outcome.error_lines) == 1
    assert "model.rpn.nms_threshold 0.7 -> 0.6; optim.learning_rate 0.001 -> 0.5" in outcome.errors
    assert "--run.name" in outcome.errors


def test_another_global_batch_is_refused_and_named(trained: Outcome, config: str) -> None:
    assert trained.exit_code == 0
    outcome = run_job("train", "--config", config, "--scaling.num_workers", "1")
    assert outcome.exit_code == 1
    assert (
        "global batch (train.batch_size_per_worker * train.accumulation_steps * scaling.num_workers) 4 -> 2"
        in outcome.errors
    )


def test_killed_and_resumed_equals_uninterrupted(trained: Outcome, config: str, folder: Path) -> None:
    run_folder = folder / "runs" / "killed"
    arguments = ("--config", config, "--run.name", "killed")

    def first_checkpoint_is_there() -> bool:
        return (run_folder / "checkpoint-0000006").exists()

    run_until_then_kill("train", *arguments, until=first_checkpoint_is_there)
    assert not (run_folder / "result.json").exists()
    resumed = run_job("train", *arguments)
    assert resumed.exit_code == 0, resumed.errors
    assert f"going on with run killed in {run_folder}, whose last checkpoint is of step 6 of 18" in resumed.output
    assert "after `make ui" in resumed.output
    assert resumed.last_line["steps"] == LAST_STEP

    client = MlflowClient(default_uri(str(folder / "runs")))
    steps = [metric.step for metric in client.get_metric_history(resumed.last_line["mlflow_run_id"], "loss")]
    assert sorted(steps) == list(range(1, LAST_STEP + 1)), "every step once, in the one MLflow run"
    for name in ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"):
        assert resumed.last_line[name] == trained.last_line[name]
    last = f"checkpoint-{LAST_STEP:07d}/model.safetensors"
    ours, theirs = (load_file(folder / "runs" / name / last) for name in ("killed", "small"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_shortened_to_a_checkpoint_that_was_not_evaluated(config: str, folder: Path) -> None:
    """No step is left, but an evaluation, which stands in the checkpoint afterwards and counts for the best."""
    run_folder = folder / "runs" / "shortened"
    changes = ("--train.evaluate_every_epochs", "3", "--checkpoints.every_steps", "2", "--checkpoints.keep_last", "2")
    arguments = ("--config", config, "--run.name", "shortened", *changes, "--train.max_steps")
    first = run_job("train", *arguments, "4")
    assert first.exit_code == 0, first.errors
    shutil.rmtree(run_folder / "checkpoint-0000004")  # as if it had been ended before the evaluation at its end
    (run_folder / "result.json").unlink()
    newest = run_folder / "checkpoint-0000002"
    before = load_file(newest / "model.safetensors")
    assert read_description(str(newest)).metrics == {}

    shortened = run_job("train", *arguments, "2")
    assert shortened.exit_code == 0, shortened.errors
    assert (shortened.last_line["steps"], shortened.last_line["checkpoint"]) == (2, str(newest))
    metrics = read_description(str(newest)).metrics
    for name in ("bbox_AP", "bbox_AP50", "segm_AP", "segm_AP50"):
        assert shortened.last_line[name] == pytest.approx(metrics[name], abs=5e-5)
    after = load_file(newest / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_the_best_checkpoint_evaluates_to_what_training_saw(trained: Outcome, config: str, folder: Path) -> None:
    best = best_checkpoint_of_run(str(folder / "runs" / "small"))
    assert best == trained.last_line["checkpoint"]
    metrics = read_description(trained.last_line["checkpoint"]).metrics
    for reference in ("small", trained.last_line["mlflow_run_id"]):
        outcome = run_job("evaluate", "--config", config, "--checkpoint", reference)
        assert outcome.exit_code == 0, outcome.errors
        for name in AP_METRICS:
            assert outcome.last_line[name] == pytest.approx(metrics[name], abs=5e-5), name


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["--model.box_head.channels", "64"],
            ["another model than the configuration's", "model.box_head.channels 64 (there 32)"],
        ),
        (
            ["--data.sources", "[{annotations: annotations/two.json}]", "--data.synthetic", "null"],
            ["trained on other classes", "class 3 is 'triangle' there, missing in the data"],
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    trained: Outcome, config: str, folder: Path, arguments: list[str], parts: list[str]
) -> None:
    annotations = folder / "shapes" / "annotations"
    for split, name in (("train", "two"), ("val", "two_val")):
        content = json.loads((annotations / f"instances_{split}.json").read_text())
        content["categories"] = content["categories"][:2]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] < 3]
        (annotations / f"{name}.json").write_text(json.dumps(content))
    if "--data.sources" in arguments:
        arguments = [*arguments, "--data.validation_sources", "[{annotations: annotations/two_val.json}]"]
    outcome = run_job("evaluate", "--config", config, "--checkpoint", trained.last_line["checkpoint"], *arguments)
    assert outcome.exit_code == 1
    assert len(outcome.error_lines) == 1
    for part in parts:
        assert part in outcome.errors


def test_the_checkpoint_predicts_in_python(trained: Outcome, folder: Path) -> None:
    maskrcnn = load(trained.last_line["checkpoint"])
    image = folder / "shapes" / "images" / "val_000001.png"
    detections = maskrcnn.predict(str(image))
    masks = maskrcnn.masks(detections, 128, 128)
    assert masks.shape == (len(detections), 128, 128)
    assert maskrcnn.class_names == ["circle", "square", "triangle"]
    with Image.open(image) as picture:
        from_picture = maskrcnn.predict(picture)
    torch.testing.assert_close(from_picture.boxes, detections.boxes)


def test_a_longer_training_goes_on_from_the_end(trained: Outcome, config: str) -> None:
    """Last in this file: it changes the finished run."""
    outcome = run_job("train", "--config", config, "--train.epochs", "4")
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["steps"] == 24
    assert outcome.last_line["mlflow_run_id"] == trained.last_line["mlflow_run_id"]
