"""One step of training: clipping, schedule, and the same gradient for one worker and for two."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from model.config import LossConfig
from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from pipeline.config import ExperimentConfig
from pipeline.optim import build_optimizer, learning_rate
from pipeline.training import (
    STEP_METRICS,
    NonFiniteLossError,
    autocast_dtype,
    check_finite,
    total_loss,
    train_step,
)
from tests.pipeline.small import small_batch, small_config

TOTAL_STEPS = 10


def make_model(config: ExperimentConfig) -> MaskRCNN:
    torch.manual_seed(0)
    return MaskRCNN(config.model, num_classes=4).train()


def test_a_step_returns_the_losses_and_moves_the_weights() -> None:
    config = small_config()
    model = make_model(config)
    before = model.box_head.class_logits.weight.clone()
    values = train_step(model, small_batch(4), build_optimizer(model, config.optim), config, 0, TOTAL_STEPS, None)
    metrics = dict(zip(STEP_METRICS, values.tolist(), strict=True))
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in LOSS_NAMES), rel=1e-5)
    assert metrics["gradient_norm"] > 0
    assert not torch.equal(before, model.box_head.class_logits.weight)


def test_weights_of_losses_enter_the_sum_alone() -> None:
    losses = {name: torch.tensor(float(index + 1)) for index, name in enumerate(LOSS_NAMES)}
    weights = LossConfig(rpn_class_loss=0, mrcnn_mask_loss=2)
    assert total_loss(losses, weights).item() == 2 + 3 + 4 + 2 * 5


class _Quadratic(nn.Module):
    """A stand-in whose gradient is known: the loss is 3 a + 4 b."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 2))

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        del batch
        zero = 0.0 * self.weight.sum()
        first = (self.weight * torch.tensor([[3.0, 4.0]])).sum()
        return {name: first if name == "rpn_class_loss" else zero for name in LOSS_NAMES}


def test_the_gradient_is_clipped_by_its_global_norm_and_scaled_by_the_schedule() -> None:
    config = small_config(optim={"name": "sgd", "learning_rate": 0.1, "gradient_clip_norm": 1.0, "warmup_steps": 0})
    model = _Quadratic()
    values = train_step(model, small_batch(1), build_optimizer(model, config.optim), config, 0, TOTAL_STEPS, None)
    assert dict(zip(STEP_METRICS, values.tolist(), strict=True))["gradient_norm"] == pytest.approx(5.0)
    rate = learning_rate(0, TOTAL_STEPS, config.optim)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[-0.6 * rate, -0.8 * rate]]))


def _worker(rank: int, folder: str, port_file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    config = small_config()
    model = make_model(config)
    parallel = nn.parallel.DistributedDataParallel(model)
    batch = small_batch(4)
    part = small_batch(4, part=slice(2 * rank, 2 * rank + 2))
    assert batch.images.shape[0] == 2 * part.images.shape[0]
    total_loss(parallel(part), config.model.losses).backward()  # type: ignore[no-untyped-call]
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters()}, os.path.join(folder, "gradients.pt"))
    torch.distributed.destroy_process_group()


def test_two_workers_give_the_gradient_of_one(tmp_path: Path) -> None:
    spawn(_worker, args=(str(tmp_path), str(tmp_path / "store")), nprocs=2)  # type: ignore[no-untyped-call]
    of_two = torch.load(tmp_path / "gradients.pt", weights_only=True)
    config = small_config()
    model = make_model(config)
    total_loss(model(small_batch(4)), config.model.losses).backward()  # type: ignore[no-untyped-call]
    of_one = {name: p.grad for name, p in model.named_parameters()}
    assert of_one.keys() == of_two.keys()
    for name, gradient in of_one.items():
        torch.testing.assert_close(of_two[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_number_that_is_not_finite_names_itself() -> None:
    check_finite([1.0] * len(STEP_METRICS), step=7)
    values = [1.0] * len(STEP_METRICS)
    values[STEP_METRICS.index("mrcnn_bbox_loss")] = math.nan
    values[STEP_METRICS.index("gradient_norm")] = math.inf
    with pytest.raises(NonFiniteLossError, match=r"step 7: mrcnn_bbox_loss = nan, gradient_norm = inf; lower optim"):
        check_finite(values, step=7)


def test_precision_by_name() -> None:
    assert autocast_dtype("fp32", "cpu") is None
    assert autocast_dtype("bf16", "cpu") is torch.bfloat16
    assert autocast_dtype("auto", "cpu") in (None, torch.bfloat16)


def test_bf16_gives_about_the_losses_of_fp32() -> None:
    config = small_config()
    results = []
    for dtype in (None, torch.bfloat16):
        model = make_model(config)
        values = train_step(model, small_batch(4), build_optimizer(model, config.optim), config, 0, TOTAL_STEPS, dtype)
        results.append(values)
    torch.testing.assert_close(results[0][:6], results[1][:6], rtol=0.1, atol=0.05)
