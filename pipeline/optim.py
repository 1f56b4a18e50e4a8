"""Optimiser and learning rate; the schedule is a function of the step, so there is no state of it to save."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from pipeline.config import OptimSettings
from pipeline.errors import UserError

COSINE_END = 1e-2
_NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters that learn; norms are not decayed, and biases only where the settings say so."""
    decayed: list[nn.Parameter] = []
    not_decayed: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                keep = isinstance(module, _NORMS) or (name.endswith("bias") and not settings.decay_biases)
                (not_decayed if keep else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    optimizer = torch.optim.SGD(
        groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.nesterov, fused=True
    )
    if settings.momentum:
        # Where fp16 leaves out the very first step, the fused kernel would go on from memory that nobody has written.
        for parameter in (*decayed, *not_decayed):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def scale_to_batch(settings: OptimSettings, global_batch_size: int) -> OptimSettings:
    """The settings for this global batch: the learning rate grows with it and the steps shrink (Goyal et al. 2017).

    Args:
        settings: as configured; without `reference_batch_size` they are taken as they are.
        global_batch_size: images a step over all workers.

    Raises:
        UserError: two milestones would fall together.
    """
    if settings.reference_batch_size is None or settings.reference_batch_size == global_batch_size:
        return settings
    factor = global_batch_size / settings.reference_batch_size
    milestones = tuple(round(milestone / factor) for milestone in settings.milestones)
    if settings.schedule == "multistep" and not all(a < b for a, b in itertools.pairwise((0, *milestones))):
        raise UserError(
            f"optim.milestones {list(settings.milestones)} come to {list(milestones)} at {global_batch_size} images a "
            f"step (optim.reference_batch_size {settings.reference_batch_size}): they have to rise"
        )
    return settings.model_copy(
        update={
            "learning_rate": settings.learning_rate * factor,
            "warmup_steps": round(settings.warmup_steps / factor),
            "milestones": milestones,
        }
    )


def explain_scaling(settings: OptimSettings, global_batch_size: int) -> str:
    """Where the learning rate of this training comes from, in one line."""
    scaled = scale_to_batch(settings, global_batch_size)
    if settings.reference_batch_size is None:
        return f"learning rate {settings.learning_rate:g} as configured"
    reference = settings.reference_batch_size
    line = (
        f"learning rate {settings.learning_rate:g} x {global_batch_size} / {reference} = {scaled.learning_rate:g} "
        "(linear with the global batch, so that an epoch moves the weights about as far)"
    )
    if scaled is not settings:
        line += f"; warm-up {settings.warmup_steps} x {reference} / {global_batch_size} = {scaled.warmup_steps} steps"
    if scaled is not settings and settings.schedule == "multistep":
        line += f"; milestones {list(settings.milestones)} -> {list(scaled.milestones)}"
    return line


def learning_rate(step: int, total_steps: int, settings: OptimSettings) -> float:
    """Learning rate of a step.

    Warm-up rises linearly from `warmup_factor` at step 0 to one at step `warmup_steps`, on top of the schedule.

    Args:
        step: 0 is the first.
        total_steps: of the whole training; cosine comes down to `COSINE_END` of the peak at its last step.
        settings: peak, warm-up, schedule, from `scale_to_batch`.
    """
    peak = settings.learning_rate * _warmup(step, settings)
    if settings.schedule == "constant":
        return peak
    if settings.schedule == "multistep":
        return peak * settings.decay_factor ** sum(step >= milestone for milestone in settings.milestones)
    span = max(1, total_steps - 1 - settings.warmup_steps)
    progress = min(1.0, max(0, step - settings.warmup_steps) / span)
    return peak * (COSINE_END + (1 - COSINE_END) * 0.5 * (1 + math.cos(math.pi * progress)))


def _warmup(step: int, settings: OptimSettings) -> float:
    if step >= settings.warmup_steps:
        return 1.0
    return settings.warmup_factor + (1 - settings.warmup_factor) * step / settings.warmup_steps


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use this learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value
