"""Exponential moving average of the weights, which is evaluated and predicted with in place of the latest ones."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def ema_decay(updates: int, decay: float) -> float:
    """Decay of an update: `(1 + n) / (10 + n)` at first, so that the random start is soon forgotten, then `decay`.

    Args:
        updates: n, how many came before it.
        decay: of the configuration.
    """
    return min(decay, (1 + updates) / (10 + updates))


def averaged_copy(model: Model) -> Model:
    """A model of its own that starts at the present weights."""
    averaged = copy.deepcopy(model)
    return averaged.requires_grad_(False)


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, updates: int, decay: float) -> None:
    """`average = d * average + (1 - d) * weight`; norm statistics too, what is not a fraction is copied.

    Args:
        averaged: from `averaged_copy`; changed.
        model: after its optimiser step.
        updates: how many came before, which is the number of the step.
        decay: largest d, see `ema_decay`.
    """
    d = ema_decay(updates, decay)
    averages, values = [], []
    for average, value in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if average.is_floating_point():
            averages.append(average)
            values.append(value)
        else:
            average.copy_(value)
    torch._foreach_lerp_(averages, values, 1 - d)
