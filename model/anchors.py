"""Anchors: the boxes that the RPN starts from (Mask R-CNN section 3.1, FPN section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import AnchorConfig


def level_anchors(
    scales: Sequence[float],
    ratios: Sequence[float],
    feature_size: tuple[int, int],
    stride: tuple[float, float],
    anchor_stride: int,
    rounded: bool = False,
) -> Tensor:
    """Anchors of one pyramid level.

    Args:
        scales: square roots of anchor areas, input pixels.
        ratios: width / height.
        feature_size: height and width of the level in feature cells.
        stride: input pixels a feature cell, down and across.
        anchor_stride: anchors stand on every how-many-th cell.
        rounded: round the corners about the centre to whole pixels.

    Returns:
        (rows * columns * ratios * scales, 4) float32 xyxy in input pixels, in this order (scales vary fastest),
        not clipped. Centres lie at cell index * stride, as in the original.
    """
    ratio = torch.tensor(ratios, dtype=torch.float64).repeat_interleave(len(scales))
    scale = torch.tensor(scales, dtype=torch.float64).repeat(len(ratios))
    width, height = scale * ratio.sqrt(), scale / ratio.sqrt()
    shapes = torch.stack([-width, -height, width, height], dim=1) / 2  # (K, 4)
    if rounded:
        shapes = shapes.round()
    y = torch.arange(0, feature_size[0], anchor_stride, dtype=torch.float64) * stride[0]
    x = torch.arange(0, feature_size[1], anchor_stride, dtype=torch.float64) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
    return (centres + shapes).reshape(-1, 4).float()


def pyramid_anchors(
    config: AnchorConfig, feature_sizes: Sequence[tuple[int, int]], canvas: tuple[int, int]
) -> list[Tensor]:
    """Anchors of P2..P6, each (A, 4) float32 xyxy in input pixels.

    A 512 px square with the default configuration has (128^2 + 64^2 + 32^2 + 16^2 + 8^2) * 3 = 65,472 in all.

    Args:
        config: scales, ratios, stride.
        feature_sizes: rows and columns of the levels.
        canvas: rows and columns of the images.
    """
    levels = []
    for level, (scale, size) in enumerate(zip(config.scales, feature_sizes, strict=True)):
        stride = (4.0 * 2**level, 4.0 * 2**level)
        if config.rounded:  # on P6 of a canvas that 64 does not divide, this is not 64
            stride = (float(canvas[0] // size[0]), float(canvas[1] // size[1]))
        levels.append(level_anchors([scale], config.ratios, size, stride, config.anchor_stride, config.rounded))
    return levels
