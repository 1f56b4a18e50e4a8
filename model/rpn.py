"""Region proposal network (Ren et al. 2015, section 3.1): objectness and box deltas for every anchor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cell_matrix import CellMatrix
from model.config import RpnConfig
from model.products import linear


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
                hidden = F.relu_(convolution(hidden))
            logits.append(_by_anchor(self.class_logits(hidden), self.logits_per_anchor))
            deltas.append(_by_anchor(self.box_deltas(hidden), 4))
        class_logits = torch.cat(logits, dim=1)
        if self.logits_per_anchor == 1:
            class_logits = torch.cat([torch.zeros_like(class_logits), class_logits], dim=2)
        return class_logits, torch.cat(deltas, dim=1)

    def can_sample(self, matrix: CellMatrix, index: Tensor) -> bool:
        """Whether `at_anchors` saves work: on a CPU, with one convolution, when most outputs are left out.

        A GPU was not measured.
        """
        convolution = self.shared[0]
        assert isinstance(convolution, nn.Conv2d)
        outputs = sum(rows * columns for rows, columns in _output_sizes(matrix, convolution.stride[0]))
        return index.device.type == "cpu" and len(self.shared) == 1 and 2 * index.shape[1] <= outputs

    def at_anchors(self, matrix: CellMatrix, index: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` gives for some anchors, from the 3 x 3 cells around each.

        A loss of a few anchors has a gradient that is zero nearly everywhere, and going back through the convolution
        over the whole pyramid would multiply those zeros: a tenth of a training step.

        Args:
            matrix: of P2..P6.
            index: (B, S) int64 rows of `pyramid_anchors`.

        Returns:
            (B, S, 2) float32 logits and (B, S, 4) float32 deltas.
        """
        (convolution,) = self.shared
        assert isinstance(convolution, nn.Conv2d)
        anchors_per_cell = self.box_deltas.out_channels // 4
        rows, inside = _neighbourhoods(matrix, index // anchors_per_cell, convolution.stride[0])
        around = matrix.cells.index_select(0, rows.flatten()) * inside.reshape(-1, 1)
        around = around.reshape(*index.shape, -1)  # (B, S, 9 * channels)
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        hidden = F.relu_(linear(around, weight, convolution.bias))
        ratio = (index % anchors_per_cell)[..., None, None]
        logits, deltas = (
            F.linear(hidden, layer.weight.flatten(1), layer.bias)
            .reshape(*index.shape, anchors_per_cell, -1)
            .gather(2, ratio.expand(-1, -1, 1, layer.out_channels // anchors_per_cell))[:, :, 0]
            .float()
            for layer in (self.class_logits, self.box_deltas)
        )
        if self.logits_per_anchor == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], dim=2)
        return logits, deltas


def _by_anchor(x: Tensor, numbers: int) -> Tensor:
    """(B, anchors * numbers, h, w) to (B, h * w * anchors, numbers) float32."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, numbers).float()


def _output_sizes(matrix: CellMatrix, stride: int) -> list[tuple[int, int]]:
    """Rows and columns that a 3 x 3 convolution with padding 1 makes of each level."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for height, width in matrix.sizes]


def _neighbourhoods(matrix: CellMatrix, output: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """What a 3 x 3 convolution with padding 1 reads for some of its outputs.

    Args:
        matrix: its input.
        output: (B, S) int64 in the order level, row, column of what it gives for an image.
        stride: of the convolution.

    Returns:
        (B, S, 9) rows of the matrix, and whether each is a cell and not padding.
    """
    outputs = torch.tensor(_output_sizes(matrix, stride), device=output.device)  # (levels, 2)
    counts = outputs.prod(dim=1)
    ends = counts.cumsum(0)
    level = torch.bucketize(output, ends, right=True)
    place = output - (ends - counts)[level]
    columns, height, width = outputs[level, 1], matrix.heights()[level], matrix.widths()[level]
    around = torch.arange(-1, 2, device=output.device)
    row = (place // columns * stride)[..., None, None] + around[:, None]  # (B, S, 3, 1)
    column = (place % columns * stride)[..., None, None] + around  # (B, S, 1, 3)
    height, width = height[..., None, None], width[..., None, None]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    image = torch.arange(matrix.num_images, device=output.device)[:, None, None, None]
    first = matrix.first_cells()[level][..., None, None] + image * height * width
    rows = torch.where(inside, first + row * width + column, 0)
    return rows.flatten(2), inside.flatten(2)
