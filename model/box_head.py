"""Box head: class and box of a region (Mask R-CNN, figure 4; the original's `fpn_classifier_graph`)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import BoxHeadConfig, NormConfig
from model.norm import apply_norm, make_norm
from model.products import Linear, linear


class BoxHead(nn.Module):
    """Convolutions with norm and ReLU, fully connected layers with ReLU, then class logits and per-class deltas."""

    def __init__(self, in_channels: int, num_classes: int, config: BoxHeadConfig, norms: NormConfig) -> None:
        super().__init__()
        size, width = config.pool_size, config.channels
        self.num_classes = num_classes
        # (in, out, kernel size) of the convolutions and (in, out) of the fully connected layers.
        convolutions: list[tuple[int, int, int]] = []
        fully_connected: list[tuple[int, int]] = []
        if config.kind == "conv7x7":  # 'valid' convolutions: the first one sees the whole region
            convolutions = [(in_channels, width, size), (width, width, 1)]
        elif config.kind == "fc2":
            fully_connected = [(in_channels * size * size, width), (width, width)]
        else:
            inner = config.convolution_channels
            convolutions = [(in_channels, inner, 3)] + [(inner, inner, 3)] * 3
            fully_connected = [(inner * size * size, width)]
        has_bias = config.norm == "none" or norms.convolution_bias
        padding = 1 if config.kind == "conv4fc1" else 0
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(a, b, kernel, padding=padding, bias=has_bias) for a, b, kernel in convolutions]
        )
        self.norms = nn.ModuleList([make_norm(config.norm, b, norms.epsilon) for _, b, _ in convolutions])
        # The first one takes its columns as `_flatten` gives them.
        self.fully_connected = nn.ModuleList([Linear(a, b) for a, b in fully_connected])
        self.class_logits = Linear(width, num_classes)
        self.box_deltas = Linear(width, 4 * num_classes)
        for layer in (*self.convolutions, *self.fully_connected):
            nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
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
        x = regions
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu_(apply_norm(norm, _convolve(convolution, x), valid))
        x = _flatten(x)
        for layer in self.fully_connected:
            x = F.relu_(layer(x))
        deltas: Tensor = self.box_deltas(x)
        logits: Tensor = self.class_logits(x)
        return logits.float(), deltas.float().reshape(-1, self.num_classes, 4)


def _convolve(convolution: nn.Module, x: Tensor) -> Tensor:
    """A convolution whose kernel covers its whole input is one matrix product, which runs several times faster."""
    assert isinstance(convolution, nn.Conv2d)
    if convolution.kernel_size != tuple(x.shape[2:]) or convolution.padding != (0, 0):
        y: Tensor = convolution(x)
        return y
    return linear(_flatten(x), _flatten(convolution.weight), convolution.bias)[:, :, None, None]


def _flatten(regions: Tensor) -> Tensor:
    """(N, channels, rows, columns) to (N, rows * columns * channels): as channels-last features lie in memory.

    Channels first, as is usual, would transpose every region in every step, and its gradient on the way back. Regions
    of torchvision's operator do not lie so and are transposed.
    """
    return regions.permute(0, 2, 3, 1).flatten(1)


def flat_columns(weight: Tensor, pool_size: int) -> Tensor:
    """Weight (out, channels * rows * columns) of a first layer from elsewhere, its columns as `_flatten` has them."""
    return _flatten(weight.reshape(weight.shape[0], -1, pool_size, pool_size))
