"""Box head: class and box of a region (the original's `fpn_classifier_graph`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BoxHeadConfig
from model.norm import apply_norm, make_norm


class BoxHead(nn.Module):
    """A 7x7 'valid' convolution and a 1x1 one, each with norm and ReLU, then class logits and per-class deltas."""

    def __init__(self, in_channels: int, num_classes: int, config: BoxHeadConfig) -> None:
        super().__init__()
        has_bias = config.norm == "none"
        self.num_classes = num_classes
        self.convolution_1 = nn.Conv2d(in_channels, config.channels, config.pool_size, bias=has_bias)
        self.norm_1 = make_norm(config.norm, config.channels)
        self.convolution_2 = nn.Conv2d(config.channels, config.channels, 1, bias=has_bias)
        self.norm_2 = make_norm(config.norm, config.channels)
        self.class_logits = nn.Linear(config.channels, num_classes)
        self.box_deltas = nn.Linear(config.channels, 4 * num_classes)
        for convolution in (self.convolution_1, self.convolution_2):
            nn.init.kaiming_uniform_(convolution.weight, nonlinearity="relu")
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        for predictor in (self.class_logits, self.box_deltas):
            nn.init.zeros_(predictor.bias)

    def forward(self, regions: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classify and refine.

        Args:
            regions: (N, channels, pool_size, pool_size) from ROIAlign; N may be 0.
            valid: (N,) bool rows that count in norm statistics, or None for all.

        Returns:
            (N, num_classes) float32 logits and (N, num_classes, 4) float32 deltas in units of `delta_scale`.
        """
        x = torch.relu(apply_norm(self.norm_1, _full_convolution(self.convolution_1, regions), valid))
        x = torch.relu(apply_norm(self.norm_2, _full_convolution(self.convolution_2, x), valid)).flatten(1)
        deltas: Tensor = self.box_deltas(x)
        logits: Tensor = self.class_logits(x)
        return logits.float(), deltas.float().reshape(-1, self.num_classes, 4)


def _full_convolution(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose kernel covers its whole input is one matrix product, which runs several times faster."""
    y = F.linear(x.flatten(1), convolution.weight.flatten(1), convolution.bias)
    return y[:, :, None, None]
