"""Feature pyramid network (Lin et al. 2016, arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """C2..C5 to P2..P6, all with the same number of channels."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList([nn.Conv2d(c, channels, 1) for c in in_channels])
        self.smoothing = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

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
