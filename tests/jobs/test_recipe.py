"""Every ingredient of a recipe at once, as a user runs it: killed and resumed, and stopped early."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.checkpoint import AVERAGE_FILE, MODEL_FILE, read_description
from tests.jobs.running import Outcome, run_job, run_until_then_kill, write_small_experiment

pytestmark = pytest.mark.cluster

INGREDIENTS: dict[str, dict[str, Any]] = {
    "data": {"repeat_threshold": 0.9, "empty_images_fraction": 0.5},
    "augment": {
        "large_scale_jitter": [0.5, 1.5], "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.05,
        "copy_paste": 0.5,
    },
    "optim": {
        "name": "sgd", "nesterov": True, "learning_rate": 0.004, "reference_batch_size": 8, "schedule": "multistep",
        "milestones": [5, 8], "gradient_clip_norm": 5.0, "ema_decay": 0.9, "decay_biases": True,
    },
    "train": {
        "accumulation_steps": 2, "synchronise_norms": True, "gradient_compression": "fp16",
        "patience": 3,
    },
}  # fmt: skip
LAST_STEP = 9  # at most 3 epochs of about 24 places in steps of 2 workers x 2 passes x 2 images


@pytest.fixture(scope="module")
def config(folder: Path) -> str:
    return str(write_small_experiment(folder, **INGREDIENTS))


@pytest.fixture(scope="module")
def trained(config: str) -> Outcome:
    outcome = run_job("train", "--config", config, "--train.max_steps", str(LAST_STEP))
    assert outcome.exit_code == 0, outcome.errors
    return outcome


def test_it_says_how_the_learning_rate_came_about(trained: Outcome) -> None:
    assert "2 workers (CPU) x 2 images x 2 passes = 8 a step, 9 steps" in trained.output
    assert "train: learning rate 0.004 x 8 / 8 = 0.004 (linear with the global batch" in trained.output
    assert trained.last_line["steps"] == LAST_STEP
    assert trained.last_line["stopped"] is None


def test_killed_and_resumed_equals_uninterrupted(trained: Outcome, config: str, folder: Path) -> None:
    """The average of the weights too, to the bit."""
    run_folder = folder / "runs" / "killed"
    arguments = ("--config", config, "--run.name", "killed", "--train.max_steps", str(LAST_STEP))

    def a_checkpoint_is_there() -> bool:
        return any(run_folder.glob("checkpoint-*"))

    run_until_then_kill("train", *arguments, until=a_checkpoint_is_there)
    assert not (run_folder / "result.json").exists()
    resumed = run_job("train", *arguments)
    assert resumed.exit_code == 0, resumed.errors
    ours, theirs = (folder / "runs" / name / f"checkpoint-{LAST_STEP:07d}" for name in ("killed", "small"))
    for file in (MODEL_FILE, AVERAGE_FILE):
        found, expected = load_file(ours / file), load_file(theirs / file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(tensor, load_file(ours / MODEL_FILE)[name]) for name, tensor in found.items())
    evaluations = [read_description(str(folder)).evaluations for folder in (ours, theirs)]
    assert evaluations[0] == evaluations[1]
    assert len(evaluations[0]) == 3


def test_the_average_is_what_was_evaluated(trained: Outcome, config: str) -> None:
    metrics = read_description(trained.last_line["checkpoint"]).metrics
    outcome = run_job("evaluate", "--config", config, "--checkpoint", "small")
    assert outcome.exit_code == 0, outcome.errors
    for name, value in metrics.items():
        assert outcome.last_line[name] == pytest.approx(value, abs=5e-5), name


def test_a_target_that_is_reached_ends_the_training(config: str) -> None:
    arguments = ("--config", config, "--run.name", "early", "--train.target_bbox_AP", "0.0")
    outcome = run_job("train", *arguments)
    assert outcome.exit_code == 0, outcome.errors
    assert 0 < outcome.last_line["steps"] <= 4
    assert outcome.last_line["stopped"].startswith("reached bbox_AP 0.")
    assert f"train: stopped at step {outcome.last_line['steps']}: reached bbox_AP" in outcome.output
    again = run_job("train", *arguments)
    assert again.last_line == outcome.last_line
    assert "nothing to do" in again.output
