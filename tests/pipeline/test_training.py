"""One step of training: clipping, schedule, and the same gradient however the images are shared out."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.multiprocessing.spawn import spawn

from model.config import LossConfig
from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from pipeline.config import ExperimentConfig
from pipeline.optim import build_optimizer, learning_rate
from pipeline.training import (
    STEP_METRICS,
    NonFiniteLossError,
    accumulate_gradients,
    autocast_dtype,
    check_finite,
    compress_gradients,
    data_parallel_options,
    gradient_scaler,
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
    values = train_step(model, [small_batch(4)], build_optimizer(model, config.optim), config, 0, TOTAL_STEPS, None)
    metrics = dict(zip(STEP_METRICS, values.tolist(), strict=True))
    assert metrics["loss"] == pytest.approx(sum(metrics[name] for name in LOSS_NAMES), rel=1e-5)
    assert metrics["gradient_norm"] > 0
    assert not torch.equal(before, model.box_head.class_logits.weight)


def test_weights_of_losses_enter_the_sum_alone() -> None:
    losses = {name: torch.tensor(float(index + 1)) for index, name in enumerate(LOSS_NAMES)}
    weights = LossConfig(rpn_class_loss=0, mrcnn_mask_loss=2)
    assert total_loss(losses, weights).item() == 2 + 3 + 4 + 2 * 5


class _Quadratic(nn.Module):
    """A stand-in whose gradient is known: the loss is 3 a + 4 b, or a share of it."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 2))
        self.slopes = torch.tensor([[3.0, 4.0]]) * share

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        del batch
        zero = 0.0 * self.weight.sum()
        first = (self.weight * self.slopes).sum()
        return {name: first if name == "rpn_class_loss" else zero for name in LOSS_NAMES}


def test_the_gradient_is_clipped_by_its_global_norm_and_scaled_by_the_schedule() -> None:
    config = small_config(optim={"name": "sgd", "learning_rate": 0.1, "gradient_clip_norm": 1.0, "warmup_steps": 0})
    model = _Quadratic()
    values = train_step(model, [small_batch(1)], build_optimizer(model, config.optim), config, 0, TOTAL_STEPS, None)
    assert dict(zip(STEP_METRICS, values.tolist(), strict=True))["gradient_norm"] == pytest.approx(5.0)
    rate = learning_rate(0, TOTAL_STEPS, config.optim)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[-0.6 * rate, -0.8 * rate]]))


def test_without_a_clip_norm_the_gradient_is_used_as_it_is() -> None:
    config = small_config(optim={"name": "sgd", "learning_rate": 0.1, "gradient_clip_norm": None, "warmup_steps": 0})
    model = _Quadratic()
    batches = [small_batch(1)] * 3  # the mean of three equal gradients
    values = train_step(model, batches, build_optimizer(model, config.optim), config, 0, TOTAL_STEPS, None)
    assert dict(zip(STEP_METRICS, values.tolist(), strict=True))["gradient_norm"] == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[-0.3, -0.4]]))


NUM_IMAGES = 6


def _gradients(model: MaskRCNN) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _worker(rank: int, num_workers: int, passes: int, folder: str) -> None:
    """Gradient of the six images shared out among workers and passes, and what each of them exchanged."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=num_workers)
    config = small_config()
    model = make_model(config)
    parallel = nn.parallel.DistributedDataParallel(model, **data_parallel_options(passes))
    exchanges = []

    def count(
        group: torch.distributed.ProcessGroup,
        bucket: torch.distributed.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        exchanges.append(bucket.index())
        return default_hooks.allreduce_hook(group, bucket)

    parallel.register_comm_hook(torch.distributed.group.WORLD, count)
    size = NUM_IMAGES // num_workers // passes
    starts = [(rank * passes + index) * size for index in range(passes)]
    batches = [small_batch(NUM_IMAGES, part=slice(start, start + size)) for start in starts]
    accumulate_gradients(parallel, batches, config.model.losses, None)
    if rank == 0:
        torch.save(_gradients(model), os.path.join(folder, "gradients.pt"))
        torch.save(exchanges, os.path.join(folder, "exchanges.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def gradient_of_one() -> dict[str, torch.Tensor]:
    """Of all six images in one pass of one process."""
    config = small_config()
    model = make_model(config)
    total_loss(model(small_batch(NUM_IMAGES)), config.model.losses).backward()  # type: ignore[no-untyped-call]
    return _gradients(model)


def assert_same_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every parameter, to a millionth of the norm of the whole."""
    assert found.keys() == expected.keys()
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * whole, name


