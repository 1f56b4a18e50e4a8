import itertools
import math

import pytest
import torch
from torch import nn

from model.mask_rcnn import MaskRCNN
from pipeline.config import OptimSettings
from pipeline.errors import UserError
from pipeline.optim import build_optimizer, explain_scaling, learning_rate, scale_to_batch, set_learning_rate
from tests.pipeline.factories import thin_model

COSINE = OptimSettings(learning_rate=0.02, warmup_steps=10, schedule="cosine")


def test_warm_up_by_hand() -> None:
    # From a thousandth at step 0 to one at step 10: 0.001 + 0.999 * step / 10 of 0.02; in the middle of the cosine the
    # warm-up is over.
    constant = COSINE.model_copy(update={"schedule": "constant"})
    for settings in (COSINE, constant):
        assert learning_rate(0, 100, settings) == pytest.approx(0.02 * 0.001)
        assert learning_rate(5, 100, settings) == pytest.approx(0.02 * 0.5005)
        assert learning_rate(10, 100, settings) == pytest.approx(0.02)
        steps = [learning_rate(step, 100, settings) for step in range(11)]
        differences = [after - before for before, after in itertools.pairwise(steps)]
        assert differences == pytest.approx([0.02 * 0.0999] * 10)  # linear
    slow = COSINE.model_copy(update={"warmup_factor": 0.5})
    assert learning_rate(0, 100, slow) == pytest.approx(0.01)


def test_cosine_by_hand() -> None:
    # Steps 10 to 99 go from the peak to a hundredth of it; the middle lies at step 54.5.
    assert learning_rate(10, 100, COSINE) == pytest.approx(0.02)
    assert learning_rate(99, 100, COSINE) == pytest.approx(0.0002)
    middle = (learning_rate(54, 100, COSINE) + learning_rate(55, 100, COSINE)) / 2
    assert middle == pytest.approx(0.02 * 0.505)
    third = learning_rate(10 + 30, 10 + 91, COSINE)  # 60 degrees: cosine one half
    assert third == pytest.approx(0.02 * (0.01 + 0.99 * 0.75))
    falling = [learning_rate(step, 100, COSINE) for step in range(10, 100)]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == 90


def test_constant_by_hand() -> None:
    constant = COSINE.model_copy(update={"schedule": "constant"})
    assert learning_rate(9, 100, constant) == pytest.approx(0.02 * 0.9001)
    assert [learning_rate(step, 100, constant) for step in (10, 50, 99)] == [0.02] * 3


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    settings = COSINE.model_copy(update={"warmup_steps": 0})
    assert learning_rate(0, 11, settings) == 0.02
    assert learning_rate(5, 11, settings) == pytest.approx(0.02 * 0.505)
    assert learning_rate(10, 11, settings) == pytest.approx(0.0002)


@pytest.mark.parametrize("total", [1, 5, 10, 11, 12])
def test_training_shorter_than_its_warm_up(total: int) -> None:
    values = [learning_rate(step, total, COSINE) for step in range(total)]
    assert all(0 < value <= 0.02 and math.isfinite(value) for value in values)
    assert values[: min(total, 10)] == sorted(values[: min(total, 10)])
    # A step after the last one, as in a longer training begun with fewer steps, stays at the end.
    assert learning_rate(total + 50, total, COSINE) == pytest.approx(0.0002)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    model = small()
    settings = OptimSettings.model_validate({"name": name, "weight_decay": 0.3, "momentum": 0.8})
    decayed, others = build_optimizer(model, settings).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)
    names = {parameter: key for key, parameter in model.named_parameters()}
    assert [names[parameter] for parameter in decayed["params"]] == ["0.weight", "2.weight"]
    assert [names[parameter] for parameter in others["params"]] == ["0.bias", "1.weight", "1.bias", "2.bias"]
    assert decayed["momentum" if name == "sgd" else "betas"] == (0.8 if name == "sgd" else (0.9, 0.999))


def test_frozen_parameters_stay_out() -> None:
    model = small()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    groups = build_optimizer(model, OptimSettings()).param_groups
    assert [len(group["params"]) for group in groups] == [1, 3]


def test_every_parameter_of_the_model_learns_once() -> None:
    model = MaskRCNN(thin_model(), 4)
    groups = build_optimizer(model, OptimSettings()).param_groups
    learned = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(learned) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)


