"""Norm layers of the heads; rows that are padding never enter a statistic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from model import products
from model.config import NormKind


class RowBatchNorm(nn.BatchNorm2d):
    """Batch norm over (N, C, H, W) where only some of the N rows are real.

    With fewer than two values a channel (no regions in the batch) it normalises by its running statistics,
    where the stock layer raises an error.
    """

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            x: (N, C, H, W); N may be 0.
            valid: (N,) bool, rows that count in the statistics, or None for all of them.
        """
        if not self.training or (valid is None and x.numel() < 2 * self.num_features):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        if valid is None:
            return super().forward(x)
        return self._masked(x, valid)

    def _masked(self, x: Tensor, valid: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        values = x.float()
        weights = valid.to(values.dtype)[:, None, None, None]
        count = weights.sum() * (x.shape[2] * x.shape[3])
        mean = (values * weights).sum(dim=(0, 2, 3)) / count.clamp(min=1)
        centred = values - mean[:, None, None]
        variance = (centred.square() * weights).sum(dim=(0, 2, 3)) / count.clamp(min=1)
        enough = count >= 2
        with torch.no_grad():
            # The running variance is the unbiased one, as in the stock layer.
            unbiased = variance * count / (count - 1).clamp(min=1)
            step = torch.where(enough, self.momentum, 0.0)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), step.to(self.running_mean.dtype))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), step.to(self.running_var.dtype))
        mean = torch.where(enough, mean, self.running_mean)
        variance = torch.where(enough, variance, self.running_var)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((values - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class FrozenStatisticsNorm(nn.BatchNorm2d):
    """Normalises by its stored mean and variance, also in training; scale and shift learn (the original's norm)."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), N may be 0."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FrozenNorm(FrozenBatchNorm2d):  # type: ignore[misc]
    """torchvision's frozen norm, which can also be folded into the convolution before it."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps=eps)
        self._folded: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(channels,) each: the norm of x is x * scale + shift. Kept until a buffer changes."""
        if torch.compiler.is_compiling():
            return self._scale_and_shift()
        state = tuple((buffer.data_ptr(), buffer._version) for buffer in self.buffers())
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, *self._scale_and_shift())
        return self._folded[1:]

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


def convolve(convolution: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """A convolution and the norm after it; inside autocast a frozen norm becomes part of the weight.

    Its float32 buffers would turn the whole map into float32. In float32 it would save little and round differently.
    """
    if not isinstance(norm, FrozenNorm) or not torch.is_autocast_enabled(x.device.type):
        y: Tensor = norm(products.convolve(convolution, x))
        return y
    scale, shift = norm.scale_and_shift()
    if convolution.bias is not None:
        shift = shift + scale * convolution.bias
    weight = convolution.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, shift, convolution.stride, convolution.padding)


def make_norm(kind: NormKind, channels: int, epsilon: float = 1e-5) -> nn.Module:
    """Norm layer for (N, channels, H, W) by its configuration name."""
    if kind == "batch":
        return RowBatchNorm(channels, eps=epsilon)
    if kind == "frozen":
        return FrozenNorm(channels, epsilon)
    if kind == "frozen_statistics":
        return FrozenStatisticsNorm(channels, eps=epsilon)
    if kind == "group":
        # At least eight channels a group: on a 1x1 map a channel alone in its group is always normalised to zero.
        groups = next((groups for groups in (32, 16, 8, 4, 2) if channels % (8 * groups) == 0), 1)
        return nn.GroupNorm(groups, channels, eps=epsilon)
    return nn.Identity()


def apply_norm(norm: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """Run a norm; only batch norm needs to know which rows are real."""
    y: Tensor = norm(x, valid) if isinstance(norm, RowBatchNorm) else norm(x)
    return y
