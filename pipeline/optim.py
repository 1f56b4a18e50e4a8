"""Optimiser and learning rate; the schedule is a function of the step, so there is no state of it to save."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config import OptimSettings

WARMUP_START = 1e-3
COSINE_END = 1e-2


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """SGD or AdamW over all parameters that learn; norms and biases (one-dimensional) are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def learning_rate(step: int, total_steps: int, settings: OptimSettings) -> float:
    """Learning rate of a step.

    Args:
        step: 0 is the first.
        total_steps: of the whole training; cosine comes down to `COSINE_END` of the peak at its last step.
        settings: peak, warm-up, schedule.
    """
    if step < settings.warmup_steps:
        progress = (step + 1) / settings.warmup_steps
        return settings.learning_rate * (WARMUP_START + (1 - WARMUP_START) * progress)
    if settings.schedule == "constant":
        return settings.learning_rate
    span = max(1, total_steps - 1 - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    factor = COSINE_END + (1 - COSINE_END) * 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Use this learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value
