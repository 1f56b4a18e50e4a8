"""One step of training, without Ray: what a worker does between two batches, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from model.config import LossConfig
from model.losses import LOSS_NAMES
from model.structures import Batch
from pipeline.config import ExperimentConfig
from pipeline.optim import learning_rate, scale_to_batch, set_learning_rate
from pipeline.update_guard import UpdateGuard

STEP_METRICS = ("loss", *LOSS_NAMES, "gradient_norm")
"""Order of the numbers that `train_step` returns."""


class NonFiniteLossError(RuntimeError):
    """A loss or gradient is NaN or infinite."""


def autocast_dtype(precision: str, device_type: str) -> torch.dtype | None:
    """Type that the forward pass computes in, None for fp32.

    Args:
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the processor has instructions for it, on other GPUs
            fp16, on other CPUs fp32; there the others are slow.
        device_type: "cpu" or "cuda".
    """
    if precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Younger than the oldest torch that this file runs on; without it the safe answer is fp32.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else None


def gradient_scaler(dtype: torch.dtype | None, device_type: str, compression: str = "none") -> torch.amp.GradScaler:
    """Scale of the loss that keeps small gradients from vanishing in fp16; without effect where there is no fp16.

    Args:
        dtype: of the forward pass, see `autocast_dtype`.
        device_type: "cpu" or "cuda".
        compression: see `compress_gradients`; what is sent in fp16 can vanish or overflow on the way just as well.
    """
    return torch.amp.GradScaler(device_type, enabled=dtype is torch.float16 or compression == "fp16")


def compress_gradients(model: nn.Module, compression: str) -> None:
    """Make the workers of a DistributedDataParallel send gradients in half the bytes; call it before the first step.

    Args:
        model: alone it stays as it is.
        compression: "none", "bf16" or "fp16".
    """
    if isinstance(model, DistributedDataParallel) and compression != "none":
        hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
        model.register_comm_hook(None, hooks[compression])


def data_parallel_options(accumulation_steps: int) -> dict[str, Any]:
    """How DistributedDataParallel exchanges gradients.

    They are views into the buckets that are sent, so that nothing is copied and no second 176 MB (ResNet-50) are held.
    Every parameter takes part in every step (`MaskRCNN.forward`), so the graph is static; not so where some backward
    passes of a step do not exchange.

    Args:
        accumulation_steps: backward passes a step.
    """
    return {"gradient_as_bucket_view": True, "static_graph": accumulation_steps == 1}


def autocast(dtype: torch.dtype | None, device_type: str) -> torch.autocast:
    """Context of a forward pass in this type; None switches it off."""
    return torch.autocast(device_type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def total_loss(losses: Mapping[str, Tensor], weights: LossConfig) -> Tensor:
    """Weighted sum of the five losses."""
    return torch.stack([losses[name] * getattr(weights, name) for name in LOSS_NAMES]).sum()


def train_step(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    config: ExperimentConfig,
    step: int,
    total_steps: int,
    dtype: torch.dtype | None,
    scaler: torch.amp.GradScaler | None = None,
    guard: UpdateGuard | None = None,
) -> Tensor:
    """Forward and backward for each batch, then clip and update once.

    Args:
        model: `MaskRCNN`, alone or in DistributedDataParallel, in training mode.
        batches: `train.accumulation_steps` of the same number of images, on the model's device; the gradient is that of
            all their images together.
        optimizer: from `build_optimizer`.
        config: loss weights, schedule, clipping.
        step: number of this step.
        total_steps: of the whole training.
        dtype: see `autocast_dtype`.
        scaler: see `gradient_scaler`; fp16 needs one. A step whose gradient overflows is left out, and the scale falls.
        guard: leaves out steps whose gradient is not finite; in fp16 the scaler does so in any case.

    Returns:
        (7,) float32 on the device, in the order of `STEP_METRICS`: the sum, the five losses without weights, and the
        norm of the gradient before clipping, 0 for a step that was left out. Not fetched, so that a GPU need not be
        waited for.
    """
    scaler = scaler or gradient_scaler(None, batches[0].images.device.type)
    settings = scale_to_batch(config.optim, config.global_batch_size)
    set_learning_rate(optimizer, learning_rate(step, total_steps, settings))
    optimizer.zero_grad(set_to_none=True)
    if guard is not None:
        guard.before_forward(model)
    values = accumulate_gradients(model, batches, config.model.losses, dtype, scaler)
    scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradient_norm = torch.nn.utils.get_total_norm(gradients)
    if config.optim.gradient_clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.gradient_clip_norm, gradient_norm)
    if guard is not None and scaler.is_enabled():
        guard.after_overflow(model, gradient_norm)
    elif guard is not None:
        guard.before_update(model, optimizer, gradient_norm)
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled():
        gradient_norm = gradient_norm.nan_to_num(nan=0.0, posinf=0.0)
    return torch.cat([values, gradient_norm.detach()[None]])


def accumulate_gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    weights: LossConfig,
    dtype: torch.dtype | None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Add the gradient of the mean over all images of the batches; workers exchange theirs once, with the last batch.

    With a scaler it is the scaled gradient.

    Returns:
        (6,) float32, the sum and the five losses without weights, averaged over the batches.
    """
    values = torch.zeros(1 + len(LOSS_NAMES), device=batches[0].images.device)
    for index, batch in enumerate(batches):
        waits = isinstance(model, DistributedDataParallel) and index < len(batches) - 1
        with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with autocast(dtype, batch.images.device.type):
                losses = model(batch)
            loss = total_loss(losses, weights)
            part = loss / len(batches)
            (scaler.scale(part) if scaler is not None else part).backward()  # type: ignore[no-untyped-call]
        values += torch.stack([loss.detach(), *(losses[name].detach() for name in LOSS_NAMES)])
    return values / len(batches)


def check_finite(values: Sequence[float], step: int) -> None:
    """Stop a training that has gone astray.

    Args:
        values: of one step, in the order of `STEP_METRICS`.
        step: its number.

    Raises:
        NonFiniteLossError: names the step and every number that is not finite.
    """
    bad = [f"{name} = {value}" for name, value in zip(STEP_METRICS, values, strict=True) if not math.isfinite(value)]
    if bad:
        raise NonFiniteLossError(
            f"step {step}: {', '.join(bad)}; lower optim.learning_rate or optim.gradient_clip_norm, "
            "or lengthen optim.warmup_steps"
        )
