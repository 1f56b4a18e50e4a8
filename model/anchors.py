"""Anchors: the boxes that the RPN starts from (Mask R-CNN section 3.1, FPN section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import AnchorConfig


def level_anchors(
    scales: Sequence[float], ratios: Sequence[float], feature_size: tuple[int, int], stride: float, anchor_stride: int
) -> Tensor:
    """Anchors of one pyramid level.

    Args:
        scales: square roots of anchor areas, input pixels.
        ratios: width / height.
        feature_size: height and width of the level in feature cells.
        stride: input pixels a feature cell.
        anchor_stride: anchors stand on every how-many-th cell.

    Returns:
        (rows * columns * ratios * scales, 4) float32 xyxy in input pixels, in this order (scales vary fastest),
        not clipped. Centres lie at cell index * stride, as in the original.
    """
    ratio = torch.tensor(ratios, dtype=torch.float64).repeat_interleave(len(scales))
    scale = torch.tensor(scales, dtype=torch.float64).repeat(len(ratios))
    width, height = scale * ratio.sqrt(), scale / ratio.sqrt()
    shapes = torch.stack([-width, -height, width, height], dim=1) / 2  # (K, 4)
    y = torch.arange(0, feature_size[0], anchor_stride, dtype=torch.float64) * stride
    x = torch.arange(0, feature_size[1], anchor_stride, dtype=torch.float64) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (centres + shapes).reshape(-1, 4).float()


def pyramid_anchors(config: AnchorConfig, feature_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Anchors of P2..P6 one after the other: (A, 4) float32 xyxy in input pixels.

    A 512 px square with the default configuration has (128^2 + 64^2 + 32^2 + 16^2 + 8^2) * 3 = 65,472.
    """
    levels = [
        level_anchors([scale], config.ratios, size, stride=4.0 * 2**level, anchor_stride=config.anchor_stride)
        for level, (scale, size) in enumerate(zip(config.scales, feature_sizes, strict=True))
    ]
    return torch.cat(levels)
