"""Mask head: one mask a class for a region (Mask R-CNN, section 3 and figure 4)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import MaskHeadConfig, NormConfig
from model.norm import apply_norm, make_norm
from model.products import linear


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
            x = F.relu_(apply_norm(norm, convolution(x), valid))
        # The transposed convolution makes 2 x 2 cells of every cell, each by a matrix of its own, so it is one product.
        # Of the 1x1 convolution to num_classes maps the one that is wanted: a product with the class's own weights.
        # Only its one number a cell is put in the order of an image, not all channels.
        assert self.upsampling.bias is not None
        assert self.mask_logits.bias is not None
        height, width = x.shape[2:]
        cells = x.permute(0, 2, 3, 1).flatten(1, 2)  # (N, height * width, channels)
        matrices = self.upsampling.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (2 * 2 * channels, channels)
        finer = F.relu_(linear(cells, matrices, self.upsampling.bias.repeat(4)))
        finer = finer.reshape(cells.shape[0], 4 * height * width, self.upsampling.out_channels)
        weight, bias = self.mask_logits.weight.flatten(1)[classes], self.mask_logits.bias[classes]
        logits = torch.bmm(finer, weight[:, :, None])[:, :, 0] + bias[:, None]
        logits = logits.reshape(-1, height, width, 2, 2).permute(0, 1, 3, 2, 4)
        return logits.reshape(-1, 2 * height, 2 * width).float()
