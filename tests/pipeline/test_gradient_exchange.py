"""Three workers: sums rank by rank give the same bits after a resume; nobody waits for objects that are not there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from model.losses import LOSS_NAMES
from model.mask_rcnn import MaskRCNN
from model.structures import Batch
from pipeline.gradient_exchange import adds_in_fixed_order, exchange_gradients
from pipeline.optim import build_optimizer
from pipeline.training import STEP_METRICS, train_step
from tests.pipeline.small import small_batch, small_config

WORKERS, STEPS, RESUMED_AT = 3, 3, 1
CONFIG = small_config(optim={"name": "sgd", "learning_rate": 0.01, "warmup_steps": 0})
Saved = dict[str, Any]


def without_objects(batch: Batch) -> Batch:
    return replace(batch, classes=torch.zeros_like(batch.classes))


def batch_of(step: int, rank: int) -> Batch:
    image = 1 + step * WORKERS + rank  # the first one shows no object
    return small_batch(image + 1, slice(image, image + 1))


def train(first: int, last: int, state: Saved | None, fixed_order: bool, rank: int) -> Saved:
    torch.manual_seed(0)
    model = MaskRCNN(CONFIG.model, num_classes=4).train()
    optimizer = build_optimizer(model, CONFIG.optim)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    # Small groups, so that their new order after the first step matters.
    parallel = DistributedDataParallel(model, bucket_cap_mb=1)
    exchange_gradients(parallel, "none", fixed_order)
    for step in range(first, last):
        train_step(parallel, [batch_of(step, rank)], optimizer, CONFIG, step, STEPS, None)
    # Copied: the training goes on with its own.
    return {
        "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }


def mean_of_gradients(rank: int) -> tuple[Tensor, Tensor]:
    """By the hook, and of all workers' own gradients added up by hand."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 200)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(rank))
    torch.autograd.backward(layer(x).square().sum())
    assert layer.weight.grad is not None
    own = [torch.empty_like(layer.weight.grad) for _ in range(WORKERS)]
    torch.distributed.all_gather(own, layer.weight.grad)
    layer.zero_grad(set_to_none=True)
    parallel = DistributedDataParallel(layer)
    exchange_gradients(parallel, "none", fixed_order=True)
    torch.autograd.backward(parallel(x).square().sum())
    return layer.weight.grad, (own[0] + own[1] + own[2]) / WORKERS


def steps_without_objects(rank: int) -> Saved:
    """One worker sees none in the first step, nobody in the second; a third step shows that nobody waits."""
    torch.manual_seed(0)
    model = MaskRCNN(CONFIG.model, num_classes=4).train()
    optimizer = build_optimizer(model, CONFIG.optim)
    parallel = DistributedDataParallel(model)
    found: Saved = {}
    for step, empty in enumerate(([0], [0, 1, 2], [])):
        batch = batch_of(step, rank)
        batch = without_objects(batch) if rank in empty else batch
        values = train_step(parallel, [batch], optimizer, CONFIG, step, STEPS, None)
        found[f"losses {step}"] = values
        found[f"without gradient {step}"] = [name for name, p in model.named_parameters() if p.grad is None]
    return found


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORKERS)
    saved: Saved = {"means": mean_of_gradients(rank), "empty": steps_without_objects(rank)}
    through = train(0, STEPS, None, True, rank)
    half = train(0, RESUMED_AT, None, True, rank)
    saved |= {"through": through["model"], "resumed": train(RESUMED_AT, STEPS, half, True, rank)["model"]}
    torch.save(saved, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(folder: Path) -> list[Saved]:
    spawn(_worker, args=(str(folder),), nprocs=WORKERS)  # type: ignore[no-untyped-call]
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(WORKERS)]


def test_the_mean_is_summed_rank_by_rank(saved: list[Saved]) -> None:
    for rank in range(WORKERS):
        by_hook, by_hand = saved[rank]["means"]
        assert torch.equal(by_hook, by_hand)
        assert torch.equal(by_hook, saved[0]["means"][0])


def test_resumed_equals_uninterrupted_to_the_bit(saved: list[Saved]) -> None:
    for rank in range(WORKERS):
        for name, tensor in saved[0]["through"].items():
            assert torch.equal(saved[rank]["through"][name], tensor) or "running" in name, name
            assert torch.equal(saved[rank]["resumed"][name], saved[rank]["through"][name]), name


def test_without_objects_losses_are_zero_and_every_parameter_has_a_gradient(saved: list[Saved]) -> None:
    object_losses = ("rpn_bbox_loss", "mrcnn_bbox_loss", "mrcnn_mask_loss")
    for rank in range(WORKERS):
        found = saved[rank]["empty"]
        for step, is_empty in enumerate((rank == 0, True, False)):
            losses = dict(zip(STEP_METRICS, found[f"losses {step}"].tolist(), strict=True))
            assert found[f"without gradient {step}"] == []
            assert all(losses[name] == 0.0 for name in object_losses) == is_empty, (rank, step, losses)
            assert all(losses[name] >= 0.0 for name in LOSS_NAMES)
            assert losses["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("wanted", "device", "workers", "expected"),
    [
        (None, "cpu", 3, True), (None, "cpu", 2, False), (None, "cuda", 8, False),
        (True, "cuda", 8, True), (True, "cpu", 2, False), (False, "cpu", 3, False),
    ],
)  # fmt: skip
def test_the_order_is_fixed_where_it_matters(wanted: bool | None, device: str, workers: int, expected: bool) -> None:
    config = small_config(train={"deterministic": wanted})
    assert adds_in_fixed_order(config, device, workers) == expected
