"""Leaves out the update of a step whose gradient is not finite, without the host waiting for the device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class UpdateGuard:
    """Of one worker; all workers have the same gradient after its exchange, so they leave out the same steps."""

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        """Nothing is left out yet.

        Args:
            policy: "skip" leaves out the bad steps alone, and takes back what their forward passes did to the
                statistics of norms; "stop" leaves out everything from the first bad step on, so that the weights stay
                those that it saw, until the host notices.
        """
        self._policy = policy
        self._shut: Tensor | None = None
        self._buffers: list[Tensor] = []

    def before_forward(self, model: nn.Module) -> None:
        """Remember the statistics of norms, where they may have to be taken back."""
        self._buffers = [buffer.clone() for buffer in model.buffers()] if self._policy == "skip" else []

    def before_update(self, model: nn.Module, optimizer: torch.optim.Optimizer, gradient_norm: Tensor) -> None:
        """Have the optimiser's fused kernel change nothing if the step is bad.

        Args:
            model: its buffers are put back.
            optimizer: fused.
            gradient_norm: () of the whole gradient.
        """
        bad = (~torch.isfinite(gradient_norm)).float()
        if self._policy == "stop":
            bad = bad if self._shut is None else torch.maximum(bad, self._shut)
            self._shut = bad
        self._take_back_statistics(model, bad.bool())
        # What torch.amp.GradScaler gives a fused optimiser: no scale, and whether to leave the step out.
        optimizer.grad_scale, optimizer.found_inf = None, bad  # type: ignore[attr-defined]

    def after_overflow(self, model: nn.Module, gradient_norm: Tensor) -> None:
        """In fp16 the scaler leaves the update out; what the forward passes did to the statistics is left to take back.

        Args:
            model: its buffers are put back if the step is bad.
            gradient_norm: () of the whole gradient, unscaled.
        """
        self._take_back_statistics(model, ~torch.isfinite(gradient_norm))

    def _take_back_statistics(self, model: nn.Module, bad: Tensor) -> None:
        for buffer, value in zip(model.buffers(), self._buffers, strict=False):
            buffer.copy_(torch.where(bad, value, buffer))