@pytest.mark.parametrize(("num_workers", "passes"), [(2, 1), (3, 1), (3, 2)])
def test_workers_and_passes_give_the_gradient_of_one(
    num_workers: int, passes: int, tmp_path: Path, gradient_of_one: dict[str, torch.Tensor]
) -> None:
    spawn(_worker, args=(num_workers, passes, str(tmp_path)), nprocs=num_workers)  # type: ignore[no-untyped-call]
    assert_same_gradient(torch.load(tmp_path / "gradients.pt", weights_only=True), gradient_of_one)
    exchanges = torch.load(tmp_path / "exchanges.pt", weights_only=True)
    assert sorted(exchanges) == list(range(len(exchanges)))  # every bucket once, however many passes


@pytest.mark.parametrize("passes", [2, 3, 6])
def test_accumulation_gives_the_gradient_of_one_pass(passes: int, gradient_of_one: dict[str, torch.Tensor]) -> None:
    config = small_config()
    model = make_model(config)
    size = NUM_IMAGES // passes
    parts = [slice(start, start + size) for start in range(0, NUM_IMAGES, size)]
    accumulate_gradients(model, [small_batch(NUM_IMAGES, part) for part in parts], config.model.losses, None)
    assert_same_gradient(_gradients(model), gradient_of_one)


def test_a_number_that_is_not_finite_names_itself() -> None:
    check_finite([1.0] * len(STEP_METRICS), step=7)
    values = [1.0] * len(STEP_METRICS)
    values[STEP_METRICS.index("mrcnn_bbox_loss")] = math.nan
    values[STEP_METRICS.index("gradient_norm")] = math.inf
    with pytest.raises(NonFiniteLossError, match=r"step 7: mrcnn_bbox_loss = nan, gradient_norm = inf; lower optim"):
        check_finite(values, step=7)


