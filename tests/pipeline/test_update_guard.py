"""A step whose gradient is not finite changes nothing: neither weights, nor the optimiser, nor statistics of norms."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from model.losses import LOSS_NAMES
from pipeline.config import ExperimentConfig
from pipeline.optim import build_optimizer
from pipeline.training import STEP_METRICS, gradient_scaler, train_step
from pipeline.update_guard import UpdateGuard
from tests.pipeline.small import small_batch, small_config

OPTIMISERS: list[dict[str, Any]] = [
    {"name": "sgd", "momentum": 0.9, "learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant"},
    {"name": "adamw", "learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant"},
]
BATCH = small_batch(1)


class _Scripted(nn.Module):
    """A model whose gradient in each step is the next of a list; with a norm that sees the same numbers."""

    def __init__(self, gradients: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 2), 0.5))
        self.norm = nn.BatchNorm1d(1, affine=False)
        self._gradients = iter(gradients)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        del batch
        gradient = next(self._gradients)
        self.norm(torch.tensor([[gradient], [1.0]]))
        loss = gradient * self.weight.sum()
        return {name: loss if name == "rpn_class_loss" else 0.0 * self.weight.sum() for name in LOSS_NAMES}


def run(gradients: list[float], optim: dict[str, Any], guard: UpdateGuard | None) -> tuple[_Scripted, Any, list[float]]:
    config = small_config(optim=optim)
    model = _Scripted(gradients).train()
    optimizer = build_optimizer(model, config.optim)
    norms = []
    for step in range(len(gradients)):
        values = train_step(model, [BATCH], optimizer, config, step, 10, None, None, guard)
        norms.append(dict(zip(STEP_METRICS, values.tolist(), strict=True))["gradient_norm"])
    return model, optimizer, norms


def assert_same(found: tuple[_Scripted, Any, list[float]], expected: tuple[_Scripted, Any, list[float]]) -> None:
    torch.testing.assert_close(dict(found[0].state_dict()), dict(expected[0].state_dict()), rtol=0, atol=0)
    ours, theirs = found[1].state_dict()["state"], expected[1].state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0)


@pytest.mark.parametrize("optim", OPTIMISERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_skip_leaves_out_the_bad_step_alone(optim: dict[str, Any], bad: float) -> None:
    found = run([1.0, bad, 2.0], optim, UpdateGuard("skip"))
    assert [math.isfinite(norm) for norm in found[2]] == [True, False, True]
    assert_same(found, run([1.0, 2.0], optim, None))


@pytest.mark.parametrize("optim", OPTIMISERS, ids=["sgd", "adamw"])
def test_stop_keeps_the_weights_that_the_bad_step_saw(optim: dict[str, Any]) -> None:
    found = run([1.0, math.nan, 2.0, 3.0], optim, UpdateGuard("stop"))
    expected = run([1.0], optim, None)
    torch.testing.assert_close(found[0].weight, expected[0].weight, rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("optim", OPTIMISERS, ids=["sgd", "adamw"])
def test_good_steps_are_what_they_are_without_a_guard(optim: dict[str, Any], policy: Any) -> None:
    assert_same(run([1.0, 2.0, 3.0], optim, UpdateGuard(policy)), run([1.0, 2.0, 3.0], optim, None))


def test_without_a_guard_one_bad_step_spoils_everything() -> None:
    model, _, _ = run([1.0, math.nan], OPTIMISERS[0], None)
    assert model.weight.isnan().all()


def test_in_fp16_the_scaler_decides() -> None:
    """An overflow there is nothing bad: the scale falls, and the guard does not stay shut."""
    config: ExperimentConfig = small_config(optim=OPTIMISERS[0])
    model = _Scripted([1.0, math.inf, 2.0]).train()
    optimizer, scaler = build_optimizer(model, config.optim), gradient_scaler(torch.float16, "cpu")
    guard = UpdateGuard("stop")
    weights = []
    for step in range(3):
        train_step(model, [BATCH], optimizer, config, step, 10, None, scaler, guard)
        weights.append(model.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert scaler.get_scale() == 2.0**15


def test_in_fp16_the_statistics_of_norms_are_taken_back() -> None:
    config: ExperimentConfig = small_config(optim=OPTIMISERS[0])
    model = _Scripted([1.0, math.nan, 2.0]).train()
    optimizer, scaler = build_optimizer(model, config.optim), gradient_scaler(torch.float16, "cpu")
    for step in range(3):
        train_step(model, [BATCH], optimizer, config, step, 10, None, scaler, UpdateGuard("skip"))
    expected, _, _ = run([1.0, 2.0], OPTIMISERS[0], None)
    torch.testing.assert_close(dict(model.norm.state_dict()), dict(expected.norm.state_dict()), rtol=0, atol=0)
