"""Trainings and evaluations that begin with weights of others, as a user runs them."""

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file
from torchvision import models

from pipeline.evaluation import AP_METRICS
from pipeline.initial_weights import INITIAL_WEIGHTS_FILE
from pipeline.mlflow_runs import default_uri
from tests.jobs.running import Outcome, run_job, write_small_experiment
from tests.jobs.test_bad_input import assert_one_line
from tests.pipeline.small import SMALL_MODEL

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """With a ResNet-18 of torchvision whose statistics are its own."""
    state = models.resnet18(weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.add_(torch.rand(tensor.shape, generator=generator) / 10)
    torch.save(state, folder / "resnet18.pth")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    weights = f"torchvision:{folder / 'resnet18.pth'}"
    frozen = {"backbone": SMALL_MODEL["backbone"], "weights": weights}
    return str(write_small_experiment(folder, model=frozen, train={"epochs": 1, "max_steps": 2}))


@pytest.fixture(scope="module")
def trained(config: str) -> Outcome:
    outcome = run_job("train", "--config", config)
    assert outcome.exit_code == 0, outcome.errors
    return outcome


def test_training_begins_with_a_backbone_of_torchvision(trained: Outcome, folder: Path, tmp_path: Path) -> None:
    line = f"weights: torchvision:{folder / 'resnet18.pth'}: 100 tensors loaded (backbone 100)"
    assert line in trained.output
    assert trained.output.index(line) < trained.output.index("train: beginning run small"), "before anything starts"
    theirs = torch.load(folder / "resnet18.pth", weights_only=True)
    initial = load_file(folder / "runs" / "small" / INITIAL_WEIGHTS_FILE)
    assert torch.equal(initial["backbone.stem.0.weight"], theirs["conv1.weight"])
    after = load_file(Path(trained.last_line["checkpoint"]) / "model.safetensors")
    assert after.keys() == initial.keys()
    frozen = [name for name in after if name.startswith("backbone.") and "running" in name]
    assert len(frozen) == 40
    for name in frozen:  # what does not learn is still the file's
        assert torch.equal(after[name], initial[name]), name
    assert not torch.equal(after["box_head.class_logits.weight"], initial["box_head.class_logits.weight"])
    client = MlflowClient(default_uri(str(folder / "runs")))
    report = client.download_artifacts(trained.last_line["mlflow_run_id"], "initial_weights.txt", str(tmp_path))
    assert line in Path(report).read_text()


def test_evaluation_of_a_run_named_as_initial_weights(trained: Outcome, config: str) -> None:
    outcome = run_job("evaluate", "--config", config, "--model.weights", "small")
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["checkpoint"] == trained.last_line["checkpoint"]
    for name in AP_METRICS:
        if name in trained.last_line:
            assert outcome.last_line[name] == pytest.approx(trained.last_line[name], abs=5e-5), name


def test_evaluation_of_weights_of_others(trained: Outcome, config: str, folder: Path) -> None:
    source = f"torchvision:{folder / 'resnet18.pth'}"
    outcome = run_job("evaluate", "--config", config, "--checkpoint", source, "--model.weights", "none")
    assert outcome.exit_code == 0, outcome.errors
    assert outcome.last_line["checkpoint"] == source
    assert "weights: not in the file, at initial values: fpn, rpn, box_head, mask_head" in outcome.output


def test_another_source_is_another_run(trained: Outcome, config: str) -> None:
    outcome = run_job("train", "--config", config, "--model.weights", "none")
    assert_one_line(outcome, 1, "model.weights torchvision:", "-> none", "--run.name")


@pytest.mark.parametrize(
    ("job", "weights", "part"),
    [
        ("train", "matterport:nowhere.h5", "matterport:nowhere.h5: no such file"),
        ("train", "torchvision:{folder}/other.pth", "of another architecture: its backbone is a ResNet-34"),
        ("evaluate", "{folder}/other.pth", "other.pth: no checkpoint of ours; say whose file it is: torchvision:"),
    ],
)
def test_weights_that_cannot_be_used_leave_nothing_behind(tmp_path: Path, job: str, weights: str, part: str) -> None:
    torch.save(models.resnet34(weights=None).state_dict(), tmp_path / "other.pth")
    config = write_small_experiment(tmp_path)
    outcome = run_job(job, "--config", str(config), "--model.weights", weights.format(folder=tmp_path))
    assert_one_line(outcome, 1, part)
    assert not (tmp_path / "runs").exists()


def test_nothing_to_evaluate(tmp_path: Path) -> None:
    outcome = run_job("evaluate", "--config", str(write_small_experiment(tmp_path)))
    assert_one_line(outcome, 2, "checkpoint: nothing to evaluate", "--model.weights")