def _faint_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = small_config(
        optim={"name": "sgd", "learning_rate": 1.0, "gradient_clip_norm": None, "warmup_steps": 0},
        train={"gradient_compression": "fp16"},
    )
    model = _Quadratic(share=1e-9)
    parallel = nn.parallel.DistributedDataParallel(model, **data_parallel_options(1))
    compress_gradients(parallel, config.train.gradient_compression)
    scaler = gradient_scaler(None, "cpu", config.train.gradient_compression)
    optimizer = build_optimizer(model, config.optim)
    train_step(parallel, [small_batch(1)], optimizer, config, 0, TOTAL_STEPS, None, scaler)
    torch.save(model.weight.detach(), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_what_fp16_cannot_hold_arrives_nevertheless(tmp_path: Path) -> None:
    """A gradient of 1e-9 is zero in fp16, whose smallest number is 6e-8; scaled by 2^16 it comes through."""
    spawn(_faint_worker, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        weight = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(weight, torch.tensor([[-3e-9, -4e-9]]), rtol=1e-2, atol=0)


def _compressing_worker(rank: int, compression: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = small_config()
    model = make_model(config)
    parallel = nn.parallel.DistributedDataParallel(model, **data_parallel_options(1))
    compress_gradients(parallel, compression)
    half = small_batch(NUM_IMAGES, part=slice(rank * 3, rank * 3 + 3))
    accumulate_gradients(parallel, [half], config.model.losses, None)
    torch.save(_gradients(model), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("compression", "precision"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_compressed_gradients_are_those_of_one_to_their_precision(
    compression: str, precision: float, tmp_path: Path, gradient_of_one: dict[str, torch.Tensor]
) -> None:
    spawn(_compressing_worker, args=(compression, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    whole = torch.cat([gradient.flatten() for gradient in gradient_of_one.values()]).norm()
    errors = []
    for name, gradient in gradient_of_one.items():
        assert torch.equal(first[name], second[name])  # or the workers would drift apart
        errors.append((first[name] - gradient).norm() / whole)
    error = torch.stack(errors).norm()
    assert precision / 100 < error < 2 * precision  # rounded, and no more than that


def test_fp16_scales_the_loss_and_leaves_out_a_step_that_overflows() -> None:
    config = small_config(optim={"name": "sgd", "learning_rate": 0.1, "gradient_clip_norm": None, "warmup_steps": 0})
    model = _Quadratic()
    optimizer = build_optimizer(model, config.optim)
    scaler = gradient_scaler(torch.float16, "cpu")
    scale = scaler.get_scale()
    assert scale > 1
    values = train_step(model, [small_batch(1)], optimizer, config, 0, TOTAL_STEPS, None, scaler)
    assert dict(zip(STEP_METRICS, values.tolist(), strict=True))["gradient_norm"] == pytest.approx(5.0)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[-0.3, -0.4]]))  # the gradient of the loss itself
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1e38})
    values = train_step(model, [small_batch(1)], optimizer, config, 0, TOTAL_STEPS, None, scaler)
    check_finite(values.tolist(), step=1)
    assert dict(zip(STEP_METRICS, values.tolist(), strict=True))["gradient_norm"] == 0
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[-0.3, -0.4]]))
    assert scaler.get_scale() == pytest.approx(5e37)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_first_step_that_overflows_leaves_nothing_behind(name: str) -> None:
    """The fused SGD of torch 2.15 then keeps a momentum that was never written."""
    config = small_config(optim={"name": name, "learning_rate": 0.1, "gradient_clip_norm": 1.0, "warmup_steps": 0})
    weights = []
    for scales in ((1e38, 1.0), (1.0,)):
        model = _Quadratic()
        optimizer = build_optimizer(model, config.optim)
        for scale in scales:
            scaler = gradient_scaler(torch.float16, "cpu")
            scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
            train_step(model, [small_batch(1)], optimizer, config, 0, TOTAL_STEPS, None, scaler)
        weights.append(model.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])
    assert weights[0].ne(0).all()


def test_state_of_the_loss_scale_goes_through_json() -> None:
    scaler, again = (gradient_scaler(torch.float16, "cpu") for _ in range(2))
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**11, "_growth_tracker": 7})
    again.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert again.state_dict() == scaler.state_dict()
    assert gradient_scaler(torch.bfloat16, "cpu").state_dict() == {}


@pytest.mark.parametrize(
    ("dtype", "compression", "scales"),
    [
        (torch.float16, "none", True),
        (torch.bfloat16, "fp16", True),  # its smallest gradients would vanish on their way to the other workers
        (None, "fp16", True),
        (None, "bf16", False),
        (torch.bfloat16, "none", False),
    ],
)
def test_the_loss_is_scaled_wherever_a_gradient_is_fp16(
    dtype: torch.dtype | None, compression: str, scales: bool
) -> None:
    assert gradient_scaler(dtype, "cpu", compression).is_enabled() is scales


def test_precision_by_name() -> None:
    assert autocast_dtype("fp16", "cpu") is torch.float16
    assert autocast_dtype("fp32", "cpu") is None
    assert autocast_dtype("bf16", "cpu") is torch.bfloat16
    assert autocast_dtype("auto", "cpu") in (None, torch.bfloat16)


def test_bf16_gives_about_the_losses_of_fp32() -> None:
    config = small_config()
    results = []
    for dtype in (None, torch.bfloat16):
        model = make_model(config)
        values = train_step(
            model, [small_batch(4)], build_optimizer(model, config.optim), config, 0, TOTAL_STEPS, dtype
        )
        results.append(values)
    torch.testing.assert_close(results[0][:6], results[1][:6], rtol=0.1, atol=0.05)
