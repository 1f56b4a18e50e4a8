"""Region proposal network (Ren et al. 2015, section 3.1): objectness and box deltas for every anchor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.config import RpnConfig


class RegionProposalNetwork(nn.Module):
    """One small head that slides over all pyramid levels."""

    def __init__(self, in_channels: int, config: RpnConfig, anchors_per_cell: int, anchor_stride: int) -> None:
        super().__init__()
        widths = [in_channels] + [config.channels] * config.num_convolutions
        strides = [anchor_stride] + [1] * (config.num_convolutions - 1)
        self.shared = nn.ModuleList(
            [
                nn.Conv2d(width, config.channels, 3, stride=stride, padding=1)
                for width, stride in zip(widths[:-1], strides, strict=True)
            ]
        )
        self.logits_per_anchor = 2 if config.objectness == "softmax" else 1
        self.class_logits = nn.Conv2d(config.channels, self.logits_per_anchor * anchors_per_cell, 1)
        self.box_deltas = nn.Conv2d(config.channels, 4 * anchors_per_cell, 1)
        for layer in (*self.shared, self.class_logits, self.box_deltas):
            nn.init.normal_(layer.weight, std=0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Score and move the anchors.

        Args:
            pyramid: P2..P6, each (B, channels, h, w).

        Returns:
            (B, A, 2) float32 logits of background and object, and (B, A, 4) float32 deltas in units of `delta_scale`;
            A in the order of `pyramid_anchors`: level, row, column, ratio. With one logit an anchor that of background
            is 0: the softmax of the two is then the sigmoid of the one.
        """
        logits, deltas = [], []
        for level in pyramid:
            hidden = level
            for convolution in self.shared:
                hidden = torch.relu(convolution(hidden))
            logits.append(_by_anchor(self.class_logits(hidden), self.logits_per_anchor))
            deltas.append(_by_anchor(self.box_deltas(hidden), 4))
        class_logits = torch.cat(logits, dim=1)
        if self.logits_per_anchor == 1:
            class_logits = torch.cat([torch.zeros_like(class_logits), class_logits], dim=2)
        return class_logits, torch.cat(deltas, dim=1)


def _by_anchor(x: Tensor, numbers: int) -> Tensor:
    """(B, anchors * numbers, h, w) to (B, h * w * anchors, numbers) float32."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, numbers).float()
