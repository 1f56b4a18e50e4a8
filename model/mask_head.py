"""Mask head: one mask a class for a region (Mask R-CNN, section 3 and figure 4)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from model.config import MaskHeadConfig, NormConfig
from model.norm import apply_norm, make_norm


class MaskHead(nn.Module):
    """3x3 convolutions with norm and ReLU, a 2x2 transposed convolution, a 1x1 to one logit a class."""

    def __init__(self, in_channels: int, num_classes: int, config: MaskHeadConfig, norms: NormConfig) -> None:
        super().__init__()
        widths = [in_channels] + [config.channels] * config.num_convolutions
        has_bias = config.norm == "none" or norms.convolution_bias
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(a, b, 3, padding=1, bias=has_bias) for a, b in itertools.pairwise(widths)]
        )
        self.norms = nn.ModuleList([make_norm(config.norm, config.channels, norms.epsilon) for _ in self.convolutions])
        self.upsampling = nn.ConvTranspose2d(config.channels, config.channels, 2, stride=2)
        self.mask_logits = nn.Conv2d(config.channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_logits.weight, std=0.001)

    def forward(self, regions: Tensor, classes: Tensor, valid: Tensor | None = None) -> Tensor:
        """Mask logits of each region for its class.

        Args:
            regions: (N, channels, pool_size, pool_size) from ROIAlign; N may be 0.
            classes: (N,) int64, the class whose mask is wanted: the true one in training, else the predicted one.
            valid: (N,) bool rows that count in norm statistics, or None for all.

        Returns:
            (N, 2 * pool_size, 2 * pool_size) float32.
        """
        x = regions
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = torch.relu(apply_norm(norm, convolution(x), valid))
        x = torch.relu(self.upsampling(x))
        # Of the 1x1 convolution to num_classes maps the one that is wanted: a product with the class's own weights.
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, cells, channels)
        assert self.mask_logits.bias is not None
        weight, bias = self.mask_logits.weight.flatten(1)[classes], self.mask_logits.bias[classes]
        logits = torch.bmm(cells, weight[:, :, None])[:, :, 0] + bias[:, None]
        return logits.reshape(-1, *x.shape[2:]).float()
