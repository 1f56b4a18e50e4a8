"""Feature pyramid network (Lin et al. 2016, arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import FpnConfig, NormConfig
from model.norm import make_norm
from model.products import Conv2d


class FeaturePyramid(nn.Module):
    """C2..C5 to P2..P6, all with the same number of channels."""

    def __init__(self, in_channels: Sequence[int], config: FpnConfig, norms: NormConfig) -> None:
        super().__init__()
        self.laterals = nn.ModuleList([_convolution(c, config, norms, kernel_size=1) for c in in_channels])
        self.smoothing = nn.ModuleList(
            [_convolution(config.channels, config, norms, kernel_size=3) for _ in in_channels]
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """C2..C5, each half the side of the one before, to P2..P6 with strides 4, 8, 16, 32, 64."""
        merged: Tensor = self.laterals[-1](features[-1])
        pyramid = [self.smoothing[-1](merged)]
        for lateral, smooth, feature in zip(
            reversed(self.laterals[:-1]), reversed(self.smoothing[:-1]), reversed(features[:-1]), strict=True
        ):
            merged = lateral(feature) + F.interpolate(merged, scale_factor=2.0, mode="nearest")
            pyramid.insert(0, smooth(merged))
        pyramid.append(F.max_pool2d(pyramid[-1], kernel_size=1, stride=2))  # P6
        return pyramid


def _convolution(in_channels: int, config: FpnConfig, norms: NormConfig, kernel_size: int) -> nn.Module:
    """A convolution that keeps the size, and its norm where there is one."""
    has_bias = config.norm == "none" or norms.convolution_bias
    convolution = Conv2d(in_channels, config.channels, kernel_size, padding=kernel_size // 2, bias=has_bias)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    if config.norm == "none":
        return convolution
    return nn.Sequential(convolution, make_norm(config.norm, config.channels, norms.epsilon))
