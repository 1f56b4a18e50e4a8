"""Where an image lies on its canvas, and what the network sees of it.

Batches hold images in the top left corner; the original has them in the centre, to where they are moved here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from model.config import ModelConfig
from model.constants import constant

Position = Literal["top_left", "centre"]


def image_windows(image_sizes: Tensor, canvas: tuple[int, int], position: Position) -> Tensor:
    """Part of the canvas that each image covers: (B, 4) float32 xyxy in input pixels.

    In the centre, an odd pixel of padding goes to the right or below.

    Args:
        image_sizes: (B, 2) height and width of the images, input pixels.
        canvas: rows and columns.
        position: see `ModelConfig.image_position`.
    """
    size = image_sizes.flip(-1).float()  # width, height
    offset = torch.zeros_like(size)
    if position == "centre":
        offset = torch.floor((constant((canvas[1], canvas[0]), size.device) - size) / 2)
    return torch.cat([offset, offset + size], dim=1)


def move_to_windows(images: Tensor, windows: Tensor) -> Tensor:
    """Images (B, C, H, W) from the top left corner, zero elsewhere, to their windows (B, 4)."""
    height, width = images.shape[2:]
    left, top = windows[:, :2].long().unbind(dim=1)  # (B,)
    row = (torch.arange(height, device=images.device) - top[:, None]) % height  # (B, H); what comes round is zero
    column = (torch.arange(width, device=images.device) - left[:, None]) % width
    image = torch.arange(images.shape[0], device=images.device)
    return images.permute(0, 2, 3, 1)[image[:, None, None], row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: Tensor, windows: Tensor, config: ModelConfig) -> Tensor:
    """(B, 3, H, W) uint8 RGB to float32 as the backbone wants it, channels last.

    Args:
        images: zero outside their windows.
        windows: (B, 4) xyxy in input pixels.
        config: mean, standard deviation, padding.
    """
    mean = constant([255.0 * value for value in config.pixel_mean], images.device)[:, None, None]
    std = constant([255.0 * value for value in config.pixel_std], images.device)[:, None, None]
    x = (images.float() - mean) / std
    if config.padding == "mean":
        left, top, right, bottom = windows[:, :, None].unbind(dim=1)  # (B, 1)
        row = torch.arange(images.shape[2], device=images.device)
        column = torch.arange(images.shape[3], device=images.device)
        x = x * ((row >= top) & (row < bottom))[:, None, :, None] * ((column >= left) & (column < right))[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)