def test_sgd_step_by_hand() -> None:
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(3.0)
    settings = OptimSettings(learning_rate=1.0, momentum=0.5, weight_decay=0.1)
    optimizer = build_optimizer(model, settings)
    set_learning_rate(optimizer, 0.5)
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.ones(1, 1), torch.ones(1)
        optimizer.step()
    # Weight: gradients 1.2 and 1 + 0.1 * 1.4 = 1.14, momentum 0.5 * 1.2 + 1.14 = 1.74: 2 - 0.6 - 0.87.
    torch.testing.assert_close(model.weight, torch.tensor([[0.53]]), check_dtype=True)
    # Bias: 1, then 1.5: 3 - 0.5 - 0.75.
    torch.testing.assert_close(model.bias, torch.tensor([1.75]))


ONE_TIMES = OptimSettings(
    learning_rate=0.02,
    reference_batch_size=16,
    warmup_steps=1000,
    schedule="multistep",
    milestones=(60000, 80000),
    gradient_clip_norm=None,
)


def test_multistep_by_hand() -> None:
    """The values of detectron2's 1x schedule: warm-up to 1000, tenths at 60,000 and 80,000."""
    expected = {
        0: 0.02 * 0.001, 500: 0.02 * 0.5005, 999: 0.02 * 0.999001, 1000: 0.02, 59999: 0.02,
        60000: 0.002, 79999: 0.002, 80000: 0.0002, 89999: 0.0002,
    }  # fmt: skip
    for step, value in expected.items():
        assert learning_rate(step, 90000, ONE_TIMES) == pytest.approx(value, rel=1e-12), step


def test_multistep_is_that_of_torch() -> None:
    settings = ONE_TIMES.model_copy(update={"warmup_steps": 7, "milestones": (11, 20), "decay_factor": 0.3})
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.02)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3, total_iters=7),
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [11, 20], gamma=0.3),
    ]
    for step in range(30):
        assert learning_rate(step, 30, settings) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_the_learning_rate_grows_with_the_global_batch_and_the_steps_shrink() -> None:
    scaled = scale_to_batch(ONE_TIMES, 64)
    assert (scaled.learning_rate, scaled.warmup_steps, scaled.milestones) == (0.08, 250, (15000, 20000))
    smaller = scale_to_batch(ONE_TIMES, 2)
    assert (smaller.learning_rate, smaller.warmup_steps, smaller.milestones) == (0.0025, 8000, (480000, 640000))
    assert scale_to_batch(ONE_TIMES, 16) == ONE_TIMES
    as_configured = ONE_TIMES.model_copy(update={"reference_batch_size": None})
    assert scale_to_batch(as_configured, 64) == as_configured


def test_milestones_that_fall_together_are_refused() -> None:
    settings = OptimSettings(schedule="multistep", milestones=(10, 20), reference_batch_size=1)
    assert scale_to_batch(settings, 5).milestones == (2, 4)
    for size in (32, 64):  # (0, 1) and (0, 0)
        with pytest.raises(UserError, match=rf"^optim\.milestones \[10, 20\] come to .* at {size} images a step"):
            scale_to_batch(settings, size)


def test_the_scaling_is_explained() -> None:
    line = explain_scaling(ONE_TIMES, 64)
    assert line.startswith("learning rate 0.02 x 64 / 16 = 0.08 (linear with the global batch")
    assert line.endswith("warm-up 1000 x 16 / 64 = 250 steps; milestones [60000, 80000] -> [15000, 20000]")
    assert explain_scaling(ONE_TIMES, 16).startswith("learning rate 0.02 x 16 / 16 = 0.02 (")
    assert explain_scaling(COSINE, 64) == "learning rate 0.02 as configured"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "multistep"}, "multistep needs some"),
        ({"milestones": (5, 9)}, "multistep needs some"),
        ({"schedule": "multistep", "milestones": (9, 5)}, "have to rise"),
        ({"name": "adamw", "nesterov": True}, "nesterov needs name sgd"),
    ],
)
def test_settings_that_contradict_each_other(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimSettings.model_validate(values)


def test_biases_are_decayed_where_asked_and_norms_never() -> None:
    model = small()
    decayed, others = build_optimizer(model, OptimSettings(decay_biases=True)).param_groups
    names = {parameter: key for key, parameter in model.named_parameters()}
    assert [names[parameter] for parameter in decayed["params"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [names[parameter] for parameter in others["params"]] == ["1.weight", "1.bias"]


def test_nesterov_step_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    settings = OptimSettings(learning_rate=0.5, momentum=0.5, nesterov=True, weight_decay=0.0)
    optimizer = build_optimizer(model, settings)
    for _ in range(2):
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
    # Velocities 1 and 1.5; steps 1 + 0.5 * 1 = 1.5 and 1 + 0.5 * 1.5 = 1.75: 2 - 0.75 - 0.875.
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.375]]))


def test_learning_rate_is_that_of_every_group() -> None:
    optimizer = build_optimizer(small(), OptimSettings())
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
